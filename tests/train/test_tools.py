"""tools.inspect_checkpoint and tools.compare_runs on runs of the toy."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from olmoearth_jax.checkpoints import checkpoint, integrity
from olmoearth_jax.train import comparison
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
    assert "| last step |  | 10 | 10 | 4 |  |  |" in table
    assert any(line.startswith("| train/loss | 1 to 4 |") for line in table)
    long, again, short = loaded.values()
    assert compare_runs.first_difference(long, again) is None
    assert "10 lines, the other 4" in str(compare_runs.first_difference(long, short))
    changed = [dict(record) for record in read_metrics(runs / "long")]
    changed[2]["train/loss"] += 1e-12
    assert str(compare_runs.first_difference(long, changed)).startswith("step 3: train/loss is")


def test_runs_are_named_by_their_folders(runs, monkeypatch):
    monkeypatch.chdir(runs / "long")
    assert list(compare_runs.load([".", "../short/metrics.jsonl"])) == ["long", "short"]
    with pytest.raises(ValueError, match="name each run once"):
        compare_runs.load([".", "."])


def made(values: dict[int, float], **others) -> list[dict]:
    return [{"step": step, "train/loss": value, **others} for step, value in values.items()]


def test_runs_are_compared_at_the_steps_that_they_share():
    noise = [0.3, -0.2, 0.1, 0.4]
    long = made({step: 5 + noise[step % 4] - step / 10 for step in range(1, 41)})
    short = made({step: 4 + noise[step % 4] - step / 10 for step in range(1, 11)})
    steps, sides = comparison.compare({"long": long, "short": short}, "train/loss", 4)
    assert steps == [7, 8, 9, 10]
    assert sides["long"].mean == pytest.approx(5 + 0.15 - 0.85)
    assert sides["short"].change == pytest.approx(-1) and sides["long"].change is None
    error = sides["long"].error
    assert error is not None and error > 0.05  # what both have drawn alike is not in the difference
    assert sides["short"].change_error == pytest.approx(0, abs=1e-9)


def test_evaluations_count_by_their_last_shared_step_and_bring_their_own_deviation():
    name = "eval/test/mados"
    runs = {
        "a": [{"step": s, name: s / 10, f"{name}_bootstrap_std": 0.5} for s in (2, 4, 6)],
        "b": [{"step": s, name: s / 5} for s in (2, 4)] + [{"step": 6, name: float("nan")}],
        "c": [{"step": 5, "val/loss": 1.0}],
    }
    steps, sides = comparison.compare(runs, name, 10)
    assert steps == [4] and set(sides) == {"a", "b"}
    assert sides["a"].error == 0.5 and sides["b"].error is None
    assert sides["b"].change == pytest.approx(0.4) and sides["b"].change_error is None
    (line,) = (x for x in comparison.table(runs, [name], 10) if x.startswith(f"| {name}"))
    assert line == f"| {name} | 4 | 0.4 ± 0.5 | 0.8 | - | +0.4 |  |"
    assert comparison.metric_names(runs)[-1] == "val/loss"
    apart = {"a": made({1: 1.0}), "b": made({2: 1.0})}
    (line,) = (x for x in comparison.table(apart, ["train/loss"], 10) if "train/loss" in x)
    assert "(no step in common)" in line


def test_curves(runs, tmp_path):
    loaded = compare_runs.load([str(runs / "long"), str(runs / "short" / "metrics.jsonl")])
    compare_runs.plot(loaded, ["train/loss"], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_where_curves_go_is_looked_at_first(tmp_path):
    run = tmp_path / "run" / "metrics.jsonl"
    run.parent.mkdir()
    run.write_text('{"step": 1, "train/loss": 1.5}\n{"step": 2, "train/loss": "odd"}\n')
    os.mkfifo(tmp_path / "pipe.jsonl")
    for runs_of, more, told in [
        (run, [f"--png={tmp_path / 'curves'}"], "must end in .png"),
        (run, [f"--png={run}", "--overwrite"], "would replace one of the inputs"),
        (run.parent, [f"--png={run}", "--overwrite"], "would replace one of the inputs"),
        (tmp_path / "pipe.jsonl", [], "is a folder, pipe or device and no metrics file"),
        (run, ["--average=0"], "--average=0"),
        (run, ["--metrics=train/lss"], "no run has the metric 'train/lss'; did you mean 'train/l"),
    ]:
        command = [sys.executable, "-m", "tools.compare_runs", str(runs_of), *more]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode and told in done.stderr and "| train/loss" not in done.stdout
    assert comparison.series(compare_runs.load([str(run)])["run"], "train/loss") == [(1, 1.5)]
