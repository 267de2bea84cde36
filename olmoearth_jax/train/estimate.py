"""What a run costs, computed from its config alone: parameters, tokens, FLOPs, memory."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from olmoearth_jax import modalities
from olmoearth_jax.config import ExperimentConfig
from olmoearth_jax.data.budget import check_grids
from olmoearth_jax.data.sampler import shape_sampler
from olmoearth_jax.mesh import rules_of
from olmoearth_jax.modalities import IMAGE_TILE_PX
from olmoearth_jax.model import latent_mim
from olmoearth_jax.model.config import EncoderConfig, PredictorConfig
from olmoearth_jax.model.reference_counts import reference_counts
from olmoearth_jax.stream.locations import map_room
from olmoearth_jax.stream.stream_shape import CROSS, SELF, MicroStepSize, Rung, StreamSpec
from olmoearth_jax.train import assemble, build, probe
from olmoearth_jax.train.build_objective import build_objective
from olmoearth_jax.train.flops import Tokens, decoder_of, forward_flops, patch_flops
from olmoearth_jax.train.query_stride import query_stride

_SAMPLES = 8
"""Samples of a simulated group."""

_LOSS_ARRAYS = 8  # predictions and targets: in the stream, in rows, normalised, and gradients


def parameter_rows(cfg: ExperimentConfig) -> list[tuple[str, int]]:
    """(part, values) of every part of the model that is trained, in order."""
    out: dict[str, int] = {}
    for path, leaf in latent_mim.flatten(latent_mim.graph(cfg.model)[1]):
        part = "/".join(path[:2])
        out[part] = out.get(part, 0) + math.prod(leaf.shape)
    return list(out.items())


def full_target(cfg: ExperimentConfig) -> bool:
    """Whether the target is a whole encoder rather than its patch projection."""
    return build_objective(cfg).full_target


def target_size(cfg: ExperimentConfig) -> int:
    """Values of the frozen target that this package keeps."""
    if cfg.model.kind == "mae":
        return 0
    leaves = latent_mim.flatten(latent_mim.target_graph(cfg.model, full_target(cfg))[1])
    return sum(math.prod(leaf.shape) for _, leaf in leaves)


def reference_total(cfg: ExperimentConfig) -> int | None:
    """Parameters as the reference counts them: with a whole target and frozen month tables.

    None for kinds of model that are not counted that way here.
    """
    if cfg.model.kind != "latent_mim" or cfg.model.decoder_config is None:
        return None
    return reference_counts(cfg.model)["total"]


def grid_timesteps(cfg: ExperimentConfig) -> dict[int, int]:
    """Grid side -> timesteps that the token budget leaves, or their mean where they are drawn."""
    loader = cfg.data_loader
    if (sampler := shape_sampler(cfg, IMAGE_TILE_PX)) is not None:
        return sampler.mean_timesteps
    counted = cfg.model.encoder_config.tokenization if loader.match_model_tokenization else None
    return check_grids(
        cfg.dataset.training_modalities,
        range(loader.min_patch_size, loader.max_patch_size + 1),
        loader.sampled_hw_p_list,
        loader.token_budget,
        IMAGE_TILE_PX,
        counted,
    )


def most_timesteps(cfg: ExperimentConfig) -> dict[int, int]:
    """Grid side -> the most timesteps that a sample can have."""
    sampler = shape_sampler(cfg, IMAGE_TILE_PX)
    return grid_timesteps(cfg) if sampler is None else sampler.timesteps


def simulate_tokens(cfg: ExperimentConfig, timesteps: Mapping[int, int]) -> Tokens:
    """Draws masks for samples of every grid and counts their tokens."""
    strategies = build.masking_strategies(cfg)
    needs = assemble.StreamNeeds(cfg.data_loader.num_masked_views)
    size = MicroStepSize(_SAMPLES)
    stride = query_stride(cfg)
    most = 0 if stride is None else stride.most
    spec = assemble.stream_spec(cfg.model, strategies, most_timesteps(cfg), size, needs, most)
    shapes = build.likely_shapes(cfg, dict(timesteps), 4 * len(timesteps))
    count = 4 * len(timesteps) if isinstance(shapes, dict) else len(shapes)
    drawn = probe.simulate_needs(
        spec, [probe.complete(spec.modalities)], strategies, shapes, 0, count
    )
    slots, rows = len(spec.slots), spec.rows
    enc, dec, loc = (np.array([n.totals[2 * slots + i] for n in drawn]) / rows for i in range(3))
    patches = np.mean([n.totals[:slots] for n in drawn], axis=0) / _SAMPLES
    read = loc if spec.loc_bound else enc
    pairs = float(np.mean(enc * enc)), float(np.mean(read * dec))
    grid = float(loc.mean()), float(np.mean(loc * enc)), float(np.mean(loc * loc))
    return Tokens(float(enc.mean()), float(dec.mean()), *pairs, patches, *grid)


def step_flops(cfg: ExperimentConfig, spec: StreamSpec, tokens: Tokens) -> float:
    """FLOPs of an optimizer step on real tokens; the backward pass counts twice the forward."""
    views = cfg.data_loader.num_masked_views
    per_sample = 3 * views * forward_flops(cfg, tokens)
    per_sample += (3 * views + 1) * patch_flops(cfg, spec, tokens.patches)
    return per_sample * cfg.data_loader.global_batch_size


def _activation_bytes(part: EncoderConfig | PredictorConfig, width: int, item: int) -> float:
    """Bytes per token and block that the backward pass keeps.

    Two float32 residual streams; queries, keys, values and their result in the compute type, once
    in the stream and once in rows; and what goes into the GELU. Norms and the GELU are recomputed.
    """
    return item * width * (8 + part.mlp_ratio) + 2 * 4 * width


def memory_rows(
    cfg: ExperimentConfig, spec: StreamSpec, rung: Rung, half: bool, fsdp: int
) -> list[tuple[str, float]]:
    """(what, bytes) on one device for the largest program: a rough estimate.

    Args:
      spec, rung: the stream and its capacities.
      half: matrix products in bfloat16.
      fsdp: devices along that axis of the mesh, as `sharding.mesh_sizes` settles it.
    """
    encoder, decoder = cfg.model.encoder_config, decoder_of(cfg)
    item, share = (2 if half else 4), 1
    if rules_of(cfg.fsdp_rules, fsdp):
        share = fsdp
    params = sum(n for _, n in parameter_rows(cfg))
    rows: list[tuple[str, float]] = [
        ("parameters, gradients, two moments (float32)", 4 * 5 * params / share),
        ("target (float32)", 4.0 * target_size(cfg)),
    ]
    pixels = sum(n * s.width for n, s in zip(rung.patches, spec.slots, strict=True))
    rows.append(("patches", 4.0 * pixels))
    keep = {"none": 1.0, "dots": 0.7, "block": 0.15}[cfg.remat]
    blocks = encoder.depth * rung.enc * _activation_bytes(encoder, encoder.embedding_size, item)
    scores = encoder.num_heads * rung.pairs(spec.plan(SELF))
    pooler = encoder.attention_pooler_config
    if pooler is not None:
        wide = (pooler.attn_dim or pooler.pooler_dim) + pooler.pooler_dim
        at_locations = _activation_bytes(encoder, pooler.pooler_dim, item)
        blocks += pooler.pooler_depth * (2 * rung.loc * at_locations + rung.enc * 2 * wide * item)
        maps = sum(map_room(spec, n) ** 2 * modalities.get(n).num_bands for n in spec.maps)
        rows.append(("maps to be drawn (float32)", 4.0 * rung.loc * maps))
    if decoder is not None:
        width = decoder.decoder_embedding_size
        read = rung.loc or rung.enc
        blocks += decoder.depth * (
            rung.dec * _activation_bytes(decoder, width, item) + read * 2 * width * item
        )
        scores = max(scores, decoder.num_heads * rung.pairs(spec.plan(CROSS)))
        output = decoder.output_embedding_size or decoder.encoder_embedding_size
        losses = 4.0 * _LOSS_ARRAYS * rung.dec * output
        rows.append(("predictions, targets, loss rows (float32)", losses))
    rows.append(("activations kept for the backward pass", keep * blocks))
    if cfg.attention != "cudnn":
        # Recomputed in the backward pass, some rows at a time.
        rows.append(("attention scores at work (XLA only)", float(min(4 * scores, 1 << 30))))
    return rows
