"""Maps and embedding files: what is written is what the model gives, where it belongs."""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
import rasterio
from rasterio.enums import ColorInterp

import olmoearth_jax
from olmoearth_jax.data.rasters import Stack, read_manifest, scaled
from olmoearth_jax.inference import domain, quantize
from olmoearth_jax.interop import checkpoints
from olmoearth_jax.maps import cogs
from tests.inference.test_model import S2, weights_of
from tools import embed

# rasterio multiplies affine maps in a way that newer versions of that package discourage.
pytestmark = pytest.mark.filterwarnings("ignore:Use `@` matmul:PendingDeprecationWarning")

CORNER = rasterio.Affine(10, 0, 500_000, 0, -10, 5_400_000)
SHAPE = (20, 25)


def write(path, x, names, nodata=None, crs: str | None = "EPSG:32633", transform=CORNER):
    form = {"count": len(x), "height": x.shape[1], "width": x.shape[2], "dtype": x.dtype}
    with rasterio.open(
        path, "w", driver="GTiff", crs=crs, transform=transform, nodata=nodata, **form
    ) as file:
        file.write(x)
        file.descriptions = names


@pytest.fixture(scope="module")
def images():
    rng = np.random.Generator(np.random.Philox(8))
    optical = rng.integers(200, 4000, (12, *SHAPE)).astype(np.uint16)
    optical[:, :5, :9] = 0  # no data: the whole first patch and parts of its neighbours
    return optical, rng.uniform(-25, -5, (2, *SHAPE)).astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, images):
    out = tmp_path_factory.mktemp("embed")
    checkpoints.write(weights_of(), out / "model")
    order = np.random.Generator(np.random.Philox(1)).permutation(12)
    write(out / "s2.tif", images[0][order], [S2[i] for i in order], 0)
    write(out / "s1.tif", images[1], ["vv", "vh"])
    rows = [{"path": "s2.tif", "date": "2021-04"}, {"path": "s1.tif", "date": "2021-04"}]
    (out / "both.json").write_text(json.dumps(rows))
    return out


def options(folder, source, to, **change) -> embed.Options:
    base = embed.Options(str(folder / "model"), [str(folder / source)], str(folder / to))
    return dataclasses.replace(base, **change)


def test_map_is_what_the_model_gives(folder, images):
    o = options(folder, "s2.tif", "out/map.tif", dates=["2021-04-15"])
    assert "map.tif (5 x 7)" in embed.run(o)[0]
    model = olmoearth_jax.load_pretrained(folder / "model")
    x = np.moveaxis(images[0].astype(np.float32), 0, -1)[:, :24, None]
    x[x == 0] = np.nan
    sample = olmoearth_jax.Sample.from_arrays(
        {"sentinel2_l2a": x}, ["2021-04-15"], bands={"sentinel2_l2a": S2}, nan_pixels="mask"
    )
    expected = model.embed(sample, 4, "spatial")[0]
    with rasterio.open(folder / "out/map.tif") as file:
        got, tags = np.moveaxis(file.read(), 0, -1), file.tags()
        assert file.crs == "EPSG:32633" and file.transform == scaled(CORNER, 4)
        assert np.isnan(file.nodata) and file.descriptions[0] == "e000"
        assert file.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
    empty = np.zeros((5, 6), bool)
    empty[:2, :3] = True
    assert np.isnan(got[:, 6:]).all()  # the last column of pixels is no whole patch
    got = got[:, :6]
    np.testing.assert_array_equal(np.isnan(got).all(-1), empty)
    np.testing.assert_allclose(got[~empty], expected[~empty], rtol=1e-4, atol=1e-5)
    assert tags["MODEL_DIGEST"] == model.digest and tags["PATCH_SIZE"] == "4"
    assert tags["POOLING"] == "spatial" and "sentinel2_l2a" in tags["NORMALIZATION"]
    item = json.loads((folder / "out/map.json").read_text())
    assert item["assets"]["embeddings"]["href"] == "./map.tif"
    assert item["properties"]["datetime"] == "2021-04-15T00:00:00Z"
    assert item["properties"]["proj:shape"] == [5, 7] and item["bbox"][0] == pytest.approx(15)
    assert sorted(p.name for p in (folder / "out").iterdir()) == ["map.json", "map.tif"]


