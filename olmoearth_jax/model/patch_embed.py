"""Patch embeddings, one module per band set (spec section 3)."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from olmoearth_jax.model.layers import Linear
from olmoearth_jax.model.tokens import SlotTable


def _chain(widths: Sequence[int], dtype) -> nnx.List:
    return nnx.List([Linear(a, b, dtype) for a, b in zip(widths[:-1], widths[1:], strict=True)])


class PatchEmbed(nnx.Module):
    """Embeds the patches of one band set.

    Spatial: per-pixel MLP (optional), one linear map of the flattened patch (row, column, channel
    with channel fastest), then optional further layers. Not spatial: one linear map of the bands.
    """

    def __init__(
        self,
        patch_pixels: int | None,
        channels: int,
        width: int,
        hidden: Sequence[int] = (),
        post: Sequence[int] = (),
        dtype=jnp.float32,
    ):
        """`patch_pixels` is the side of an embedded patch, None for non-spatial modalities."""
        self.patch_pixels = patch_pixels
        if patch_pixels is None:
            hidden, post = (), ()
        self.pixel_proj = _chain([channels, *hidden], dtype)
        inputs = [channels, *hidden][-1] * (patch_pixels or 1) ** 2
        self.proj = Linear(inputs, width, dtype)
        self.post_proj = _chain([width, *post], dtype)

    def project(self, patches: jax.Array) -> jax.Array:
        """Resized patches [..., Pf, Pf, C] (not spatial: [..., C]) -> float32 [..., D]."""
        x = patches
        for layer in self.pixel_proj:
            x = jax.nn.relu(layer(x))
        if self.patch_pixels is not None:
            x = x.reshape(*x.shape[:-3], -1)
        x = self.proj(x, jnp.float32)
        for layer in self.post_proj:
            x = layer(jax.nn.relu(x), jnp.float32)
        return x


class PatchEmbeddings(nnx.Module):
    """The patch embeddings of all slots, keyed by modality then band set."""

    def __init__(
        self,
        slots: SlotTable,
        width: int,
        hidden: Sequence[int] | None = None,
        post: Sequence[int] | None = None,
        dtype=jnp.float32,
    ):
        self.slots = slots
        self.per_modality = nnx.Dict()
        for slot_id, slot in enumerate(slots.slots):
            pixels = slot.patch_side if slots.spatial[slot_id] else None
            embed = PatchEmbed(pixels, len(slot.channels), width, hidden or (), post or (), dtype)
            if slot.modality not in self.per_modality:
                self.per_modality[slot.modality] = nnx.List([])
            self.per_modality[slot.modality].append(embed)

    def of_slot(self, slot_id: int) -> PatchEmbed:
        slot = self.slots.slots[slot_id]
        return self.per_modality[slot.modality][slot.band_set]

    def project(self, slot_id: int, patches: jax.Array) -> jax.Array:
        """Embeds patches that hold exactly the channels of that slot; see `PatchEmbed.project`."""
        return self.of_slot(slot_id).project(patches)


def band_keep_mask(
    rate: float, random_rate: bool, u_rate: jax.Array, u_band: jax.Array, u_keep: jax.Array
) -> jax.Array:
    """Which bands survive band dropout (spec section 3.3), from uniform draws in [0, 1).

    Multiply patches by it: the resize is linear per channel, so before or after is the same.

    Args:
      rate: configured rate.
      random_rate: draw the rate itself uniformly below `rate`.
      u_rate: [] draw shared by the whole group.
      u_band: [samples, bands] draws.
      u_keep: [samples] draw that picks the survivor where all bands were dropped.

    Returns:
      float32 [samples, bands] of 0 and 1; all ones when there is a single band.
    """
    bands = u_band.shape[-1]
    if bands == 1:
        return jnp.ones_like(u_band)
    limit = u_rate * rate if random_rate else rate
    keep = u_band >= limit
    survivor = jnp.arange(bands) == jnp.floor(u_keep[..., None] * bands).astype(jnp.int32)
    keep = jnp.where(keep.any(-1, keepdims=True), keep, survivor)
    return keep.astype(jnp.float32)
