"""UNet-style head: from a grid of embeddings to a map of classes (spec/model_v1_3.md 9)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from olmoearth_jax.model.layers import empty, precision


class _Conv(nnx.Module):
    """3 x 3 convolution with zero padding; kernel [3, 3, in, out]."""

    def __init__(self, d_in: int, d_out: int):
        self.kernel = empty(3, 3, d_in, d_out)
        self.bias = empty(d_out)

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.kernel[...]
        y = jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=precision(kernel.dtype),
        )  # fmt: skip
        return y + self.bias[...]


class UNetHead(nnx.Module):
    """Convolutions and nearest doublings of constant width, from patches to pixels.

    The parts are numbered as in the PyTorch package, whose state dict counts every activation and
    doubling as one: `keys` gives the number of each convolution.
    """

    def __init__(
        self, width: int, num_classes: int, patch_size: int, convs_per_resolution: int = 1
    ):
        if patch_size < 1 or patch_size & (patch_size - 1):
            raise ValueError(f"patch_size must be a power of two, got {patch_size}")
        if convs_per_resolution < 1:
            raise ValueError("convs_per_resolution must be at least 1")
        self.doublings = patch_size.bit_length() - 1
        self.per_resolution = convs_per_resolution
        count = 1 + self.doublings * convs_per_resolution
        self.convs = nnx.List([_Conv(width, width) for _ in range(count)])
        self.out = _Conv(width, num_classes)

    @property
    def keys(self) -> list[int]:
        """Numbers of the convolutions, the last included, in the package's sequence."""
        numbers, position = [0], 2
        for _ in range(self.doublings):
            position += 1
            for _ in range(self.per_resolution):
                numbers.append(position)
                position += 2
        return [*numbers, position]

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, h, w, D] -> float32 [B, num_classes, h * p, w * p], channels first."""
        x = x.astype(jnp.float32)
        convs = iter(self.convs)
        x = jax.nn.relu(next(convs)(x))
        for _ in range(self.doublings):
            x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
            for _ in range(self.per_resolution):
                x = jax.nn.relu(next(convs)(x))
        return jnp.moveaxis(self.out(x), -1, 1)

    def load(self, state: dict[str, np.ndarray]) -> None:
        """Takes over a state dict of the PyTorch package (`decoder.<n>.weight` and `.bias`).

        Raises:
          ValueError: other keys or shapes.
        """
        wanted = {}
        for number, conv in zip(self.keys, [*self.convs, self.out], strict=True):
            wanted[f"decoder.{number}.weight"] = conv.kernel, (2, 3, 1, 0)
            wanted[f"decoder.{number}.bias"] = conv.bias, (0,)
        if set(wanted) != set(state):
            raise ValueError(f"the head needs the tensors {sorted(wanted)}, got {sorted(state)}")
        for key, (param, axes) in wanted.items():
            value = np.asarray(state[key], np.float32).transpose(axes)
            if value.shape != param[...].shape:
                raise ValueError(f"{key} has the shape {list(np.shape(state[key]))}, "
                                 f"which does not fit {list(param[...].shape)}")  # fmt: skip
            param[...] = jnp.asarray(value)


def initial_head(
    seed: int, width: int, num_classes: int, patch_size: int, convs_per_resolution: int = 1
) -> UNetHead:
    """A head with random weights, uniform within 1 / sqrt(9 * width)."""
    head = UNetHead(width, num_classes, patch_size, convs_per_resolution)
    bound = (9 * width) ** -0.5
    for number, conv in enumerate([*head.convs, head.out]):
        rng = np.random.Generator(np.random.Philox(key=[seed, number]))
        for param in (conv.kernel, conv.bias):
            values = rng.uniform(-bound, bound, param[...].shape).astype(np.float32)
            param[...] = jnp.asarray(values)
    return head