@pytest.mark.parametrize("rule", quantize.QUANTIZATIONS)
def test_int8_and_tiles(folder, rule):
    tiles = {"tile": 16, "overlap": 8, "batch_size": 3}
    embed.run(options(folder, "both.json", "float.tif", **tiles))
    embed.run(options(folder, "both.json", "int8.tif", dtype="int8", quantization=rule, **tiles))
    with rasterio.open(folder / "float.tif") as a, rasterio.open(folder / "int8.tif") as b:
        x, q = a.read()[..., :6], b.read()[..., :6].astype(np.float32)
        assert b.dtypes[0] == "int8" and b.nodata == -128 and b.tags()["QUANTIZATION"]
        scale, offset = (np.array(v)[:, None, None] for v in (b.scales, b.offsets))
    assert not np.isnan(x).any()  # radar is everywhere
    if rule == "linear":
        assert (np.abs(q * scale + offset - x) <= 0.501 * scale).all()
    else:
        s = q / 127.5
        inside = np.abs(x) < 0.99
        assert np.abs(np.sqrt(np.abs(s * s)) - np.sqrt(np.abs(x)))[inside].max() < 0.004
        assert (np.sign(s) == np.sign(x))[inside & (np.abs(x) > 1e-4)].all()


def test_maps_replace_maps_and_nothing_else(folder):
    o = options(folder, "s2.tif", "again.tif", dates=["2021-04-15"])
    assert embed.run(o)[0] == embed.run(o)[0]
    (folder / "again.json").write_text('[{"path": "mine.tif"}]')
    with pytest.raises(ValueError, match="again.json exists and was not written by this program"):
        embed.run(o)
    embed.run(dataclasses.replace(o, overwrite=True))
    for to, change in (("s2.tif", {}), ("both.tif", {"input": [str(folder / "both.json")]}),
                       ("model/ATTRIBUTION.tif", {})):  # fmt: skip
        o = options(folder, "s2.tif", to, dates=["2021-04-15"], overwrite=True)
        if to.startswith("model"):
            (folder / "model" / "ATTRIBUTION.json").write_text("{}")
        with pytest.raises(ValueError, match="would replace one of the inputs"):
            embed.run(dataclasses.replace(o, **change))


def test_tiles_cover_the_axis_once():
    for side, tile, overlap in ((100, 40, 8), (40, 40, 8), (44, 40, 8), (36, 16, 8), (8, 64, 16)):
        tiles = domain.tiles_of(side, tile, overlap, 4)
        assert [t.first for t in tiles] == [0, *(t.last for t in tiles[:-1])]
        assert tiles[-1].last == side and len({t.stop - t.start for t in tiles}) == 1
        for t in tiles:
            assert t.start == 0 or t.first - t.start >= overlap // 2
            assert t.stop == side or t.stop - t.last >= overlap // 2
    with pytest.raises(ValueError, match="whole patches of 4"):
        domain.tiles_of(100, 40, 12, 4)


def test_samples_of_arrays(folder, images):
    x = np.moveaxis(images[0].astype(np.float32), 0, -1)[None, :16, 9:25, None].repeat(3, 0)
    x[1] = np.nan
    arrays = {"sentinel2_l2a": x[..., ::-1], "bands_sentinel2_l2a": np.array(S2[::-1])}
    np.savez(folder / "chips.npz", dates=np.array(["2021-04-15"]), **arrays)
    o = options(folder, "chips.npz", "out.npz", batch_size=2)
    embed.run(o)
    with np.load(folder / "out.npz") as out:
        assert out["embeddings"].shape == (3, 4, 4, 16) and out["ids"].tolist() == ["0", "1", "2"]
        assert out["valid"].reshape(3, -1).all(1).tolist() == [True, False, True]
        np.testing.assert_allclose(out["embeddings"][0], out["embeddings"][2], atol=1e-5)
        whole = out["embeddings"]
    embed.run(dataclasses.replace(o, output=str(folder / "out.safetensors"), dtype="int8"))
    from safetensors.numpy import load_file

    small = load_file(folder / "out.safetensors")
    back = small["embeddings"] * small["scale"] + small["offset"]
    assert (np.abs(back - whole)[[0, 2]] <= 0.502 * small["scale"]).all()
    assert (small["embeddings"][1] == -128).all()
    embed.run(dataclasses.replace(o, pooling="instance"))
    with np.load(folder / "out.npz") as out:
        assert out["embeddings"].shape == (3, 16) and out["valid"].tolist() == [True, False, True]


