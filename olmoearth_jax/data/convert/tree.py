"""The GeoTIFF tree: CSV indices, tiles, file names and sample enumeration (spec/data.md section 3).

<resolution>_<modality>[_monthly].csv     one row per timestep of a tile
<resolution>_<modality>[_monthly]/<crs>_<col>_<row>_<resolution of the band set>.tif
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from olmoearth_jax import modalities as registry
from olmoearth_jax.data.derived import tile_latlon
from olmoearth_jax.data.series import Date
from olmoearth_jax.modalities import BASE_RESOLUTION_M, IMAGE_TILE_PX, Modality


@dataclasses.dataclass(frozen=True, order=True)
class Cell:
    """A cell of the tile grid of a CRS; `factor` is its pixel size in units of 0.625 m."""

    crs: str
    col: int
    row: int
    factor: int = 16

    def __str__(self) -> str:
        return f"{self.crs}_{self.col}_{self.row}"

    def coarser(self, factor: int) -> Cell:
        """The cell of the grid of `factor` that contains this one."""
        ratio = factor // self.factor
        return Cell(self.crs, self.col // ratio, self.row // ratio, factor)


@dataclasses.dataclass(frozen=True)
class TileJob:
    """A tile to be converted: its cell, and per modality the dates of its timesteps."""

    cell: Cell
    dates: Mapping[str, tuple[Date, ...]]


@dataclasses.dataclass(frozen=True)
class Series:
    """What a CSV lists: the dates of each tile's timesteps, how many rows were ignored, and the
    tiles of which nothing is left because no row of theirs has the number 0."""

    dates: dict[Cell, tuple[Date, ...]]
    ignored: int
    lost: tuple[str, ...] = ()


def resolution_text(factor: int) -> str:
    """Metres per pixel as in file names: '10', '2.5', '0.625'."""
    return f"{factor * BASE_RESOLUTION_M:g}"


def stem(modality: Modality) -> str:
    """Name of a modality's folder and, with .csv, of its index."""
    suffix = "_monthly" if modality.multitemporal else ""
    return f"{resolution_text(modality.tile_resolution_factor)}_{modality.name}{suffix}"


def files_of(modality: Modality) -> dict[int, tuple[int, ...]]:
    """Per resolution (in units of 0.625 m) the channels that its file holds.

    Band sets of the same resolution follow each other in one file.
    """
    out: dict[int, tuple[int, ...]] = {}
    for factor, bands in zip(modality.band_set_resolutions, modality.band_sets, strict=True):
        out[factor] = (*out.get(factor, ()), *bands)
    return out


def raster_path(tree: Path, modality: Modality, cell: Cell, resolution: int) -> Path:
    """File of a tile's bands of one resolution (in units of 0.625 m)."""
    return tree / stem(modality) / f"{cell}_{resolution_text(resolution)}.tif"


def find_modalities(tree: Path) -> tuple[str, ...]:
    """Modalities whose CSV lies in the tree, in registry order."""
    found = [n for n in registry.all_names() if _convertible(n)]
    return tuple(n for n in found if (tree / f"{stem(registry.get(n))}.csv").is_file())


def check_names(names: Sequence[str]) -> tuple[str, ...]:
    """Canonical names of modalities to convert.

    Raises:
      ValueError: unknown, repeated, or of a kind that has no CSV.
    """
    resolved = registry.resolve(names)
    for name in resolved:
        if not _convertible(name):
            known = [n for n in registry.names() if _convertible(n)]
            raise ValueError(
                f"modality {name!r} is not converted from GeoTIFFs; {registry.closest(name, known)}"
            )
    return resolved


def _convertible(name: str) -> bool:
    modality = registry.get(name)
    return modality.from_csv and modality.in_sample and modality.tile_resolution_factor > 0


@functools.lru_cache(maxsize=1 << 16)
def centre(cell: Cell) -> tuple[float, float]:
    """(lat, lon) in degrees of a cell's centre.

    Raises:
      ValueError: the CRS is unknown, or has no such place.
    """
    outside = f"{cell.crs} has no place at column {cell.col}, row {cell.row}"
    if cell.crs.startswith(("EPSG:326", "EPSG:327")):
        try:
            return tile_latlon(cell.crs, cell.col, cell.row, cell.factor)
        except (OverflowError, ZeroDivisionError):
            raise ValueError(outside) from None
    from rasterio import errors, warp

    side = BASE_RESOLUTION_M * cell.factor * IMAGE_TILE_PX
    x, y = (cell.col + 0.5) * side, -(cell.row + 0.5) * side
    try:
        found = warp.transform(cell.crs, "EPSG:4326", [x], [y])
    except (errors.RasterioError, ValueError) as e:
        raise ValueError(f"unknown coordinate reference system {cell.crs!r} ({e})") from e
    except Exception as e:  # GDAL's own errors have no public class
        raise ValueError(f"{outside} ({e})") from e
    lat, lon = found[1][0], found[0][0]
    if not (math.isfinite(lat) and math.isfinite(lon)):
        raise ValueError(outside)
    return lat, lon


def enumerate_tiles(series: Mapping[str, Series]) -> list[TileJob]:
    """The tiles to be converted, sorted by (CRS, column, row).

    Every cell that occurs in a multitemporal modality makes one, as does every cell at 0.625 m;
    it holds each modality of the same or a coarser grid at its place.
    """
    cells = {
        cell
        for name, listed in series.items()
        for cell in listed.dates
        if registry.get(name).multitemporal or cell.factor == 1
    }
    jobs = []
    for cell in sorted(cells):
        dates = {}
        for name, listed in series.items():
            factor = registry.get(name).tile_resolution_factor
            if factor >= cell.factor and factor % cell.factor == 0:
                found = listed.dates.get(cell.coarser(factor))
                if found is not None:
                    dates[name] = found
        jobs.append(TileJob(cell, dates))
    return jobs


def raster_paths(tree: Path, job: TileJob, names: Iterable[str]) -> list[Path]:
    """Every file a tile is made from."""
    out = []
    for name in names:
        modality = registry.get(name)
        cell = job.cell.coarser(modality.tile_resolution_factor)
        out += [raster_path(tree, modality, cell, r) for r in files_of(modality)]
    return out
