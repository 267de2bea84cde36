"""Rasters that are not as the converter expects them: units, direction, place, missing data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import rasterio
from affine import Affine
from rasterio.crs import CRS
from rasterio.enums import ColorInterp

from olmoearth_jax import modalities as registry
from olmoearth_jax.data.convert import Conversion, Settings, convert, tiles, tree
from olmoearth_jax.data.convert.tree import Cell
from olmoearth_jax.data.derived import to_decibel
from olmoearth_jax.data.h5 import open_sample
from olmoearth_jax.data.h5_writer import Storage
from olmoearth_jax.data.raster_file import RasterFile
from tests.data.trees import add_modality, make_tree, month, plausible, write_raster

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


@pytest.mark.parametrize("band", [0, 1])
def test_radar_of_one_band_in_power_is_refused(tmp_path, band):
    make_tree(tmp_path, tiles=1)
    mixed = _radar()
    mixed[band::2] = 10 ** (mixed[band::2] / 10)
    write_raster(_path(tmp_path, "sentinel1"), mixed)
    with pytest.raises(ValueError, match="is decibel in some timesteps or bands and linear power"):
        _convert(tmp_path)


SIDE = 2560.0
LEFT, TOP = CELL.col * SIDE, -CELL.row * SIDE
UTM = CRS.from_epsg(32633)
WORDS = (
    "EPSG:32633",
    "+proj=utm +zone=33 +datum=WGS84 +units=m",
    UTM.to_wkt(version="WKT2_2019"),
    UTM.to_wkt(version="WKT1_ESRI"),
)


def _place(path: Path, data: np.ndarray, transform=None, crs=WORDS[0], **more: Any) -> None:
    """Writes a placed raster; `more` may hold descriptions, mask, scales and offsets."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = data.shape
    size = SIDE / width
    after = {k: more.pop(k) for k in ("descriptions", "scales", "offsets") if k in more}
    mask, kinds = more.pop("mask", None), more.pop("colorinterp", None)
    with (
        rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True),
        rasterio.open(
            path, "w", driver="GTiff", count=count, height=height, width=width, dtype=data.dtype,
            crs=crs, transform=transform or Affine(size, 0, LEFT, 0, -size, TOP), **more,
        ) as file,
    ):  # fmt: skip
        if kinds:
            file.colorinterp = kinds
        file.write(data)
        for key, value in after.items():
            setattr(file, key, value)
        if mask is not None:
            file.write_mask(mask)


def _turned(data: np.ndarray, how: str) -> tuple[np.ndarray, Affine]:
    """The same picture stored in another direction."""
    size = SIDE / data.shape[-1]
    up, left = "upside down" in how, "mirrored" in how
    data = data[:, :: -1 if up else 1, :: -1 if left else 1]
    return data, Affine(
        -size if left else size, 0, LEFT + SIDE * left, 0, size if up else -size, TOP - SIDE * up
    )


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> tuple[Path, Conversion, np.ndarray]:
    folder = tmp_path_factory.mktemp("plain")
    made = make_tree(folder, tiles=1)
    return folder, _convert(folder, tile_px=256), made["sentinel1"][CELL][0]


@pytest.mark.parametrize("how", ["", "upside down", "mirrored", "upside down and mirrored"])
@pytest.mark.parametrize("words", WORDS)
def test_any_direction_and_wording_gives_the_plain_samples(tmp_path, plain, how, words):
    make_tree(tmp_path, tiles=1)
    data, transform = _turned(plain[2], how)
    _place(_path(tmp_path, "sentinel1"), data, transform, words)
    done = _convert(tmp_path, tile_px=256)
    for name in ("sentinel1", "worldcover", "srtm"):
        np.testing.assert_array_equal(_stored(done, name), _stored(plain[1], name))
    file = "EPSG:32633_100_-2000_10.tif"
    assert [n[2] for n in done.notes] == ([f"was turned ({file} is {how})"] if how else [])


