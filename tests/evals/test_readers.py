"""Reading evaluation data: layouts, unsafe files, missing folders, labels out of range."""

import json
import pickle
import zipfile
from typing import Any

import h5py
import numpy as np
import pytest
import rasterio

from olmoearth_jax.configlib import tasks
from olmoearth_jax.evals.datasets import (
    DataUnavailable,
    archives,
    open_split,
    tensors,
    why_unavailable,
)
from olmoearth_jax.evals.datasets.base import partition_name, read_json
from olmoearth_jax.evals.samples import MASK
from olmoearth_jax.interop import torch_file
from olmoearth_jax.interop.plain_pickle import PickleRefused
from tools.evaldata import pastis
from tools.goldens.evals_data import data_folders

from .builders import task, write_windows
from .test_eval_goldens import HERE


class Evil:
    def __reduce__(self):
        return (eval, ("1 + 1",))


def test_pickles_that_ask_for_anything_else_are_refused():
    for value in (Evil(), {"a": [Evil()]}, np.savetxt):
        with pytest.raises(PickleRefused, match="asks for"):
            archives.loads(pickle.dumps(value), "file.pkl")
    with pytest.raises(ValueError, match="file.pkl is not a readable pickle"):
        archives.loads(b"\x80\x04nonsense", "file.pkl")
    with pytest.raises(ValueError, match="not a bytes literal"):
        archives.loads_literal("__import__('os')", "attribute")


def test_plain_data_and_arrays_are_unpickled():
    value = {"x": np.arange(5), "y": [1.5, "a", None], "z": np.float32(2)}
    back = archives.loads(pickle.dumps(value), "file.pkl")
    assert np.array_equal(back["x"], value["x"]) and back["y"] == value["y"] and back["z"] == 2


def test_torch_archives_hold_tensors_only(tmp_path):
    path = tmp_path / "evil.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("evil/data.pkl", pickle.dumps(Evil()))
    with pytest.raises(PickleRefused, match="tensors never need"):
        archives.load_torch(path)
    path.write_bytes(b"no archive")
    with pytest.raises(ValueError, match="not a torch archive"):
        archives.load_torch(path)
    table = archives.load_torch(HERE / "files" / "mados" / "MADOS_val.pt")
    assert table["images"].shape == (3, 8, 8, 13) and table["labels"].dtype == np.int64


def write_pt(path, tensors, wrap=None):
    """What PyTorch saves of float32 tensors; `wrap` changes the pickle's bytes."""
    torch_file.write(tensors, path)
    if wrap is not None:
        with zipfile.ZipFile(path) as packed:
            members = {name: packed.read(name) for name in packed.namelist()}
        with zipfile.ZipFile(path, "w") as packed:
            for name, raw in members.items():
                packed.writestr(name, wrap(raw) if name.endswith("data.pkl") else raw)


EMPTY_LIST, STOP = b"\x80\x02]", b"."


@pytest.mark.parametrize("file", ["months", "targets", "s2_images/0"])
@pytest.mark.parametrize("what", ["a dict", "a list", "texts", "another shape", "bytes"])
def test_odd_tensor_files_are_named(monkeypatch, tmp_path, file, what):
    folder = tmp_path / "pastis_r_train"
    for part in ("s2_images", "s1_images"):
        (folder / part).mkdir(parents=True)
    plain = {
        "months": np.full((1, 2), 201809.0), "targets": np.zeros((1, 4, 4)),
        "s2_images/0": np.zeros((2, 13, 4, 4)), "s1_images/0": np.zeros((2, 2, 4, 4)),
    }  # fmt: skip
    for name, x in plain.items():
        np.save(folder / f"{name}.npy", x)
    (folder / f"{file}.npy").unlink()
    path = folder / f"{file}.pt"
    if what == "a dict":
        write_pt(path, {"a": np.zeros(3, np.float32)})
    elif what == "a list":
        write_pt(path, {}, lambda raw: EMPTY_LIST + STOP)
    elif what == "texts":
        path = path.with_suffix(".npy")
        np.save(path, np.array(["x"]))
    elif what == "another shape":
        path = path.with_suffix(".npy")
        np.save(path, np.zeros(3))
    else:
        path.write_bytes(b"x" * 40)
    monkeypatch.setenv("PASTIS_DIR", str(tmp_path))
    with pytest.raises(ValueError, match="must be|is not a torch") as told:
        open_split("pastis", task("pastis"), "train")[0]
    assert any(name in str(told.value) for name in (file.rpartition("/")[2], "months"))


