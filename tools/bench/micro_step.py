"""What the benchmarks of a training micro-step share: its group, its program, its call."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import flags

from olmoearth_jax import modalities
from olmoearth_jax.config import ExperimentConfig
from olmoearth_jax.data.draws import rng
from olmoearth_jax.data.subset import array_shape
from olmoearth_jax.masking import MaskContext, missing_tokens
from olmoearth_jax.mesh import make_mesh
from olmoearth_jax.stream.stream_shape import CROSS, GRID, READ, SELF, Rung, StreamSpec
from olmoearth_jax.stream.token_counts import TokenCounts
from olmoearth_jax.train import assemble, build, estimate, probe
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


def real_tokens(counts: list[TokenCounts], spec: StreamSpec) -> estimate.Tokens:
    """All tokens and pairs that exist, as sums."""
    enc, dec, loc = (
        np.concatenate([x.ravel() for x in found]).astype(float)
        for found in zip(*((c.enc, c.dec.sum(-1), c.loc) for c in counts), strict=True)
    )
    read = loc if spec.loc_bound else enc
    sums = [enc, dec, enc * enc, read * dec, loc, loc * enc, loc * loc]
    return _tokens([float(x.sum()) for x in sums])


def padded_tokens(rung: Rung, spec: StreamSpec, devices: int = 1) -> estimate.Tokens:
    """All that a rung computes on so many devices, as sums."""
    plans = [SELF, CROSS, *([READ, GRID] if spec.loc_bound else [])]
    pairs = [rung.pairs(spec.plan(name)) for name in plans] + [0, 0]
    sums = [rung.enc, rung.dec, *pairs[:2], rung.loc, *pairs[2:4]]
    return _tokens([float(devices * x) for x in sums])


def without_rows(padded: estimate.Tokens, real: estimate.Tokens) -> estimate.Tokens:
    """Padded streams, but attention on the pairs that exist."""
    pairs = ("encoder_pairs", "decoder_pairs", "read_pairs", "grid_pairs")
    return dataclasses.replace(padded, **{name: getattr(real, name) for name in pairs})


def _tokens(sums: list[float]) -> estimate.Tokens:
    enc, dec, own, cross, loc, read, grid = sums
    return estimate.Tokens(enc, dec, own, cross, np.zeros(0), loc, read, grid)


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
