"""The worked example of docs/new_task.md, and what is wrong in a file of tasks."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import rasterio

from launch import evaluate
from olmoearth_jax import check, modalities, overrides
from olmoearth_jax.configlib import own_tasks, tasks
from olmoearth_jax.configlib.official import official
from olmoearth_jax.evals import callback, datasets, models, runner
from olmoearth_jax.evals.datasets.base import DataUnavailable
from olmoearth_jax.evals.datasets.windowed import Windowed, state_of
from olmoearth_jax.evals.samples import collate
from olmoearth_jax.model.pooling import Pooling

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "new_task.md").read_text()

BANDS = modalities.get("sentinel2_l2a").bands


def block(kind: str) -> str:
    found = re.search(rf"```{kind}\n(.*?)```", PAGE, re.DOTALL)
    assert found
    return found[1]


@pytest.fixture
def page(tmp_path, monkeypatch) -> Path:
    """A folder with the files of the page, its data made."""
    monkeypatch.setattr(tasks, "OWN", {})
    monkeypatch.setattr(datasets, "OWN", tasks.OWN)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "make_fields.py").write_text(block("python"))
    (tmp_path / "my_tasks.json").write_text(block("json"))
    exec(compile(block("python"), "make_fields.py", "exec"), {})
    return tmp_path


def test_the_data_of_the_page(page):
    (name, task), = own_tasks.add_file("my_tasks.json").items()  # fmt: skip
    sizes = {s: len(datasets.open_split(name, task, s)) for s in ("train", "valid", "test")}
    assert sizes == {"train": 12, "valid": 6, "test": 6}
    sample, label = datasets.open_split(name, task, "train")[0]
    assert sample["sentinel2_l2a"].shape == (16, 16, 2, 12) and label.shape == (16, 16)
    assert sample["timestamps"].tolist() == [[15, 3, 2023], [15, 6, 2023]]
    assert (label[:2] == -1).all() and label.max() == 2


def test_evaluated_by_its_file(page, capsys):
    argv = ["evaluate", "--baseline=raw_bands", "--tasks_json=my_tasks.json", "--out=out"]
    argv += ["--set=epochs=5"]
    for name in evaluate.FLAGS:  # what other tests have set
        evaluate.FLAGS[name].unparse()
    rest = evaluate.FLAGS(argv)
    assert evaluate.main(rest) == 0
    (line,) = (page / "out" / "results.jsonl").read_text().splitlines()
    found = json.loads(line)
    assert found["task"] == "my_fields_probe" and 0 < found["test"]["primary"] <= 1
    with pytest.raises(ValueError, match="is in the catalogue"):
        _write(page, task_name="mados")
        own_tasks.add_file("odd.json")


def test_what_has_changed_is_evaluated_again(page, capsys):
    """Data or record of a user are mended between two evaluations: no old score stands for new."""

    def scores():
        state_of.cache_clear()  # as in a process of its own
        argv = ["evaluate", "--baseline=raw_bands", "--tasks_json=my_tasks.json", "--out=out"]
        for name in evaluate.FLAGS:
            evaluate.FLAGS[name].unparse()
        assert evaluate.main(evaluate.FLAGS([*argv, "--set=epochs=2"])) == 0
        return len((page / "out" / "results.jsonl").read_text().splitlines())

    assert scores() == 1 == scores()
    record = json.loads((page / "my_tasks.json").read_text())
    record["datasets"]["my_fields"]["num_classes"] = 4
    (page / "my_tasks.json").write_text(json.dumps(record))
    assert scores() == 2
    path = page / "my_fields" / "windows" / "all" / "window_0" / "arrays.npz"
    held = dict(np.load(path))
    held["label"][..., 4:] = 0
    np.savez(path, **held)
    assert scores() == 3 == scores()


@pytest.mark.parametrize("side", [8, 32])
def test_windows_of_another_size_than_told(page, side):
    record = json.loads((page / "my_tasks.json").read_text())
    record["datasets"]["my_fields"]["height_width"] = side
    (page / "odd.json").write_text(json.dumps(record))
    ((name, task),) = own_tasks.add_file("odd.json").items()
    said = f"sentinel2_l2a is 16 x 16 pixels in size; height_width of 'my_fields' is {side}"
    with pytest.raises(ValueError, match=said):
        _ = datasets.open_split(name, task, "train")[0]


def _bright(sample, missing) -> np.ndarray:
    """What a model without parameters makes of an image in which some pixels are missing."""
    batch = collate([sample])
    assert (batch["sentinel2_l2a_mask"][0, ..., 0] == 3).tolist() == missing.tolist()
    return models.RawBands(["sentinel2_l2a"]).embed(batch, 4, Pooling(place="spatial"))


@pytest.mark.parametrize(
    ("dtype", "value"),
    [("float32", np.nan), *((d, v) for d in ("float32", "int32") for v in (-99999, "declared"))],
)
def test_pixels_without_data(page, dtype, value):
    """In whatever way a window says so: they are masked, and their numbers do not count."""
    folder = page / "my_fields/windows/all/window_0"
    arrays = dict(np.load(folder / "arrays.npz"))
    image = arrays["sentinel2_l2a"].astype(dtype)
    image[3, 1, 2:7, 5] = 7 if value == "declared" else value
    if value == "declared":
        (folder / "arrays.npz").unlink()
        for step in range(2):
            where = folder / "layers" / f"sentinel2.{step}" / "_".join(BANDS)
            where.mkdir(parents=True)
            _geotiff(where / "geotiff.tif", image[:, step], 7)
        (folder / "layers/label/class").mkdir(parents=True)
        _geotiff(folder / "layers/label/class/geotiff.tif", arrays["label"][0].astype("i2"), None)
    else:
        np.savez(folder / "arrays.npz", sentinel2_l2a=image, label=arrays["label"])
    missing = np.zeros((16, 16, 2), bool)
    missing[2:7, 5, 1] = True
    ((name, task),) = own_tasks.add_file("my_tasks.json").items()
    reader = datasets.open_split(name, task, "train")
    found = _bright(reader[0][0], missing)
    whole = _bright(reader[1][0], np.zeros_like(missing))
    assert np.abs(found).max() < 2 * np.abs(whole).max()


def _geotiff(path: Path, image: np.ndarray, nodata: float | None) -> None:
    with rasterio.open(
        path, "w", driver="GTiff", width=16, height=16, count=len(image), dtype=str(image.dtype),
        nodata=nodata, transform=rasterio.Affine(10, 0, 0, 0, -10, 160),
    ) as out:  # fmt: skip
        out.write(image)


def test_missing_power_and_values_stay_missing(page):
    """The fill value is no power to be made decibel of, and no value to be learnt."""
    power = np.full((2, 1, 8, 8), 0.01, np.float32)
    power[:, :, :2] = modalities.MISSING
    values = np.full((1, 1, 8, 8), 3.0)
    values[..., 0] = modalities.MISSING
    info = tasks.DatasetInfo("mine", "regression", 1, ("sentinel1",), folder=str(page))
    reader = Windowed.__new__(Windowed)
    reader.task, reader.info, reader.modalities = tasks.EvalTaskConfig(), info, ("sentinel1",)
    reader.split, reader.folder = "train", page
    raw = reader.arranged({"sentinel1": power, "label": values})
    sample, label = reader.convert(raw)
    assert (sample["sentinel1_mask"][:2] == 3).all() and not sample["sentinel1_mask"][2:].any()
    assert np.isnan(label[:, 0]).all() and (label[:, 1:] == 3).all()


def _several(folder: Path, change=lambda label, number: {"label": label}) -> None:
    """Windows with a brighter band for each of three classes that they show."""
    rng = np.random.default_rng(0)
    for number in range(60):
        where = folder / "several" / "windows" / "all" / f"w{number}"
        where.mkdir(parents=True)
        label = rng.integers(0, 2, 3)
        image = rng.normal(1500, 100, (12, 1, 16, 16))
        image[:3, 0] += 1500 * label[:, None, None]
        arrays = change(label, number)
        np.savez(where / "arrays.npz", sentinel2_l2a=image.astype(np.uint16), **arrays)
        about = {"options": {"eval_split": ["train", "train", "val", "test"][number % 4]}}
        (where / "metadata.json").write_text(json.dumps(about))
    dataset = {"folder": "several", "task_type": "classification", "multilabel": True,
               "num_classes": 3, "modalities": ["sentinel2_l2a"]}  # fmt: skip
    task = {"dataset": "several", "eval_mode": "knn", "patch_size": 4, "num_workers": 0}
    record = {"datasets": {"several": dataset}, "tasks": {"several_knn": task}}
    (folder / "odd.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    "unknown",
    [
        None,
        lambda label, n: {"label": label - 2 * (n % 5 == 2) * label - (n % 5 == 2)},
        lambda label, n: {"label": label, "valid": np.asarray(n % 5 != 2)},
        lambda label, n: {"label": np.where(n % 5 == 2, np.nan, label)},
    ],
)
def test_windows_of_several_classes(page, unknown):
    """Windows whose labels are not known neither vote nor count."""
    _several(page, *([] if unknown is None else [unknown]))
    ((name, task),) = own_tasks.add_file("odd.json").items()
    options = tasks.RunOptions(run_on_test=True, n_bootstrap=5, k=5)
    found = runner.run_task(name, task, models.baseline("raw_bands").model, options)
    assert found.test is not None and found.valid is not None
    assert min(found.valid.primary, found.test.primary) > 0.75
    assert found.bootstrap["mean"] > 0.75


def test_labels_of_several_classes_that_are_too_few(page):
    _several(page, lambda label, n: {"label": label[:2]})
    ((name, task),) = own_tasks.add_file("odd.json").items()
    with pytest.raises(ValueError, match="its label has 2 values; .* for each of the 3"):
        _ = datasets.open_split(name, task, "train")[0]


def test_in_a_run(page):
    at = "trainer.callbacks.downstream_evaluator"
    cfg = overrides.apply_values(official("nano"), {f"{at}.tasks_json": "my_tasks.json"})
    assert check.problems(cfg) == []
    evaluator = callback.DownstreamEvaluator(cfg, 10, lambda line: None)
    assert "my_fields_probe" in evaluator.tasks and evaluator.intervals["my_fields_probe"] == 10
    named = overrides.apply_values(cfg, {f"{at}.tasks_to_run": ["my_fields_probe", "mados"]})
    assert check.problems(named) == []
    assert list(callback.DownstreamEvaluator(named, 1, lambda line: None).tasks) == [
        "my_fields_probe"
    ]
    wrong = overrides.apply_values(cfg, {f"{at}.tasks_to_run": ["my_field_probe"]})
    (problem,) = check.problems(wrong)
    assert "did you mean 'my_fields_probe'?" in problem
    lost = overrides.apply_values(cfg, {f"{at}.tasks_json": "absent.json"})
    (problem,) = check.problems(lost)
    assert problem.startswith(f"{at}.tasks_json: the tasks file absent.json cannot be read")


def _write(where: Path, task_name: str = "mine", task=None, **dataset) -> None:
    values = json.loads(block("json"))
    values["datasets"]["my_fields"] |= dataset
    (settings,) = values["tasks"].values()
    values["tasks"] = {task_name: settings | (task or {})}
    (where / "odd.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_classes": 1}, "num_classes must be at least 2 for segmentation"),
        ({"task_type": "regression"}, "num_classes must be 1 for regression, got 3"),
        ({"task_type": "segmentaton"}, "did you mean 'segmentation'"),
        ({"modalities": []}, "it needs 'modalities'"),
        ({"modalities": ["sentinel2"]}, "sentinel2"),
        ({"folder": ""}, "it needs 'folder'"),
        ({"height_width": None}, "it needs 'height_width'"),
        ({"height_width": 0}, "height_width must be at least 1"),
        ({"classes": 3}, "classes"),
        ({"task": {"patch_size": 5}}, "patch_size 5 does not divide the tile of 16 px"),
        ({"task": {"probe_lr": None}}, "needs probe_lr"),
        ({"task": {"dataset": "my_field"}}, "unknown evaluation dataset 'my_field'; did you mean"),
        ({"task": {"eval_mode": "nearest"}}, "eval_mode"),
    ],
)
def test_wrong_files_are_told(page, change, message):
    _write(page, **change)
    with pytest.raises(ValueError, match=message) as caught:
        own_tasks.add_file("odd.json")
    assert "odd.json" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["mados", "pastis_mine", "m-mine", "pretrain_subset_2"])
def test_names_of_other_data_sets_are_taken(page, name):
    values = json.loads(block("json"))
    values["datasets"] = {name: values["datasets"]["my_fields"]}
    (page / "odd.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="choose another"):
        own_tasks.add_file("odd.json")


@pytest.mark.parametrize("name", ["mados", "pastis", "m-eurosat", "pretrain_subset"])
def test_tasks_of_any_recipe_or_catalogue_are_taken(page, name):
    """A recipe's own task of the name would be run in its place."""
    _write(page, task_name=name)
    with pytest.raises(ValueError, match="is in the catalogue; choose another name"):
        own_tasks.add_file("odd.json")


