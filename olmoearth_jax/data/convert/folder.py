"""Tiles of a folder of GeoTIFFs that is no tree: areas of any extent, found by a name pattern.

Files of one area lie on one grid; which files belong to an area say the fields of the pattern other
than modality, date, band, bands and resolution. Every tile is one sample.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
from pathlib import Path

import numpy as np

from olmoearth_jax import modalities as registry
from olmoearth_jax.data.convert.rasters import Loaded
from olmoearth_jax.data.convert.sources import Part, Say, signature
from olmoearth_jax.data.convert.tree import Cell, TileJob
from olmoearth_jax.data.crs import transform_points
from olmoearth_jax.data.errors import ReadError
from olmoearth_jax.data.raster_file import RasterError
from olmoearth_jax.data.rasters import Raster, Stack, name_pattern, read_folder
from olmoearth_jax.data.series import Date, nearest_to_mid_month
from olmoearth_jax.modalities import MAX_TIMESTEPS, Modality

_HELD = ("modality", "date", "band", "bands", "resolution")
_OFF = 0.01


@dataclasses.dataclass(frozen=True)
class _Listing:
    """The rasters of a folder.

    Attributes:
      areas: per area, by its name ('' for the only one), its rasters in the order of their names.
      others: names of the files that do not match.
    """

    areas: dict[str, list[Raster]]
    others: list[str]


@functools.lru_cache(maxsize=2)
def _list_folder(folder: Path, pattern: str) -> _Listing:
    """The rasters of a folder whose names match a pattern.

    Raises:
      ValueError: it is no pattern, or matches nothing.
    """
    rasters, others = read_folder(folder, pattern)
    form, areas, owners = name_pattern(pattern), {}, {}
    for raster in rasters:
        match = form.fullmatch(Path(raster.path).relative_to(folder).as_posix())
        assert match is not None
        own = [text for field, text in match.groupdict().items() if field not in _HELD]
        area = "_".join(own).replace("/", "_")
        if owners.setdefault(area, own) != own:
            raise ValueError(
                f"the files of {'/'.join(own)} and {'/'.join(owners[area])} in {folder} would be "
                f"one area {area!r}: rename one of them"
            )
        areas.setdefault(area, []).append(raster)
    return _Listing(dict(sorted(areas.items())), others)


Axes = dict[str, dict[Date, str]]
"""Per modality its timesteps: date in the sample, and day of the image."""


@functools.lru_cache(maxsize=1)
def _stack(
    folder: Path, pattern: str, area: str, wanted: tuple[str, ...], monthly: bool
) -> tuple[Stack, Axes]:
    """An area's open rasters, and of them what is used; a process works on one area at a time.

    Raises:
      ValueError: they cannot be used, or not together.
    """
    alone = wanted[0] if len(wanted) == 1 else ""
    chosen = []
    for raster in _list_folder(folder, pattern).areas[area]:
        if raster.modality and registry.get(raster.modality).multitemporal and not raster.dates:
            raise ValueError(f"{raster.path} has no date: the form of the names must hold {{date}}")
        if not wanted or raster.modality in ("", *wanted):
            chosen.append(dataclasses.replace(raster, modality=raster.modality or alone))
    try:
        stack = Stack(chosen, over="keep")
    except ValueError as e:
        way = "name one modality (--supported_modality_names), or put {modality} into the form"
        text = str(e).replace("give --modality or name it in the manifest", way)
        raise ValueError(text) from e
    axes = _axes(stack, monthly)
    stack.select({name: [d for d in own.values() if d] for name, own in axes.items()})
    return stack, axes


def _axes(stack: Stack, monthly: bool) -> Axes:
    """The timesteps that are used; with `monthly` one a month where that is needed."""
    days = {n: stack.dates_of(n) for n in stack.names}
    series = [own for name, own in days.items() if registry.get(name).multitemporal]
    fits = all(own == series[0] and len(own) <= MAX_TIMESTEPS for own in series)
    out, months = {}, {}
    for name, own in days.items():
        dates = [_date(day) for day in own]
        if not registry.get(name).multitemporal:
            out[name] = {(1, 0, 2000): ""}
        elif monthly and not fits:
            chosen = nearest_to_mid_month(dates)
            keys = [months.setdefault(dates[k][1:], dates[k]) for k in chosen]
            out[name] = {key: own[k] for key, k in zip(keys, chosen, strict=True)}
        else:
            out[name] = dict(zip(dates, own, strict=True))
    return out


def _forget() -> None:
    """Files may have changed since they were listed and opened."""
    _list_folder.cache_clear()
    _stack.cache_clear()


def find_modalities(folder: Path, pattern: str) -> tuple[str, ...]:
    """The modalities of a folder's rasters, in registry order.

    Raises:
      ValueError: as `_list_folder`, or rasters that cannot be used together.
    """
    _forget()
    found: set[str] = set()
    for area, rasters in _list_folder(folder, pattern).areas.items():
        named = {r.modality for r in rasters}
        found |= set(_stack(folder, pattern, area, (), False)[0].names) if "" in named else named
    return tuple(n for n in registry.all_names() if n in found)


@dataclasses.dataclass(frozen=True)
class FolderSource:
    """A folder of GeoTIFFs.

    Attributes:
      folder: where they lie.
      pattern: see `_list_folder`.
      modalities: the ones that are converted.
      grid: 'tile' for tiles at multiples of their size in the CRS, as those of the published
        dataset; 'raster' for tiles from the top left corner of each area, the last ones moved
        inward.
      tile_px: side of a tile in pixels of 10 m.
      monthly: images of one calendar month are one timestep, that nearest its middle, where there
        are too many or the series have other dates than each other.
    """

    folder: Path
    pattern: str
    modalities: tuple[str, ...]
    grid: str
    tile_px: int
    monthly: bool

    def jobs(self, say: Say | None) -> list[TileJob]:
        _forget()
        listing, out = _list_folder(self.folder, self.pattern), []
        if say and listing.others:
            shown = ", ".join(listing.others[:3])
            say(f"{len(listing.others)} files are not named like {self.pattern}, such as {shown}")
        for area in listing.areas:
            stack, axes = self._open(area)
            if not stack.names:
                continue
            _check_bands(stack, area)
            dates = {n: tuple(axis) for n, axis in axes.items()}
            if say:
                for note in stack.notes:
                    say(note)
            code = ":".join(stack.crs.to_authority() or ("", "")).strip(":") or "grid"
            name = f"{code}/{area}" if area else code
            cells = [Cell(name, col, row) for row, col in self._places(stack, area)]
            out += [TileJob(cell, dates) for cell in sorted(cells)]
        return out

    def signature(self, job: TileJob) -> str:
        rasters = _list_folder(self.folder, self.pattern).areas[self._area(job.cell)]
        return signature([Path(r.path) for r in rasters], job)

    def load(self, job: TileJob, name: str) -> Loaded:
        (stack, axes), modality = self._open(self._area(job.cell)), registry.get(name)
        try:
            whole = _window(stack, self._corner(stack, job.cell), self.tile_px, modality)
        except RasterError as e:
            raise ReadError(e.path, e.reason) from e
        if modality.multitemporal:
            days = [stack.dates.index(day) for day in axes[name].values()]
            whole = whole[:, :, days]
        missing = np.isnan(whole)
        return Loaded(_stored(whole, missing, modality), missing if missing.any() else None, "")

    def parts(self, job: TileJob, name: str) -> list[Part]:
        stack, axes = self._open(self._area(job.cell))
        bands, days, out = list(registry.get(name).bands), list(axes[name].values()), []
        for path, planes, dtype in stack.files_of(name):
            held = [(bands.index(band), days.index(day)) for band, day in planes if day in days]
            steps, channels = sorted({s for _, s in held}), sorted({c for c, _ in held})
            if held:
                out.append((path, steps, channels, dtype))
        return out

    def centre(self, cell: Cell) -> tuple[float, float]:
        stack, _ = self._open(self._area(cell))
        row, col = self._corner(stack, cell)
        t = stack.transform
        x, y = t.c + (col + self.tile_px / 2) * t.a, t.f + (row + self.tile_px / 2) * t.e
        lon, lat = transform_points(stack.crs, "EPSG:4326", [x], [y])
        return float(lat[0]), float(lon[0])

    def _open(self, area: str) -> tuple[Stack, Axes]:
        return _stack(self.folder, self.pattern, area, self.modalities, self.monthly)

    def _area(self, cell: Cell) -> str:
        """The area that a cell's name holds behind the code of its CRS."""
        return cell.crs.partition("/")[2]

    def _places(self, stack: Stack, area: str) -> list[tuple[int, int]]:
        """(row, column) of every tile."""
        side, (height, width) = self.tile_px, stack.shape
        if self.grid == "tile":
            top, left = _offset(stack)
            spans = ((top, height), (left, width))
            rows, cols = (range(start // side, -(-(start + n) // side)) for start, n in spans)
        else:
            if min(height, width) < side:
                raise ValueError(
                    f"the area {area or self.folder} has {height} x {width} pixels of 10 m, less "
                    f"than a sample of {side}: give a smaller --tile_size"
                )
            rows, cols = (range(-(-n // side)) for n in (height, width))
        return [(row, col) for row in rows for col in cols]

    def _corner(self, stack: Stack, cell: Cell) -> tuple[int, int]:
        """(row, column) in the stack of a tile's first pixel; outside of it where it stands out."""
        side = self.tile_px
        if self.grid == "tile":
            top, left = _offset(stack)
            return cell.row * side - top, cell.col * side - left
        height, width = stack.shape
        return min(cell.row * side, height - side), min(cell.col * side, width - side)


def _offset(stack: Stack) -> tuple[int, int]:
    """(row, column) of a stack's first pixel, counted in pixels of 10 m from the CRS's origin.

    Raises:
      ValueError: its pixels are not those of the grid.
    """
    t = stack.transform
    places = -t.f / 10, t.c / 10
    off = max(abs(p - round(p)) for p in places)
    if abs(t.a - 10) > 1e-6 or abs(t.e + 10) > 1e-6 or off > _OFF:
        raise ValueError(
            f"pixels of {t.a:g} x {-t.e:g} from {t.c:.10g}, {t.f:.10g} are not those of the tile "
            "grid (10 m, edges at multiples of 10 m); --grid=raster takes them as they lie"
        )
    return round(places[0]), round(places[1])


def _date(day: str) -> Date:
    known = datetime.date.fromisoformat(day)
    return known.day, known.month - 1, known.year


def _check_bands(stack: Stack, area: str) -> None:
    for name in stack.names:
        modality = registry.get(name)
        lacking = [b for b in modality.bands if b not in stack.bands_of(name)]
        if lacking:
            raise ValueError(
                f"the rasters{f' of {area}' if area else ''} lack the bands {', '.join(lacking)} "
                f"of {name}; samples hold all of them"
            )
        if not modality.spatial:
            raise ValueError(f"{name} has no pixels, so it cannot be taken from rasters by name")


def _window(stack: Stack, corner: tuple[int, int], side: int, modality: Modality) -> np.ndarray:
    """float32 [H, W, T, C] of a tile in the order of the registry's bands, NaN where missing."""
    f = modality.image_factor
    low = [max(0, k) for k in corner]
    high = [min(n, k + side) for n, k in zip(stack.shape, corner, strict=True)]
    window = stack.read(slice(low[0], high[0]), slice(low[1], high[1]))
    bands = window.bands[modality.name]
    order = [bands.index(b) for b in modality.bands]
    inside = window.arrays[modality.name][..., order]
    if inside.shape[:2] == (side * f, side * f):
        return inside
    out = np.full((side * f, side * f, *inside.shape[2:]), np.nan, np.float32)
    top, left = ((a - b) * f for a, b in zip(low, corner, strict=True))
    out[top : top + inside.shape[0], left : left + inside.shape[1]] = inside
    return out


def _stored(values: np.ndarray, missing: np.ndarray, modality: Modality) -> np.ndarray:
    """The values in the modality's own dtype where that holds them."""
    dtype = np.dtype(modality.source_dtype or "float32")
    if dtype.kind not in "iu":
        return values
    present = values[~missing]
    known = np.iinfo(dtype)
    fits = not present.size or (
        present.min() >= known.min and present.max() <= known.max and not (present % 1).any()
    )
    return np.where(missing, 0, values).astype(dtype) if fits else values