def test_h5_folder(folder, capsys):
    from olmoearth_jax.data.sample import sample_dataset_dir

    for name in ("sample_0.h5", "sample_1.h5"):
        (folder / "h5").mkdir(exist_ok=True)
        (folder / "h5" / name).write_bytes((sample_dataset_dir() / name).read_bytes())
    (folder / "h5" / "._sample_0.h5").write_bytes(b"of a Mac")
    embed.run(options(folder, "h5", "h5.npz", pooling="instance"))
    assert "2 of 2 samples (100 %)" in capsys.readouterr().err
    with np.load(folder / "h5.npz") as out:
        assert out["ids"].tolist() == ["sample_0", "sample_1"]
        assert np.isfinite(out["embeddings"]).all() and out["embeddings"].std() > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output": "map.npz"}, "must end in .tif"),
        ({"input": ["absent.tif"]}, "there is no file"),
        ({"input": [".", ""]}, "there is no file ''"),
        ({"input": ["."], "dates": ["2023-06-15"]}, "no .h5 files; for GeoTIFFs give --name"),
        ({"pooling": "spatal"}, "did you mean 'spatial'"),
        ({"pooling": "instance"}, "makes no map"),
        ({"pooling": "student", "dates": ["2021-04-15"]}, "only models of v1.3 have"),
        ({"searchlight": True}, "goes with --pooling"),
        ({"dates": None}, "has no date"),
        ({"dates": ["2021-04-15", "2021-05-15"]}, "2 dates were given for 1 rasters"),
        ({"bands": ["B02"]}, "has 12 bands, of which 1 are named"),
        ({"bands": [*S2[:-1], "B10"], "modality": "sentinel2_l2a"}, "take no band B10"),
        ({"bands": [*S2[:-1], "B99"]}, "none has all of them"),
        ({"dates": ["2021-04-15"], "tile": 10}, "whole patches of 4"),
    ],
)
def test_refused(folder, change, message):
    base = {"dates": ["2021-04-15"]}
    with pytest.raises(ValueError, match=message):
        embed.run(options(folder, "s2.tif", "never.tif", **base | change))
    assert not (folder / "never.tif").exists()


def test_other_grids_and_units_are_refused(folder, images, tmp_path):
    def stack(*rows):
        (tmp_path / "m.csv").write_text("path,date\n" + "\n".join(f"{r},2021-04" for r in rows))
        with Stack(read_manifest(tmp_path / "m.csv")) as found:
            embed.check_values(options(folder, "m.csv", "never.tif"), found)

    coarse = scaled(CORNER, 2)
    write(tmp_path / "coarse.tif", images[1], ["vv", "vh"], transform=coarse)
    with pytest.raises(ValueError, match="have 20 m, but the models were trained on 10 m"):
        stack("coarse.tif")
    with pytest.raises(ValueError, match="lie on different grids"):
        stack(folder / "s2.tif", "coarse.tif")
    with pytest.raises(ValueError, match="pixels of different sizes"):
        stack(folder / "s1.tif", "coarse.tif")
    write(tmp_path / "none.tif", images[1], ["vv", "vh"], crs=None)
    with pytest.raises(ValueError, match="no coordinate reference system"):
        stack("none.tif")
    write(tmp_path / "linear.tif", 10 ** (images[1] / 10), ["vv", "vh"])
    with pytest.raises(ValueError, match="like linear power"):
        stack("linear.tif")
    (tmp_path / "m.csv").write_text("path,day\na.tif,3\n")
    with pytest.raises(ValueError, match="unknown member 'day'"):
        read_manifest(tmp_path / "m.csv")


def test_one_file_in_another_unit_is_named(folder, images, tmp_path):
    usual = images[0].astype(np.float32)
    write(tmp_path / "june.tif", usual / 10_000, S2)
    write(tmp_path / "picture.tif", (usual / 32).astype(np.uint8), S2)
    write(tmp_path / "fills.tif", np.where(usual == 0, -9999, usual), S2)
    for number in range(5):
        write(tmp_path / f"{number}.tif", images[0], S2, 0)
    usable = ",".join(str(tmp_path / f"{number}.tif") for number in range(5)).split(",")
    dates = [f"2021-0{month}" for month in range(1, 7)]
    for odd, said in (
        ("june", "june.tif: .* like reflectance in 0..1"),
        ("picture", "picture.tif: .* 8-bit picture"),
        ("fills", "holds -9999 in .* declare it as the nodata value of the file"),
    ):
        o = options(folder, "s2.tif", "never.tif", dates=dates)
        o = dataclasses.replace(o, input=[*usable, str(tmp_path / f"{odd}.tif")])
        with pytest.raises(ValueError, match=f"{said}.*--nocheck_units"):
            embed.run(o)


def test_flags_that_would_do_nothing_are_refused(folder, images):
    x = np.moveaxis(images[0], 0, -1)[None, :, :, None]
    np.savez(folder / "arrays.npz", sentinel2_l2a=x, dates=["2021-04-15"], bands_sentinel2_l2a=S2)
    for change in ({"dates": ["2021-05-15"]}, {"bands": S2}, {"modality": "landsat"}, {"tile": 8}):
        (flag,) = change
        with pytest.raises(ValueError, match=f"--{flag} goes with rasters"):
            embed.run(options(folder, "arrays.npz", "never.npz", **change))


