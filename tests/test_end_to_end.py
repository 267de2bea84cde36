"""Train, kill, resume, evaluate, inspect: the commands as a user types them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from olmoearth_jax.train.metrics import read_metrics, without_timing

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = (
    "--config=configs/nano.py:smoke",
    "--config.trainer.max_duration.value=10",
    "--config.trainer.callbacks.checkpointer.save_interval=10",
    "--config.trainer.callbacks.checkpointer.ephemeral_save_interval=5",
)


def _command(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", module, *arguments]


def _train(folder: Path, cache: Path) -> list[str]:
    return _command(
        "launch.train",
        *SETTINGS,
        "--run_name=end_to_end",
        f"--config.common.save_folder={folder}",
        f"--config.compile.cache_dir={cache}",
    )


def _run(command: list[str]) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def _steps(folder: Path) -> list[int]:
    found = [p.name for p in (folder / "checkpoints").glob("*") if p.name.isdecimal()]
    return sorted(int(n) for n in found)


def _kill_after_first_checkpoint(command: list[str], folder: Path) -> None:
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        deadline = time.monotonic() + 900
        while 5 not in _steps(folder):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()


def _digest(folder: Path) -> str:
    out = _run(_command("tools.inspect_checkpoint", f"--checkpoint={folder}"))
    last = out.strip().splitlines()[-1]
    assert last.startswith("digest: ")
    return last


@pytest.mark.slow
def test_killed_and_resumed_equals_undisturbed(tmp_path):
    cache = tmp_path / "cache"
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    _run(_train(whole, cache))
    _kill_after_first_checkpoint(_train(broken, cache), broken)
    said = _run(_train(broken, cache))
    assert "Resuming after step" in said
    assert _digest(broken) == _digest(whole)
    curves = []
    for folder in (whole, broken):
        records = [without_timing(r) for r in read_metrics(folder / "metrics.jsonl")]
        curves.append([json.dumps(r, sort_keys=True) for r in records])
    assert curves[0] == curves[1]
    assert len(curves[0]) == 10
    said = _run(_train(whole, cache))
    assert "already complete" in said

    _run(_command("launch.evaluate", f"--checkpoint={whole}", "--tasks=brandenburg_knn"))
    (results,) = (whole / "evals").glob("10.json")
    assert "brandenburg_knn" in results.read_text()