@pytest.mark.parametrize("name", ["../../mine", "a/b", "..", "", "a\nb", "-x"])
def test_names_become_names_of_folders(page, name):
    """Those of tasks where fine-tuning keeps its state, those of data where embeddings are read."""
    _write(page, task_name=name)
    with pytest.raises(ValueError, match=r"odd\.json: the name .* must "):
        own_tasks.add_file("odd.json")
    _write(page, task={"dataset": name})
    held = json.loads((page / "odd.json").read_text())
    held["datasets"] = {name: held["datasets"]["my_fields"]}
    (page / "odd.json").write_text(json.dumps(held))
    with pytest.raises(ValueError, match=r"odd\.json: the name .* must "):
        own_tasks.add_file("odd.json")


def test_every_reader_has_its_names():
    taken = own_tasks.PREFIXES
    assert all(name.startswith(taken) for name in datasets._PREFIXES)
    assert set(taken) <= set(datasets._PREFIXES)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"tasks": 3}', '{"task": {}}', "[" * 100000])
def test_what_is_no_file_of_tasks(page, text):
    (page / "odd.json").write_text(text)
    with pytest.raises(ValueError, match=r"odd\.json"):
        own_tasks.add_file("odd.json")


def test_data_that_is_not_there(page):
    _write(page, folder="nowhere")
    (task,) = own_tasks.add_file("odd.json").values()
    assert "has no windows/" in str(datasets.why_unavailable("mine", task))
    with pytest.raises(DataUnavailable):
        datasets.open_split("mine", task, "train")


@pytest.mark.slow
def test_every_command_of_the_page(page):
    lines = PAGE.replace("\\\n", " ").splitlines()
    commands = [shlex.split(x) for x in lines if re.match(r"python (-m|\w+\.py)", x)]
    assert len(commands) == 4
    small = ["--config.trainer.max_duration.value=2", "--config.ladder.max_rungs=2"]
    small.append("--config.common.training_modalities=[sentinel2_l2a,openstreetmap_raster]")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    commands = [*commands[:2], commands[3] + small, commands[2]]  # the run comes last on the page
    for command in commands:
        done = subprocess.run(
            [sys.executable, *command[1:]], cwd=page, env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, (command, done.stderr)
    assert "my_fields_probe" in done.stdout
