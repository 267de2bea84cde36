"""Rasters that are not as the converter expects them: units, direction, place, missing data."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest

from olmoearth_jax import modalities as registry
from olmoearth_jax.data.convert import Conversion, Settings, convert, tiles, tree
from olmoearth_jax.data.convert.tree import Cell
from olmoearth_jax.data.derived import to_decibel
from olmoearth_jax.data.h5_writer import Storage
from tests.data.trees import make_tree, write_raster

CELL = Cell("EPSG:32633", 100, -2000)


def _convert(folder: Path, **changes) -> Conversion:
    given = {"tree": folder, "output_dir": folder / "out", "storage": Storage("zstd", 1)} | changes
    return convert(Settings(**given))


def _path(folder: Path, name: str, cell: Cell = CELL, resolution: int = 16) -> Path:
    return tree.raster_path(folder, registry.get(name), cell, resolution)


def _stored(done: Conversion, name: str, number: int = 0) -> np.ndarray:
    with h5py.File(done.folder / f"sample_{number}.h5") as file:
        return np.asarray(file[name])


def _radar(seed: int = 0) -> np.ndarray:
    """Decibel [24, 64, 64]."""
    draw = np.random.default_rng(seed)
    return (-14 + 4 * draw.standard_normal((24, 64, 64))).astype(np.float32)


def test_decibel_radar_is_taken_as_it_is_and_said(tmp_path):
    make_tree(tmp_path, tiles=2)
    db, second = _radar(), Cell(CELL.crs, 101, -2000)
    write_raster(_path(tmp_path, "sentinel1"), db)
    write_raster(_path(tmp_path, "sentinel1", second), (10 ** (db / 10)).astype(np.float32))
    done = _convert(tmp_path, tile_px=256)
    assert done.notes == [(str(CELL), "sentinel1", "is decibel already and taken as it is")]
    assert "decibel already" in (done.folder / "notes.csv").read_text()
    whole = db.reshape(12, 2, 64, 64).repeat(4, 2).repeat(4, 3).transpose(2, 3, 0, 1)
    for number in (0, 1):
        got = _stored(done, "sentinel1", number)
        np.testing.assert_allclose(got, whole, atol=1e-4)
        assert got.dtype == np.float32
    assert _convert(tmp_path, tile_px=256).notes == done.notes


def test_linear_power_stays_linear_even_where_noise_removal_made_it_negative(tmp_path):
    draw = np.random.default_rng(1)
    water = (draw.standard_normal((24, 64, 64)) * 0.002 - 0.0005).astype(np.float32)
    assert np.median(water) < 0 and not tiles.is_decibel(water)
    for values in (np.full((4, 4), 0.0), np.linspace(0, 80, 99), np.arange(1, 200)):
        assert not tiles.is_decibel(values)
    make_tree(tmp_path, tiles=1)
    write_raster(_path(tmp_path, "sentinel1"), water)
    done = _convert(tmp_path, tile_px=256)
    assert not done.notes and not (done.folder / "notes.csv").exists()
    want = to_decibel(water[:, 0, 0]).reshape(12, 2)
    np.testing.assert_array_equal(_stored(done, "sentinel1")[0, 0], want)


@pytest.mark.parametrize("unit", ["hundredths", "fill"])
def test_radar_of_neither_unit_is_left_out_with_the_reason(tmp_path, unit):
    make_tree(tmp_path, tiles=1)
    db = _radar()
    if unit == "hundredths":
        db = (100 * db).astype(np.int16)
    else:
        db[3, 5, 5] = -9999
    write_raster(_path(tmp_path, "sentinel1"), db)
    with pytest.raises(ValueError, match="sentinel1 is no linear power and holds -.*no decibel"):
        _convert(tmp_path)