CONTRADICTIONS = {
    "one pixel east": ({"transform": Affine(40, 0, LEFT + 40, 0, -40, TOP)}, "not lie on its tile"),
    "half a pixel north": ({"transform": Affine(40, 0, LEFT, 0, -40, TOP + 20)}, "not lie on its"),
    "rows from the equator": (
        {"transform": Affine(40, 0, LEFT, 0, -40, -TOP)},
        "top left corner is 256000, -5.12e.06, that of the tile 256000, 5.12e.06 .EPSG:32633",
    ),
    "finer": ({"transform": Affine(10, 0, LEFT, 0, -10, TOP)}, "covers 640 x 640 m .64 pixels of"),
    "not square": ({"transform": Affine(40, 0, LEFT, 0, -20, TOP)}, "covers 2560 x 1280 m"),
    "rotated": ({"transform": Affine(40, 1, LEFT, 1, -40, TOP)}, "is rotated"),
    "next zone": ({"crs": "EPSG:32634"}, "EPSG:32634 against EPSG:32633; warp it"),
    "degrees": ({"crs": "EPSG:4326"}, "EPSG:4326 against EPSG:32633"),
    "other order": ({"descriptions": ("VH", "VV") * 12}, "band 1 as 'VH', but vv belongs there"),
    "order of dates": (
        {"descriptions": [f"2020{m:02d}_VV" for m in range(12)] * 2},
        "band 2 as '202001_VV', but vh belongs there; the bands of every timestep must be vv, vh",
    ),
    "other sensor": ({"descriptions": ("B02", "B03") * 12}, "as those of sentinel2_l2a .B02, B03"),
}


@pytest.mark.parametrize("what", CONTRADICTIONS)
def test_what_contradicts_the_tile_is_refused_with_the_reason(tmp_path, plain, what):
    make_tree(tmp_path, tiles=1)
    given, message = CONTRADICTIONS[what]
    _place(_path(tmp_path, "sentinel1"), plain[2], **given)
    with pytest.raises(ValueError, match=f"EPSG:32633_100_-2000_10.tif: .*{message}"):
        _convert(tmp_path)
    assert not list(tmp_path.rglob("sample_*.h5"))


@pytest.mark.parametrize(
    "names",
    [
        ("VV", "VH") * 12,
        ("sigma0_VV", "Sigma0 VH") * 12,
        [f"{k // 2}_{'VV' if k % 2 == 0 else 'VH'}" for k in range(24)],
        [f"Band {k + 1}" for k in range(24)],
        ("backscatter",) * 24,
    ],
)
def test_descriptions_that_fit_or_name_no_band_are_fine(tmp_path, plain, names):
    make_tree(tmp_path, tiles=1)
    _place(_path(tmp_path, "sentinel1"), plain[2], descriptions=tuple(names))
    done = _convert(tmp_path, tile_px=256)
    assert not done.notes
    np.testing.assert_array_equal(_stored(done, "sentinel1"), _stored(plain[1], "sentinel1"))


@pytest.mark.parametrize("how", ["nodata", "nan", "mask", "alpha"])
def test_declared_missing_values_are_left_out_or_stored_as_such(tmp_path, plain, how):
    make_tree(tmp_path, tiles=1)
    data = plain[2].copy()
    gone = np.zeros((12, 2, 64, 64), bool)
    gone[:, :, 3, 5:7] = True
    if how in ("nodata", "nan"):  # the others hold for all bands alike
        gone[4, :, :32] = True
        fill = np.nan if how == "nan" else -9999.0
        data[gone.reshape(data.shape)] = fill
        more: dict[str, Any] = {"nodata": fill}
    else:
        flags = np.where(gone[0, 0], 0, 255)
        more = {"mask": flags.astype(np.uint8)}
        if how == "alpha":
            data = np.concatenate([data, flags[None]]).astype(data.dtype)
            kinds = ColorInterp
            more = {"colorinterp": (*[kinds.undefined] * 24, kinds.alpha)}
    _place(_path(tmp_path, "sentinel1"), data, **more)
    done = _convert(tmp_path, tile_px=256)
    steps = [k for k in range(12) if k != 4 or how in ("mask", "alpha")]
    want = _stored(plain[1], "sentinel1")[:, :, steps]
    want[12:16, 20:28] = -99999
    got = _stored(done, "sentinel1")
    np.testing.assert_array_equal(got, want)
    assert got.dtype == np.float32
    said = f"has {len(steps) * 2 * 2 * 16} missing values, stored as -99999"
    first = "misses at least half of its values on 2020-04-30, which is left out; "
    assert done.notes[0][2] == (said if len(steps) == 12 else first + said)
    with h5py.File(done.folder / "sample_0.h5") as file:
        mask = np.asarray(file["missing_timesteps_masks/sentinel1"])
        assert np.flatnonzero(mask).tolist() == steps and len(mask) == 12


