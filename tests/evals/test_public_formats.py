"""Readers of public data sets, on files written in their published layouts."""

import csv
import json
from typing import Any

import h5py
import numpy as np
import pyarrow
import pytest
import rasterio
from pyarrow import parquet

from olmoearth_jax.configlib import tasks
from olmoearth_jax.data.sample import sample_dataset_dir
from olmoearth_jax.evals import runner
from olmoearth_jax.evals.datasets import open_split, pretrain, series
from olmoearth_jax.evals.models import RawBands
from olmoearth_jax.evals.samples import MASK
from tools import convert_evals
from tools.evaldata import floods, geobench2, mados

from .builders import task

RNG = np.random.default_rng(0)


def _togo(root, count=10):
    arrays = root / "features" / "arrays"
    arrays.mkdir(parents=True)
    features = []
    for i in range(count):
        about = {"index": i, "dataset": "togo", "is_crop": i % 2, "is_test": False}
        features.append({"properties": about})
        with h5py.File(arrays / f"{i}_togo.h5", "w") as f:
            f["array"] = RNG.uniform(0, 4000, (12, 18))
    features.append({"properties": {"index": 99, "dataset": "kenya", "is_crop": 1}})
    (root / "labels.geojson").write_text(json.dumps({"features": features}))
    (root / "test_features").mkdir()
    with h5py.File(root / "test_features" / "togo-eval.h5", "w") as f:
        f["x"], f["y"] = RNG.uniform(0, 4000, (4, 12, 18)), np.array([0.0, 1, 1, 0])


def test_cropharvest(monkeypatch, tmp_path):
    _togo(tmp_path)
    monkeypatch.setenv("CROPHARVEST_DIR", str(tmp_path))
    both = ["sentinel1", "sentinel2_l2a"]
    settings = task("cropharvest_togo", input_modalities=both, patch_size=1)
    splits = {s: open_split("t", settings, s) for s in ("train", "valid", "test")}
    assert [len(s) for s in splits.values()] == [8, 2, 4]
    train, valid = (splits[s] for s in ("train", "valid"))
    assert not {p for p, _ in train.items} & {p for p, _ in valid.items}
    for reader in splits.values():
        sample, label = reader[0]
        assert sample["sentinel2_l2a"].shape == (1, 1, 12, 12) and label in (0, 1)
        assert sample["sentinel1"].shape == (1, 1, 12, 2)
        assert sample["timestamps"][0].tolist() == [1, 1, 2019]
        assert sample["timestamps"][-1].tolist() == [1, 0, 2020]
    with pytest.raises(ValueError, match="a series must be"):
        train.read((np.zeros((12, 3)), 0))


def test_sickle(monkeypatch, tmp_path):
    rows = [("train", 7, 3), ("val", 8, 4), ("test", 9, 5)]
    with open(tmp_path / "sickle_dataset_tabular.csv", "w", newline="") as f:
        out = csv.writer(f)
        out.writerow(["UNIQUE_ID", "PLOT_ID", "STANDARD_SEASON", "YEAR", "SPLIT"])
        out.writerows([(uid, plot, "Jun-Nov", 2019, split) for split, uid, plot in rows])
    names = ["B1", "B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A", "B9", "B11", "B12"]
    masks = tmp_path / "masks" / "yield_distributed" / "10m"
    masks.mkdir(parents=True)
    for _, uid, plot in rows:
        folder = tmp_path / "images" / "S2" / "npy" / str(uid)
        folder.mkdir(parents=True)
        for day in ("20190605", "20190615", "20190801", "20180101"):
            bands: dict[str, Any] = {n: RNG.uniform(1, 4000, (36, 36)).astype("f4") for n in names}
            np.savez(folder / f"{day}T050659_20190605T051541_T44PKS.npz", **bands)
        mask = np.zeros((2, 32, 32), "f4")
        mask[:, :8], mask[:, 8:16] = [[[plot]], [[1]]], [[[plot]], [[4]]]
        mask[:, 16:20] = [[[77]], [[1]]]
        with rasterio.open(
            masks / f"{uid}.tif", "w", driver="GTiff", width=32, height=32, count=2,
            dtype="float32", transform=rasterio.Affine(10, 0, 0, 0, -10, 320),
        ) as out:  # fmt: skip
            out.write(mask)
    monkeypatch.setenv("SICKLE_DIR", str(tmp_path))
    sample, label = open_split("t", task("sickle"), "train")[0]
    assert sample["sentinel2_l2a"].shape == (32, 32, 2, 12)
    assert sample["timestamps"].tolist() == [[1, 5, 2019], [1, 7, 2019]]
    assert (label[:8] == 0).all() and (label[8:16] == 1).all() and (label[16:] == -1).all()
    with pytest.raises(ValueError, match="names no date"):
        series.acquisition(tmp_path / "image.npz")


