"""A folder of GeoTIFFs of any extent, without CSVs, becomes samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import rasterio
from affine import Affine

from olmoearth_jax.data import index
from olmoearth_jax.data.convert import Conversion, Settings, convert
from olmoearth_jax.data.crs import transform_points
from olmoearth_jax.data.h5 import open_sample
from olmoearth_jax.data.h5_writer import Storage

BANDS = ["B02", "B03", "B04", "B08", "B05", "B06", "B07", "B8A", "B11", "B12", "B01", "B09"]
LEFT, TOP = 300040.0, 5800080.0  # on the 10 m grid, in the middle of a tile of it
NAME = "{modality}_{date}.tif"


def _write(path: Path, data: np.ndarray, names=(), left=LEFT, top=TOP, size=10.0, **more) -> None:
    count, height, width = data.shape
    form: dict[str, Any] = {"count": count, "height": height, "width": width, "dtype": data.dtype}
    place = Affine(size, 0, left, 0, -size, top)
    path.parent.mkdir(parents=True, exist_ok=True)
    with rasterio.open(
        path, "w", driver="GTiff", crs="EPSG:32633", transform=place, **form, **more
    ) as file:
        file.write(data)
        if names:
            file.descriptions = tuple(names)


def _scene(seed: int, height=40, width=56, bands=12) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 9000, (bands, height, width)).astype(np.uint16)


def _sentinel2(folder: Path, days: list[str], **more) -> list[np.ndarray]:
    scenes = [_scene(k) for k in range(len(days))]
    for day, scene in zip(days, scenes, strict=True):
        _write(folder / f"sentinel2_l2a_{day}.tif", scene, BANDS, **more)
    return scenes


def _convert(folder: Path, say=None, **changes: Any) -> Conversion:
    given: dict[str, Any] = {"tree": folder, "output_dir": folder / "out", "tile_px": 16}
    given |= {"name": NAME, "grid": "raster", "min_timesteps": 1, "storage": Storage("zstd", 1)}
    given.update(changes)
    return convert(Settings(**given), say=say)


def _stored(done: Conversion, name: str, number: int = 0) -> np.ndarray:
    with h5py.File(done.folder / f"sample_{number}.h5") as file:
        return np.asarray(file[name])


MONTHS = [f"2021-{m:02d}-15" for m in range(1, 4)]


def test_an_area_of_any_extent_is_cut_from_its_corner(tmp_path):
    scenes = _sentinel2(tmp_path, MONTHS)
    land = np.full((1, 40, 56), 40, np.uint8)
    _write(tmp_path / "worldcover_2021.tif", land)
    (tmp_path / "notes.txt").write_text("x")
    said: list[str] = []
    done = _convert(tmp_path, said.append)
    assert done.samples == 12 and not done.dropped  # 3 x 4, the last ones moved inward
    assert any(line.startswith("1 files are not named like") for line in said)
    whole = np.stack(scenes, axis=1).transpose(2, 3, 1, 0)  # [H, W, T, C] in the registry's order
    corners = [(min(16 * r, 24), min(16 * c, 40)) for c in range(4) for r in range(3)]
    for number, (row, col) in enumerate(corners):
        got = _stored(done, "sentinel2_l2a", number)
        np.testing.assert_array_equal(got, whole[row : row + 16, col : col + 16])
        assert got.dtype == np.uint16
        x, y = LEFT + 10 * (col + 8), TOP - 10 * (row + 8)
        lon, lat = transform_points("EPSG:32633", "EPSG:4326", [x], [y])
        np.testing.assert_allclose(
            _stored(done, "latlon", number), [lat[0], lon[0]], rtol=0, atol=1e-5
        )
    assert _stored(done, "worldcover").dtype == np.uint8
    with open_sample(done.folder / "sample_0.h5", ["sentinel2_l2a"]) as sample:
        assert sample.header.timestamps.tolist() == [[15, m, 2021] for m in range(3)]
    found = index.prepare(done.folder, ["sentinel2_l2a", "worldcover"])
    assert len(found) == 12 and found.tile_px == 16
    again = _convert(tmp_path)
    assert again.folder == done.folder and again.written == 0


def test_the_tile_grid_is_that_of_the_coordinate_system(tmp_path):
    (scene,) = _sentinel2(tmp_path, MONTHS[:1])
    done = _convert(tmp_path, grid="tile")
    rows = (done.folder / "sample_tiles.csv").read_text().splitlines()[1:]
    top, left = -int(TOP / 10), int(LEFT / 10)
    for line in rows:
        number, crs, col, row, piece = line.split(",")
        assert crs == "EPSG:32633" and piece == "0"
        got = _stored(done, "sentinel2_l2a", int(number))[:, :, 0]
        y, x = int(row) * 16 - top, int(col) * 16 - left
        want = np.full((16, 16, 12), -99999, np.int32)
        inner = np.s_[max(y, 0) : min(y + 16, 40), max(x, 0) : min(x + 16, 56)]
        part = scene[:, inner[0], inner[1]].transpose(1, 2, 0)
        a, b = inner[0].start - y, inner[1].start - x
        want[a : a + part.shape[0], b : b + part.shape[1]] = part
        np.testing.assert_array_equal(got, want)
    assert rows and done.samples == len(rows)
    assert all("at least half" in r or "nothing but missing" in r for r in done.dropped.values())
    covered = sum(
        (_stored(done, "sentinel2_l2a", k)[..., 0] != -99999).sum() for k in range(len(rows))
    )
    assert covered > 0.7 * 40 * 56


def test_single_bands_coarse_bands_nodata_and_areas(tmp_path):
    scene = _scene(5)
    scene[:, :4, :4] = 0
    for area, left in (("east", LEFT + 5000), ("west", LEFT)):
        for k, band in enumerate(BANDS):
            coarse = band in ("B05", "B11", "B01")
            data = scene[k : k + 1, ::2, ::2] if coarse else scene[k : k + 1]
            path = tmp_path / area / f"S2_20210315_{band}.tif"
            _write(path, data, left=left, size=20.0 if coarse else 10.0, nodata=0)
    said: list[str] = []
    name = "{tile}/S2_{date}_{band}.tif"
    with pytest.raises(ValueError, match="fit sentinel2_l2a and landsat.: name one modality"):
        _convert(tmp_path, name=name)
    done = _convert(tmp_path, said.append, name=name, modalities=("sentinel2_l2a",))
    assert done.samples == 24 and any("repeated to the finer grid" in line for line in said)
    want = scene.astype(np.int32)
    for k, band in enumerate(BANDS):
        if band in ("B05", "B11", "B01"):
            want[k] = want[k, ::2, ::2].repeat(2, 0).repeat(2, 1)
    want[want == 0] = -99999
    for number in (0, 12):  # the first tile of either area
        got = _stored(done, "sentinel2_l2a", number)[:, :, 0]
        np.testing.assert_array_equal(got, want[:, :16, :16].transpose(1, 2, 0))
    places = (done.folder / "sample_tiles.csv").read_text()
    assert "EPSG:32633/east" in places and "EPSG:32633/west" in places


def test_months_bring_series_of_other_dates_together(tmp_path):
    _sentinel2(tmp_path, ["2021-01-02", "2021-01-17", "2021-02-10"])
    radar = [np.full((2, 40, 56), -10.0 - k, np.float32) for k in range(2)]
    for day, data in zip(("2021-01-20", "2021-02-13"), radar, strict=True):
        _write(tmp_path / f"sentinel1_{day}.tif", data, ("VV", "VH"))
    done = _convert(tmp_path, over="select")
    with open_sample(done.folder / "sample_0.h5", ["sentinel1", "sentinel2_l2a"]) as sample:
        assert len(sample.header.timestamps) == 2
        assert all(mask.all() for mask in sample.header.masks.values())
    assert _stored(done, "sentinel1")[0, 0, :, 0].tolist() == [-10.0, -11.0]
    want = _scene(1)[:, 0, 0], _scene(2)[:, 0, 0]
    np.testing.assert_array_equal(_stored(done, "sentinel2_l2a")[0, 0], want)
    exact = _convert(tmp_path, output_dir=tmp_path / "b")
    assert {name for _, name, _ in exact.removed} == {"sentinel1"}


def test_longer_series_keep_the_image_nearest_mid_month(tmp_path):
    days = [f"2021-{month:02d}-{day}" for month in range(1, 8) for day in ("03", "16", "28")]
    scenes = _sentinel2(tmp_path, days)
    with pytest.raises(ValueError, match="has 21 timesteps .*--over=select would keep one"):
        _convert(tmp_path)
    done = _convert(tmp_path, over="select")
    want = np.stack([scene[:, 0, 0] for scene in scenes[1::3]])
    np.testing.assert_array_equal(_stored(done, "sentinel2_l2a")[0, 0], want)
    with open_sample(done.folder / "sample_0.h5", ["sentinel2_l2a"]) as sample:
        assert sample.header.timestamps.tolist() == [[16, m, 2021] for m in range(7)]


def test_areas_are_told_apart_and_resolutions_put_together(tmp_path):
    scene = _scene(0)
    for k, band in enumerate(BANDS):
        _write(tmp_path / f"T33UUU_20210115_{band}_{10 if k < 4 else 20}m.tif", scene[k : k + 1])
    form = {"name": "{tile}_{date}_{band}_{resolution}.tif", "modalities": ("sentinel2_l2a",)}
    done = _convert(tmp_path, **form)
    np.testing.assert_array_equal(_stored(done, "sentinel2_l2a")[0, 0, 0], scene[:, 0, 0])
    other = tmp_path / "areas"
    for folder, name in (("a_b", "c"), ("a", "b_c")):
        _write(other / folder / f"{name}_2021-01-15.tif", scene, BANDS)
    with pytest.raises(ValueError, match="a_b/c and a/b_c in .* would be one area 'a_b_c'"):
        _convert(other, name="{site}/{plot}_{date}.tif", modalities=("sentinel2_l2a",))


def test_one_file_in_another_unit_is_named(tmp_path):
    days = [f"2021-{m:02d}-15" for m in range(1, 13)]
    _sentinel2(tmp_path, days)
    for month, data, said in (
        ("03", (_scene(3) / 10_000).astype(np.float32), "like reflectance in 0..1"),
        ("05", (_scene(5) / 40).astype(np.uint8), "8-bit picture"),
    ):
        path = tmp_path / f"sentinel2_l2a_2021-{month}-15.tif"
        usual = path.read_bytes()
        _write(path, data, BANDS)
        with pytest.raises(ValueError, match=f"tiles cannot be used: {path}: .*{said}"):
            _convert(tmp_path)
        path.write_bytes(usual)
    draw = np.random.default_rng(0)
    for day in days:
        db = draw.uniform(-25, -5, (2, 40, 56))
        power = day == "2021-06-15"
        values = 10 ** (db / 10) if power else db
        _write(tmp_path / f"sentinel1_{day}.tif", values.astype(np.float32), ("vv", "vh"))
    said = "decibel in some timesteps or bands and linear power in others"
    with pytest.raises(ValueError, match=f"sentinel1_2021-06-15.tif: sentinel1 is {said}"):
        _convert(tmp_path)


@pytest.mark.parametrize("value", [np.inf, -np.inf, 1e300])
def test_numbers_that_no_sample_can_hold_are_left_out(tmp_path, value):
    scene = _scene(0).astype(np.float64)
    scene[3, 5, 20] = value
    _write(tmp_path / "sentinel2_l2a_2021-01-15.tif", scene, BANDS)
    done = _convert(tmp_path)
    assert done.samples == 11
    (reason,) = done.dropped.values()
    assert "sentinel2_l2a holds infinite values, or numbers too large for float32" in reason


def test_what_cannot_be_taken_is_refused(tmp_path):
    _sentinel2(tmp_path, MONTHS[:1])
    cases: list[tuple[dict[str, Any], str]] = [
        ({"tile_px": 64}, "has 40 x 56 pixels of 10 m, less than a sample of 64"),
        ({"name": "S2_{date}.tif"}, "none of the 1 files .* is named like 'S2_{date}.tif'"),
        ({"name": "x.tif"}, "must hold fields"),
        ({"name": "{modality}_{day}.tif"}, "has no date: the form of the names must hold {date}"),
        ({"grid": "cell"}, "grid must be one of tile, raster, got 'cell'"),
        (
            {"name": "", "modalities": ("sentinel2_l2a",)},
            "the files of a tree lie on the tile grid",
        ),
        ({"name": "", "grid": "tile"}, "give the form of their names, --name="),
    ]
    for changes, message in cases:
        with pytest.raises(ValueError, match=message):
            _convert(tmp_path, **changes)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="file is a file, so nothing can be written"):
        _convert(tmp_path, output_dir=tmp_path / "file")
    few = tmp_path / "few"
    _write(few / "sentinel2_l2a_2021-01-01.tif", _scene(0, bands=3), BANDS[:3])
    with pytest.raises(ValueError, match="lack the bands B08, B05.* of sentinel2_l2a"):
        _convert(few)
    off = tmp_path / "off"
    _sentinel2(off, MONTHS[:1], left=LEFT + 3)
    with pytest.raises(ValueError, match="not those of the tile grid.*--grid=raster takes them"):
        _convert(off, grid="tile")
    assert _convert(off).samples == 12


def test_a_damaged_file_is_named_before_anything_is_written(tmp_path):
    _sentinel2(tmp_path, MONTHS[:2], compress="deflate")
    path = tmp_path / "sentinel2_l2a_2021-02-15.tif"
    data = bytearray(path.read_bytes())
    data[9000:12_000] = b"\xff" * 3000
    path.write_bytes(data)
    with pytest.raises(ValueError, match="tiles cannot be used: .*sentinel2_l2a_2021-02-15.tif"):
        _convert(tmp_path)
    assert not list(tmp_path.rglob("sample_*.h5"))
