"""Data that are not as a reader expects: told in a sentence, never read as something else."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import rasterio

from olmoearth_jax import modalities
from olmoearth_jax.configlib import own_tasks, tasks
from olmoearth_jax.evals import datasets
from olmoearth_jax.evals.datasets.windowed import state_of
from olmoearth_jax.evals.samples import collate
from olmoearth_jax.model.pooling import Pooling

from .builders import tiny_model

RNG = np.random.default_rng(0)
BANDS = modalities.get("sentinel2_l2a").bands


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a data set of a user with one window of train; gives its task and the window."""
    monkeypatch.setattr(tasks, "OWN", {})
    monkeypatch.setattr(datasets, "OWN", tasks.OWN)

    def made(arrays, options=None, names=("sentinel2_l2a",), **settings):
        window = tmp_path / "mine" / "windows" / "g" / "w"
        window.mkdir(parents=True)
        if arrays is not None:
            arrays = {"label": np.zeros((1, 1, 16, 16), int), **arrays}
            np.savez(window / "arrays.npz", **arrays)
        about = {"eval_split": "train"} if options is None else options
        (window / "metadata.json").write_text(json.dumps({"options": about}))
        record = {
            "folder": "mine", "task_type": "segmentation", "num_classes": 3,
            "modalities": list(names), "height_width": 16, "timeseries": True,
        }  # fmt: skip
        task = {"dataset": "mine", "probe_lr": 0.1, "num_workers": 0, **settings}
        (tmp_path / "t.json").write_text(
            json.dumps({"datasets": {"mine": record}, "tasks": {"t": task}})
        )
        return own_tasks.add_file(tmp_path / "t.json")["t"], window

    return made


def first(task):
    return datasets.open_split("t", task, "train")[0]


def optical(bands=12, steps=2):
    return RNG.integers(0, 4000, (bands, steps, 16, 16)).astype(np.uint16)


def radar(steps):
    return RNG.normal(-12, 2, (2, steps, 16, 16)).astype(np.float32)


@pytest.mark.parametrize("count", [10, 13])
def test_images_of_another_number_of_bands(write, count):
    """The first twelve of thirteen are not those of the model, and ten are too few."""
    task, _ = write({"sentinel2_l2a": optical(count)})
    with pytest.raises(ValueError, match=f"item 0: sentinel2_l2a has {count} bands instead of"):
        first(task)


def test_images_without_an_axis_of_time(write):
    task, _ = write({"sentinel2_l2a": optical()[:, 0]})
    with pytest.raises(ValueError, match=r"window w: sentinel2_l2a must be \[bands, dates, rows"):
        first(task)


@pytest.mark.parametrize("names", [("sentinel2_l2a", "sentinel1"), ("sentinel1", "sentinel2_l2a")])
def test_sensors_of_other_numbers_of_dates(write, names):
    """They would be put on the first dates, whichever are theirs."""
    dates = {"eval_split": "train", "dates": ["2023-01-05", "2023-04-05", "2023-07-05"]}
    arrays = {"sentinel2_l2a": optical(steps=3), "sentinel1": radar(2)}
    task, _ = write(arrays, dates, names)
    with pytest.raises(ValueError, match="have different numbers of dates"):
        first(task)


def test_maps_have_no_dates(write):
    height = np.full((1, 1, 16, 16), 300.0)
    arrays = {"srtm": height, "sentinel2_l2a": optical(steps=3)}
    sample, _ = first(write(arrays, names=("srtm", "sentinel2_l2a"))[0])
    assert len(sample["timestamps"]) == 3 and sample["srtm"].shape == (16, 16, 1, 1)


def test_classes_are_whole_numbers(write):
    task, _ = write({"sentinel2_l2a": optical(), "label": np.full((1, 1, 16, 16), 0.5)})
    with pytest.raises(ValueError, match=r"holds label 0\.5, which is no whole number"):
        first(task)


@pytest.mark.parametrize("options", [[], 3, "train"])
def test_options_of_another_form(write, options):
    task, _ = write({"sentinel2_l2a": optical()}, options)
    with pytest.raises(ValueError, match=r"the options in .*metadata\.json must be an object"):
        first(task)