def test_breizhcrops(monkeypatch, tmp_path):
    monkeypatch.setenv("BREIZHCROPS_DIR", str(tmp_path))
    (tmp_path / "classmapping.csv").write_text(
        ",code,id,classname\n0,ORH,0,barley\n1,BTH,1,wheat\n"
    )
    folder = tmp_path / "2017" / "L1C"
    folder.mkdir(parents=True)
    days = np.datetime64("2017-01-10", "ns") + np.arange(8) * np.timedelta64(20, "D")
    series = np.column_stack([RNG.uniform(0, 9000, (8, 16)), days.astype("int64")])
    for region in ("frh01", "frh02", "frh03", "frh04"):
        (folder / f"{region}.csv").write_text(
            f"idx,CODE_CULTU,path,sequencelength\n0,BTH,{region}/a,8\n1,ZZZ,{region}/b,8\n"
        )
        with h5py.File(folder / f"{region}.h5", "w") as f:
            f[f"{region}/a"] = series
    settings = task("breizhcrops", patch_size=1)
    reader = open_split("t", settings, "train")
    sample, label = reader[0]
    assert len(reader) == 2 and label == 1
    assert sample["sentinel2_l2a"].shape == (1, 1, 5, 12)
    assert sample["timestamps"][:, 1].tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="no label fractions"):
        open_split("t", task("breizhcrops", patch_size=1, label_fraction=0.1), "train")


def test_geobench2(monkeypatch, tmp_path):
    folder = tmp_path / "burn_scars" / "train"
    folder.mkdir(parents=True)
    label = RNG.integers(-1, 2, (8, 8))
    np.savez(folder / "0.npz", image=RNG.uniform(0, 1, (6, 8, 8)), label=label)
    np.savez(folder / "1.npz", image=RNG.uniform(0, 1, (6, 8, 8)))
    np.savez(folder / "2.npz", picture=np.zeros((6, 8, 8)), label=label)
    np.savez(folder / "3.npz", image=np.full((6, 8, 8), np.nan), label=label)
    monkeypatch.setenv("GEOBENCH2_DIR", str(tmp_path))
    reader = open_split("t", task("gb2-burn_scars"), "train")
    sample, got = reader[0]
    assert np.array_equal(got, label) and not sample["sentinel2_l2a"][..., 3].any()
    assert np.isfinite(reader[3][0]["sentinel2_l2a"]).all()
    with pytest.raises(ValueError, match="holds no label"):
        reader[1]
    with pytest.raises(ValueError, match="lacks 'image'"):
        reader[2]


def test_the_pretraining_folder_itself():
    settings = task(
        "pretrain_subset_osm",
        h5py_dir=str(sample_dataset_dir()),
        pretrain_target_modality="openstreetmap_raster",
        pretrain_train_samples=10, pretrain_valid_samples=5, pretrain_test_samples=5,
    )  # fmt: skip
    splits = {s: open_split("t", settings, s) for s in ("train", "valid", "test")}
    assert [len(s) for s in splits.values()] == [10, 5, 5]
    sample, label = splits["train"][0]
    assert sample["sentinel2_l2a"].shape == (32, 32, 12, 12) and label.shape == (32, 32)
    mask = sample["sentinel2_l2a" + MASK]
    assert mask.shape == (32, 32, 12, 3)
    assert not mask[:, :, 0].any() and (mask[:, :, 1:] == 3).all()
    assert set(np.unique(label)) <= set(range(-1, 30))
    bare = task("pretrain_subset", h5py_dir=settings.h5py_dir, eval_mode="embedding_diagnostics")
    assert len(open_split("t", bare, "train")) == 68
    with pytest.raises(ValueError, match="split of 60 samples with labels is empty"):
        open_split("t", task(**{**vars(settings), "pretrain_train_samples": 60}), "valid")


