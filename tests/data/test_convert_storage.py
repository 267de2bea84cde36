"""However people store a raster, a conversion gives the plain values, or an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import rasterio
from affine import Affine
from rasterio.crs import CRS

from olmoearth_jax import modalities as registry
from olmoearth_jax.data.convert import Settings, convert, tree
from olmoearth_jax.data.convert.tree import Cell
from olmoearth_jax.data.h5_writer import Storage
from olmoearth_jax.modalities import MISSING
from tests.data.trees import month, write_rows

CELL = Cell("EPSG:32633", 100, -2000)
LEFT, TOP = 256_000.0, 5_120_000.0
S2 = registry.get("sentinel2_l2a")
UTM = CRS.from_epsg(32633)
WORDS = (
    "EPSG:32633",
    "+proj=utm +zone=33 +datum=WGS84 +units=m",
    UTM.to_wkt(version="WKT2_2019"),
    UTM.to_wkt(version="WKT1_ESRI"),
)
ALIASES = {"B01": "coastal", "B02": "blue", "B8A": "nir08", "B11": "swir16", "B05": "B5"}
FAULTS = ("rotated", "elsewhere", "other system", "scaled", "renamed", "complex")


def _image(rng: np.random.Generator, steps: int, side: int) -> np.ndarray:
    """[T, 12, side, side] float64 of whole numbers, NaN where missing in all bands or in some."""
    x = rng.integers(1, 9000, (steps, 12, side, side)).astype(np.float64)
    x[rng.random((steps, 1, side, side)).repeat(12, 1) < 0.1] = np.nan
    x[rng.random(x.shape) < 0.01] = np.nan
    return x


def _write(
    path: Path, rng: np.random.Generator, x: np.ndarray, names, place: Affine, fault: str = ""
) -> None:
    """Writes [C, h, w] in a way drawn at random, with a fault if one is named."""
    crs: Any = rng.choice(WORDS)
    if rng.random() < 0.5:
        x, place = x[:, ::-1], place @ Affine(1, 0, 0, 0, -1, x.shape[1])
    if rng.random() < 0.5:
        x, place = x[..., ::-1], place @ Affine(-1, 0, x.shape[2], 0, 1, 0)
    gone, filled = np.isnan(x), np.nan_to_num(x)
    kind = str(rng.choice(["uint16", "int16", "int32", "float32", "float64"]))
    after: dict[str, Any] = {}
    if rng.random() < 0.4:
        filled = filled + 1000
        after = {"scales": (1e-4,) * len(x), "offsets": (-0.1,) * len(x)}
    if rng.random() < 0.6:
        after["descriptions"] = tuple(ALIASES.get(n, n.lower()) for n in names)
    form: dict[str, Any] = {"nodata": 65535 if kind == "uint16" else -9999}
    filled[gone] = form["nodata"]
    if (gone == gone[0]).all() and rng.random() < 0.5:
        form = {}
        after["mask"] = ~gone[0]
    place, crs, kind = _spoil(fault, place, crs, kind, after, names)
    count, height, width = x.shape
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = after.pop("mask", None)
    with (
        rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True),
        rasterio.open(
            path, "w", driver="GTiff", count=count, height=height, width=width, dtype=kind,
            crs=crs, transform=place, **form,
        ) as file,
    ):  # fmt: skip
        file.write(filled.astype(kind))
        for key, value in after.items():
            setattr(file, key, value)
        if mask is not None:
            file.write_mask(mask)


def _spoil(
    fault: str, place: Affine, crs: Any, kind: str, after: dict[str, Any], names
) -> tuple[Affine, Any, str]:
    if fault == "rotated":
        place = place @ Affine.rotation(3)
    elif fault == "elsewhere":
        place = place @ Affine.translation(0.5, 0)
    elif fault == "other system":
        crs = "EPSG:32733"
    elif fault == "scaled":
        after |= {"scales": (0.5,) * len(names), "offsets": (0.0,) * len(names)}
    elif fault == "renamed":
        after["descriptions"] = ("B99", *names[1:][::-1])
    elif fault == "complex":
        kind = "complex64"
    return place, crs, kind


def _drawn_faults(rng: np.random.Generator, count: int) -> list[str]:
    """For half of the draws, a fault of one of `count` files."""
    out = [""] * count
    if rng.random() < 0.5:
        out[rng.integers(count)] = str(rng.choice(FAULTS))
    return out


def _compare(settings: Settings, want: np.ndarray, wrong: bool) -> None:
    """Holds the samples to [H, W, T, C] with NaN, or expects an error."""
    if wrong:
        with pytest.raises(ValueError):
            convert(settings)
        assert not list(settings.output_dir.glob("**/*.h5"))
        return
    done = convert(settings)
    with h5py.File(done.folder / "sample_0.h5") as file:
        got = np.asarray(file["sentinel2_l2a"])
    np.testing.assert_allclose(got, np.nan_to_num(want, nan=MISSING), atol=2e-3)


@pytest.mark.parametrize("seed", range(16))
def test_a_tree_stored_in_any_way(tmp_path, seed):
    rng = np.random.default_rng(seed)
    steps, side = int(rng.integers(1, 3)), int(rng.choice([32, 64]))
    x = _image(rng, steps, side)
    files = tree.files_of(S2)
    faults = _drawn_faults(rng, len(files))
    for (resolution, channels), fault in zip(files.items(), faults, strict=True):
        part = x[:, list(channels)].reshape(-1, side, side)
        names = [S2.bands[c] for c in channels] * steps
        place = Affine(2560 / side, 0, LEFT, 0, -2560 / side, TOP)
        _write(tree.raster_path(tmp_path, S2, CELL, resolution), rng, part, names, place, fault)
    rows = [[CELL.crs, CELL.col, CELL.row, month(0), k, month(k), month(k)] for k in range(steps)]
    write_rows(tmp_path, S2.name, rows)
    settings = Settings(
        tmp_path, tmp_path / "out", tile_px=256, min_timesteps=1, storage=Storage("zstd", 1)
    )
    k = 256 // side
    whole = x.transpose(2, 3, 0, 1).repeat(k, 0).repeat(k, 1)
    _compare(settings, whole, any(faults))


@pytest.mark.parametrize("seed", range(16))
def test_a_folder_stored_in_any_way(tmp_path, seed):
    rng = np.random.default_rng(seed)
    x = _image(rng, 2, 64)
    groups = np.array_split(rng.permutation(12), rng.integers(1, 4))
    cut = int(rng.integers(0, 64))
    spans = [slice(0, 64)] if cut < 8 else [slice(0, cut), slice(cut - 1, 64)]
    work = [(g, p, step) for g in groups for p in spans for step in range(2)]
    faults = _drawn_faults(rng, len(work))
    # Descriptions name the bands here, or the names of the files do.
    for (group, span, step), fault in zip(work, faults, strict=True):
        names = [S2.bands[c] for c in group]
        path = tmp_path / f"{'+'.join(names)}_2021-0{step + 1}-15_{span.start}.tif"
        place = Affine(10, 0, LEFT, 0, -10, TOP - 10 * span.start)
        _write(path, rng, x[step, group, span], names, place, fault)
    settings = Settings(
        tmp_path, tmp_path / "out", ("sentinel2_l2a",), tile_px=64, min_timesteps=1,
        name="{bands}_{date}_{resolution}.tif", grid="raster", storage=Storage("zstd", 1),
    )  # fmt: skip
    _compare(settings, x.transpose(2, 3, 0, 1), any(faults))