def test_the_parts_of_a_virtual_raster_are_inputs(folder, tmp_path):
    import rasterio.shutil

    part, whole = tmp_path / "part.tif", tmp_path / "whole.vrt"
    part.write_bytes((folder / "s2.tif").read_bytes())
    rasterio.shutil.copy(part, whole, driver="VRT")
    o = options(folder, whole, "map.tif", dates=["2021-04-15"], overwrite=True)
    with pytest.raises(ValueError, match="would replace one of the inputs"):
        embed.run(dataclasses.replace(o, output=str(part)))
    assert part.read_bytes() == (folder / "s2.tif").read_bytes()


def test_a_failed_map_leaves_nothing(tmp_path):
    form = {"height": 2, "width": 2, "dtype": "float32", "crs": rasterio.CRS.from_epsg(32633),
            "transform": CORNER}  # fmt: skip
    with pytest.raises(RuntimeError), cogs.open_map(tmp_path / "a.tif", form, ["e"], {}) as writer:
        writer.write(0, 0, np.ones((2, 2, 1)), np.ones((2, 2), bool))
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    with (
        pytest.raises(ValueError, match="not known for a map"),
        cogs.open_map(tmp_path / "a.tif", form | {"dtype": "int16"}, ["e"], {}),
    ):
        pass


def test_footprints_across_180_degrees():
    form = {"height": 5000, "width": 5000, "dtype": "float32", "transform": CORNER}
    places = {"EPSG:3832": (10, 3.3e6, 1e6), "EPSG:4326": (4e-4, 179, 10)}
    for crs, (size, x, y) in places.items():
        place = rasterio.Affine(size, 0, x, 0, -size, y)
        item = cogs.stac_item(
            "a.tif", form | {"crs": rasterio.CRS.from_user_input(crs), "transform": place}, ["e"],
            {}, [],
        )  # fmt: skip
        west, south, east, north = item["bbox"]
        assert west > 178 and east < -178 and south < north
        rings = [p[0] for p in item["geometry"]["coordinates"]]
        assert item["geometry"]["type"] == "MultiPolygon" and len(rings) == 2
        assert [max(p[0] for p in r) - min(p[0] for p in r) for r in rings] == pytest.approx(
            [180 - west, east + 180]
        )


def test_a_map_in_a_local_system_has_no_footprint(folder, images, tmp_path):
    local = 'LOCAL_CS["site",UNIT["metre",1],AXIS["Easting",EAST],AXIS["Northing",NORTH]]'
    write(tmp_path / "site.tif", images[0], S2, 0, local)
    o = options(folder, tmp_path / "site.tif", "site.tif", dates=["2021-04-15"])
    with pytest.raises(ValueError, match="'site' is a local one.*--any_pixel_size if it is 10 m"):
        embed.run(o)
    embed.run(dataclasses.replace(o, any_pixel_size=True))
    item = json.loads((folder / "site.json").read_text())
    assert item["geometry"] is None and "bbox" not in item
    assert "site" in item["properties"]["proj:wkt2"]


FAULTS = ("rotated", "elsewhere", "other system", "scaled", "complex")


def draw_raster(path, rng, x, names, top, fault):
    """Writes bands [C, h, w] of which 0 is missing in a way drawn at random."""
    t = rasterio.Affine(10, 0, CORNER.c, 0, -10, CORNER.f - 10 * top)
    if rng.random() < 0.5:
        x, t = x[:, ::-1], t @ rasterio.Affine(1, 0, 0, 0, -1, x.shape[1])
    if rng.random() < 0.5:
        x, t = x[..., ::-1], t @ rasterio.Affine(-1, 0, x.shape[2], 0, 1, 0)
    crs = ["EPSG:32633", rasterio.CRS.from_epsg(32633).to_wkt(version="WKT1_ESRI")]
    crs = "EPSG:32733" if fault == "other system" else crs[rng.integers(2)]
    kind = str(rng.choice(["uint16", "int16", "int32", "float32", "float64"]))
    way = str(rng.choice(["zero", "value", "mask", "alpha", *(["nan"] if kind[0] == "f" else [])]))
    gone, kinds = x == 0, None
    form: dict[str, Any] = {}
    y = x.astype(np.float64)
    y[gone] = {"value": -9999 if kind != "uint16" else 65535, "nan": np.nan}.get(way, 0)
    if way in ("zero", "value", "nan"):
        form = {"nodata": float(y[gone][0]) if gone.any() else None}
    if way == "alpha":
        y = np.concatenate([y, 255.0 * ~gone[:1]])
        kinds = [ColorInterp.undefined] * len(x) + [ColorInterp.alpha]
    kind = "complex64" if fault == "complex" else kind
    t = t @ rasterio.Affine.rotation(2) if fault == "rotated" else t
    t = t @ rasterio.Affine.translation(0.4, 0) if fault == "elsewhere" else t
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(
        path, "w", driver="GTiff", crs=crs, transform=t, count=len(y), height=y.shape[1],
        width=y.shape[2], dtype=kind, **form,
    ) as file:  # fmt: skip
        if kinds:
            file.colorinterp = kinds
        file.write(y.astype(kind))
        file.descriptions = (*names, None) if way == "alpha" else tuple(names)
        if fault == "scaled" or rng.random() < 0.4:
            file.scales = (0.5 if fault == "scaled" else 1e-4,) * len(y)
        if way == "mask":
            file.write_mask(~gone[0])
    return str(path)