def test_whole_numbers_are_stored_as_int32_only_where_some_are_missing(tmp_path, plain):
    make_tree(tmp_path, tiles=1)
    codes = np.full((1, 256, 256), 40, np.uint8)
    codes[0, :9] = 0
    _place(_path(tmp_path, "worldcover"), codes, nodata=0)
    heights = np.full((1, 256, 256), 7, np.int16)
    _place(_path(tmp_path, "srtm"), heights, nodata=-32768)
    done = _convert(tmp_path, tile_px=256)
    got = _stored(done, "worldcover")
    assert got.dtype == np.int32 and (got[:9] == -99999).all() and (got[9:] == 40).all()
    assert _stored(done, "srtm").dtype == np.int16
    assert done.notes == [(str(CELL), "worldcover", "has 2304 missing values, stored as -99999")]
    with open_sample(done.folder / "sample_0.h5", ["worldcover"]) as sample:
        np.testing.assert_array_equal(sample.read("worldcover"), got)
    _place(_path(tmp_path, "srtm"), heights, nodata=7)
    _place(_path(tmp_path, "sentinel1"), plain[2], nodata=float(plain[2][0, 0, 0]))
    again = _convert(tmp_path, output_dir=tmp_path / "b")
    assert (str(CELL), "srtm", "holds nothing but missing values") in again.removed


def test_scale_and_offset_give_the_physical_value_or_are_refused(tmp_path, plain):
    make_tree(tmp_path, tiles=1)
    hundredths = np.rint(100 * _radar()).astype(np.int16)
    _place(_path(tmp_path, "sentinel1"), hundredths, scales=(0.01,) * 24)
    done = _convert(tmp_path, tile_px=256)
    want = (hundredths[:, 0, 0] * 0.01).astype(np.float32).reshape(12, 2)
    np.testing.assert_array_equal(_stored(done, "sentinel1")[0, 0], want)
    heights = np.full((1, 256, 256), 7, np.int16)
    _place(_path(tmp_path, "srtm"), heights, scales=(0.1,))
    with pytest.raises(ValueError, match="scale and offset tags .0.1 and 0.*no unit of srtm"):
        _convert(tmp_path, output_dir=tmp_path / "b")
    _place(_path(tmp_path, "srtm"), heights)
    for scale in (0.0, -0.01, np.nan):
        _place(_path(tmp_path, "sentinel1"), hundredths, scales=(scale,) * 24)
        with pytest.raises(ValueError, match="no unit of sentinel1"):
            _convert(tmp_path, output_dir=tmp_path / "b")


@pytest.mark.parametrize(
    ("scale", "offset", "moved"), [(1e-4, 0.0, 0), (1e-4, -0.1, -1000), (1.0, -1000.0, -1000)]
)
def test_sentinel2_comes_in_counts_whatever_the_tags(tmp_path, scale, offset, moved):
    add_modality(tmp_path, "sentinel2_l2a", [CELL], [month(i) for i in range(12)])
    plain = _convert(tmp_path, tile_px=256)
    for factor, count in ((16, 4), (32, 6), (64, 2)):
        path = _path(tmp_path, "sentinel2_l2a", resolution=factor)
        with RasterFile(path) as file:
            data = file.read()[0]
        steps = 12 * count
        _place(path, data, scales=(scale,) * steps, offsets=(offset,) * steps)
    done = _convert(tmp_path, output_dir=tmp_path / "b", tile_px=256)
    want = _stored(plain, "sentinel2_l2a").astype(np.int32) + moved
    got = _stored(done, "sentinel2_l2a")
    np.testing.assert_array_equal(got, want)
    assert got.dtype.kind in "iu"


def test_the_page_names_the_bands_of_every_file():
    page = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text()
    for name in registry.all_names():
        modality = registry.get(name)
        if not modality.from_csv or not modality.in_sample or name == "gse":
            continue
        for resolution, channels in tree.files_of(modality).items():
            bands = ", ".join(modality.bands[c] for c in channels)
            row = f"| {tree.stem(modality)} | {tree.resolution_text(resolution)} | {bands} |"
            assert row in page, row


def _scene(name: str, **changes: Any) -> list[np.ndarray]:
    """Plausible rasters [C, 64, 64] of a modality's files; `spoil` and `share` put a value in."""
    modality, draw = registry.get(name), np.random.default_rng(3)
    out = []
    for bands in tree.files_of(modality).values():
        count = len(bands) * (12 if modality.multitemporal else 1)
        values = plausible(draw.integers(1, 200, (count, 64, 64)), name)
        out.append(values.astype(changes.get("dtype", modality.source_dtype or "float32")))
    if "spoil" in changes:
        flat = out[-1].reshape(-1)
        flat[: int(changes["share"] * flat.size)] = changes["spoil"]
    return out


def _write_scene(folder: Path, name: str, cell: Cell = CELL, **changes: Any) -> list[Path]:
    files = tree.files_of(registry.get(name))
    paths = [_path(folder, name, cell, resolution) for resolution in files]
    for path, values in zip(paths, _scene(name, **changes), strict=True):
        write_raster(path, values)
    return paths


