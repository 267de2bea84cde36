"""Starting from weights that fit only in part."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from olmoearth_jax.checkpoints import checkpoint
from olmoearth_jax.train import partial

from . import train_toy as toy

ROOT = Path(__file__).resolve().parents[2]
FORM = {"params": {"a/kernel": [[2, 3], "float32"], "b/kernel": [[4], "float32"]}}


def test_what_fits_is_taken_and_the_rest_is_listed():
    wanted = {"params": {"a/kernel": [[2, 3], "float32"], "c/bias": [[1], "float32"]}}
    assert partial.compare(FORM, wanted) == {
        "taken": ["params/a/kernel"],
        "fresh": ["params/c/bias"],
        "left_over": ["params/b/kernel"],
    }


def test_shapes_are_strict_and_nothing_in_common_is_an_error():
    other = {"params": {"a/kernel": [[3, 2], "float32"]}}
    with pytest.raises(ValueError, match=r"a/kernel is \[2, 3\], wanted \[3, 2\]"):
        partial.compare(FORM, other)
    with pytest.raises(ValueError, match="no parameter that this model has too"):
        partial.compare(FORM, {"params": {"d": [[1], "float32"]}})
    with pytest.raises(ValueError, match="no parameter"):
        partial.compare({}, FORM)


def test_a_state_takes_the_saved_values_and_keeps_the_others(tmp_path):
    toy.run(tmp_path / "a", 3)
    folder = checkpoint.find_checkpoint(tmp_path / "a")
    saved = checkpoint.load_item(folder)
    program = toy.ToyProgram()
    fresh = program.init_state()
    fresh["params"] = {**fresh["params"], "sensor": {"kernel": np.full(3, 7, np.float32)}}
    state, report = partial.restore(folder, fresh, lambda: fresh)
    assert report["fresh"] == ["params/sensor/kernel"] and not report["left_over"]
    np.testing.assert_array_equal(state["params"]["dense"]["kernel"], saved["dense"]["kernel"])
    np.testing.assert_array_equal(state["params"]["sensor"]["kernel"], 7)
    assert "1 drawn anew (sensor/kernel)" in partial.told(report)


def test_a_run_takes_only_weights_and_says_so(tmp_path):
    toy.run(tmp_path / "a", 3)
    lines = []
    config = {"trainer": {"save_interval": 10}}
    how = {"load_path": str(tmp_path / "a"), "load_partial": True, "config": config}
    summary = toy.run(tmp_path / "b", 3, lines=lines, **how)
    assert (summary.start_step, summary.step) == (0, 3)
    toy.run(tmp_path / "c", 3, load_path=str(tmp_path / "a"), load_weights_only=True)
    starts = [toy.lines_of(tmp_path / name)[0] for name in "bc"]
    assert starts[0] == starts[1]  # the same weights and a new optimiser
    kept = json.loads((tmp_path / "b" / "config.json").read_text())["trainer"]["loaded"]
    assert kept["taken"] and not kept["fresh"]
    assert any("parameters taken, 0 drawn anew" in line for line in lines)
    again = {"trainer": {"save_interval": 10}}
    toy.run(tmp_path / "b", 6, config=again)
    assert again["trainer"]["loaded"] == kept  # also after it was resumed


@pytest.mark.slow
def test_another_modality_starts_from_the_weights_of_fewer(tmp_path):
    def train(folder, names, *more):
        command = [
            sys.executable, "-m", "launch.train", "--config=configs/nano.py:smoke",
            f"--run_name={folder}", f"--config.common.save_folder={tmp_path / folder}",
            f"--config.common.training_modalities={names}", "--config.ladder.max_rungs=1",
            "--config.trainer.max_duration.value=2", "--config.trainer.max_duration.unit=steps",
            "--config.trainer.callbacks.downstream_evaluator.enabled=false",
            "--config.trainer.callbacks.tensorboard.image_interval=null", *more,
        ]  # fmt: skip
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    assert train("few", "[sentinel2_l2a,worldcover]")[0] == 0
    load = f"--config.trainer.load_path={tmp_path / 'few'}"
    names = "[sentinel2_l2a,sentinel1,worldcover]"
    code, text = train("strict", names, load)
    assert code == 2 and "missing in the checkpoint" in text, text
    code, text = train("more", names, load, "--config.trainer.load_partial=true")
    assert code == 0 and "drawn anew" in text, text
    loaded = json.loads((tmp_path / "more" / "config.json").read_text())["trainer"]["loaded"]
    assert all("sentinel1" in path for path in loaded["fresh"]) and loaded["fresh"]
    assert not loaded["left_over"]
