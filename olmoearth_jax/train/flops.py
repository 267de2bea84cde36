"""Floating-point operations of a model on tokens; a multiplication and an addition are two."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from olmoearth_jax.config import ExperimentConfig
from olmoearth_jax.model.config import PredictorConfig
from olmoearth_jax.stream.stream_shape import StreamSpec
from olmoearth_jax.stream.token_counts import TokenCounts


def decoder_of(cfg: ExperimentConfig) -> PredictorConfig | None:
    """The decoder, also where it stands inside a pixel reconstructor."""
    pixels = cfg.model.reconstructor_config
    return cfg.model.decoder_config or (pixels.decoder_config if pixels else None)


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Mean real tokens of one view of one sample that lacks nothing.

    Attributes:
      encoded, decoded: tokens.
      encoder_pairs: tokens attended to, summed over the encoded ones.
      decoder_pairs: the same from decoded to encoded tokens.
      patches: patches per slot that either view needs.
      locations: of the pooler's grid, if there is one.
      read_pairs, grid_pairs: pairs of locations with encoded tokens, and with one another.
    """

    encoded: float
    decoded: float
    encoder_pairs: float
    decoder_pairs: float
    patches: np.ndarray
    locations: float = 0.0
    read_pairs: float = 0.0
    grid_pairs: float = 0.0


def tokens_of(sums: Sequence[float]) -> Tokens:
    """From sums of encoded, decoded, their pairs, locations and the pairs of those."""
    enc, dec, own, cross, loc, read, grid = sums
    return Tokens(enc, dec, own, cross, np.zeros(0), loc, read, grid)


def real_tokens(counts: Sequence[TokenCounts], spec: StreamSpec) -> Tokens:
    """All tokens and pairs that exist, as sums."""
    enc, dec, loc = (
        np.concatenate([x.ravel() for x in found]).astype(float)
        for found in zip(*((c.enc, c.dec.sum(-1), c.loc) for c in counts), strict=True)
    )
    read = loc if spec.loc_bound else enc
    sums = [enc, dec, enc * enc, read * dec, loc, loc * enc, loc * loc]
    return tokens_of([float(x.sum()) for x in sums])


def forward_flops(cfg: ExperimentConfig, tokens: Tokens) -> float:
    """FLOPs of the forward pass of these tokens, patch projection and losses left out."""
    decoder, width = decoder_of(cfg), cfg.model.encoder_config.embedding_size
    total = _encoder_flops(cfg, tokens.encoded, tokens.encoder_pairs)
    total += _grid_flops(cfg, tokens)
    if decoder is None:
        return total
    inner = decoder.decoder_embedding_size
    per_query = 2 * inner * inner * (2 + 2 * decoder.mlp_ratio)
    per_context = 2 * 2 * inner * inner
    read, read_width = tokens.encoded, width
    if decoder.use_attention_pooler:
        read, read_width = tokens.locations, decoder.pooler_dim or width
    total += decoder.depth * (
        tokens.decoded * per_query + read * per_context + 4 * tokens.decoder_pairs * inner
    )
    output = decoder.output_embedding_size or decoder.encoder_embedding_size
    return total + 2 * inner * (read * read_width + tokens.decoded * output)


def _encoder_flops(cfg: ExperimentConfig, tokens: float, pairs: float) -> float:
    """FLOPs of the encoder's blocks on tokens that attend to so many pairs."""
    encoder = cfg.model.encoder_config
    width = encoder.embedding_size
    block = 2 * width * width * (4 + 2 * encoder.mlp_ratio)
    return encoder.depth * (tokens * block + 4 * pairs * width)


def _grid_flops(cfg: ExperimentConfig, tokens: Tokens) -> float:
    """FLOPs of pooler, student and heads on the location grid."""
    encoder, heads = cfg.model.encoder_config, cfg.model.supervision_head_config
    pooler = encoder.attention_pooler_config
    if pooler is None:
        return 0.0
    width, inner = pooler.pooler_dim, pooler.attn_dim or pooler.pooler_dim
    mlp = 4 * width * width * encoder.mlp_ratio
    context = encoder.embedding_size if pooler.attn_dim is not None else width
    read = tokens.locations * (4 * width * inner + mlp) + tokens.encoded * 4 * context * inner
    mix = tokens.locations * (8 * width * inner + mlp)
    pairs = 4 * inner * (tokens.read_pairs + tokens.grid_pairs)
    total = pooler.pooler_depth * (read + mix + pairs)
    each = 2 * width * max(pooler.student_dims or [0])
    if heads is not None:
        side = heads.spatial_unfold or encoder.max_patch_size
        maps = heads.modality_configs.values()
        each += 2 * width * side**2 * sum(m.num_output_channels for m in maps)
    return total + tokens.locations * each


def patch_flops(cfg: ExperimentConfig, spec: StreamSpec, patches: np.ndarray) -> float:
    """FLOPs of projecting the patches of one sample once."""
    hidden = cfg.model.encoder_config.patch_embed_hidden_sizes or []
    width = cfg.model.encoder_config.embedding_size
    total = 0.0
    for slot, count in zip(spec.slots, patches, strict=True):
        pixels, channels = slot.patch_side**2, len(slot.channels)
        for size in hidden:
            total += count * 2 * pixels * channels * size
            channels = size
        total += count * 2 * pixels * channels * width
    return total


def training_flops(cfg: ExperimentConfig, spec: StreamSpec, counts: Sequence[TokenCounts]) -> float:
    """Operations that training on the real tokens of these groups takes.

    Three times the forward pass of every view (once forward, twice backward), and what makes the
    targets once. Padding, what is computed again, losses and the update are left out.
    """
    if not counts:
        return 0.0
    total = 3 * forward_flops(cfg, real_tokens(counts, spec))
    for c in counts:
        starts, patches = c.table.starts, c.need.sum(0)
        per_slot = np.array([patches[a:b].sum() for a, b in zip(starts, starts[1:], strict=False)])
        total += (3 * spec.views + 1) * patch_flops(cfg, spec, per_slot)
        if spec.deep:
            seen = c.need.sum(1).astype(float)
            total += _encoder_flops(cfg, float(seen.sum()), float((seen * seen).sum()))
    return total
