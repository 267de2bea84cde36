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
from absl import app, flags

from launch import _estimate
from launch._app import load_file
from olmoearth_jax import modalities
from olmoearth_jax.config import ExperimentConfig
from olmoearth_jax.data.draws import rng
from olmoearth_jax.data.subset import array_shape
from olmoearth_jax.masking import MaskContext, missing_tokens
from olmoearth_jax.stream.census import take_census
from olmoearth_jax.train import assemble, build, probe
from olmoearth_jax.train.sharding import make_mesh
from olmoearth_jax.train.step import TrainProgram

_BATCH = flags.DEFINE_integer("batch", 8, "Samples of the group.")
_GRIDS = flags.DEFINE_list("grids", ["2", "5", "12"], "Grid sides to time.")
_PATCH = flags.DEFINE_integer("patch_size", 4, "Patch size in pixels.")
_ENGINES = flags.DEFINE_list("engines", ["stream", "dense"], "Engines to time.")
_STEPS = flags.DEFINE_integer("steps", 5, "Timed micro-steps per engine and grid.")
_RUNGS = flags.DEFINE_integer("max_rungs", 12, "Step programs of the stream engine.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of pixels and masks.")


def random_group(
    config: ExperimentConfig, grid: int, timesteps: int, patch_size: int, size: int, seed: int
) -> dict[str, Any]:
    """A group of complete random samples, masked as the config says."""
    names = modalities.in_sample_order(config.dataset.training_modalities)
    draw = rng(seed, "bench", grid)
    data = {}
    for name in names:
        shape = (size, *array_shape(name, grid * patch_size, timesteps))
        data[name] = draw.standard_normal(shape, np.float32)
    missing = missing_tokens(data, patch_size, config.model.encoder_config.tokenization)
    group = {
        "position": np.arange(size),
        "index": np.arange(size),
        "ok": np.ones(size, bool),
        "grid": np.int32(grid),
        "patch_size": np.int32(patch_size),
        "timestamps": np.tile(np.array([15, 6, 2020], np.int32), (size, timesteps, 1)),
        "data": data,
    }
    views = zip(("mask_a", "mask_b"), build.masking_strategies(config), strict=False)
    for number, (key, strategy) in enumerate(views):
        group[key] = strategy(missing, MaskContext.whole_group(seed * 2 + number, size))
    return group


def _programs(config: ExperimentConfig, timesteps: dict[int, int]) -> dict[str, TrainProgram]:
    mesh = make_mesh()
    objective = build.build_objective(config)
    options = assemble.EngineOptions.of(
        config.model, dtype=build.compute_dtype(config), attention=config.attention
    )
    out = {}
    for engine in _ENGINES.value:
        if engine == "dense":
            built: Any = assemble.dense_engine(config.model, objective, mesh, _BATCH.value, options)
        else:
            spec = build.stream_of(config, timesteps, mesh.size, objective.token_loss.scope)
            config.ladder.max_rungs = _RUNGS.value
            ladder = build.size_ladder(config, spec, timesteps, [probe.complete(spec.modalities)])
            built = assemble.stream_engine(config.model, spec, ladder, objective, mesh, options)
        recipe = build.build_recipe(config, 1000)
        out[engine] = TrainProgram(
            config.model, built, recipe, mesh, assemble.trainable_leaves(config.model, True)
        )
    return out


def _micro_step(program: TrainProgram, group: dict[str, Any]) -> tuple[Callable[[], float], Any]:
    """(function that runs one micro-step and returns its seconds, the compiled program)."""
    state = program.init_state()
    (prepared,) = program.engine.prepare([group])
    key = jax.random.key(0)
    total = program._zeros(state, prepared)
    compiled = program._program(prepared.key, state, total, prepared.inputs, key)

    def run() -> float:
        nonlocal total
        jax.block_until_ready(total)
        begun = time.perf_counter()
        total = compiled(state["params"], state["target"], total, prepared.inputs, key)
        jax.block_until_ready(total)
        return time.perf_counter() - begun

    run()
    return run, (compiled, prepared)


def _padding(config: ExperimentConfig, program: TrainProgram, group: dict[str, Any], host: dict):
    """FLOPs computed over FLOPs of real tokens, with and without the attention rows."""
    engine: Any = program.engine
    census = take_census(group, engine.spec)
    rows = engine.spec.rows
    enc, dec = census.enc.sum() / rows, census.dec.sum() / rows
    self_pairs = float((census.enc.astype(float) ** 2).sum()) / rows
    cross = float((census.enc * census.dec.sum(-1)).sum()) / rows
    nothing = np.zeros(0)
    real = _estimate.forward_flops(
        config, _estimate.Tokens(float(enc), float(dec), self_pairs, cross, nothing)
    )
    rung = engine.ladder[host["rung"]]
    padded_self = _estimate._pairs(rung, engine.spec, "self") / rows
    padded_cross = _estimate._pairs(rung, engine.spec, "cross") / rows
    streams = (rung.enc / rows, rung.dec / rows)
    return {
        "flops_padded_over_real": _estimate.forward_flops(
            config, _estimate.Tokens(*streams, padded_self, padded_cross, nothing)
        )
        / real,
        "flops_padded_over_real_without_rows": _estimate.forward_flops(
            config, _estimate.Tokens(*streams, self_pairs, cross, nothing)
        )
        / real,
    }


def measure(config: ExperimentConfig) -> dict[str, Any]:
    """The figures of one process."""
    config.data_loader.global_batch_size = _BATCH.value
    config.train_module.rank_microbatch_size = _BATCH.value
    timesteps = _estimate.grid_timesteps(config)
    programs = _programs(config, timesteps)
    results = []
    for text in _GRIDS.value:
        grid = int(text)
        group = random_group(config, grid, timesteps[grid], _PATCH.value, _BATCH.value, _SEED.value)
        runs: dict[str, Callable[[], float]] = {}
        row: dict[str, Any] = {"grid": grid, "timesteps": timesteps[grid]}
        for engine, program in programs.items():
            begun = time.perf_counter()
            runs[engine], (compiled, prepared) = _micro_step(program, group)
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
                times[engine].append(run())
        for engine, seconds in times.items():
            row[f"{engine}_s"] = statistics.median(seconds)
        if len(runs) > 1:
            ratios = [a / b for a, b in zip(times["stream"], times["dense"], strict=True)]
            row["stream_over_dense"] = statistics.median(ratios)
        results.append(row)
    return {
        "benchmark": "train_step",
        "config": flags.FLAGS.config,
        "batch": _BATCH.value,
        "patch_size": _PATCH.value,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "dtype": np.dtype(build.compute_dtype(config)).name,
        "programs": {k: p.compile_count for k, p in programs.items()},
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "results": results,
    }


def main(_argv: list[str]) -> None:
    config = load_file(flags.FLAGS.config or "configs/nano.py")
    print(json.dumps(measure(config)))


if __name__ == "__main__":
    app.run(main)