def test_another_pretraining_folder_in_its_place_is_told_apart(tmp_path):
    """So that results of the one are not taken for those of the other."""
    found = []
    for rows in ("0,1", "0,1\n1,1"):
        (tmp_path / "sample_metadata.csv").write_text(f"sample_index,sentinel2_l2a\n{rows}\n")
        pretrain.state_of.cache_clear()  # as in a process of its own
        settings = task("pretrain_subset", h5py_dir=str(tmp_path), eval_mode="knn")
        info = tasks.dataset_info(settings.dataset)
        found.append(runner.describe(settings, info, RawBands(["sentinel2_l2a"]), tasks.DEFAULTS))
    assert found[0].pop("data_state") != found[1].pop("data_state") and found[0] == found[1]


def test_land_cover_codes_are_codes_in_every_tile():
    trees = np.full((4, 4, 1, 1), 10.0)
    assert (pretrain.worldcover_label(trees) == 0).all()
    assert (pretrain.worldcover_label(trees * 0 + 7) == -1).all()


def test_converted_scenes_of_floods_and_mados(tmp_path):

    def write(path, array):
        path.parent.mkdir(parents=True, exist_ok=True)
        with rasterio.open(
            path, "w", driver="GTiff", width=array.shape[-1], height=array.shape[-2],
            count=len(array), dtype=array.dtype, transform=rasterio.Affine(10, 0, 0, 0, -10, 0),
        ) as out:  # fmt: skip
            out.write(array)

    label = np.full((1, 512, 512), -1, "i2")
    label[0, 70:80, 70:80] = 1
    write(tmp_path / "LabelHand" / "Ghana_1_LabelHand.tif", label)
    write(tmp_path / "s1" / "Ghana_1_S1Hand.tif", RNG.normal(size=(2, 512, 512)).astype("f4"))
    (tmp_path / "split.csv").write_text("Ghana_1_S1Hand.tif,Ghana_1_LabelHand.tif\n")
    out = floods.convert(tmp_path, tmp_path / "split.csv")
    assert out["s1"].shape == (1, 2, 64, 64) and out["labels"].shape == (1, 1, 64, 64)
    with pytest.raises(ValueError, match="lacks Scene_3_L2R_rhorc_442_1.tif"):
        mados.convert_scene(tmp_path, "Scene_3_1")
    with pytest.raises(ValueError, match="not a scene"):
        mados.convert_scene(tmp_path, "3_1")


def _tortilla(samples):
    """Bytes of a tortilla of (row, bytes of the item) pairs."""
    body, rows = bytearray(geobench2.HEADER.size), []
    for row, data in samples:
        rows.append({**row, "tortilla:offset": len(body), "tortilla:length": len(data)})
        body += data
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    footer = sink.getvalue().to_pybytes()
    body[: geobench2.HEADER.size] = geobench2.HEADER.pack(b"#y", len(body), len(footer))
    return bytes(body) + footer


def _tiff(array):
    with rasterio.MemoryFile() as memory:
        with memory.open(
            driver="GTiff", width=array.shape[-1], height=array.shape[-2], count=len(array),
            dtype=array.dtype, transform=rasterio.Affine(10, 0, 0, 0, -10, 0),
        ) as out:  # fmt: skip
            out.write(array)
        return bytes(memory.getbuffer())


