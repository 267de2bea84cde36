"""Stacks of GeoTIFFs on one grid, read window by window as samples; see `tools.embed`."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from olmoearth_jax import Sample, modalities
from olmoearth_jax.inference.cog import raster_library
from olmoearth_jax.inference.dates import parse_dates
from olmoearth_jax.inference.domain import Crop
from olmoearth_jax.modalities import closest

FIELDS = ("path", "date", "modality", "bands")
_OVERVIEW = 256  # pixels per side that the units are judged by


@dataclasses.dataclass
class Raster:
    """One file of a stack: an image of one modality and date; `bands` in the file's order."""

    path: str
    date: str = ""
    modality: str = ""
    bands: Sequence[str] = ()
    file: Any = None

    @property
    def factor(self) -> int:
        """Pixels per pixel of 10 m and side."""
        return modalities.get(self.modality).image_factor


def read_manifest(path: Path) -> list[Raster]:
    """The rasters of a JSON or CSV manifest; relative paths start at its folder.

    Raises:
      ValueError: it cannot be read, or holds other members.
    """
    try:
        if path.suffix == ".json":
            rows = json.loads(path.read_text())
        else:
            with path.open(newline="") as file:
                rows = list(csv.DictReader(file))
    except (OSError, ValueError) as e:
        raise ValueError(f"the manifest {path} cannot be read: {e}") from None
    if not isinstance(rows, list) or not all(isinstance(r, dict) and r.get("path") for r in rows):
        raise ValueError(f"the manifest {path} must list rasters, each with a 'path'")
    out = []
    for row in rows:
        for key in row:
            if key not in FIELDS:
                raise ValueError(f"{path}: unknown member {key!r}; {closest(str(key), FIELDS)}")
        known = {k: v for k, v in row.items() if v}
        if isinstance(known.get("bands"), str):
            known["bands"] = known["bands"].split()
        out.append(Raster(**known | {"path": str(path.parent / known["path"])}))
    return out


def scaled(transform: Any, factor: float) -> Any:
    """The affine map of a grid whose pixels are `factor` times as large."""
    t = transform
    return type(t)(t.a * factor, t.b * factor, t.c, t.d * factor, t.e * factor, t.f)