@pytest.mark.parametrize(
    ("name", "dtype", "spoil", "share", "says"),
    [
        ("sentinel2_l2a", "uint16", 65535, 0.01, "holds 65535 in 1.00%"),
        ("sentinel2_l2a", "int16", -9999, 0.001, "holds -9999 in 0.10%"),
        ("sentinel2_l2a", "uint16", 40000, 0.05, "-1000..30000 .* 5.00% .* such as 40000"),
        ("sentinel2_l2a", "uint16", 65000, 0.5, "stored without a sign"),
        ("sentinel2_l2a", "float32", 0.3, 1.0, "like reflectance in 0..1"),
        ("landsat", "int32", -9999, 0.01, "holds -9999 in 1.00%"),
        ("srtm", "int16", -32768, 0.01, "holds -32768 in 0.98%"),
        ("worldcover", "uint8", 15, 0.01, "one of 10, .* 0.98% .* such as 15"),
        ("worldcereal", "float32", 254, 0.01, "holds 254 in 1.00%"),
        ("wri_canopy_height_map", "uint8", 255, 0.01, "holds 255 in 0.98%"),
        ("sentinel1", "float32", -9999, 0.001, "holds -9999 in 0.10%"),
        ("sentinel1", "uint16", 300, 0.9, "median is 300, like counts"),
    ],
)
def test_values_that_cannot_be_stop_the_conversion(tmp_path, name, dtype, spoil, share, says):
    make_tree(tmp_path, tiles=2)
    others = {"sentinel1", "worldcover", "srtm"}
    if name not in others:
        starts = [month(i) for i in range(12)]
        cells = [CELL, Cell(CELL.crs, 101, -2000)]
        add_modality(
            tmp_path, name, cells, starts if registry.get(name).multitemporal else starts[:1]
        )
    path = _write_scene(tmp_path, name, dtype=dtype, spoil=spoil, share=share)[-1]
    with pytest.raises(ValueError, match=f"1 of 2 tiles .*{path.name}: .*{says}") as told:
        _convert(tmp_path)
    assert "pass --nocheck_units" in str(told.value)
    assert not list(tmp_path.glob("out/**/*.h5"))
    settings = Settings(tmp_path, tmp_path / "out", storage=Storage("zstd", 1))
    assert convert(settings, check_units=False).samples == 8
    with pytest.raises(ValueError, match=says):  # a record of a look that did not judge is none
        convert(settings)
    assert convert(settings, skip_unreadable=True).samples == 4


@pytest.mark.filterwarnings("ignore:Dataset has no geotransform")
def test_odd_values_are_told_once_for_each_modality(tmp_path):
    make_tree(tmp_path, tiles=3)
    cells = [Cell(CELL.crs, 100 + k, -2000) for k in range(3)]
    add_modality(tmp_path, "sentinel2_l2a", cells, [month(i) for i in range(12)])
    add_modality(tmp_path, "worldcereal", cells, [month(0)])
    for cell in cells:
        _write_scene(tmp_path, "worldcereal", cell)  # averages of its codes
    for cell in cells[1:]:
        for path in _write_scene(tmp_path, "sentinel2_l2a", cell):
            with rasterio.open(path, "r+") as file:
                values = file.read()
                values[:, :20] = 0
                file.write(values)
    said: list[str] = []
    settings = Settings(tmp_path, tmp_path / "out", storage=Storage("zstd", 1))
    convert(settings, say=said.append)
    warned = [line for line in said if line.startswith("warning: ")]
    assert [line for line in warned if "sentinel2_l2a" in line] == [
        f"warning: 2 of 3 tiles, such as {cells[1]}: sentinel2_l2a: 31% of the values are 0. If "
        "that stands for missing data, declare it as the nodata value of the file"
    ]
    (cereal,) = [line for line in warned if "worldcereal" in line]
    assert "lie between its codes 0 and 100" in cereal and len(warned) == 2
    again: list[str] = []
    convert(settings, say=again.append)
    assert [line for line in again if line.startswith("warning: ")] == warned


@pytest.mark.filterwarnings("ignore:Dataset has no geotransform")
def test_declared_nodata_is_not_judged(tmp_path):
    make_tree(tmp_path, tiles=1)
    add_modality(tmp_path, "landsat", [CELL], [month(i) for i in range(12)])
    for path in _write_scene(tmp_path, "landsat", dtype="int32", spoil=-9999, share=0.01):
        with rasterio.open(path, "r+") as file:
            file.nodata = -9999
    assert _convert(tmp_path).samples == 4
