"""Loading one modality of a tile from its GeoTIFFs (spec/data.md section 3, loading).

A raster that says where it lies must lie on its tile; what it declares to be missing is told apart.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from olmoearth_jax import modalities as registry
from olmoearth_jax.band_names import canonical, identify, only_counted
from olmoearth_jax.data.convert.tree import Cell, TileJob, centre, files_of, raster_path
from olmoearth_jax.data.crs import crs_difference, same_crs, transform_points
from olmoearth_jax.data.errors import ReadError
from olmoearth_jax.data.raster_file import RasterError, RasterFile
from olmoearth_jax.modalities import BASE_RESOLUTION_M, IMAGE_TILE_PX, MISSING, Modality

_OFF = 0.05
"""Pixels of its own by which a raster may miss the edges of its tile: what rounding explains."""

_REFLECTANCE = 1e-3
"""Largest scale that makes reflectance of Sentinel-2 counts."""


@dataclasses.dataclass
class Loaded:
    """A modality of a tile.

    Attributes:
      values: [H, W, T, C], or [T, C] without extent, in the stored dtype.
      missing: bool of the same shape, what the rasters declare to be no data; None for nothing.
      turned: in words, which files were turned; '' for none.
    """

    values: np.ndarray
    missing: np.ndarray | None
    turned: str

    def filled(self, steps: Sequence[int] | np.ndarray | slice = slice(None)) -> np.ndarray:
        """The values of some timesteps, with MISSING where there are none.

        Whole numbers become int32 for that, or int64 where they need it; without missing values
        the dtype stays.
        """
        values = self.values[..., steps, :]
        gone = None if self.missing is None else self.missing[..., steps, :]
        if gone is None or not gone.any():
            return values
        if values.dtype.kind == "f":
            wide = np.result_type(values.dtype, np.float32)
        else:
            wide = np.result_type(values.dtype, np.int32)
            wide = wide if wide.kind == "i" else np.dtype(np.int64)
        return np.where(gone, wide.type(MISSING), values.astype(wide))


def load_modality(tree: Path, job: TileJob, name: str) -> Loaded:
    """A modality of a tile, as its rasters hold it.

    Coarser rasters are repeated and finer ones decimated to the modality's own grid.

    Raises:
      ReadError: a raster is missing, damaged, not square, of the wrong number or order of bands,
        or does not lie on its tile.
    """
    modality = registry.get(name)
    steps = len(job.dates[name])
    cell = job.cell.coarser(modality.tile_resolution_factor)
    ratio = modality.tile_resolution_factor // job.cell.factor
    parts, gone, channels, turned = [], [], [], []
    for resolution, bands in files_of(modality).items():
        path = raster_path(tree, modality, cell, resolution)
        side = IMAGE_TILE_PX * modality.image_factor // ratio if modality.spatial else None
        place = (job.cell.row - cell.row * ratio, job.cell.col - cell.col * ratio)
        values, valid, how = _read(path, modality, cell, (steps, bands), ratio, place)
        if side is not None:
            values = resample(values, side, path)
            valid = None if valid is None else resample(valid, side, path)
        elif values.shape[1:] != (1, 1):
            raise ReadError(path, f"must have a single pixel, got {values.shape[1:]}")
        shape = (steps, len(bands), *values.shape[1:])
        parts.append(values.reshape(shape))
        gone.append(None if valid is None else ~valid.reshape(shape))
        channels += bands
        turned += [f"{path.name} is {how}"] if how else []
    order = None if channels == sorted(channels) else np.argsort(channels)
    missing = None
    if any(g is not None and g.any() for g in gone):
        known = [
            np.zeros(p.shape, bool) if g is None else g for p, g in zip(parts, gone, strict=True)
        ]
        missing = _joined(known, order, modality)
    return Loaded(_joined(parts, order, modality), missing, ", ".join(turned))


def _joined(
    parts: Sequence[np.ndarray], order: np.ndarray | None, modality: Modality
) -> np.ndarray:
    """Files [T, C, H, W] as one array [H, W, T, C] in the order of channels, or [T, C]."""
    joined = np.concatenate(parts, axis=1)
    if order is not None:
        joined = joined[:, order]
    if modality.spatial:
        return joined.transpose(2, 3, 0, 1)
    return joined[:, :, 0, 0]


def resample(values: np.ndarray, side: int, path: str | Path = "raster") -> np.ndarray:
    """[C, h, h] to [C, side, side]: every k-th pixel from index 0, or each pixel k times.

    Raises:
      ReadError: the sides are not whole multiples of each other.
    """
    own = values.shape[1]
    if own == side:
        return values
    if own > side and own % side == 0:
        k = own // side
        return values[:, ::k, ::k]
    if own < side and side % own == 0:
        k = side // own
        wide = values.repeat(k, axis=2)  # whole rows are then copied, not pixels
        return np.broadcast_to(wide[:, :, None], (len(wide), own, k, side)).reshape(-1, side, side)
    raise ReadError(path, f"is {own} px wide, which is no whole fraction or multiple of {side} px")


def _read(
    path: Path,
    modality: Modality,
    cell: Cell,
    layers: tuple[int, Sequence[int]],
    ratio: int,
    place: tuple[int, int],
) -> tuple[np.ndarray, np.ndarray | None, str]:
    """Bands [C, h, w] of the part at `place` when the raster is cut into ratio x ratio parts,
    which of them are valid (None for all), and how the file lies. `layers` are timesteps and
    channels."""
    steps, bands = layers
    count = steps * len(bands)
    try:
        with RasterFile(path, expected=count) as raster:
            if raster.width != raster.height:
                raise ReadError(path, f"is not square: {raster.width} x {raster.height} px")
            if raster.count != count:
                raise ReadError(
                    path,
                    f"has {raster.count} bands, expected {count} (timesteps in the CSV times "
                    f"bands of the set)",
                )
            if len(set(raster.dtypes)) != 1:
                raise ReadError(path, f"mixes data types: {sorted(set(raster.dtypes))}")
            _check_bands(raster, modality, bands)
            _check_place(raster, modality, cell)
            side = raster.width // (ratio if modality.spatial else 1)
            rows, cols = (slice(k * side, (k + 1) * side) for k in place)
            window = (rows, cols) if modality.spatial else (None, None)
            if raster.complete:
                values, valid = raster.values(*window), None
            else:
                values, valid = raster.read(*window)
            return _physical(raster, modality, values), valid, raster.turned
    except RasterError as e:
        if not path.exists():
            raise ReadError(path, "file does not exist, but the CSV lists the tile") from None
        raise ReadError(path, e.reason) from e
    except ReadError:
        raise
    except ValueError as e:  # a CRS or place that PROJ does not know
        raise ReadError(path, str(e)) from e


def _check_bands(raster: RasterFile, modality: Modality, bands: Sequence[int]) -> None:
    """Refuses descriptions that contradict the expected order; those that name no band are fine.

    Raises:
      RasterError: they are of another order or sensor.
    """
    names = [(text or "").strip() for text in raster.descriptions]
    want = [modality.bands[c] for c in bands]
    if not any(names) or only_counted(names):
        return
    order = f"the bands of every timestep must be {', '.join(want)}"
    for k, text in enumerate(names):
        found = _band(text, modality.name)
        if found is not None and found != want[k % len(want)]:
            raise RasterError(
                raster.path,
                f"describes its band {k + 1} as {text!r}, but {want[k % len(want)]} belongs there; "
                + order,
            )
    first = names[: len(want)]
    if len(want) > 1 and all(first) and not any(_band(n, modality.name) for n in first):
        others = [m for m, _ in identify(first)]
        if others:
            raise RasterError(
                raster.path,
                f"describes its bands as those of {' or '.join(others)} ({', '.join(first[:4])}); "
                + order,
            )


def _band(text: str, modality: str) -> str | None:
    """The band that a description means, also with a date before it as Earth Engine writes it."""
    found = canonical(text, modality) if text else None
    if found is None and "_" in text and text[0].isdigit():
        found = canonical(text.rsplit("_", 1)[1], modality)
    return found


def _check_place(raster: RasterFile, modality: Modality, cell: Cell) -> None:
    """Holds a raster that says where it lies to its tile.

    Raises:
      RasterError: it lies elsewhere, has another size, or another CRS.
    """
    if not raster.placed and raster.crs is None:
        return
    if not modality.spatial:
        _check_centre(raster, cell)
        return
    if raster.crs is not None and not same_crs(raster.crs, cell.crs):
        raise RasterError(
            raster.path,
            f"has another coordinate reference system than its tile: "
            f"{crs_difference(raster.crs, cell.crs)}; warp it to the tile's grid",
        )
    if not raster.placed:
        return
    side, t = BASE_RESOLUTION_M * cell.factor * IMAGE_TILE_PX, raster.transform
    width, height = raster.width * t.a, -raster.height * t.e
    slack = _OFF * side / raster.width
    if abs(width - side) > slack or abs(height - side) > slack:
        raise RasterError(
            raster.path,
            f"covers {width:g} x {height:g} m ({raster.width} pixels of {t.a:g} x {-t.e:g} m), but "
            f"its tile {side:g} x {side:g} m",
        )
    east, north = t.c - cell.col * side, t.f + cell.row * side
    if max(abs(east), abs(north)) > slack:
        raise RasterError(
            raster.path,
            f"does not lie on its tile: its top left corner is {t.c:g}, {t.f:g}, that of the tile "
            f"{cell.col * side:g}, {-cell.row * side:g} ({cell.crs})",
        )


def _check_centre(raster: RasterFile, cell: Cell) -> None:
    """A pixel of weather may be larger than its tile, and lie on a grid of its own."""
    if not raster.placed or raster.crs is None:
        return
    lat, lon = centre(cell)
    x, y = transform_points("EPSG:4326", raster.crs, [lon], [lat])
    t = raster.transform
    col, row = (x[0] - t.c) / t.a, (y[0] - t.f) / t.e
    turn = 360 / t.a if raster.crs.is_geographic else 0.0  # longitudes from 0 to 360
    inside = any(-_OFF <= col + k * turn <= raster.width + _OFF for k in (-1, 0, 1))
    if not inside or not -_OFF <= row <= raster.height + _OFF:
        raise RasterError(
            raster.path,
            f"does not hold the centre of its tile ({lat:.4f} degrees north, {lon:.4f} east)",
        )


def _physical(raster: RasterFile, modality: Modality, values: np.ndarray) -> np.ndarray:
    """The values in the model's unit where the file has scale and offset tags.

    Raises:
      RasterError: tags of a modality for which they are not defined.
    """
    scales, offsets = np.array(raster.scales), np.array(raster.offsets)
    same = (scales == 1).all()
    if same and (offsets == 0).all():
        return values
    usable = (scales > 0).all() and np.isfinite([scales, offsets]).all()
    counts = modality.name == "sentinel2_l2a" and (scales <= _REFLECTANCE).all()
    if usable and counts:  # the tags make reflectance of counts
        scales, offsets = 10_000 * scales, 10_000 * offsets
    elif not usable or (
        modality.name != "sentinel1" and not (modality.name == "sentinel2_l2a" and same)
    ):
        raise RasterError(
            raster.path,
            f"has scale and offset tags ({scales[0]:g} and {offsets[0]:g}), which give no unit of "
            f"{modality.name} that the models take: store the values in their unit, without tags",
        )
    whole = np.isclose(scales, 1, rtol=1e-6).all() and values.dtype.kind in "iu"
    if whole and np.allclose(offsets, np.rint(offsets), atol=1e-3):
        added = np.rint(offsets).astype(np.int32)
        return values.astype(np.int32) + added[:, None, None] if added.any() else values
    scaled = values * scales[:, None, None] + offsets[:, None, None]
    return scaled.astype(np.float32)