def draw_rasters(folder, rng, x, faulty):
    """The files of an image in a way drawn at random, one of them with a fault if asked for."""
    groups = np.array_split(rng.permutation(12), rng.integers(1, 4))
    cut = int(rng.integers(0, x.shape[1]))
    spans = [slice(0, None)] if cut < 6 else [slice(0, cut), slice(cut - 2, None)]
    work = [(group, span) for group in groups for span in spans]
    bad = int(rng.integers(len(work))) if faulty else -1
    out = []
    for k, (group, span) in enumerate(work):
        names = [S2[i] for i in group]
        if rng.random() < 0.5:
            names = [n.replace("B0", "B") for n in names]
        fault = str(rng.choice(FAULTS)) if k == bad else ""
        part = folder / f"{k}.tif"
        out.append(draw_raster(part, rng, x[group, span], names, span.start, fault))
    return [out[k] for k in rng.permutation(len(out))]


@pytest.mark.parametrize("seed", range(10))
def test_any_storage_gives_the_map_of_the_plain_file(folder, images, tmp_path, seed):
    rng = np.random.default_rng(seed)
    plain = options(folder, "s2.tif", "plain.tif", dates=["2021-04-15"])
    if not (folder / "plain.tif").exists():
        embed.run(plain)
    with rasterio.open(folder / "plain.tif") as file:
        expected, form = file.read(), file.profile
    faulty = seed % 3 == 0
    files = draw_rasters(tmp_path, rng, images[0], faulty)
    o = options(folder, "", tmp_path / "drawn.tif", modality="sentinel2_l2a")
    o = dataclasses.replace(o, input=files, dates=["2021-04-15"] * len(files))
    if faulty:
        with pytest.raises(ValueError):
            embed.run(o)
        assert not (tmp_path / "drawn.tif").exists()
        return
    embed.run(o)
    with rasterio.open(tmp_path / "drawn.tif") as file:
        assert (file.transform, file.crs) == (form["transform"], "EPSG:32633")
        np.testing.assert_allclose(file.read(), expected, rtol=1e-4, atol=1e-5)


def test_what_is_said_beside_the_map(folder, images, tmp_path, capsys):
    left, right = images[0].copy(), images[0].copy()
    left[:, :, 10:], right[:, :, :8] = 0, 0
    rasters = tmp_path / "scenes"
    rasters.mkdir()
    for name, x in (("left", left), ("right", right)):
        write(rasters / f"sentinel2_l2a_20210415_{name}.tif", x, S2, 0)
    (rasters / "notes.txt").write_text("mine")
    o = options(folder, rasters, "scenes.tif", name="{modality}_{date}_{tile}.tif")
    written, *notes = embed.run(o)
    assert "scenes.tif (5 x 7)" in written and "tiles (100 %)" in capsys.readouterr().err
    assert "2 rasters put together" in notes[0]
    assert "no embedding for 0 pixels at the bottom and 1 pixels at the right" in notes[1]
    assert "1 files are not named like" in notes[2] and "notes.txt" in notes[2]
    embed.run(options(folder, "s2.tif", "plain.tif", dates=["2021-04-15"]))
    with rasterio.open(folder / "plain.tif") as a, rasterio.open(folder / "scenes.tif") as b:
        np.testing.assert_array_equal(a.read(), b.read())
    with pytest.raises(ValueError, match="--name goes with one folder"):
        embed.run(options(folder, "s2.tif", "never.tif", name="{date}.tif"))
    with pytest.raises(ValueError, match="give --name"):
        embed.run(options(folder, rasters, "never.npz"))
