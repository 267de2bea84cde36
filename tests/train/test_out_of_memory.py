"""launch.train on a device whose memory does not suffice: an address space with a limit."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 8_000_000  # KiB of addresses; the step asks for as much again
GREEDY = [
    "--config=configs/nano.py:smoke",
    "--config.data_loader.global_batch_size=64",
    "--config.data_loader.samples_per_shape=64",
    "--config.train_module.rank_microbatch_size=64",
    "--config.data_loader.token_budget=2250",
    "--config.data_loader.sampled_hw_p_list=[8]",
    "--config.ladder.max_rungs=1",
    "--config.trainer.max_duration.value=2",
    "--config.trainer.callbacks.downstream_evaluator.enabled=False",
]


@pytest.mark.slow
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="limits the memory of the CPU")
def test_out_of_memory_names_the_knobs_and_what_the_programs_need(tmp_path):
    folder = f"--config.common.save_folder={tmp_path / 'run'}"
    command = shlex.join([sys.executable, "-m", "launch.train", *GREEDY, folder])
    run = subprocess.run(
        ["bash", "-c", f"ulimit -v {LIMIT} && exec {command}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    printed = run.stdout + run.stderr
    assert run.returncode == 1, printed
    assert "Traceback" not in printed
    for words in ("rank_microbatch_size", "remat", "mesh.fsdp", "(micro-step)", "Out of memory"):
        assert words in printed
