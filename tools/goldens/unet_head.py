"""UNet-style head: from a grid of embeddings to a map of classes (spec/model_v1_3.md 9).

Parameters are {'decoder.<n>.weight': [out, in, 3, 3], 'decoder.<n>.bias': [out]} as in the PyTorch
package, where n counts every convolution, activation and doubling as one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def conv_numbers(patch_size: int, convs_per_resolution: int = 1) -> list[int]:
    """Numbers of the convolutions, the last included.

    Raises:
      ValueError: a patch size that is no power of two, or no convolutions.
    """
    if patch_size < 1 or patch_size & (patch_size - 1):
        raise ValueError(f"patch_size must be a power of two, got {patch_size}")
    if convs_per_resolution < 1:
        raise ValueError("convs_per_resolution must be at least 1")
    block = 1 + 2 * convs_per_resolution
    doublings = range(patch_size.bit_length() - 1)
    numbers = [3 + block * d + 2 * c for d in doublings for c in range(convs_per_resolution)]
    return [0, *numbers, 2 + block * len(doublings)]


def initial_head(
    seed: int, width: int, num_classes: int, patch_size: int, convs_per_resolution: int = 1
) -> dict[str, np.ndarray]:
    """Random parameters, uniform within 1 / sqrt(9 * width)."""
    rng, out = np.random.Generator(np.random.Philox(seed)), {}
    bound = (9 * width) ** -0.5
    numbers = conv_numbers(patch_size, convs_per_resolution)
    for number in numbers:
        channels = num_classes if number == numbers[-1] else width
        for name, shape in (("weight", (channels, width, 3, 3)), ("bias", (channels,))):
            out[f"decoder.{number}.{name}"] = rng.uniform(-bound, bound, shape).astype(np.float32)
    return out


def unet_head(
    params: Mapping[str, Any], x: jax.Array, patch_size: int, convs_per_resolution: int = 1
) -> jax.Array:
    """[B, h, w, D] -> float32 [B, num_classes, h * p, w * p], channels first.

    Raises:
      ValueError: parameters of another head.
    """
    numbers = conv_numbers(patch_size, convs_per_resolution)
    wanted = [f"decoder.{n}.{leaf}" for n in numbers for leaf in ("weight", "bias")]
    if sorted(wanted) != sorted(params):
        raise ValueError(f"the head needs the tensors {wanted}, got {sorted(params)}")
    y = jnp.moveaxis(x.astype(jnp.float32), -1, 1)
    for place, number in enumerate(numbers):
        if 0 < place < len(numbers) - 1 and (place - 1) % convs_per_resolution == 0:
            y = jnp.repeat(jnp.repeat(y, 2, axis=2), 2, axis=3)
        kernel, bias = (jnp.asarray(params[f"decoder.{number}.{n}"]) for n in ("weight", "bias"))
        y = jax.lax.conv_general_dilated(y, kernel, (1, 1), "SAME", precision="highest")
        y = y + bias[:, None, None]
        y = y if number == numbers[-1] else jax.nn.relu(y)
    return y