def test_missing_folders_say_what_is_expected(monkeypatch, tmp_path):
    for name, variable in (
        ("mados", "MADOS_DIR"),
        ("m_eurosat", "GEOBENCH_DIR"),
        ("sen1floods11", "FLOODS_DIR"),
        ("pastis_sentinel2", "PASTIS_DIR"),
        ("fifty_cities_sentinel2", "FIFTY_CITIES_DIR"),
        ("breizhcrops", "BREIZHCROPS_DIR"),
        ("cropharvest_togo_sentinel2", "CROPHARVEST_DIR"),
        ("sickle_sentinel2", "SICKLE_DIR"),
        ("nandi_crop_map", "NANDI_DIR"),
        ("awf_lulc_map", "AWF_DIR"),
        ("gb2_burn_scars", "GEOBENCH2_DIR"),
    ):
        monkeypatch.delenv(variable, raising=False)
        settings = tasks.catalogue()[name]
        reason = why_unavailable(name, settings)
        assert reason is not None and variable in reason and "http" in reason + "http"
        monkeypatch.setenv(variable, str(tmp_path / "nowhere"))
        reason = why_unavailable(name, settings)
        assert reason is not None and "is not a folder" in reason
        monkeypatch.setenv(variable, str(tmp_path))
        reason = why_unavailable(name, settings)
        assert reason is not None and "missing" in reason, name


def test_wrong_layouts_are_named(monkeypatch, tmp_path):
    monkeypatch.setenv("MADOS_DIR", str(tmp_path))
    images, labels = np.zeros((2, 8, 8, 13), "f4"), np.zeros((2, 8, 8), int)
    for stored, message in (
        ({"images": images}, "must hold 'images' and 'labels'"),
        ({"images": np.moveaxis(images, -1, 1), "labels": labels}, "images must be"),
        ({"images": images, "labels": labels + 15}, "holds label 15, outside 0...14"),
    ):
        arrays: dict[str, Any] = dict(stored)
        np.savez(tmp_path / "MADOS_train.npz", **arrays)
        with pytest.raises(ValueError, match=message):
            open_split("mados", task("mados"), "train")
    with pytest.raises(DataUnavailable, match="MADOS_val.pt is missing"):
        open_split("mados", task("mados"), "val")
    with pytest.raises(ValueError, match="unknown split 'trian'"):
        open_split("mados", task("mados"), "trian")


def test_empty_splits_are_named(monkeypatch, tmp_path):
    monkeypatch.setenv("MADOS_DIR", str(tmp_path))
    images, labels = np.zeros((0, 8, 8, 13), "f4"), np.zeros((0, 8, 8), int)
    np.savez(tmp_path / "MADOS_train.npz", images=images, labels=labels)
    with pytest.raises(ValueError, match="the train split of 'mados' is empty"):
        open_split("mados", task("mados"), "train")


def test_damaged_geobench_samples_are_named(monkeypatch, tmp_path):
    import shutil

    source = HERE / "files" / "geobench"
    shutil.copytree(source, tmp_path / "geobench")
    monkeypatch.setenv("GEOBENCH_DIR", str(tmp_path / "geobench"))
    folder = tmp_path / "geobench" / "classification_v1.0" / "m-eurosat"
    reader = open_split("t", task("m-eurosat"), "train")
    with h5py.File(folder / f"{reader.items[0]}.hdf5", "a") as f:
        del f["02 - Blue"]
    with pytest.raises(ValueError, match="lacks the band '02 - Blue'"):
        reader[0]
    with h5py.File(folder / f"{reader.items[1]}.hdf5", "a") as f:
        f.attrs["pickle"] = repr(pickle.dumps(Evil()))
    with pytest.raises(PickleRefused, match="asks for"):
        reader[1]


def test_label_fractions_need_a_partition(tmp_path, monkeypatch):
    assert partition_name(0.01) == "0.01x_train"
    with pytest.raises(ValueError, match="no partition exists"):
        partition_name(0.3)
    images, labels = np.zeros((4, 8, 8, 13), "f4"), np.zeros((4, 8, 8), int)
    np.savez(tmp_path / "MADOS_train.npz", images=images, labels=labels)
    monkeypatch.setenv("MADOS_DIR", str(tmp_path))
    fifth = task("mados", label_fraction=0.2)
    with pytest.raises(DataUnavailable, match="0.20x_train_partition.json is missing"):
        open_split("mados", fifth, "train")
    rows = tmp_path / "0.20x_train_partition.json"
    rows.write_text("[2, 9]")
    with pytest.raises(ValueError, match="names row 9, but there are 4"):
        open_split("mados", fifth, "train")
    rows.write_text("[2, 1]")
    assert list(open_split("mados", fifth, "train").items) == [2, 1]


