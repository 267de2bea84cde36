"""The encoder (spec section 7), on tokens of any layout."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from olmoearth_jax.model.blocks import (
    PLAIN,
    Attend,
    BlockShape,
    Reading,
    Running,
    run_block,
    run_blocks,
    stack,
)
from olmoearth_jax.model.config import EncoderConfig
from olmoearth_jax.model.encodings import CompositeEncodings
from olmoearth_jax.model.layers import LayerNorm, Linear, empty
from olmoearth_jax.model.patch_embed import PatchEmbeddings
from olmoearth_jax.model.pooler import AttentionPooler
from olmoearth_jax.model.rope import RopeConfig, coordinates
from olmoearth_jax.model.tokens import SlotTable, Tokens


def slot_table(config: EncoderConfig) -> SlotTable:
    """The slots of an encoder config."""
    return SlotTable.build(
        config.supported_modality_names, config.tokenization, config.max_patch_size
    )


class ProjectAndAggregate(nnx.Module):
    """Pools visible tokens and projects, in the configured order."""

    def __init__(self, width: int, num_layers: int, aggregate_first: bool, dtype=jnp.float32):
        self.aggregate_first = aggregate_first
        self.layers = nnx.List([Linear(width, width, dtype) for _ in range(num_layers)])

    def project(self, x: jax.Array) -> jax.Array:
        """Linears with ReLU between, [..., D] -> float32 [..., D]."""
        for i, layer in enumerate(self.layers):
            x = layer(jax.nn.relu(x) if i else x, jnp.float32)
        return x

    def __call__(self, tokens: jax.Array, visible: jax.Array) -> jax.Array:
        """tokens [B, N, D] and bool visible [B, N] -> [B, D]; see `_masked_mean`."""
        if self.aggregate_first:
            return self.project(_masked_mean(tokens, visible))
        return _masked_mean(self.project(tokens), visible)


def _masked_mean(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean over axis -2 of x [..., N, D] where mask [..., N]; zeros where there is nothing."""
    weight = mask.astype(jnp.float32)[..., None]
    total = jnp.sum(jnp.where(weight > 0, x.astype(jnp.float32), 0.0), axis=-2)
    return total / jnp.maximum(jnp.sum(weight, axis=-2), 1.0)


class Encoder(nnx.Module):
    """Patch embeddings, encodings, self-attention blocks, final norm and pooling head."""

    def __init__(self, config: EncoderConfig, dtype=jnp.float32):
        width = config.embedding_size
        self.slots = slot_table(config)
        self.width = width
        self.rope = RopeConfig.of(config)
        self.patch_embeddings = PatchEmbeddings(
            self.slots,
            width,
            config.patch_embed_hidden_sizes,
            config.post_proj_hidden_sizes,
            dtype,
        )
        self.encodings = CompositeEncodings(self.slots, width, config.position_encoding)
        self.register_tokens = (
            empty(config.num_register_tokens, width) if config.num_register_tokens else None
        )
        self.blocks = stack(BlockShape.of(config, width), config.depth, dtype)
        self.norm = LayerNorm(width)
        out = config.output_embedding_size
        self.embedding_projector = Linear(width, out, dtype) if out else None
        self.output_width = out or width
        pooler = config.attention_pooler_config
        self.attention_pooler = None if pooler is None else AttentionPooler(config, dtype)
        self.project_and_aggregate = ProjectAndAggregate(
            self.output_width if pooler is None else pooler.pooler_dim,
            config.num_projection_layers,
            config.aggregate_then_project,
            dtype,
        )

    def encode(
        self,
        x0: jax.Array,
        tokens: Tokens,
        attend: Attend,
        running: Running = PLAIN,
        exits: Mapping[str, int] | None = None,
    ) -> jax.Array:
        """Encodings, blocks and final norm.

        Register tokens, if any, are part of x0 (slot -1) and are dropped by the caller.

        Args:
          x0: float32 [..., N, D] patch embeddings.
          tokens: their coordinates, [..., N].
          attend: attention over the tokens that take part.
          running: drop path and rematerialisation of the blocks.
          exits: depth at which each modality leaves the stream (0: x0 itself). Not all zero:
            that case runs no block at all and is `x0`.

        Returns:
          float32 [..., N, D]. Tokens that do not take part hold arbitrary finite values.
        """
        depth = None if exits is None else self._exit_depths(exits, tokens)
        position = None if self.rope is None else coordinates(self.rope, tokens)
        x = x0 + self.encodings(tokens)
        if depth is None:
            return self.norm(run_blocks(self.blocks, x, Reading(attend, position), running))
        out = x0
        for layer, block in enumerate(self.blocks):
            x = run_block(block, layer, x, Reading(attend, position), running)
            out = jnp.where(depth == layer + 1, x, out)
        return self.norm(out)

    def _exit_depths(self, exits: Mapping[str, int], tokens: Tokens) -> jax.Array:
        """int32 [..., N, 1] exit depth of each token."""
        depths = np.full(len(self.slots) + 1, len(self.blocks), np.int32)
        for name, value in exits.items():
            if not 0 <= value <= len(self.blocks):
                raise ValueError(
                    f"token exit depth {value} of {name!r} is outside 0..{len(self.blocks)}"
                )
            if name in self.slots.names:
                depths[list(self.slots.of(name))] = value
        slot = jnp.where(tokens.slot < 0, len(self.slots), tokens.slot)
        return jnp.take(jnp.asarray(depths), slot)[..., None]

    def project_output(self, x: jax.Array) -> jax.Array:
        """The output projection on every token, where configured."""
        if self.embedding_projector is None:
            return x
        return self.embedding_projector(x, jnp.float32)