def _layer(window: Path, name: str, folder: str, count: int) -> None:
    path = window / "layers" / name / folder
    path.mkdir(parents=True)
    with rasterio.open(
        path / "geotiff.tif", "w", driver="GTiff", width=16, height=16, count=count,
        dtype="uint16", transform=rasterio.Affine(10, 0, 0, 0, -10, 160),
    ) as out:  # fmt: skip
        out.write(RNG.integers(0, 2, (count, 16, 16)).astype("u2"))


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        (
            [("sentinel2", "_".join(BANDS), 12), ("sentinel2_l2a", "_".join(BANDS), 12)],
            "two layers",
        ),
        ([("sentinel2", "_".join(BANDS), 13)], "has 13 bands, but its folder names 12"),
        ([("sentinel2", "_".join(BANDS), 12)], "no layer of srtm"),
    ],
)
def test_layers_that_do_not_fit(write, layers, said):
    task, window = write(None, names=("sentinel2_l2a", "srtm"))
    _layer(window, "label", "class", 1)
    for name, folder, count in layers:
        _layer(window, name, folder, count)
    with pytest.raises(ValueError, match=said):
        first(task)


@pytest.mark.parametrize(
    ("stats", "said"),
    [
        ({}, "the statistics of 'mine' have no 'sentinel2_l2a'"),
        ({"sentinel2_l2a": dict.fromkeys(BANDS, {"mean": 1})}, "need the mean and the std"),
        ({"sentinel2_l2a": dict.fromkeys(BANDS, {"mean": 1, "std": 0})}, "a std above 0"),
        ({"sentinel2_l2a": dict.fromkeys(BANDS, [1, 2])}, "is not of the form that is expected"),
    ],
)
def test_statistics_that_are_none(write, stats, said):
    task, window = write({"sentinel2_l2a": optical()}, norm_stats_from_pretrained=False)
    (window.parents[2] / "stats.json").write_text(json.dumps(stats))
    with pytest.raises(ValueError, match=said):
        first(task)


def test_a_user_may_have_no_statistics(write):
    task, window = write({"sentinel2_l2a": optical()})
    assert not tasks.has_own_stats(tasks.dataset_info(task.dataset))
    (window.parents[2] / "stats.json").write_text("{}")
    assert tasks.has_own_stats(tasks.dataset_info(task.dataset))


def test_what_a_result_depends_on(write, tmp_path):
    """Statistics, and windows that are links to folders elsewhere, are parts of the data."""
    task, window = write({"sentinel2_l2a": optical()})
    folder = str(window.parents[2])
    elsewhere = tmp_path / "elsewhere"
    os.rename(window.parent, elsewhere)
    window.parent.symlink_to(elsewhere)

    def state():
        state_of.cache_clear()
        return state_of(folder)

    before = state()
    (elsewhere / "w" / "metadata.json").write_text('{"options": {"eval_split": "val"}}')
    after = state()
    (Path(folder) / "stats.json").write_text("{}")
    assert len({before, after, state()}) == 3 and state() == state()


@pytest.mark.parametrize(
    ("name", "text"),
    [("classmapping.csv", "a,b\n1,2\n"), ("2017/L1C/frh01.csv", "x\n1\n")],
)
def test_tables_without_a_column(monkeypatch, tmp_path, name, text):
    """They ended a training run: no task may."""
    monkeypatch.setenv("BREIZHCROPS_DIR", str(tmp_path))
    (tmp_path / "2017" / "L1C").mkdir(parents=True)
    (tmp_path / "classmapping.csv").write_text("id,code\n0,a\n")
    for region in ("frh01", "frh02"):
        (tmp_path / "2017" / "L1C" / f"{region}.h5").write_bytes(b"")
        (tmp_path / "2017" / "L1C" / f"{region}.csv").write_text("CODE_CULTU,path\na,b\n")
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match="train split of 'breizhcrops' is not of the form"):
        datasets.open_split("b", tasks.EvalTaskConfig("breizhcrops"), "train")


ODD_ROWS = [
    ([0, 10**30], "names row 1000000"),
    ([0.5, 1], r"names row 0\.5"),
    (["a"], "names row a"),
    ([[0, 1]], r"names row \[0, 1\]"),
    ([True], "names row True"),
    ([4], "names row 4, but there are 4"),
    ([0, 0, 1], "names a row twice"),
]