class Stack:
    """Open rasters of one grid; a context manager.

    Attributes:
      names: the modalities.
      dates: the distinct dates, ascending, as they were given.
      shape: (H, W) in pixels of 10 m.
      crs, transform: of that grid, as rasterio has them.
    """

    def __init__(self, rasters: list[Raster], any_pixel_size: bool = False):
        if not rasters:
            raise ValueError("there are no rasters to embed")
        self._rasters = rasters
        library = raster_library()
        for raster in rasters:
            try:
                raster.file = library.open(raster.path)
            except library.errors.RasterioIOError as e:
                raise ValueError(f"{raster.path} cannot be read as a raster: {e}") from None
            _name_bands(raster)
        self.names = modalities.in_sample_order({r.modality for r in rasters})
        self.dates = self._dates()
        self._check_grid(any_pixel_size)

    def __enter__(self) -> Stack:
        return self

    def __exit__(self, *_: Any) -> None:
        for raster in self._rasters:
            raster.file.close()

    @property
    def iso_dates(self) -> list[str]:
        """The dates as yyyy-mm-dd."""
        stamps = parse_dates(self.dates) if self.dates else []
        return [f"{year}-{month + 1:02d}-{day:02d}" for day, month, year in stamps]

    def _dates(self) -> list[str]:
        out = set()
        for raster in self._rasters:
            if not modalities.get(raster.modality).multitemporal:
                continue
            if not raster.date:
                raise ValueError(
                    f"{raster.path} has no date: give --dates=YYYY-MM-DD, one per raster, or a "
                    "'date' in the manifest"
                )
            out.add(raster.date)
        return sorted(out, key=lambda d: tuple(parse_dates([d])[0][::-1]))

    def _check_grid(self, any_pixel_size: bool) -> None:
        first = self._rasters[0]
        self.crs, factor = first.file.crs, first.factor
        self.transform = scaled(first.file.transform, factor)
        self.shape = first.file.height // factor, first.file.width // factor
        if self.crs is None:
            raise ValueError(f"{first.path} has no coordinate reference system")
        if self.transform.b or self.transform.d:
            raise ValueError(f"{first.path} is rotated; warp it to a north-up grid")
        for raster in self._rasters:
            file, scale = raster.file, raster.factor
            own = scaled(file.transform, scale)
            shape = file.height // scale, file.width // scale
            same = file.crs == self.crs and shape == self.shape
            if not same or not own.almost_equals(self.transform, 1e-3):
                raise ValueError(
                    f"{raster.path} and {first.path} lie on different grids ({file.crs}, "
                    f"{file.height} x {file.width}): warp them to one, for example with gdalwarp"
                )
        size = abs(self.transform.a)
        metres = self.crs.linear_units_factor[1] if self.crs.is_projected else 0
        if not any_pixel_size and not 9 <= size * metres <= 11:
            unit = f"{size * metres:.3g} m" if metres else f"{size:.3g} degrees"
            raise ValueError(
                f"the pixels of {first.path} have {unit}, but the models were trained on 10 m: "
                "warp it to a UTM grid of 10 m, or pass --any_pixel_size"
            )

    def read(
        self, rows: Crop, cols: Crop, nan_pixels: str = "mask", overview: int | None = None
    ) -> Sample:
        """The sample of a window, in pixels of 10 m; units are not checked.

        With `overview` the window is read thinned out to at most so many pixels per side.
        """
        height, width = rows.stop - rows.start, cols.stop - cols.start
        if overview:
            height, width = min(height, overview), min(width, overview)
        library, arrays, bands = raster_library(), {}, {}
        for name in self.names:
            modality = modalities.get(name)
            steps = len(self.dates) if modality.multitemporal else 1
            f = modality.image_factor
            used = dict.fromkeys(b for r in self._rasters if r.modality == name for b in r.bands)
            bands[name] = list(used)
            out = np.full((height * f, width * f, steps, len(used)), np.nan, np.float32)
            for raster in (r for r in self._rasters if r.modality == name):
                window = library.windows.Window(
                    cols.start * f, rows.start * f, (cols.stop - cols.start) * f,
                    (rows.stop - rows.start) * f,
                )  # fmt: skip
                x = raster.file.read(
                    window=window, out_shape=(raster.file.count, *out.shape[:2]), masked=True
                )
                step = self.dates.index(raster.date) if modality.multitemporal else 0
                where = [bands[name].index(b) for b in raster.bands]
                out[:, :, step, where] = np.moveaxis(x.astype(np.float32).filled(np.nan), 0, -1)
            arrays[name] = out
        return Sample.from_arrays(
            arrays, self.dates or None, bands=bands, nan_pixels=nan_pixels,
            check_units=overview is not None,
        )  # fmt: skip

    def check_values(self) -> None:
        """Looks at the values of the whole area, thinned out.

        Raises:
          ValueError: see `Sample.from_arrays`.
        """
        height, width = self.shape
        self.read(Crop(0, height, 0, height), Crop(0, width, 0, width), "mask", _OVERVIEW)


def _name_bands(raster: Raster) -> None:
    """Fills in the names of a raster's bands and its modality.

    Raises:
      ValueError: they are not said anywhere, or do not fit the file.
    """
    count, given = raster.file.count, list(raster.bands)
    found = given or [d.strip() for d in raster.file.descriptions if d]
    if raster.modality:
        modality = modalities.get(raster.modality)
        if not found and count == modality.num_bands == 1:
            found = list(modality.bands)
    if len(found) != count:
        raise ValueError(
            f"{raster.path} has {count} bands, of which {len(found)} are named: give their names "
            "with --bands, in the manifest, or as band descriptions of the file"
        )
    if not raster.modality:
        lower = {b.lower() for b in found}
        fits = [
            n for n in modalities.names() if lower <= {b.lower() for b in modalities.get(n).bands}
        ]
        if len(fits) != 1:
            known = ", ".join(fits) or "none has all of them"
            raise ValueError(
                f"the modality of {raster.path} is not clear from its bands {', '.join(found)} "
                f"({known}): give --modality or name it in the manifest"
            )
        raster.modality = fits[0]
    modality = modalities.get(raster.modality)
    raster.modality = modality.name
    canonical = {b.lower(): b for b in modality.bands}
    for band in found:
        if band.lower() not in canonical:
            raise ValueError(
                f"{raster.path}: unknown band {band!r} of {modality.name}; "
                f"{closest(band, modality.bands)}"
            )
    raster.bands = [canonical[b.lower()] for b in found]
