"""The cross-attention predictor (spec section 8), on tokens of any layout, and its pixel heads."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from olmoearth_jax import modalities
from olmoearth_jax.model.blocks import (
    PLAIN,
    Attend,
    BlockShape,
    Reading,
    Running,
    run_blocks,
    stack,
)
from olmoearth_jax.model.config import PredictorConfig, ReconstructorConfig
from olmoearth_jax.model.encodings import CompositeEncodings
from olmoearth_jax.model.layers import LayerNorm, Linear, empty, precision
from olmoearth_jax.model.patch_embed import resize_matrix
from olmoearth_jax.model.rope import RopeConfig, coordinates
from olmoearth_jax.model.tokens import SlotTable, Tokens


class Predictor(nnx.Module):
    """Predicts hidden tokens from visible ones; queries never attend to each other."""

    def __init__(self, config: PredictorConfig, dtype=jnp.float32):
        width = config.decoder_embedding_size
        # Decoders embed no patches, so the base patch size of their slots is never used.
        self.slots = SlotTable.build(config.supported_modality_names, config.tokenization)
        self.width = width
        self.output_width = config.output_embedding_size or config.encoder_embedding_size
        self.rope = RopeConfig.of(config)
        self.input_norm = LayerNorm(config.encoder_embedding_size)
        self.embed = Linear(config.encoder_embedding_size, width, dtype)
        self.mask_token = empty(width)
        self.encodings = CompositeEncodings(self.slots, width, config.position_encoding)
        self.blocks = stack(BlockShape.of(config, width), config.depth, dtype)
        grid = config.pooler_dim if config.use_attention_pooler else None
        self.location_embed = None if grid is None else Linear(grid, width, dtype)
        self.norm = LayerNorm(width)
        self.output_proj = Linear(width, self.output_width, dtype)

    def context(self, y: jax.Array, tokens: Tokens) -> jax.Array:
        """Encoder tokens [..., N, D_e] -> float32 context [..., N, D_d]."""
        return self.embed(self.input_norm(y), jnp.float32) + self.encodings(tokens)

    def location_context(self, grid: jax.Array) -> jax.Array:
        """Location tokens [..., Q, pooler_dim] -> float32 context [..., Q, D_d] (v1.3 spec 3)."""
        assert self.location_embed is not None
        return self.location_embed(grid, jnp.float32)

    def queries(self, tokens: Tokens) -> jax.Array:
        """float32 [..., N, D_d]: mask token plus encodings."""
        return self.mask_token[...] + self.encodings(tokens)

    def decode(
        self,
        x_q: jax.Array,
        tokens_q: Tokens,
        context: tuple[jax.Array, Tokens | jax.Array],
        attend: Attend,
        running: Running = PLAIN,
    ) -> jax.Array:
        """Runs the blocks: queries [..., Nq, D_d] read an unchanging context.

        Args:
          x_q: float32 [..., Nq, D_d].
          tokens_q: their coordinates.
          context: [..., Nk, D_d], and its coordinates or directly its positions [..., Nk, 2]
            (row, col).
          attend: attention of the queries to the context.
          running: drop path and rematerialisation.
        """
        seen, tokens_k = context
        position = context_position = None
        if self.rope is not None:
            position = coordinates(self.rope, tokens_q)
            on_grid = not isinstance(tokens_k, Tokens)
            context_position = tokens_k if on_grid else coordinates(self.rope, tokens_k)
        reading = Reading(attend, position, seen, context_position)
        return run_blocks(self.blocks, x_q, reading, running)

    def output(self, x: jax.Array) -> jax.Array:
        """Final norm and projection, [..., D_d] -> float32 [..., D_out]."""
        return self.output_proj(self.norm(x), jnp.float32)


class PatchReconstruction(nnx.Module):
    """Turns each token into a patch of pixels: one linear map to P x P x C, then a resize."""

    def __init__(self, width: int, channels: int, base: int, dtype=jnp.float32):
        self.channels, self.base = channels, base
        self.kernel = nnx.Param(jnp.zeros((width, base * base * channels), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((channels,), jnp.float32))
        self.dtype = jnp.dtype(dtype)

    def __call__(self, tokens: jax.Array, patch_size: int) -> jax.Array:
        """float32 [..., D] -> [..., p, p, C], each patch resized on its own."""
        kernel = self.kernel[...].astype(self.dtype)
        flat = jnp.dot(tokens.astype(self.dtype), kernel, precision=precision(self.dtype))
        patch = flat.astype(jnp.float32).reshape(
            *tokens.shape[:-1], self.base, self.base, self.channels
        )
        patch = patch + self.bias[...]
        if patch_size == self.base:
            return patch
        matrix = jnp.asarray(resize_matrix(self.base, patch_size), jnp.float32)
        high = jax.lax.Precision.HIGHEST
        patch = jnp.einsum("yh,...hwc->...ywc", matrix, patch, precision=high)
        return jnp.einsum("xw,...ywc->...yxc", matrix, patch, precision=high)


class Reconstructor(nnx.Module):
    """Its own predictor, then a patch head per band set."""

    def __init__(self, config: ReconstructorConfig, dtype=jnp.float32):
        self.slots = SlotTable.build(
            config.supported_modality_names, config.tokenization, config.max_patch_size
        )
        self.decoder = Predictor(config.decoder_config, dtype)
        width = self.decoder.output_width
        self.heads = nnx.Dict()
        for name in self.slots.names:
            spatial = modalities.get(name).spatial
            heads = [len(self.slots.slots[s].channels) for s in self.slots.of(name)]
            self.heads[name] = nnx.List(
                [
                    PatchReconstruction(width, channels, config.max_patch_size, dtype)
                    if spatial
                    else Linear(width, channels, dtype)
                    for channels in heads
                ]
            )

    def reconstruct(self, name: str, tokens: jax.Array, patch_size: int) -> jax.Array:
        """Pixels of one modality from decoder tokens.

        Args:
          tokens: [B, h, w, T, S, D]; not spatial: [B, T, S, D] or [B, S, D].
          patch_size: pixels per patch side.

        Returns:
          float32 [B, h * p, w * p, T, C], channels in band-set order; not spatial: [B, T, C] or
          [B, C].
        """
        heads = self.heads[name]
        if not modalities.get(name).spatial:
            return jnp.concatenate(
                [head(tokens[..., s, :], jnp.float32) for s, head in enumerate(heads)], axis=-1
            )
        pixels = patch_size * modalities.get(name).image_factor
        parts = [head(tokens[..., s, :], pixels) for s, head in enumerate(heads)]
        patches = jnp.concatenate(parts, axis=-1)
        batch, rows, cols, steps, p, _, channels = patches.shape
        patches = patches.transpose(0, 1, 4, 2, 5, 3, 6)
        return patches.reshape(batch, rows * p, cols * p, steps, channels)
