"""Reading embedding archives: points, boxes and whole zones, as numbers or as stored."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from olmoearth_jax.data.crs import transform_points
from olmoearth_jax.inference.quantize import Rule, restore
from olmoearth_jax.maps import conventions, store_form
from olmoearth_jax.maps.archive_zone import Zone, read_plan
from olmoearth_jax.maps.lattice import LONLAT, on_earth, pixel_of, zone_bounds, zone_of
from olmoearth_jax.maps.store import NAME, NOT_PROCESSED, zarr_library

NEAR_BOUNDARY = 0.5
"""Degrees from the boundary of a zone within which its neighbour is asked too."""


@dataclasses.dataclass(frozen=True)
class Map:
    """A part of one zone.

    Attributes:
      values: float32 [H, W, d], NaN where there is no embedding.
      valid: bool [H, W].
      transform: as rasterio has it.
      crs: such as 'EPSG:32633'.
    """

    values: np.ndarray
    valid: np.ndarray
    transform: Any
    crs: str


class Archive:
    """An open archive; see `open_archive`.

    Attributes:
      zones: numbers of the UTM zones.
      periods: years, or names such as '2023-04_2024-03'.
      dimensions: D.
      widths: Matryoshka widths that embeddings can be cut to, descending.
      attrs: attributes of the root group.
      rule: how values are stored.
      path: of the store.
    """

    def __init__(self, group: Any, path: str):
        self.path, self._group, self.attrs = path, group, dict(group.attrs)
        version = self.attrs.get("olmoearth:store_version", 1)
        if "geoemb:type" not in self.attrs:
            raise ValueError(f"{path} is no archive of embeddings: it has no geoemb attributes")
        if not isinstance(version, int) or not 1 <= version <= conventions.STORE_VERSION:
            raise ValueError(
                f"{path} has store version {version}; this software reads up to "
                f"{conventions.STORE_VERSION}: update it"
            )
        self.rule: Rule = conventions.rule_of(self.attrs)
        self.dimensions, self.widths = store_form.dimensions_of(self.attrs, path)
        names = store_form.zone_names(group.group_keys())
        if not names:
            raise ValueError(f"{path} holds no UTM zones")
        self.zones = [int(name[3:]) for name in names]
        spans = store_form.periods_of({name: group[name] for name in names}, path)
        self.periods: list[Any] = [_period_name(*s) if isinstance(s, tuple) else s for s in spans]
        self._zones: dict[int, Zone] = {}
        self._plan = None if "://" in path else read_plan(Path(path).parent / "job" / "plan.jsonl")

    def __repr__(self) -> str:
        zones = ", ".join(map(str, self.zones))
        periods = ", ".join(map(str, self.periods))
        return (
            f"<Archive {self.path}: UTM zone{'s' * (len(self.zones) > 1)} {zones}; {periods}; "
            f"{self.dimensions} values of {self.rule.dtype} per place>"
        )

    def zone(self, number: int) -> Zone:
        """The arrays of a zone.

        Raises:
          ValueError: it is not in the archive, or its metadata make no sense.
        """
        if number not in self.zones:
            raise ValueError(f"zone {number} is not in the archive; there are {self.zones}")
        if number not in self._zones:
            group, where = self._group[f"utm{number:02d}"], f"{self.path}/utm{number:02d}"
            transform = store_form.transform_of(group.attrs, number, where)
            arrays = store_form.arrays_of(
                group, where, transform, self.rule, self.dimensions, len(self.periods)
            )
            self._zones[number] = Zone(number, transform, *arrays).with_plan(self._plan)
        return self._zones[number]

    def step_of(self, period: Any) -> int:
        """Place of a period on the time axis.

        Raises:
          ValueError: it is not in the archive.
        """
        for step, held in enumerate(self.periods):
            if str(held) == str(period).replace("/", "_"):
                return step
        raise ValueError(
            f"the period {period} is not in the archive; there are "
            f"{', '.join(map(str, self.periods))}"
        )

    def width_of(self, width: int | None) -> int:
        """The number of bands to read.

        Raises:
          ValueError: more than there are, or less than one.
        """
        if width is None:
            return self.dimensions
        if not 1 <= width <= self.dimensions:
            raise ValueError(f"the embeddings have {self.dimensions} dimensions, not {width}")
        return width

    def window(
        self, zone: Zone, step: int, rows: slice, cols: slice, width: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(values float32 [h, w, d] with NaN, valid bool [h, w]) of a window of a zone.

        The values cannot be written to where there is no embedding at all.
        """
        q, scales, coverage = self.stored(zone, step, rows, cols, width)
        valid = _processed(coverage)
        if not valid.any():
            return np.broadcast_to(np.float32(np.nan), q.shape), valid
        values = restore(q, self.rule, scales)
        valid &= np.isfinite(values[..., 0])
        if not valid.all():
            values[~valid] = np.nan
        return values, valid

    def stored(
        self, zone: Zone, step: int, rows: slice, cols: slice, width: int | None = None
    ) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
        """(values [h, w, d] as stored, scales [h, w] or None, coverage [h, w]) of a window.

        Where there is no embedding at all, nothing but coverage is read: arrays that span a whole
        zone are mostly empty. The others cannot be written to then.
        """
        d = self.width_of(width)
        with _no_coalescing():
            # Coverage first: what it calls done has its embeddings already.
            coverage = np.asarray(zone.coverage[step, rows, cols])
            if not _processed(coverage).any():
                fill = np.array(self.rule.fill, self.rule.dtype)
                scales = None
                if zone.scales is not None:
                    scales = np.broadcast_to(np.float32(np.inf), coverage.shape)
                return np.broadcast_to(fill, (*coverage.shape, d)), scales, coverage
            q = np.moveaxis(np.asarray(zone.embeddings[step, :d, rows, cols]), 0, -1)
            scales = None if zone.scales is None else np.asarray(zone.scales[step, rows, cols])
        return q, scales, coverage

    def read(
        self, bbox: Sequence[float], period: Any = None, width: int | None = None, crs: Any = None
    ) -> list[Map]:
        """Embeddings of a box, on the native grid of each zone that it touches.

        Args:
          bbox: west, south, east, north in degrees.
          period: may be left out if there is one.
          width: the first bands only.
          crs: of one map of everything instead, resampled (nearest); whatever rasterio takes.

        Raises:
          ValueError: a period or width that the archive has not, a box outside of it, or an
            unknown CRS.
        """
        from rasterio.transform import Affine

        step, out, windows = self._only_step(period), [], self.windows(bbox)
        if crs is not None:
            from olmoearth_jax.maps import regrid

            values, valid, t = regrid.read(self, windows, bbox, self.periods[step], width, crs)
            return [Map(values, valid, Affine(*t), str(crs))]
        for zone, rows, cols in windows:
            values, valid = self.window(zone, step, rows, cols, width)
            values = values if values.flags.writeable else values.copy()
            out.append(Map(values, valid, Affine(*zone.place(rows, cols)), zone.crs))
        return out

    def _only_step(self, period: Any) -> int:
        if period is None:
            if len(self.periods) > 1:
                raise ValueError(f"name one of the periods {', '.join(map(str, self.periods))}")
            return 0
        return self.step_of(period)

    def windows(self, bbox: Sequence[float]) -> list[tuple[Zone, slice, slice]]:
        """Where a box of degrees lies in the zones.

        Raises:
          ValueError: it is none, or lies outside of the archive.
        """
        from olmoearth_jax.maps import area

        if len(bbox) != 4:
            raise ValueError(f"a box is west, south, east, north in degrees, not {bbox}")
        west, south, east, north = (float(v) for v in bbox)
        if not (-180 <= west < east <= 180 and -90 <= south < north <= 90):
            raise ValueError(
                f"a box is west, south, east, north in degrees, not {west:g}, {south:g}, "
                f"{east:g}, {north:g}"
            )
        out = []
        for number in self.zones:
            first, last = zone_bounds(number)
            if not (west < last and first < east):
                continue
            part = area.of_box((max(west, first), south, min(east, last), north))
            zone, shape = self.zone(number), area.by_zone(part)[number]
            left, bottom, right, top = shape.bounds
            (row, col), (last_row, last_col) = (
                pixel_of(zone.transform, x, y)
                for x, y in ((left, top), (np.nextafter(right, left), np.nextafter(bottom, top)))
            )
            rows = slice(max(int(row), 0), min(int(last_row) + 1, zone.shape[0]))
            cols = slice(max(int(col), 0), min(int(last_col) + 1, zone.shape[1]))
            if rows.start < rows.stop and cols.start < cols.stop:
                out.append((zone, rows, cols))
        if not out:
            raise ValueError(f"the box {west:g}, {south:g}, {east:g}, {north:g} lies outside of "
                             f"the archive, which reaches over {self.bounds()}")  # fmt: skip
        return out

    def bounds(self) -> str:
        """West, south, east, north in degrees of everything, as text."""
        corners = []
        for number in self.zones:
            zone = self.zone(number)
            rows, cols = zone.span
            a, _, c, _, e, f = zone.place(rows, cols)
            right, bottom = c + a * (cols.stop - cols.start), f + e * (rows.stop - rows.start)
            xs, ys = [c, right] * 2, [f, f, bottom, bottom]
            corners.append(np.stack(transform_points(zone.crs, LONLAT, xs, ys)))
        every = np.concatenate(corners, axis=1)
        low, high = every.min(1), every.max(1)
        return f"{low[0]:.4f}, {low[1]:.4f}, {high[0]:.4f}, {high[1]:.4f}"

    def points(
        self, lonlat: Any, periods: Any = None, width: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Embeddings at points.

        Args:
          lonlat: float [N, 2] in degrees.
          periods: several, or one; default all.
          width: the first bands only.

        Returns:
          (float32 [N, P, d], NaN where there is none; bool [N, P]).

        Raises:
          ValueError: another shape, or a period or width that the archive has not.
        """
        values, valid, _ = self.locate(lonlat, periods, width)
        return values, valid

    def locate(
        self, lonlat: Any, periods: Any = None, width: int | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """As `points`, and int [N, 3]: the zone, row and column that answer, -1 where none does."""
        lonlat = np.asarray(lonlat, np.float64)
        if lonlat.ndim != 2 or lonlat.shape[1] != 2:
            raise ValueError(f"points are [N, 2] of longitude and latitude, not {lonlat.shape}")
        periods = self.periods if periods is None else periods
        if np.ndim(periods) == 0:
            periods = [periods]
        steps = [self.step_of(p) for p in periods]
        count, d = len(lonlat), self.width_of(width)
        values = np.full((count, len(steps), d), np.nan, np.float32)
        valid = np.zeros((count, len(steps)), bool)
        places = np.full((count, 3), -1)
        there = on_earth(lonlat)
        lon = np.where(there, lonlat[:, 0], 0.0)
        own = np.atleast_1d(zone_of(lon)) if count else np.zeros(0, int)
        west = np.mod(lon + 180, 6) <= NEAR_BOUNDARY
        east = np.mod(lon + 180, 6) >= 6 - NEAR_BOUNDARY
        near = np.where(west, (own - 2) % 60 + 1, np.where(east, own % 60 + 1, -1))
        for zones in (own, near):
            for number in np.unique(zones):
                if number not in self.zones:
                    continue
                rest = np.flatnonzero((zones == number) & there & ~valid.any(1))
                self._look_up(int(number), rest, lonlat, steps, values, valid, places)
        return values, valid, places

    def _look_up(
        self, number: int, chosen: np.ndarray, lonlat: np.ndarray, steps: Sequence[int],
        values: np.ndarray, valid: np.ndarray, places: np.ndarray,
    ) -> None:  # fmt: skip
        """Fills in what a zone says of some points, chunk by chunk."""
        if not len(chosen):
            return
        zone, d = self.zone(number), values.shape[-1]
        xs, ys = transform_points(LONLAT, zone.crs, *lonlat[chosen].T.tolist())
        rows, cols = pixel_of(zone.transform, xs, ys)
        inside = (rows >= 0) & (rows < zone.shape[0]) & (cols >= 0) & (cols < zone.shape[1])
        chosen, rows, cols = chosen[inside], rows[inside], cols[inside]
        places[chosen] = np.stack([np.full(len(rows), number), rows, cols], 1)
        side = zone.coverage.chunks[-1]
        blocks: dict[tuple[int, int], list[int]] = {}
        for k, (row, col) in enumerate(zip(rows // side, cols // side, strict=True)):
            blocks.setdefault((int(row), int(col)), []).append(k)
        for (row, col), members in blocks.items():
            span = tuple(slice(at * side, (at + 1) * side) for at in (row, col))
            r, c = rows[members] - row * side, cols[members] - col * side
            for p, step in enumerate(steps):
                x, seen = self.window(zone, step, span[0], span[1], d)
                values[chosen[members], p] = x[r, c]
                valid[chosen[members], p] = seen[r, c]

    def search(
        self, point: Any, period: Any = None, top: int = 100, width: int | None = None
    ) -> list[dict[str, Any]]:
        """The places most like one or several points (lon, lat), best first.

        Returns:
          lon, lat, score (cosine), zone, row and col of each.

        Raises:
          ValueError: no embedding there, or a period or width that the archive has not.
        """
        from olmoearth_jax.maps import similar

        when = self.periods[self._only_step(period)]
        query = similar.query_of_points(self, point, when, width)
        return similar.search(self, query, when, top)

    def dataset(self, zone: int) -> Any:
        """A zone as an xarray Dataset, values as stored and read when they are used.

        Raises:
          ValueError: xarray is missing, or there is no such zone.
        """
        self.zone(zone)
        return xarray_library().open_zarr(
            self.path, group=f"utm{zone:02d}", consolidated=False, mask_and_scale=False,
            decode_coords="all", chunks=None,
        )  # fmt: skip


def open_archive(path: str | Path) -> Archive:
    """Opens an archive for reading.

    Args:
      path: folder of an archive, its .zarr store, or the URL of one.

    Raises:
      ValueError: there is none, it is of a newer version, or a package is missing.
    """
    text = str(path).rstrip("/")
    if "://" not in text:
        folder = Path(text).expanduser()
        text = str(folder if (folder / "zarr.json").is_file() else folder / NAME)
        if not (Path(text) / "zarr.json").is_file():
            raise ValueError(f"{folder} is no archive: it holds no {NAME}")
    elif not text.endswith(".zarr"):
        text = f"{text}/{NAME}"
    zarr = zarr_library()
    try:
        group = zarr.open_group(text, mode="r", zarr_format=3)
    except Exception as e:  # zarr's errors about metadata are of many types
        raise ValueError(f"{text} cannot be read as an archive: {e}") from None
    return Archive(group, text)


def dequantize(dataset: Any) -> Any:
    """Embeddings float32 of a dataset as stored (`Archive.dataset`), NaN where there are none.

    Args:
      dataset: an xarray Dataset with `embeddings` and the attributes of its store.

    Returns:
      an xarray DataArray of the dims of `embeddings`; lazy if they are.

    Raises:
      ValueError: the attributes name no known rule, or arrays are missing.
    """
    rule = conventions.rule_of(dataset.attrs)
    scales = conventions.scales_of(dataset.attrs)
    wanted = ["embeddings", *([scales] if rule.method == "per_pixel_scale" else [])]
    if lacking := [name for name in wanted if name not in dataset]:
        raise ValueError(f"the dataset holds no {lacking[0]!r}, which its attributes speak of")
    q = dataset["embeddings"]
    if rule.dtype != "int8" and q.dtype.kind != "f":
        raise ValueError(f"the embeddings are {q.dtype}, but their attributes say {rule.dtype}")
    x = q.astype("float32")
    if rule.method == "signed_power":
        x = np.sign(x) * (x / np.float32(127.5)) ** 2
    elif rule.method == "per_pixel_scale":
        s = dataset[scales]
        x = (x * s.where((q.isel(band=0) != -128) & np.isfinite(s))).transpose(*q.dims)
    elif rule.method == "linear":
        x = x * np.float32(rule.scale) + np.float32(rule.offset)
    if rule.dtype == "int8":
        x = x.where(q != -128)
    return x.astype("float32").rename("embeddings")


def xarray_library() -> Any:
    """The xarray package.

    Raises:
      ValueError: it is not installed.
    """
    try:
        import xarray
    except ImportError:
        raise ValueError("datasets need the 'zarr' extra: pip install 'olmoearth-jax[zarr]'"
                         ) from None  # fmt: skip
    return xarray


@contextlib.contextmanager
def _no_coalescing() -> Iterator[None]:
    """Reads of a few chunks do not fetch what lies between them (zarr 3.3 and later)."""
    zarr, key = zarr_library(), "array.sharding_coalesce_max_gap_bytes"
    if zarr.config.get(key, None) is None:
        yield
    else:
        with zarr.config.set({key: 0}):
            yield


def _processed(coverage: np.ndarray) -> np.ndarray:
    """Where there is an embedding."""
    return (coverage > 0) & (coverage < NOT_PROCESSED)


def _period_name(first: str, last: str) -> Any:
    """The year, or the months, of a period's first and last day."""
    year = first[:4]
    if first == f"{year}-01-01" and last == f"{year}-12-31":
        return int(year)
    return f"{first[:7]}_{last[:7]}"
