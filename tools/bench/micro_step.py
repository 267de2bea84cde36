"""What the benchmarks of a training micro-step share: its group, its program, its call."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from olmoearth_jax import modalities
from olmoearth_jax.config import ExperimentConfig
from olmoearth_jax.data.draws import rng
from olmoearth_jax.data.subset import array_shape
from olmoearth_jax.masking import MaskContext, missing_tokens
from olmoearth_jax.mesh import make_mesh
from olmoearth_jax.stream.stream_shape import CROSS, GRID, READ, SELF, Rung, StreamSpec
from olmoearth_jax.stream.token_counts import count_tokens
from olmoearth_jax.train import assemble, build, estimate, probe
from olmoearth_jax.train.flops import tokens_of, training_flops
from olmoearth_jax.train.step import TrainProgram

from ..goldens.dense_engine import dense_engine

if "config" not in flags.FLAGS:  # programs of launch in the same process have it, too
    flags.DEFINE_string(
        "config", None, "Config file, with an argument after a colon.",
        allow_override=True,
    )  # fmt: skip


def config_path(usual: str = "configs/nano.py") -> str:
    """What --config says; `usual` where it says nothing."""
    return flags.FLAGS["config"].value or usual


def padded_tokens(rung: Rung, spec: StreamSpec, devices: int = 1) -> estimate.Tokens:
    """All that a rung computes on so many devices, as sums."""
    plans = [SELF, CROSS, *([READ, GRID] if spec.loc_bound else [])]
    pairs = [rung.pairs(spec.plan(name)) for name in plans] + [0, 0]
    sums = [rung.enc, rung.dec, *pairs[:2], rung.loc, *pairs[2:4]]
    return tokens_of([float(devices * x) for x in sums])


def without_rows(padded: estimate.Tokens, real: estimate.Tokens) -> estimate.Tokens:
    """Padded streams, but attention on the pairs that exist."""
    pairs = ("encoder_pairs", "decoder_pairs", "read_pairs", "grid_pairs")
    return dataclasses.replace(padded, **{name: getattr(real, name) for name in pairs})


_SIDE = {"cpu": 1024}


def matrix_rate(dtype: Any) -> float:
    """Floating-point operations per second of a large square product of random numbers."""
    side = _SIDE.get(jax.default_backend(), 8192)
    a, b = (jax.random.normal(jax.random.key(i), (side, side), dtype) for i in (0, 1))
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    product = jax.jit(lambda a, b: jnp.matmul(a, b, precision=precision))
    product(a, b).block_until_ready()
    rates = []
    for _ in range(5):
        begun = time.perf_counter()
        out = None
        for _ in range(10):
            out = product(a, b)
        jax.block_until_ready(out)
        rates.append(10 * 2 * side**3 / (time.perf_counter() - begun))
    return statistics.median(rates)


def real_flops(config: ExperimentConfig, spec: StreamSpec, groups: Sequence[Any]) -> float:
    """Training operations of all groups' real tokens; see `flops.training_flops`."""
    return training_flops(config, spec, [count_tokens(group, spec) for group in groups])


def program_bytes(compiled: Any) -> int:
    """What a compiled program needs of a device's memory, its arguments included."""
    a = compiled.memory_analysis()
    kept = a.argument_size_in_bytes + a.output_size_in_bytes - a.alias_size_in_bytes
    return kept + a.temp_size_in_bytes


def random_group(
    config: ExperimentConfig, grid: int, timesteps: int, patch_size: int, size: int, seed: int
) -> dict[str, Any]:
    """A group of complete random samples, masked as the config says."""
    group = random_pixels(config, grid, timesteps, patch_size, size, seed)
    missing = missing_tokens(group["data"], patch_size, config.model.encoder_config.tokenization)
    views = zip(("mask_a", "mask_b"), build.masking_strategies(config), strict=False)
    for number, (key, strategy) in enumerate(views):
        group[key] = strategy(missing, MaskContext.whole_group(seed * 2 + number, size))
    return group


def random_pixels(
    config: ExperimentConfig, grid: int, timesteps: int, patch_size: int, size: int, seed: int
) -> dict[str, Any]:
    """A group of complete random samples without masks."""
    names = modalities.in_sample_order(config.dataset.training_modalities)
    draw = rng(seed, "bench", grid)
    data = {}
    for name in names:
        shape = (size, *array_shape(name, grid * patch_size, timesteps))
        data[name] = draw.standard_normal(shape, np.float32)
    return {
        "position": np.arange(size),
        "index": np.arange(size),
        "ok": np.ones(size, bool),
        "grid": np.int32(grid),
        "patch_size": np.int32(patch_size),
        "timestamps": np.tile(np.array([15, 6, 2020], np.int32), (size, timesteps, 1)),
        "data": data,
    }


def stream_program(config: ExperimentConfig, max_rungs: int) -> TrainProgram:
    """Training through the token stream, its ladder sized for complete samples."""
    mesh = make_mesh()
    objective = build.build_objective(config)
    timesteps = estimate.most_timesteps(config)
    spec = build.stream_of(config, timesteps, mesh.size, objective)
    config.ladder.max_rungs = max_rungs
    ladder = build.size_ladder(config, spec, timesteps, [probe.complete(spec.modalities)])
    engine = assemble.stream_engine(config, spec, ladder, objective, mesh)
    return _program(config, engine, mesh)


def dense_program(config: ExperimentConfig, batch: int) -> TrainProgram:
    """Training through padded rows of whole samples."""
    mesh = make_mesh()
    objective = build.build_objective(config)
    engine = dense_engine(config, objective, mesh, batch)
    return _program(config, engine, mesh)


def _program(config: ExperimentConfig, engine: Any, mesh: Any) -> TrainProgram:
    return TrainProgram(config, engine, mesh, assemble.trainable_leaves(config.model, True), 1000)


def prepare_step(
    program: TrainProgram, state: Any, group: dict[str, Any]
) -> tuple[Callable[[], Any], Any, Any]:
    """(function that runs one micro-step and waits for its sums, the program, its input)."""
    (prepared,) = program.engine.prepare([group])
    key = jax.random.key(0)
    compiled = program._program(prepared, state, program._zeros(state, prepared), key)

    def run() -> Any:
        total = program._zeros(state, prepared)
        total = compiled(state["params"], state["target"], total, prepared.inputs, key)
        return jax.block_until_ready(total)

    return run, compiled, prepared
