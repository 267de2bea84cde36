"""Linear layer and layer norm with explicit precision.

Parameters are float32. Matrix products run in `compute_dtype`; norms, and everything added to the
residual stream, in float32.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

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


class LayerNorm(nnx.Module):
    """Layer norm over the last axis in float32, eps 1e-5, affine."""

    def __init__(self, width: int):
        self.scale = empty(width)
        self.bias = empty(width)

    def __call__(self, x: jax.Array) -> jax.Array:
        return _normed(x.astype(jnp.float32), self.scale[...], self.bias[...])


@jax.checkpoint
def _normed(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    # Recomputed in the backward pass: of x alone, which is kept anyway, it costs next to nothing.
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(variance + _LAYER_NORM_EPS) * scale + bias


def gelu(x: jax.Array) -> jax.Array:
    """Exact (erf) GELU, evaluated in float32."""
    wide = x.astype(jnp.float32)
    return (0.5 * wide * (1.0 + jax.lax.erf(wide * 0.7071067811865476))).astype(x.dtype)
