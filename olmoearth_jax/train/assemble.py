"""Puts model, masking, losses and mesh together into an engine and a program."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from olmoearth_jax import modalities
from olmoearth_jax.config import ExperimentConfig
from olmoearth_jax.losses import Objective
from olmoearth_jax.masking import Strategy, TokenBounds
from olmoearth_jax.model import heads, latent_mim
from olmoearth_jax.model.config import ModelConfig
from olmoearth_jax.model.encoder import slot_table
from olmoearth_jax.stream.engine import StreamEngine, shared_bits
from olmoearth_jax.stream.forward import StreamForward
from olmoearth_jax.stream.ladder import row_plans
from olmoearth_jax.stream.locations import check_grid
from olmoearth_jax.stream.patch_tables import BandDropout
from olmoearth_jax.stream.stream_shape import (
    CROSS,
    GRID,
    READ,
    SELF,
    TARGET,
    MicroStepSize,
    RowPlan,
    Rung,
    StreamSpec,
    make_slots,
    round_up,
)
from olmoearth_jax.train import hosts
from olmoearth_jax.train.query_stride import query_stride

_REMAT = {"none": "none", "dots": "dots", "block": "full"}


def compute_dtype(config: ExperimentConfig) -> Any:
    """Type of the matrix products: bfloat16 on accelerators, float32 on CPU, unless set."""
    if config.precision == "auto":
        return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    return jnp.dtype(config.precision)


def parts_of(config: ExperimentConfig, objective: Objective) -> dict[str, Any]:
    """What any engine is given: module structures, losses, what is dropped and recomputed."""
    model, dtype, dropout = config.model, compute_dtype(config), None
    encoder, decoder = model.encoder_config, model.decoder_config
    if encoder.band_dropout_rate > 0:
        names = encoder.band_dropout_modalities
        dropout = BandDropout(
            encoder.band_dropout_rate,
            encoder.random_band_dropout,
            None if names is None else tuple(names),
        )
    if decoder is None and model.reconstructor_config is not None:
        decoder = model.reconstructor_config.decoder_config
    return {
        "graph": latent_mim.graph(model, dtype)[0],
        "target_graph": latent_mim.target_graph(model, objective.full_target, dtype)[0],
        "objective": objective,
        "remat": _REMAT[config.remat],
        "encoder_drop": encoder.drop_path,
        "decoder_drop": 0.0 if decoder is None else decoder.drop_path,
        "band_dropout": dropout,
    }


def micro_step_shape(global_batch: int, group: int, devices: int) -> tuple[int, int]:
    """(groups per micro-step, samples per device).

    k = min(groups, devices) whole groups, k dividing the number of groups, so that a device
    holds about one group's worth of samples.

    Raises:
      ValueError: the batch doesn't divide into groups, or a micro-step over the devices; the
        message lists the group sizes that do.
    """
    if global_batch % group:
        raise ValueError(
            f"data_loader.global_batch_size={global_batch} is not divisible by "
            f"train_module.rank_microbatch_size={group}"
        )
    k = _groups_at_once(global_batch, group, devices)
    if (k * group) % devices:
        fit = [
            n
            for n in range(1, global_batch + 1)
            if global_batch % n == 0 and not _groups_at_once(global_batch, n, devices) * n % devices
        ]
        advice = (
            f"set train_module.rank_microbatch_size to one of {', '.join(map(str, fit))} (which "
            "must divide data_loader.samples_per_shape)"
            if fit
            else f"with data_loader.global_batch_size={global_batch} no "
            "train_module.rank_microbatch_size does: make it a multiple of the devices, or take "
            "as many devices as divide it"
        )
        raise ValueError(
            f"a micro-step of {k} group(s) of {group} samples does not divide over {devices} "
            f"devices; {advice}"
        )
    return k, k * group // devices


def _groups_at_once(global_batch: int, group: int, devices: int) -> int:
    groups = global_batch // group
    return max(n for n in range(1, min(groups, devices) + 1) if groups % n == 0)


@dataclasses.dataclass(frozen=True)
class StreamNeeds:
    """What an objective asks of a stream."""

    views: int = 2
    """Masked views."""
    scopes: tuple[str, ...] = ("modality",)
    """What the token losses' rows are (`losses.TokenLoss.scope`)."""
    deep: bool = False
    """Whether the target encoder runs."""
    pixels: bool = False
    """Whether tokens are compared with their pixels."""
    all_pixels: bool = False
    """Whether that holds for all tokens that aren't missing rather than for decoded ones."""
    maps: tuple[str, ...] = ()
    """Modalities that are drawn from the location grid."""

    @classmethod
    def of(cls, objective: Objective) -> StreamNeeds:
        """Those of an objective."""
        mae, drawn = objective.mae, objective.supervision
        maps = () if drawn is None else tuple(task.name for task in drawn.tasks)
        pixels, every = mae is not None, mae is not None and not mae.only_decode
        return cls(objective.views, objective.scopes, objective.deep, pixels, every, maps)


