"""tools.inspect_checkpoint and tools.compare_runs on runs of the toy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from olmoearth_jax.checkpoints import checkpoint, integrity
from olmoearth_jax.train.metrics import read_metrics
from tests.train import train_toy as toy
from tools import compare_runs, inspect_checkpoint

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    toy.run(folder / "long", 10)
    toy.run(folder / "again", 10, hard_stop=6)
    toy.run(folder / "again", 10)
    toy.run(folder / "short", 4)
    return folder


def test_report_ends_with_the_digest(runs):
    folder = checkpoint.find_checkpoint(runs / "long")
    lines = inspect_checkpoint.report(folder)
    params = checkpoint.load_item(folder)
    assert lines[-1] == f"digest: {integrity.parameter_digest(params)}"
    text = "\n".join(lines)
    assert "step: 10 (epoch 1, 3 of 7 steps into it)" in text and "files: whole" in text
    assert "dataset fingerprint: abc" in text and '"width": 8' in text
    assert "dense/kernel" in text and "16x8" in text and "total: 136 values" in text
    assert "WARNING" not in text


@pytest.mark.parametrize("inside", ["", "checkpoints", "checkpoints/10"])
def test_inspect_takes_any_of_the_folders(runs, inside):
    done = subprocess.run(
        [sys.executable, "-m", "tools.inspect_checkpoint", f"--checkpoint={runs}/long/{inside}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("digest: ")


def test_inspect_tells_what_is_wrong(runs):
    done = subprocess.run(
        [sys.executable, "-m", "tools.inspect_checkpoint", f"--checkpoint={runs}/nowhere"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and done.stderr.startswith("error: No complete checkpoint")


def test_compare(runs, tmp_path):
    loaded = compare_runs.load([str(runs / name) for name in ("long", "again", "short")])
    assert list(loaded) == ["long", "again", "short"]
    table = compare_runs.table(loaded, compare_runs.metric_names(loaded), 10)
    assert "| last step | 10 | 10 | 4 |" in table
    assert any(line.startswith("| train/loss |") for line in table)
    long, again, short = loaded.values()
    assert compare_runs.first_difference(long, again) is None
    assert "10 lines, the other 4" in str(compare_runs.first_difference(long, short))
    changed = [dict(record) for record in read_metrics(runs / "long")]
    changed[2]["train/loss"] += 1e-12
    assert str(compare_runs.first_difference(long, changed)).startswith("step 3: train/loss is")


def test_curves(runs, tmp_path):
    pytest.importorskip("matplotlib")
    loaded = compare_runs.load([str(runs / "long"), str(runs / "short" / "metrics.jsonl")])
    compare_runs.plot(loaded, ["train/loss"], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000
