"""Forward pass of attention over long rows on a CPU, in blocks that stay within its caches.

Nothing is kept for a backward pass. Softmax does not change when one vector is subtracted from all
keys of a row. Here that is their mean: every query then has a score of 0 or more, so that nothing
is lost to underflow, and the lengths of queries and keys (Cauchy-Schwarz) almost always prove that
nothing overflows either. The maximum of the scores need then be neither found nor subtracted.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from olmoearth_jax.model.layers import product

_SCORE_BYTES = 2 << 20  # of one block of scores
_KEYS = 384  # of one block, at most
_LOG2_E = float(np.log2(np.e))
# Sums of 2^s of that many bits, times values, stay finite, and `_exp2` holds for +-s.
_SAFE_BITS = 96.0
_EXP2 = [
    float(c)
    for c in np.polynomial.chebyshev.Chebyshev.interpolate(np.exp2, 5, domain=[-0.5, 0.5])
    .convert(kind=np.polynomial.Polynomial)
    .coef
]


def blocks(queries: int, keys: int) -> tuple[int, int] | None:
    """(queries, keys) of a block; None where rows are short, or lengths have no fitting divisor."""
    if 4 * queries * keys <= _SCORE_BYTES:
        return None
    per_block = _largest_divisor(keys, _KEYS)
    if 4 * per_block < min(_KEYS, keys):
        return None
    most = max(_SCORE_BYTES // (4 * per_block), 1)
    at_once = _largest_divisor(queries, most)
    return (at_once, per_block) if 4 * at_once > min(most, queries) else None


def _largest_divisor(n: int, most: int) -> int:
    return max(d for d in range(1, min(n, most) + 1) if n % d == 0)


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, keep: jax.Array, block: tuple[int, int]
) -> jax.Array:
    """Softmax attention of rows of one head each; softmax in float32.

    Args:
      q: [R, Lq, d], scaled.
      k: [R, Lk, d], finite everywhere.
      v: [R, Lk, d], finite everywhere.
      keep: bool [R, Lk], keys that take part; a row without any gives 0.
      block: (queries, keys) at a time, divisors of Lq and Lk; see `blocks`.

    Returns:
      [R, Lq, d] in the dtype of q.
    """

    # Powers of two cost less than powers of e. A narrower type would lose bits by the factor.
    narrow = q.dtype != jnp.float32
    q = q if narrow else q * _LOG2_E
    unit = _LOG2_E if narrow else 1.0

    def row(args):
        q, k, v, keep = args
        k, v = _centred(k, keep), jnp.where(keep[:, None], v, 0)
        keys = tuple(x.reshape(-1, block[1], *x.shape[1:]) for x in (k, v, keep))
        cut = q.reshape(-1, block[0], q.shape[-1])

        def run(add: Callable) -> Callable:
            return lambda: jax.lax.map(lambda some: _over_keys(add, unit, some, keys), cut)

        # A comparison with NaN is false: NaN takes the careful way and stays NaN.
        safe = _length(q) * _length(k) * unit < _SAFE_BITS
        return jax.lax.cond(safe, run(_add), run(_add_carefully)).reshape(q.shape)

    return jax.lax.map(row, (q, k, v, keep))


def _centred(k: jax.Array, keep: jax.Array) -> jax.Array:
    """Keys less the mean of those that take part; 0 for the others."""
    wide, keep = k.astype(jnp.float32), keep[:, None]
    mean = jnp.sum(wide, axis=0, where=keep) / jnp.maximum(jnp.sum(keep), 1)
    return jnp.where(keep, wide - mean, 0.0).astype(k.dtype)


def _length(x: jax.Array) -> jax.Array:
    """Of the longest vector of [L, d]."""
    return jnp.sqrt(jnp.max(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=-1)))


def _over_keys(add: Callable, unit: float, q: jax.Array, keys: tuple[jax.Array, ...]) -> jax.Array:
    start = (
        jnp.zeros((len(q), keys[1].shape[-1]), jnp.float32),
        jnp.zeros((len(q),), jnp.float32),
        jnp.full((len(q),), -jnp.inf),
    )

    def some(sums, keys):
        k, v, keep = keys
        return add(sums, product("qd,kd->qk", q, k) * unit, v, keep), None

    (out, total, _), _ = jax.lax.scan(some, start, keys)
    return (out / jnp.where(total > 0, total, 1.0)[:, None]).astype(q.dtype)


def _add(sums, bits, v, keep):
    """One block of keys more: sums of weighted values (0 of dropped keys), and of weights."""
    out, total, top = sums
    p = _exp2(bits)
    # The sum as a product: a reduction would compute the weights once more, and more slowly.
    total = total + product("qk,k->q", p, keep.astype(jnp.float32))
    return out + product("qk,kd->qd", p.astype(v.dtype), v), total, top


def _add_carefully(sums, bits, v, keep):
    """The same for scores of any size, relative to the largest so far (online softmax)."""
    out, total, top = sums
    bits = jnp.where(keep, bits, -jnp.inf)
    new = jnp.maximum(top, jnp.max(bits, axis=-1))
    base = jnp.where(new == -jnp.inf, 0.0, new)
    p = jnp.exp2(bits - base[:, None])
    fade = jnp.exp2(top - base)
    out = out * fade[:, None] + product("qk,kd->qd", p.astype(v.dtype), v)
    return out, total * fade + jnp.sum(p, axis=-1), new


def _exp2(x: jax.Array) -> jax.Array:
    """2^x for float32 |x| < 126, to 2.3e-7 relatively, in half the instructions of `jnp.exp`."""
    whole = jnp.round(x)
    part = x - whole
    power = jnp.float32(_EXP2[-1])
    for c in _EXP2[-2::-1]:
        power = power * part + jnp.float32(c)
    bits = jax.lax.bitcast_convert_type(power, jnp.int32) + (whole.astype(jnp.int32) << 23)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