def test_windowed_data_of_every_kind(monkeypatch, tmp_path):
    monkeypatch.setenv("EVAL_DATASETS_DIR", str(tmp_path))
    write_windows(tmp_path / "yemen_crop", {"train": 3, "val": 1})
    reader = open_split("t", task(), "train")
    sample, label = reader[0]
    assert sample["sentinel2_l2a"].shape == (16, 16, 2, 12) and label.shape == (16, 16)
    assert not sample["sentinel2_l2a" + MASK].any()
    assert sample["timestamps"].tolist() == [[1, 8, 2022], [1, 9, 2022]]
    assert len(open_split("t", task(label_fraction=0.4), "train")) == 1
    path = reader.items[1] / "arrays.npz"
    arrays: dict[str, Any] = dict(np.load(path))
    arrays["sentinel2_l2a"][0, 0, 0, 0] = np.nan
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match="train item 1 holds pixels of sentinel2_l2a that are not"):
        reader[1]
    with pytest.raises(ValueError, match="no window .* eval_split=test"):
        open_split("t", task(), "test")
    with pytest.raises(DataUnavailable, match="stats.json"):
        open_split("t", task(norm_stats_from_pretrained=False), "train")


def test_windows_of_geotiffs(monkeypatch, tmp_path):
    monkeypatch.setenv("EVAL_DATASETS_DIR", str(tmp_path))
    folder = tmp_path / "yemen_crop" / "windows" / "g" / "w"
    sets = {"sentinel2": ("B02_B03_B04_B08", 8), "sentinel2.1": ("B02_B03_B04_B08", 8)}
    for layer, (names, side) in sets.items():
        for bands, size in ((names, side), ("B05_B06_B07_B8A_B11_B12", 4), ("B01_B09", 2)):
            path = folder / "layers" / layer / bands
            path.mkdir(parents=True)
            count = bands.count("_") + 1
            with rasterio.open(
                path / "geotiff.tif", "w", driver="GTiff", width=size, height=size, count=count,
                dtype="uint16",
                transform=rasterio.Affine(80 / size, 0, 0, 0, -80 / size, 80),
            ) as out:  # fmt: skip
                out.write(np.arange(count * size * size).reshape(count, size, size).astype("u2"))
    path = folder / "layers" / "label" / "class"
    path.mkdir(parents=True)
    with rasterio.open(
        path / "geotiff.tif", "w", driver="GTiff", width=8, height=8, count=1, dtype="uint8",
        transform=rasterio.Affine(10, 0, 0, 0, -10, 80),
    ) as out:  # fmt: skip
        label = np.ones((1, 8, 8), "u1")
        label[0, 0] = 255
        out.nodata = 255
        out.write(label)
    (folder / "metadata.json").write_text('{"options": {"eval_split": "train"}}')
    sample, label = open_split("t", task(), "train")[0]
    assert sample["sentinel2_l2a"].shape == (8, 8, 2, 12)
    assert (label[0] == -1).all() and (label[1:] == 1).all()
    (path / "geotiff.tif").unlink()
    with pytest.raises(ValueError, match="neither a label layer"):
        open_split("t", task(), "train")[0]