def stream_spec(
    model: ModelConfig,
    strategies: Sequence[Strategy],
    grid_timesteps: Mapping[int, int],
    size: MicroStepSize,
    needs: StreamNeeds,
    most_queries: int = 0,
) -> StreamSpec:
    """The static stream of a model under its masking.

    Args:
      strategies: masking of each distinct view.
      grid_timesteps: grid side -> timesteps the token budget allows.
      size: of a micro-step.
      needs: of the objective.
      most_queries: most locations of a sample where there may be several in a patch.
    """
    encoder = model.encoder_config
    names = modalities.in_sample_order(encoder.supported_modality_names)
    counts = {n: encoder.tokenization.num_band_sets(n) for n in names}

    def bounds(tokens: Mapping[str, tuple[int, int]], steps: int) -> TokenBounds:
        parts = [s.bounds(tokens, steps) for s in strategies]
        return TokenBounds(
            max(p.encode for p in parts),
            {n: max(p.encode_by_modality[n] for p in parts) for n in names},
            {n: max(p.decode[n] for p in parts) for n in names},
        )

    encodable = {
        n: any(n not in getattr(s, "only_decode_modalities", ()) for s in strategies) for n in names
    }
    slots = make_slots(slot_table(encoder), grid_timesteps, encodable)
    plans: dict[str, RowPlan] = {}
    enc = dec = 0
    for whole in sorted({scope in ("sample", "batch") for scope in needs.scopes}) or [False]:
        found, enc, dec = row_plans(names, counts, grid_timesteps, bounds, whole)
        plans |= {p.name: p for p in found}
    extra = encoder.num_register_tokens
    most = plans[SELF].queries + extra
    plans[SELF] = RowPlan(SELF, most, most)
    if needs.deep:
        most = _most_tokens(counts, grid_timesteps) + extra
        plans[TARGET] = RowPlan(TARGET, most, most)
    locations = 0
    if encoder.attention_pooler_config is not None:
        locations = round_up(max(most_queries, max(grid_timesteps) ** 2), 4)
        plans[CROSS] = RowPlan(CROSS, dec, locations)
        plans[READ], plans[GRID] = (
            RowPlan(READ, locations, enc),
            RowPlan(GRID, locations, locations),
        )
    return StreamSpec(
        slots, names, tuple(plans.values()), enc + extra, dec, size.samples, size.devices,
        needs.views, size.groups, encoder.max_patch_size, registers=extra, pixels=needs.pixels,
        all_pixels=needs.all_pixels, loc_bound=locations, maps=needs.maps,
    )  # fmt: skip


def _most_tokens(band_sets: Mapping[str, int], grid_timesteps: Mapping[int, int]) -> int:
    """All tokens of a sample, over all grids."""
    return max(
        sum(math.prod(modalities.get(n).axes(g, t)) * sets for n, sets in band_sets.items())
        for g, t in grid_timesteps.items()
    )


def stream_engine(
    config: ExperimentConfig,
    spec: StreamSpec,
    ladder: Sequence[Rung],
    objective: Objective,
    mesh: Mesh,
) -> StreamEngine:
    """The packed engine.

    Raises:
      ValueError: a model whose grid the stream does not have (`locations.check_grid`).
    """
    check_grid(config.model)
    forward = StreamForward(
        spec=spec, mesh=mesh, attention=config.attention, **parts_of(config, objective)
    )
    agree = functools.partial(hosts.current().agree, join=shared_bits)
    stride = query_stride(config)
    if stride is None:
        return StreamEngine(forward, ladder, mesh, agree)
    return StreamEngine(forward, ladder, mesh, agree, stride.per_patch)


def trainable_leaves(model: ModelConfig, pooled: bool, objective: Objective | None = None) -> Any:
    """Tree of bools: which parameters the optimiser touches (spec/train.md section 5.1).

    Left alone: channel embeddings that are not learnable, frozen patch embeddings, and what no
    loss reads (no gradient at all, hence no decay either): the pooled projection, a decoder
    without token loss, a reconstructor without pixel loss, a student without distillation.

    Args:
      model: the model.
      pooled: whether some loss reads the pooled projection.
      objective: the losses; None: token losses only.
    """
    encoder = model.encoder_config
    compares = objective is None or objective.compares_tokens
    paints = objective is not None and objective.mae is not None
    read = {
        heads.SUPERVISION: objective is not None and objective.supervision is not None,
        heads.DISTILLATION: objective is not None and objective.distillation is not None,
    }
    learns = {"encoder": encoder.learnable_channel_embeddings}
    if model.decoder_config is not None:
        flag = model.decoder_config.learnable_channel_embeddings
        learns |= dict.fromkeys(("decoder", "decoder_a", "decoder_b"), flag)
    if model.reconstructor_config is not None:
        inner = model.reconstructor_config.decoder_config
        learns["reconstructor"] = inner.learnable_channel_embeddings
    out = {}
    for path, _ in latent_mim.flatten(latent_mim.graph(model)[1]):
        keep = True
        if path[0] in read:
            keep = read[path[0]]
        elif path[0] != "encoder":
            keep = paints if path[0] == "reconstructor" else compares
        elif path[:2] == ("encoder", "attention_pooler") and path[2].startswith("student"):
            keep = read[heads.DISTILLATION]
        if "encodings" in path:
            keep = keep and learns[path[0]]
        elif path[:2] == ("encoder", "patch_embeddings"):
            keep = not encoder.frozen_patch_embeddings
        elif path[:2] == ("encoder", "project_and_aggregate"):
            keep = pooled
        out[path] = np.bool_(keep)
    return latent_mim.unflatten(out)
