"""Arithmetic shared by the losses: all float32, products at the highest matmul precision."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

NEGATIVE = -1e30
"""Score of an excluded pair: finite, so that rows without any pair stay finite too."""

LOWEST_TAU = 1e-12
"""Scores are cosines over tau, and must stay far from `NEGATIVE` and the ends of float32."""


def check_tau(tau: float) -> None:
    """Raises ValueError for a temperature that no loss can be divided by."""
    if tau <= 0:
        raise ValueError(f"the temperature tau must be positive, got {tau}")
    if tau < LOWEST_TAU:
        raise ValueError(f"the temperature tau must be at least {LOWEST_TAU:g}, got {tau}")


def normalise(x: jax.Array, eps: float = 1e-12) -> jax.Array:
    """x / max(|x|, eps) over the last axis, float32; finite gradient at zero."""
    x = x.astype(jnp.float32)
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    long = square > eps * eps
    return x * jnp.where(long, lax.rsqrt(jnp.where(long, square, 1.0)), 1.0 / eps)


def products(a: jax.Array, b: jax.Array) -> jax.Array:
    """All inner products [..., I, J] of a [..., I, D] and b [..., J, D]."""
    return jnp.einsum("...id,...jd->...ij", a, b, precision=lax.Precision.HIGHEST)


def log_sum_exp(scores: jax.Array) -> jax.Array:
    """log sum exp over the last axis; excluded entries hold `NEGATIVE`."""
    top = lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    return jnp.log(jnp.sum(jnp.exp(scores - top), axis=-1)) + top[..., 0]


def diagonal(matrix: jax.Array) -> jax.Array:
    """Diagonal of the last two axes, without a gather (whose gradient would be a scatter)."""
    eye = jnp.eye(matrix.shape[-1], dtype=bool)
    return jnp.sum(jnp.where(eye, matrix, 0.0), axis=-1)


def safe_divide(a: jax.Array, b: jax.Array) -> jax.Array:
    """a / b, and 0 with zero gradient where b is 0."""
    return jnp.where(b > 0, a, 0.0) / jnp.where(b > 0, b, 1.0)


def segment_sum(values: jax.Array, segment: jax.Array, num_segments: int) -> jax.Array:
    """Sums [R, ...] by segment into [G, ...]: a product with one-hot rows, hence deterministic."""
    rows = (segment[:, None] == jnp.arange(num_segments)).astype(jnp.float32)
    return jnp.einsum("rg,r...->g...", rows, values, precision=lax.Precision.HIGHEST)
