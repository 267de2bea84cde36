"""Evaluation beside training: a watching process, and a run that is evaluated as it goes."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from olmoearth_jax.checkpoints import checkpoint
from olmoearth_jax.evals import runner
from olmoearth_jax.model import latent_mim
from olmoearth_jax.train.metrics import read_metrics

from .builders import tiny_config, write_windows

ROOT = Path(__file__).resolve().parents[2]


def _save(saver: checkpoint.Checkpointer, step: int) -> None:
    params = latent_mim.initial_params(tiny_config(), seed=step)
    saver.save(step, {"params": params, "step": np.int32(step)})
    saver.wait()


def _wait_for(path: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 600
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, path
        time.sleep(0.1)


@pytest.mark.slow
def test_a_process_of_its_own_evaluates_checkpoints_as_they_appear(tmp_path):
    write_windows(tmp_path / "data" / "yemen_crop", {"train": 4, "val": 2, "test": 2})
    run = tmp_path / "run"
    run.mkdir()
    command = [
        sys.executable, "-m", "launch.evaluate", f"--checkpoint={run}", "--watch",
        "--poll_seconds=0.2", "--tasks=yemen_crop", "--set=epochs=2", "--set=patch_size=4",
    ]  # fmt: skip
    env = {**os.environ, "EVAL_DATASETS_DIR": str(tmp_path / "data")}
    info = checkpoint.RunInfo(config={"model": dataclasses.asdict(tiny_config())})
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True) as watcher:
        with checkpoint.Checkpointer(run / "checkpoints", info, save_interval=1) as saver:
            for step in (1, 2):
                _save(saver, step)
                _wait_for(run / "evals" / f"{step}.json", watcher)
        _wait_for(run / "evals" / "results.png", watcher)
        watcher.send_signal(signal.SIGTERM)
        said, _ = watcher.communicate(timeout=600)
        assert watcher.returncode in (0, 130), said
    found = runner.read_lines(run / "evals")
    assert [r["checkpoint_step"] for r in found] == [1, 2]
    assert all(r["task"] == "yemen_crop" and r["test"]["primary"] is not None for r in found)


EVALUATOR = "trainer.callbacks.downstream_evaluator"
EVERY_20 = (
    "--config.trainer.no_evals=False",
    f"--config.{EVALUATOR}.enabled=True",
    f"--config.{EVALUATOR}.tasks_to_run=[brandenburg_knn]",
    f"--config.{EVALUATOR}.tasks.brandenburg_knn.eval_interval.unit=steps",
    f"--config.{EVALUATOR}.tasks.brandenburg_knn.eval_interval.value=20",
    f"--config.{EVALUATOR}.tasks.brandenburg_knn.patch_size=16",
)


def _train(folder: Path, cache: Path, *arguments: str) -> Path:
    command = [
        sys.executable, "-m", "launch.train", "--config=configs/nano.py:smoke", "--run_name=run",
        f"--config.common.save_folder={folder}", f"--config.compile.cache_dir={cache}",
        "--config.trainer.max_duration.value=60",
        "--config.trainer.callbacks.checkpointer.save_interval=60", *arguments,
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder / "checkpoints" / "60"


@pytest.mark.slow
def test_evaluating_every_20_steps_changes_no_bit_of_the_checkpoint(tmp_path):
    plain = _train(tmp_path / "plain", tmp_path / "cache")
    evaluated = _train(tmp_path / "evaluated", tmp_path / "cache", *EVERY_20)
    folder = tmp_path / "evaluated"
    assert [(folder / "evals" / f"{step}.json").exists() for step in (20, 40, 60)] == [True] * 3
    scored = [r for r in read_metrics(folder / "metrics.jsonl") if "eval/brandenburg_knn" in r]
    assert len(scored) == 3
    metas = [checkpoint.read_meta(p) for p in (plain, evaluated)]
    same = [{k: m[k] for k in m if k not in ("config", "time")} for m in metas]
    assert json.dumps(same[0], sort_keys=True) == json.dumps(same[1], sort_keys=True)
    items = [p.name for p in plain.iterdir() if p.is_dir() and p.name != "meta"]
    assert "params" in items and len(items) > 1
    for item in items:
        leaves = [
            dict(latent_mim.flatten(checkpoint.load_item(p, item))) for p in (plain, evaluated)
        ]
        assert leaves[0].keys() == leaves[1].keys()
        for path, value in leaves[0].items():
            assert np.array_equal(value, leaves[1][path], equal_nan=True), (item, path)