def test_converted_pastis_reads_back(monkeypatch, tmp_path):
    rng = np.random.default_rng(0)
    raw = tmp_path / "raw"
    for folder in ("DATA_S2", "DATA_S1A", "ANNOTATIONS"):
        (raw / folder).mkdir(parents=True)
    dates = [20180900 + 100 * m if m < 4 else 20190100 + 100 * (m - 4) for m in range(13)]
    np.save(raw / "DATA_S2" / "S2_7.npy", rng.integers(0, 9000, (13, 10, 16, 16)).astype("i2"))
    np.save(raw / "DATA_S1A" / "S1A_7.npy", rng.normal(size=(13, 3, 16, 16)))
    np.save(raw / "ANNOTATIONS" / "TARGET_7.npy", rng.integers(0, 20, (3, 16, 16)).astype("u1"))
    about = {"ID_PATCH": 7, "Fold": 1, "dates-S2": {str(i): d + 5 for i, d in enumerate(dates)}}
    (raw / "metadata.geojson").write_text(json.dumps({"features": [{"properties": about}]}))
    assert pastis.convert(raw, tmp_path / "out", "train") == 4
    monkeypatch.setenv("PASTIS_DIR", str(tmp_path / "out"))
    settings = task("pastis", input_modalities=["sentinel1", "sentinel2_l2a"])
    reader = open_split("t", settings, "train")
    sample, label = reader[3]
    assert len(reader) == 4 and label.shape == (8, 8) and label.max() < 19
    assert sample["sentinel1"].shape == (8, 8, 12, 2)
    with pytest.raises(ValueError, match="no patch of the test folds"):
        pastis.convert(raw, tmp_path / "out", "test")
    (raw / "DATA_S2" / "S2_7.npy").unlink()  # a second conversion that ends half-way
    with pytest.raises(FileNotFoundError):
        pastis.convert(raw, tmp_path / "out", "train", cut=False)
    with pytest.raises(DataUnavailable, match="months"):
        open_split("t", settings, "train")


def test_floods_drop_tiles_that_are_not_finite():
    with data_folders(HERE):
        reader = open_split("t", task("sen1floods11", input_modalities=["sentinel1"]), "valid")
        assert len(reader) == 2 and isinstance(reader, tensors.Sen1Floods11)


def test_tasks_say_what_is_wrong_with_them():
    for settings, message in (
        (task("madoss"), "did you mean 'mados'"),
        (task("mados", input_modalities=["sentinel1"]), "dataset 'mados' has no 'sentinel1'"),
        (task("mados", probe_lr=None), "needs probe_lr"),
        (task("mados", patch_size=7), "patch_size 7 does not divide the tile of 80 px"),
        (task("mados", eval_mode="finetune"), "needs ft_lr"),
        (task("mados", probe_type="liner"), "did you mean 'linear'"),
        (task("mados", norm_method="norm"), "unknown norm_method"),
        (task("mados", pooling_type="median"), "unknown pooling_type 'median'"),
        (task("mados", primary_metric="mious"), "did you mean 'miou'"),
        (task("mados", primary_metric="class_f1"), "needs primary_metric_class"),
        (task("mados", epochs=0), "epochs must be at least 1, got 0"),
        (task("mados", quantize_embeddings=True, quantize_bits=4), "quantile_config_path"),
        (task("pastis", input_modalities=[]), "input_modalities must be given"),
        (task("mados", label_fraction=0.0), "label_fraction"),
        (task("pretrain_subset_osm", h5py_dir="/nowhere/at/all"), "does not exist"),
    ):
        with pytest.raises(ValueError, match=message):
            tasks.check_task("t", settings)


def test_every_record_of_the_catalogues_is_valid():
    for which in tasks.CATALOGUES:
        for name, settings in tasks.catalogue(which).items():
            tasks.check_task(name, settings)
    counts = [len(tasks.catalogue(w)) for w in tasks.CATALOGUES]
    assert counts[0] >= 79 and counts[1:] == [21, 1]
    for version, count in (("v1", 4), ("v1_1", 7), ("v1_2", 7)):
        assert len(tasks.official_tasks(version)) == count
    with pytest.raises(ValueError, match="did you mean 'mados'"):
        tasks.select(tasks.catalogue(), ["madso"])


def test_cities_are_known_by_the_names_that_folders_have():
    from olmoearth_jax.evals.datasets import tensors as cities

    names = [c for row in cities.CONTINENTS.values() for c in row.split(", ")]
    assert len(names) == len(set(names)) == 50
    for name, home in (("Rio_de_Janeiro", "South America"), ("port-au-prince", "North America"),
                       ("Cape Town", "Africa"), ("Wolfsburg", "Europe")):  # fmt: skip
        assert cities.continent(name) == home
    counts = {name.replace(" ", "_"): 2 for name in names}
    parts = cities.split_units(counts, "by_continent")
    assert sum(map(len, parts.values())) == 100
    counts |= {"Atlantis": 1, "Eldorado": 1}
    for mode in ("random", "by_city"):
        assert sum(map(len, cities.split_units(counts, mode).values())) == 102
    with pytest.raises(ValueError, match="no continent of Atlantis, Eldorado"):
        cities.split_units(counts, "by_continent")


