"""Times one training micro-step, stream engine against dense engine, in one process.

    python -m tools.bench.train_step --config=configs/nano.py --batch=8 --grids=2,5,12

Pixels are random and complete (the most tokens the sampler can draw). Both engines take the same
groups in turn; times are medians. Prints one JSON line.
"""

from __future__ import annotations

import json
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import flags

from olmoearth_jax import commands
from olmoearth_jax.config import ExperimentConfig
from olmoearth_jax.config_files import load_file
from olmoearth_jax.stream.token_counts import count_tokens
from olmoearth_jax.train import assemble, estimate
from olmoearth_jax.train.flops import real_tokens
from olmoearth_jax.train.step import TrainProgram

from .micro_step import (
    config_path,
    dense_program,
    padded_tokens,
    prepare_step,
    random_group,
    stream_program,
    without_rows,
)

flags.declare_key_flag("config")
_BATCH = flags.DEFINE_integer("batch", 8, "Samples of the group.", lower_bound=1)
_GRIDS = flags.DEFINE_list("grids", ["2", "5", "12"], "Grid sides to time.")
_PATCH = flags.DEFINE_integer("patch_size", 4, "Patch size in pixels.")
_ENGINES = flags.DEFINE_list("engines", ["stream", "dense"], "Engines to time.")
_STEPS = flags.DEFINE_integer("steps", 5, "Timed micro-steps per engine and grid.")
_RUNGS = flags.DEFINE_integer("max_rungs", 12, "Step programs of the stream engine.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of pixels and masks.")


def _padding(config: ExperimentConfig, program: TrainProgram, group: dict[str, Any], host: dict):
    """FLOPs computed over FLOPs of real tokens, with and without the attention rows."""
    engine: Any = program.engine
    own = real_tokens([count_tokens(group, engine.spec)], engine.spec)
    most = padded_tokens(engine.ladder[host["rung"]], engine.spec)
    real = estimate.forward_flops(config, own)
    return {
        "flops_padded_over_real": estimate.forward_flops(config, most) / real,
        "flops_padded_over_real_without_rows": estimate.forward_flops(
            config, without_rows(most, own)
        )
        / real,
    }


def measure(config: ExperimentConfig) -> dict[str, Any]:
    """The figures of one process."""
    config.data_loader.global_batch_size = _BATCH.value
    config.train_module.rank_microbatch_size = _BATCH.value
    timesteps = estimate.grid_timesteps(config)
    makers = {
        "stream": lambda: stream_program(config, _RUNGS.value),
        "dense": lambda: dense_program(config, _BATCH.value),
    }
    programs = {engine: makers[engine]() for engine in _ENGINES.value}
    # One state for both engines, without the optimiser's: a large model fills the memory else.
    whole = next(iter(programs.values())).init_state()
    state = {name: whole[name] for name in ("params", "target")}
    del whole
    results = []
    for text in _GRIDS.value:
        grid = int(text)
        group = random_group(config, grid, timesteps[grid], _PATCH.value, _BATCH.value, _SEED.value)
        runs: dict[str, Callable[[], Any]] = {}
        row: dict[str, Any] = {"grid": grid, "timesteps": timesteps[grid]}
        for engine, program in programs.items():
            begun = time.perf_counter()
            runs[engine], compiled, prepared = prepare_step(program, state, group)
            runs[engine]()
            row[f"{engine}_first_s"] = time.perf_counter() - begun
            row[f"{engine}_temp_mb"] = compiled.memory_analysis().temp_size_in_bytes / 2**20
            if engine == "stream":
                engine_: Any = program.engine
                number = engine_.ladder.index(prepared.key)
                row.update(_padding(config, program, group, {"rung": number}))
                row["encoded_tokens"] = prepared.host["encoded_tokens"]
                row["decoded_tokens"] = prepared.host["decoded_tokens"]
        times: dict[str, list[float]] = {engine: [] for engine in runs}
        for _ in range(_STEPS.value):
            for engine, run in runs.items():
                begun = time.perf_counter()
                run()
                times[engine].append(time.perf_counter() - begun)
        for engine, seconds in times.items():
            row[f"{engine}_s"] = statistics.median(seconds)
        if len(runs) > 1:
            ratios = [a / b for a, b in zip(times["stream"], times["dense"], strict=True)]
            row["stream_over_dense"] = statistics.median(ratios)
        results.append(row)
    return {
        "benchmark": "train_step",
        "config": config_path(),
        "batch": _BATCH.value,
        "patch_size": _PATCH.value,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "dtype": np.dtype(assemble.compute_dtype(config)).name,
        "programs": {k: p.compile_count for k, p in programs.items()},
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "results": results,
    }


def main(_argv: list[str]) -> None:
    config = load_file(config_path())
    print(json.dumps(measure(config)))


if __name__ == "__main__":
    commands.run(main)
