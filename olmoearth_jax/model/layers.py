"""Linear layer and layer norm with explicit precision.

Parameters are float32. Matrix products run in `compute_dtype`; norms, and everything added to the
residual stream, in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from olmoearth_jax.model.variants import TODAY, Variant

_LAYER_NORM_EPS = 1e-5


def precision(dtype) -> jax.lax.Precision | None:
    """Precision of products of that dtype: full for float32, where accelerators would round."""
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None


def product(pattern: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Batched product with a float32 result, at full precision if the inputs are float32."""
    return jnp.einsum(
        pattern, a, b, precision=precision(a.dtype), preferred_element_type=jnp.float32
    )


def empty(*shape: int) -> nnx.Param:
    """A float32 parameter; its values come from `params.initial_params`."""
    return nnx.Param(jnp.zeros(shape, jnp.float32))


class Linear(nnx.Module):
    """y = x @ kernel + bias with kernel [in, out]."""

    def __init__(self, d_in: int, d_out: int, dtype=jnp.float32):
        self.dtype = jnp.dtype(dtype)
        self.kernel = empty(d_in, d_out)
        self.bias = empty(d_out)

    def __call__(self, x: jax.Array, out_dtype=None) -> jax.Array:
        """[..., in] -> [..., out]; the bias is added in float32, then cast to `out_dtype`.

        `out_dtype` defaults to the compute dtype.
        """
        kernel = self.kernel[...].astype(self.dtype)
        y = jnp.dot(x.astype(self.dtype), kernel, precision=precision(self.dtype))
        y = y.astype(jnp.float32) + self.bias[...]
        return y.astype(out_dtype or self.dtype)


def joined(layers: Sequence[Linear], x: jax.Array) -> list[jax.Array]:
    """What each layer makes of x [..., in], by one product; the layers share their dtype."""
    dtype = layers[0].dtype
    kernel = jnp.concatenate([layer.kernel[...].astype(dtype) for layer in layers], axis=1)
    bias = jnp.concatenate([layer.bias[...] for layer in layers])
    y = jnp.dot(x.astype(dtype), kernel, precision=precision(dtype))
    y = (y.astype(jnp.float32) + bias).astype(dtype)
    widths = [layer.bias[...].shape[0] for layer in layers]
    ends = [sum(widths[: n + 1]) for n in range(len(widths) - 1)]
    return jnp.split(y, ends, axis=-1)


class LayerNorm(nnx.Module):
    """Layer norm over the last axis in float32, eps 1e-5, affine."""

    def __init__(self, width: int):
        self.scale = empty(width)
        self.bias = empty(width)

    def __call__(self, x: jax.Array, variant: Variant = TODAY) -> jax.Array:
        """[..., width] of any type -> float32 [..., width]."""
        if variant.norm_once:
            return _normed_once(x, self.scale[...], self.bias[...])
        if jax.default_backend() == "cpu":
            return _normed_on_cpu(x, self.scale[...], self.bias[...])
        # Cast inside, a narrow stream is kept as it is for the backward pass.
        wide = x if variant.narrow else x.astype(jnp.float32)
        return variant.again(_normed)(wide, self.scale[...], self.bias[...])


def _normed(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    # Recomputed in the backward pass: of x alone, which is kept anyway, it costs next to nothing.
    x = x.astype(jnp.float32)
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(variance + _LAYER_NORM_EPS) * scale + bias


@jax.custom_vjp
def _normed_on_cpu(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    """`_normed`, whose gradient takes its means over the width as products.

    XLA joins sums along both axes into one loop on a CPU, 10 to 40 times as slow as its parts.
    """
    return _normed(x, scale, bias)


def _cpu_forward(x, scale, bias):
    return _normed(x, scale, bias), (x, scale)


def _cpu_backward(saved, g):
    x, scale = saved
    wide, width = x.astype(jnp.float32), x.shape[-1]
    mean = jnp.full((width, 1), 1 / width, jnp.float32)
    centred = wide - product("...d,de->...e", wide, mean)
    variance = product("...d,de->...e", jnp.square(centred), mean)
    inverse = jax.lax.rsqrt(variance + _LAYER_NORM_EPS)
    unit = centred * inverse
    scaled_mean, along = scale[:, None] / width, g * unit
    d_x = inverse * (
        g * scale
        - product("...d,de->...e", g, scaled_mean)
        - unit * product("...d,de->...e", along, scaled_mean)
    )
    axes = tuple(range(g.ndim - 1))
    return d_x.astype(x.dtype), jnp.sum(along, axis=axes), jnp.sum(g, axis=axes)


_normed_on_cpu.defvjp(_cpu_forward, _cpu_backward)


@jax.custom_vjp
def _normed_once(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    return _once_forward(x, scale, bias)[0]


def _once_forward(x, scale, bias):
    wide = x.astype(jnp.float32)
    # Both sums in one pass over x; the variance of a residual stream is far above the rounding
    # of its mean's square.
    mean = jnp.mean(wide, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(wide), axis=-1, keepdims=True) - jnp.square(mean)
    inverse = jax.lax.rsqrt(jnp.maximum(variance, 0.0) + _LAYER_NORM_EPS)
    return (wide - mean) * inverse * scale + bias, (x, mean, inverse, scale)


def _once_backward(saved, g):
    x, mean, inverse, scale = saved
    unit = (x.astype(jnp.float32) - mean) * inverse
    scaled, axes = g * scale, tuple(range(g.ndim - 1))
    along = jnp.mean(scaled * unit, axis=-1, keepdims=True)
    d_x = inverse * (scaled - jnp.mean(scaled, axis=-1, keepdims=True) - unit * along)
    return d_x.astype(x.dtype), jnp.sum(g * unit, axis=axes), jnp.sum(g, axis=axes)


_normed_once.defvjp(_once_forward, _once_backward)


def gelu(x: jax.Array) -> jax.Array:
    """Exact (erf) GELU, evaluated in float32."""
    wide = x.astype(jnp.float32)
    return (0.5 * wide * (1.0 + jax.lax.erf(wide * 0.7071067811865476))).astype(x.dtype)