@pytest.mark.parametrize(("rows", "said"), ODD_ROWS)
def test_partitions_name_rows_once(monkeypatch, tmp_path, rows, said):
    monkeypatch.setenv("MADOS_DIR", str(tmp_path))
    images, labels = np.zeros((4, 80, 80, 13), "f4"), np.zeros((4, 80, 80), int)
    np.savez(tmp_path / "MADOS_train.npz", images=images, labels=labels)
    (tmp_path / "0.10x_train_partition.json").write_text(json.dumps(rows))
    few = tasks.EvalTaskConfig("mados", probe_lr=0.1, label_fraction=0.1)
    with pytest.raises(ValueError, match=said):
        datasets.open_split("m", few, "train")


@pytest.mark.parametrize("shape", [(4, 64, 64), (4,), (4, 1, 32, 64)])
def test_floods_of_another_form(monkeypatch, tmp_path, shape):
    """Of labels without their second axis, the first row of pixels was taken for all."""
    monkeypatch.setenv("FLOODS_DIR", str(tmp_path))
    tiles = {"s1": np.zeros((4, 2, 64, 64), "f4"), "labels": np.zeros(shape, int)}
    np.savez(tmp_path / "flood_train_data.npz", **tiles)
    with pytest.raises(ValueError, match=r"must be \[N, 2, H, W\] with labels"):
        datasets.open_split("f", tasks.EvalTaskConfig("sen1floods11", probe_lr=0.1), "train")


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        ({"a": 10**6}, "counts 1000000 tiles of 'a'"),
        ({"a": 1.5}, r"counts 1\.5 tiles"),
        ({"a": -3}, "counts -3 tiles"),
        ({"../../a": 5}, "without '/'"),
        ([5], "must be an object"),
    ],
)
def test_cities_that_cannot_be(monkeypatch, tmp_path, counts, said):
    """A list of their tiles was made before anything else, however many there are said to be."""
    monkeypatch.setenv("FIFTY_CITIES_DIR", str(tmp_path))
    (tmp_path / "manifest.json").write_text(json.dumps({"counts": counts}))
    cities = tasks.EvalTaskConfig("fifty_cities", input_modalities=["sentinel2_l2a"], probe_lr=0.1)
    with pytest.raises(ValueError, match=said):
        datasets.open_split("c", cities, "train")


def test_a_device_in_the_place_of_a_description(monkeypatch, tmp_path):
    folder = tmp_path / "classification_v1.0" / "m-eurosat"
    folder.mkdir(parents=True)
    monkeypatch.setenv("GEOBENCH_DIR", str(tmp_path))
    os.mkfifo(folder / "task_specs.pkl")
    with pytest.raises(ValueError, match="is a pipe, device or folder"):
        datasets.open_split("e", tasks.EvalTaskConfig("m-eurosat"), "train")


def test_a_patch_without_data_is_zero_however_pooled(write):
    """Its maximum was that of nothing, and the model was said to have diverged."""
    image = optical(steps=1).astype("f4")
    image[:, :, :4, :4] = np.nan
    task, _ = write({"sentinel2_l2a": image})
    batch = collate([first(task)[0]])
    for how in ("mean", "max"):
        found = tiny_model(("sentinel2_l2a",)).embed(batch, 4, Pooling(how, "spatial"))
        assert (found[0, 0, 0] == 0).all() and np.isfinite(found).all() and found[0, 1:].any()


def test_a_window_without_data_is_named(write):
    task, _ = write({"sentinel2_l2a": np.full((12, 2, 16, 16), np.nan)})
    with pytest.raises(ValueError, match="window w: its images hold no data at all"):
        first(task)


def pixels(value, dtype=None):
    return {"label": np.full((1, 1, 16, 16), value, dtype)}


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"sentinel2_l2a": optical() * 1e300}, "pixels of sentinel2_l2a that are not finite"),
        (
            {"sentinel2_l2a": optical().astype("c8")},
            "sentinel2_l2a must hold numbers, got complex64",
        ),
        ({"sentinel2_l2a": optical().astype("U5")}, "sentinel2_l2a must hold numbers, got <U5"),
        (pixels("a"), "window w: label must hold numbers, got <U1"),
        (pixels(1e300), "holds label 9007199254740992, outside 0...2"),
        ({"label": np.array(1)}, r"its label must be \[1, 1, rows, columns\], got \[\]"),
        ({"label": np.zeros((1, 2, 16, 16), int)}, r"got \[1, 2, 16, 16\]"),
    ],
)
def test_arrays_of_other_kinds(write, arrays, said):
    """What float32 or a class cannot hold was cast to something else, with a warning at best."""
    task, _ = write({"sentinel2_l2a": optical(), **arrays})
    with pytest.raises(ValueError, match=said):
        first(task)