def test_tortillas_that_are_unpacked_again(monkeypatch, tmp_path):
    """Neither a half of a conversion nor what is left of a larger one is read as data."""
    scene = _tortilla(
        [({}, _tiff(np.ones((6, 16, 16), "f4"))), ({}, _tiff(np.ones((1, 16, 16), "i2")))]
    )
    (tmp_path / "in").mkdir()

    def convert(count):
        whole = _tortilla([({"tortilla:data_split": "train"}, scene)] * count)
        (tmp_path / "in" / "geobench_burn_scars.tortilla").write_bytes(whole)
        geobench2.convert(tmp_path / "in", tmp_path / "out")

    def stored():
        return sorted(p.name for p in (tmp_path / "out" / "burn_scars").rglob("*.npz"))

    original, left = geobench2.read_sample, [True]
    monkeypatch.setattr(geobench2, "read_sample", lambda *a: left.pop() and original(*a))
    with pytest.raises(IndexError):
        convert(3)
    assert not (tmp_path / "out" / "burn_scars" / "train").exists()
    monkeypatch.setattr(geobench2, "read_sample", original)
    for count in (3, 1):
        convert(count)
        assert stored() == [f"{n}.npz" for n in range(count)]


@pytest.mark.parametrize(
    ("what", "files", "said"),
    [
        ("pastis", {"metadata.geojson": "[]"}, "is not of the form that is expected"),
        ("pastis", {"metadata.geojson": '{"features": [{"properties": {}}]}'}, "KeyError: 'Fold'"),
        (
            "floods",
            {"a/flood_x_data.csv": "", "b/flood_x_data.csv": ""},
            "holds several flood_x_data",
        ),
    ],
)
def test_published_data_of_another_form(tmp_path, capsys, what, files, said):
    for name, text in files.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text(text)
    given = [what, f"--source={tmp_path / 'in'}", f"--target={tmp_path / 'out'}"]
    assert convert_evals.main(given) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and said in err


def test_tortillas_unpack_into_what_the_reader_takes(monkeypatch, tmp_path):
    image = RNG.uniform(0, 1, (6, 16, 16)).astype("f4")
    label = RNG.integers(-1, 2, (1, 16, 16)).astype("i2")
    scene = _tortilla([({"tortilla:id": "image"}, _tiff(image)), ({}, _tiff(label))])
    splits = ("train", "train", "validation", "test")
    whole = _tortilla([({"tortilla:data_split": s}, scene) for s in splits])
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "geobench_burn_scars.tortilla").write_bytes(whole)
    trees = [{"species_labels": ["Abies", "Tilia"]}, {}, {}]
    forest = _tortilla([(row, _tiff(np.ones((12, 6, 6), "f4"))) for row in trees])
    forest = _tortilla([({"tortilla:data_split": "train"}, forest)])
    (tmp_path / "in" / "geobench_treesatai.tortilla").write_bytes(forest)
    counts = geobench2.convert(tmp_path / "in", tmp_path / "out")
    assert counts["burn_scars/train"] == 2 and counts["treesatai/train"] == 1
    monkeypatch.setenv("GEOBENCH2_DIR", str(tmp_path / "out"))
    sizes = [len(open_split("t", task("gb2-burn_scars"), s)) for s in ("train", "valid", "test")]
    assert sizes == [2, 1, 1]
    sample, got = open_split("t", task("gb2-burn_scars"), "train")[1]
    assert np.array_equal(got, label[0]) and sample["sentinel2_l2a"].shape == (16, 16, 1, 12)
    _, species = open_split("t", task("gb2-treesatai", eval_mode="knn"), "train")[0]
    assert np.flatnonzero(species).tolist() == [0, 14]
    (tmp_path / "in" / "geobench_treesatai.tortilla").write_bytes(b"no tortilla at all, at length")
    with pytest.raises(ValueError, match="is no tortilla file"):
        geobench2.convert(tmp_path / "in", tmp_path / "again")
    with pytest.raises(ValueError, match="holds no geobench_<name>.tortilla"):
        geobench2.convert(tmp_path / "out", tmp_path / "again")


def test_a_geographic_split_of_unknown_places():
    """They lay in a block of their own, in which whoever is there is near to nobody."""
    places = np.array([[1.0, 2.0], [np.nan, 2.0], [50.0, 60.0]])
    with pytest.raises(ValueError, match="needs the place of every sample"):
        pretrain.geographic_split(np.arange(3), places, (1, 1, 1), 5.0, 0)
    with pytest.raises(ValueError, match="the valid split"):  # the others alone are too few
        pretrain.geographic_split(np.array([0, 2]), places, (1, 1, 1), 5.0, 0)
