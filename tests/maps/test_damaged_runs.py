"""Folders of runs that were damaged, or are of somebody who means harm: told before any work."""

import json
import shutil

import numpy as np
import pytest

from olmoearth_jax.maps import fine_tuning, predicting
from olmoearth_jax.maps.token_head import HeadOptions
from tests.maps import world
from tests.maps.test_finetune import options as training
from tests.maps.test_predict import options, quiet


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = world.build(tmp_path_factory.mktemp("world"))
    fine_tuning.run(training(out, out / "run", head=HeadOptions(epochs=2)), quiet)
    return out


@pytest.fixture
def run(folder):
    shutil.copytree(folder / "run", folder / "bad")
    yield folder / "bad"
    shutil.rmtree(folder / "bad")


def refused(folder, match):
    with pytest.raises(ValueError, match=match) as caught:
        predicting.run(options(folder, "out", run=str(folder / "bad")), quiet)
    assert not (folder / "out").exists() and "\n" not in str(caught.value)


CLASS = {"value": 1, "name": "field", "color": "#4477aa"}


@pytest.mark.parametrize("name, value", [
    ("version", "x"), ("version", None), ("window", 0), ("window", "32"), ("window", 30),
    ("window", 32.5), ("pixel", "x"), ("pixel", float("nan")), ("pixel", 0), ("timesteps", "2"),
    ("modalities", ["a"]), ("modalities", {"sentinel2_l2a": 5}), ("mode", "other"), ("unit", 5),
    ("overlap", -5), ("overlap", "x"), ("standardised_by", []), ("standardised_by", [1e300, 1]),
    ("standardised_by", ["a", "b"]), ("classes", []), ("classes", None), ("model", 5),
    ("classes", [CLASS, {**CLASS, "name": "other"}]), ("classes", [CLASS, {**CLASS, "value": 2}]),
    *(("classes", [{**CLASS, key: value}]) for key, value in (
        ("value", -5), ("value", 10**9), ("value", "1"), ("value", True), ("name", ["<b>"]),
        ("color", "red"), ("color", None), ("color", '#fff"><script>'), ("more", 1))),
    *(("embedding", {"patch_size": 4, "pooling": "spatial", "pooling_type": "mean",
                     "location_size": None, key: value}) for key, value in (
        ("patch_size", 0), ("patch_size", "4"), ("pooling", "x"), ("pooling_type", "x"),
        ("location_size", -3), ("more", 1))),
], ids=str)  # fmt: skip
def test_members_that_no_run_writes(folder, run, name, value):
    held = json.loads((run / "task.json").read_text())
    (run / "task.json").write_text(json.dumps({**held, name: value}))
    refused(folder, "task.json cannot be read: ")
    held.pop(name)
    (run / "task.json").write_text(json.dumps(held))
    refused(folder, f"task.json cannot be read: there is no '{name}'")


@pytest.mark.parametrize("text", ["", "{", "[]", "5", "null", '"x"', "{}", "[" * 100_000])
def test_files_that_are_no_objects(folder, run, text):
    for name in ("report.json", "task.json"):
        (run / name).write_text(text)
        refused(folder, "cannot be read")


def test_classes_of_another_run(folder, run):
    held = json.loads((run / "task.json").read_text())
    held["classes"].pop()
    (run / "task.json").write_text(json.dumps(held))
    refused(folder, "the report of .*bad cannot be read")


def test_weights_that_are_none(folder, run):
    path = run / "weights" / "head.npz"
    whole = dict(np.load(path))
    data = path.read_bytes()
    for wrong in (b"junk", data[:200], data[: len(data) // 2], b""):
        path.write_bytes(wrong)
        refused(folder, "head.npz cannot be read")
    changes = {
        "form of the model": lambda x: x[:5], "NaN or infinite": lambda x: x * np.nan,
        "the model": lambda x: x.astype("S4"), "allow_pickle": lambda x: np.array([{1: 2}], object),
    }  # fmt: skip
    for told, change in changes.items():
        np.savez(path, **{k: change(v) for k, v in whole.items()})
        refused(folder, told)
    np.savez(path, a=np.zeros(3))
    refused(folder, "head.npz lacks params/linear/bias")
    path.unlink()
    refused(folder, "head.npz cannot be read")
