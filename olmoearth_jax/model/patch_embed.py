"""Images to embedded patches (spec section 3).

An antialiased bicubic resize as two matrix products, the cut into patches, and their embeddings,
one module per band set.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from olmoearth_jax.model.layers import Linear
from olmoearth_jax.model.tokens import SlotTable

_ROWS_FIRST = ["einsum_path", (0, 2), (0, 1)]


def _keys_cubic(x: np.ndarray) -> np.ndarray:
    """Keys cubic with a = -0.5."""
    x = np.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


@functools.lru_cache(maxsize=256)
def resize_matrix(in_size: int, out_size: int) -> np.ndarray:
    """The linear map of one axis, float64 [out_size, in_size] (spec section 3.1).

    Taps outside the image are dropped and the others renormalised, so rows sum to 1.
    """
    if in_size < 1 or out_size < 1:
        raise ValueError(f"cannot resize {in_size} pixels to {out_size}")
    step = in_size / out_size
    stretch = max(step, 1.0)
    matrix = np.zeros((out_size, in_size))
    for i in range(out_size):
        centre = step * (i + 0.5)
        first = max(int(centre - 2.0 * stretch + 0.5), 0)
        last = min(int(centre + 2.0 * stretch + 0.5), in_size)
        weights = _keys_cubic((np.arange(first, last) - centre + 0.5) / stretch)
        matrix[i, first:last] = weights / weights.sum()
    matrix.setflags(write=False)
    return matrix


def grid_size(pixels: int, patch_size: int) -> int:
    """Patches along a side of `pixels`.

    Raises:
      ValueError: the side is not divisible by the patch size.
    """
    if patch_size < 1 or pixels % patch_size:
        raise ValueError(
            f"image side of {pixels} pixels is not divisible by patch size {patch_size}"
        )
    return pixels // patch_size


def resize(images: Any, patch_size: int, base: int, xp: ModuleType = jnp) -> Any:
    """Resizes [..., H, W, C] so that a patch of `patch_size` pixels gets `base` pixels a side.

    Args:
      images: float32 images; the whole image is resized, so neighbouring patches mix at borders.
      patch_size: side of a patch in the image's own pixels.
      base: side of a patch after the resize.
      xp: jax.numpy, or numpy for arrays on the host.

    Returns:
      float32 [..., H / patch_size * base, W / patch_size * base, C].
    """
    height, width = images.shape[-3:-1]
    rows, cols = grid_size(height, patch_size), grid_size(width, patch_size)
    if patch_size == base:
        return images
    down = xp.asarray(resize_matrix(height, rows * base), xp.float32)
    across = xp.asarray(resize_matrix(width, cols * base), xp.float32)
    if xp is np:  # by BLAS, which einsum as such does not call
        flat = images.reshape(-1, *images.shape[-3:])
        flat = np.einsum("yh,xw,nhwc->nyxc", down, across, flat, optimize=_ROWS_FIRST)
        return flat.reshape(*images.shape[:-3], *flat.shape[1:])
    high = jax.lax.Precision.HIGHEST
    images = jnp.einsum("yh,...hwc->...ywc", down, images, precision=high)
    return jnp.einsum("xw,...ywc->...yxc", across, images, precision=high)


def to_patches(images: Any, patch_size: int, base: int, xp: ModuleType = jnp) -> Any:
    """Resizes and cuts images into patches.

    Args:
      images: float32 [B, H, W, T, C], one modality (all its channels).
      patch_size: side of a patch in the image's own pixels (patch size times the image factor).
      base: side of an embedded patch (base patch size times the image factor).
      xp: jax.numpy, or numpy for arrays on the host.

    Returns:
      float32 [B, h, w, T, base, base, C].
    """
    batch, height, width, steps, channels = images.shape
    rows, cols = grid_size(height, patch_size), grid_size(width, patch_size)
    # Timesteps in front: then each axis is one plain matrix product.
    frames = xp.moveaxis(images, 3, 1)
    frames = resize(frames, patch_size, base, xp)
    cut = frames.reshape(batch, steps, rows, base, cols, base, channels)
    return cut.transpose(0, 2, 4, 1, 3, 5, 6)


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
