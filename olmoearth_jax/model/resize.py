"""Antialiased bicubic resize as two matrix products, and cutting into patches (spec section 3)."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

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
