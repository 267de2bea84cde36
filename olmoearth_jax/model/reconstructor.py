"""Pixel reconstruction head of the MAE model (spec section 9)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from olmoearth_jax import modalities
from olmoearth_jax.model.config import ReconstructorConfig
from olmoearth_jax.model.decoder import Predictor
from olmoearth_jax.model.layers import Linear, precision
from olmoearth_jax.model.resize import resize_matrix
from olmoearth_jax.model.tokens import SlotTable


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
