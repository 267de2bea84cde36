"""Steps as the training loop takes them, packing and transfer included, and the very first."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from olmoearth_jax.config import ExperimentConfig
from olmoearth_jax.train import estimate
from olmoearth_jax.train.progress import MAX_IN_FLIGHT

from .arms import MOST_TIME, Bench, Trial, short
from .micro_step import random_group, stream_program

_LR = np.float32(1e-4)
_REPEATS = 8


@dataclasses.dataclass
class WholeSteps:
    """The optimiser's update, which all arms share, and what steps with it take."""

    bench: Bench
    update: Any = None
    error: str = ""
    """Why there is no update."""

    def compile_update(self) -> None:
        """Compiles the update, or sets `error`; the bench has its state by then."""
        try:
            program, state = self.bench.zeros, self.bench.state
            assert program is not None
            self.update = program._update_program(state, program.programs["zeros"](), {})
        except Exception as e:  # this runs in a thread, which nobody would see end
            self.error = short(e)

    def measure(self, trial: Trial) -> dict[str, Any]:
        """Seconds of a step on waiting inputs, of one with packing and transfer, their ratio.

        The bench has a whole state afterwards, also when this fails.

        Raises:
          ValueError: the update was not compiled.
        """
        if self.update is None:
            raise ValueError(f"no update: {self.error or 'it was not ready'}")
        try:
            return self._measured(trial)
        except Exception:
            # An update that fails has taken the state with it.
            if any(x.is_deleted() for x in jax.tree.leaves(self.bench.state)):
                assert self.bench.zeros is not None
                self.bench.state = self.bench.zeros.init_state()
            raise

    def _measured(self, trial: Trial) -> dict[str, Any]:
        bench, program = self.bench, trial.program
        assert program is not None
        groups = bench.groups[MOST_TIME]
        program.programs["update"] = self.update
        trial.load(bench)
        self._on_device(trial)
        own = statistics.median(_seconds(lambda: self._on_device(trial)) for _ in range(_REPEATS))
        trial.inputs = []
        self._steps(trial, groups, 2)
        whole = _seconds(lambda: self._steps(trial, groups, _REPEATS)) / _REPEATS
        packing = _seconds(
            lambda: jax.block_until_ready([m.inputs for m in program.engine.prepare(groups)])
        )
        samples = sum(len(g["position"]) for g in groups)
        return {
            "samples_per_s": samples / whole,
            "step_s": whole,
            "device_s": own,
            "step_over_device": whole / own,
            "packing_ms_per_sample": 1e3 * packing / samples,
        }

    def _on_device(self, trial: Trial) -> None:
        total = trial.one_pass(self.bench)
        self.bench.state, metrics = self.update(self.bench.state, total, _LR)
        jax.block_until_ready(metrics)

    def _steps(self, trial: Trial, groups: list[Any], count: int) -> None:
        assert trial.program is not None
        running: deque[Any] = deque()
        for n in range(count):
            self.bench.state, report = trial.program.step(self.bench.state, groups, n + 1)
            running.append(report.metrics)
            if len(running) > MAX_IN_FLIGHT:
                jax.block_until_ready(running.popleft())
        jax.block_until_ready(list(running))


def _seconds(function: Any) -> float:
    begun = time.perf_counter()
    function()
    return time.perf_counter() - begun


def first_step(
    config: ExperimentConfig, rungs: int, seed: int, told: Callable[[dict[str, Any]], None]
) -> None:
    """Tells seconds of what comes before and with the first step of a process, and of the second.

    What is being compiled behind the steps is awaited after that: to end a process in the midst of
    it could leave a part of a program in the compilation cache.
    """
    size = config.train_module.rank_microbatch_size
    timesteps = estimate.grid_timesteps(config)
    count = config.data_loader.global_batch_size // size
    grids = [sorted(timesteps)[n % len(timesteps)] for n in range(count)]
    patch = config.data_loader.min_patch_size
    groups = [
        random_group(config, grid, timesteps[grid], patch, size, seed + n)
        for n, grid in enumerate(grids)
    ]
    begun = time.perf_counter()
    program = stream_program(config, rungs)
    sized = time.perf_counter()
    state = jax.block_until_ready(program.init_state())
    made = time.perf_counter()
    took = []
    for number in (1, 2):
        last = time.perf_counter()
        state, report = program.step(state, groups, number)
        jax.block_until_ready(report.metrics)
        took.append(time.perf_counter() - last)
    found = {
        "programs": program.compile_count,
        "ladder_s": sized - begun,
        "parameters_s": made - sized,
        "first_step_s": took[0],
        "second_step_s": took[1],
        "until_first_step_s": made - begun + took[0],
    }
    told(found)
    program.close()
    program.programs.join()