@pytest.mark.parametrize("dtype", ["u1", "u2", "u4", "i2", "f4"])
def test_invalid_labels_of_any_type_are_marked(dtype):
    from olmoearth_jax.evals.datasets.windowed import window_label

    label = np.array([[1, 255], [0, 2]], dtype)
    valid = np.array([[1, 0], [1, 1]])
    assert window_label("segmentation", label, valid).tolist() == [[1, -1], [0, 2]]
    gaps = np.array([[1, np.nan], [0, 2]])
    assert window_label("segmentation", gaps, valid).tolist() == [[1, -1], [0, 2]]
    values = window_label("regression", label, valid)
    assert np.isnan(values[0, 1]) and values[1].tolist() == [0, 2]


def test_windows_keep_their_own_dates_and_decibels(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("EVAL_DATASETS_DIR", str(tmp_path))
    write_windows(tmp_path / "oil_spill_detection", {"train": 1}, classes=2)
    settings = task("oil_spill_detection", input_modalities=["sentinel1"])
    path = tmp_path / "oil_spill_detection" / "windows" / "g" / "w0" / "arrays.npz"
    arrays: dict[str, Any] = dict(np.load(path))
    decibel = np.random.default_rng(0).uniform(-25, -5, (2, 2, 16, 16)).astype("f4")
    found = []
    for radar in (decibel, 10 ** (decibel / 10)):
        np.savez(path, sentinel1=radar, **arrays)
        found.append(open_split("t", settings, "train")[0][0])
    np.testing.assert_allclose(found[0]["sentinel1"], found[1]["sentinel1"], atol=1e-4)
    assert caplog.text.count("is decibel already") == 1
    assert found[0]["timestamps"].tolist() == [[1, 8, 2022], [1, 9, 2022]]
    np.savez(path, sentinel1=decibel, dates=np.array(["2023-06-15", "20230801"]), **arrays)
    own = open_split("t", settings, "train")[0][0]
    assert own["timestamps"].tolist() == [[15, 5, 2023], [1, 7, 2023]]
    np.savez(path, sentinel1=decibel, dates=np.array(["2023-06-15"]), **arrays)
    with pytest.raises(ValueError, match="window w0: 1 dates were given for 2 time steps"):
        open_split("t", settings, "train")[0]
    stamps = np.array([[3, 0, 2020], [4, 1, 2020]])
    np.savez(path, sentinel1=decibel, timestamps=stamps, **arrays)
    assert open_split("t", settings, "train")[0][0]["timestamps"].tolist() == stamps.tolist()
    np.savez(path, sentinel1=decibel, timestamps=stamps[::-1], **arrays)
    with pytest.raises(ValueError, match="window w0: the dates are not in ascending order"):
        open_split("t", settings, "train")[0]


@pytest.mark.parametrize("dtype", ["u1", "u2"])
def test_the_highest_unsigned_label_is_what_minus_one_became(monkeypatch, tmp_path, dtype, caplog):
    monkeypatch.setenv("EVAL_DATASETS_DIR", str(tmp_path))
    write_windows(tmp_path / "yemen_crop", {"train": 2}, classes=2)
    for path in (tmp_path / "yemen_crop").rglob("arrays.npz"):
        arrays: dict[str, Any] = dict(np.load(path))
        label = arrays["label"].copy()
        label[..., 0, :] = -1
        np.savez(path, **(arrays | {"label": label.astype(dtype)}))
    split = open_split("t", task(), "train")
    for _, label in (split[0], split[1]):
        assert (label[0] == -1).all() and set(np.unique(label[1:])) <= {0, 1}
    assert caplog.text.count(f"the label {np.iinfo(dtype).max}") == 1
    arrays["label"] = np.full_like(arrays["label"], 200).astype(dtype)
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match="holds label 200, outside"):
        [split[i] for i in range(2)]


@pytest.mark.parametrize(
    "text, said",
    [("[" * 100_000, "cannot be read as JSON"), ("{", "cannot be read as JSON"), ("[]", "a dict"),
     ("\udcff", "cannot be read as JSON"), ("null", "a dict"), ("{}", "a dict with counts"),
     ("1" * 5000, "cannot be read as JSON"), (None, "cannot be read as JSON")],
)  # fmt: skip
def test_json_of_evaluation_data_that_is_damaged_is_named(tmp_path, text, said):
    path = tmp_path / "manifest.json"
    if text is not None:
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=f"manifest.json .*{said}"):
        read_json(path, dict, "counts")
