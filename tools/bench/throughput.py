"""Samples per second of training, and its share of the device's matrix rate, over official draws.

    python -m tools.bench.throughput --config=configs/base.py:version=v1_2 --micro_batch=32

Groups walk through the sampler's grids with drawn patch sizes and complete random pixels: the most
tokens the sampler can draw. Timed are micro-steps on inputs that wait on the device, with one
update per global batch, and then whole steps with packing and transfer. MFU counts the
floating-point operations of real tokens (three times the forward pass of both views) over the rate
of a large matrix product measured in the same process. All settings are compiled before the first
is timed. Prints one JSON line per setting.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from absl import flags

from olmoearth_jax import commands, overrides
from olmoearth_jax.config import ExperimentConfig
from olmoearth_jax.config_files import load_file
from olmoearth_jax.data.draws import rng
from olmoearth_jax.train import assemble, estimate
from olmoearth_jax.train.step import TrainProgram

from .kernels import top_kernels
from .micro_step import (
    config_path,
    matrix_rate,
    program_bytes,
    random_group,
    real_flops,
    stream_program,
)

flags.declare_key_flag("config")
_BATCH = flags.DEFINE_list("micro_batch", ["32"], "Samples of a micro-step, one or several values.")
_ATTENTION = flags.DEFINE_list("attention", ["auto"], "Attention kernels: auto, cudnn, xla.")
_PRECISION = flags.DEFINE_list("precision", ["auto"], "Matrix products: auto, bfloat16, float32.")
_DRAWS = flags.DEFINE_integer("draws", 12, "Groups, walking through the grids.", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Passes over the groups.", lower_bound=1)
_RUNGS = flags.DEFINE_integer("max_rungs", 12, "Step programs.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of draws, pixels and masks.")
_THREADS = flags.DEFINE_integer("compile_threads", 8, "Programs compiled at a time.")
_TRACE = flags.DEFINE_string("trace", None, "Folder for a profile; names top kernels.")

_RATE = np.float32(1e-4)  # learning rate of the timed updates


def draw_groups(config: ExperimentConfig, size: int) -> list[dict[str, Any]]:
    """Groups of complete samples: grids in turn, patch sizes drawn."""
    timesteps = estimate.grid_timesteps(config)
    grids, loader = sorted(timesteps), config.data_loader
    # Fewer groups than grids are spread over them.
    stride = max(len(grids) // _DRAWS.value, 1)

    def one(n: int) -> dict[str, Any]:
        grid = grids[n * stride % len(grids)]
        draw = rng(_SEED.value, "throughput", n)
        patch = int(draw.integers(loader.min_patch_size, loader.max_patch_size + 1))
        return random_group(config, grid, timesteps[grid], patch, size, _SEED.value + n)

    with ThreadPoolExecutor(_THREADS.value) as pool:
        return list(pool.map(one, range(_DRAWS.value)))


@dataclasses.dataclass
class Case:
    """One setting: its program, and its micro-steps on the device."""

    config: ExperimentConfig
    program: TrainProgram
    state: Any
    groups: list[dict[str, Any]]
    prepared: list[Any]

    @classmethod
    def build(cls, path: str, precision: str, attention: str, size: int) -> Case:
        """Everything but compiled programs."""
        config = load_file(path)
        updates = max(config.data_loader.global_batch_size // size, 1)
        changes = {
            "precision": precision,
            "attention": attention,
            "train_module.rank_microbatch_size": size,
            "data_loader.global_batch_size": size * updates,
        }
        config = overrides.apply_values(config, changes)
        program = stream_program(config, _RUNGS.value)
        groups = draw_groups(config, size)
        prepared = list(program.engine.prepare(groups))
        jax.block_until_ready([micro.inputs for micro in prepared])
        return cls(config, program, program.init_state(), groups, prepared)

    @property
    def per_update(self) -> int:
        """Micro-steps of an update."""
        module = self.config.train_module
        return self.config.data_loader.global_batch_size // module.rank_microbatch_size

    def update(self, total: Any) -> Any:
        """The compiled optimiser update."""
        arguments = (self.state, total, _RATE)
        return self.program.programs.get("update", self.program._update, arguments, (0,))

    def jobs(self) -> list[Callable[[], Any]]:
        """Compilations, which may run at the same time."""
        total = self.program._zeros(self.state, self.prepared[0])
        first = {micro.key: micro for micro in self.prepared}
        warm = [functools.partial(self.program.warm_up, m, self.state) for m in first.values()]
        return [*warm, functools.partial(self.update, total)]

    def one_pass(self) -> Any:
        """All micro-steps once, an update after every global batch; metrics of the last one."""
        program, key, metrics = self.program, jax.random.key(0), None
        total = program._zeros(self.state, self.prepared[0])
        for n, micro in enumerate(self.prepared, 1):
            run = program._program(micro, self.state, total, key)
            total = run(self.state["params"], self.state["target"], total, micro.inputs, key)
            if n % self.per_update == 0 or n == len(self.prepared):
                self.state, metrics = self.update(total)(self.state, total, _RATE)
                total = program._zeros(self.state, self.prepared[0])
        return jax.block_until_ready(metrics)

    def whole_steps(self, count: int) -> None:
        """Steps as the training loop takes them: the next is packed while one is computed."""
        report: Any = None
        for n in range(count):
            self.state, report = self.program.step(self.state, self.groups, n + 1)
        jax.block_until_ready(report.metrics)

    def memory_gb(self) -> float:
        """What the largest micro-step program needs, its arguments included."""
        used = {micro.key for micro in self.prepared}
        return max(program_bytes(self.program.programs[key]) for key in used) / 1e9


def _seconds(function: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    function()
    return time.perf_counter() - begun


def measure(case: Case) -> dict[str, Any]:
    """Figures of one setting whose programs are compiled."""
    engine: Any = case.program.engine
    config = case.config
    rate = matrix_rate(assemble.compute_dtype(config))
    metrics = case.one_pass()
    seconds = [_seconds(case.one_pass) for _ in range(_REPEATS.value)]
    case.whole_steps(1)
    whole = _seconds(lambda: case.whole_steps(_REPEATS.value)) / _REPEATS.value
    packing = _seconds(lambda: jax.block_until_ready([m.inputs for m in _packed(case)]))
    kernels = []
    if _TRACE.value:
        with jax.profiler.trace(_TRACE.value):
            case.one_pass()
        kernels = top_kernels(_TRACE.value, 10)
    size = config.train_module.rank_microbatch_size
    median, samples = statistics.median(seconds), size * len(case.groups)
    flops = real_flops(config, engine.spec, case.groups)
    return {
        "micro_batch": size,
        "attention": config.attention,
        "dtype": np.dtype(assemble.compute_dtype(config)).name,
        "micro_steps_per_update": case.per_update,
        "samples_per_s": samples / median,
        "fastest_and_slowest_s": [min(seconds), max(seconds)],
        "samples_per_s_with_packing": samples / whole,
        "packing_ms_per_sample": 1e3 * packing / samples,
        "tflop_per_sample": flops / samples / 1e12,
        "mfu_of_measured_rate": flops / median / rate,
        "measured_rate_tflops": rate / 1e12,
        "program_memory_gb": case.memory_gb(),
        "programs_used": len({m.key for m in case.prepared}),
        "loss": float(metrics[f"train/{engine.objective.metric_name}"]),
        "top_kernels": kernels,
    }


def _packed(case: Case) -> list[Any]:
    return list(case.program.engine.prepare(case.groups))


def main(_argv: list[str]) -> None:
    path = config_path("configs/base.py:version=v1_2")
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    settings = itertools.product(_PRECISION.value, _ATTENTION.value, _BATCH.value)
    cases = [Case.build(path, p, a, int(size)) for p, a, size in settings]
    jobs = [job for case in cases for job in case.jobs()]
    begun = time.perf_counter()
    with ThreadPoolExecutor(_THREADS.value) as pool:
        list(pool.map(lambda job: job(), jobs))
    compiling = {"programs_compiled": len(jobs), "compile_s": time.perf_counter() - begun}
    for case in cases:
        head = {"benchmark": "throughput", "config": path, "device": device, **compiling}
        print(json.dumps(head | measure(case)), flush=True)


if __name__ == "__main__":
    commands.run(main)
