"""Attention over padded rows (spec section 6), one function for every backend.

float32 softmax. A row without any key gives exactly zero, and zero gradients. The plain
implementation keeps only the log-sum-exp for the backward pass and recomputes the scores, a few
rows at a time, so that no array of all scores ever exists. On a CPU it leaves out most of the
padding of long rows: one of a few sizes that are compiled for them is chosen by what a row holds.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any, Literal

import jax
import jax.numpy as jnp

from olmoearth_jax.model import cpu_attention
from olmoearth_jax.model.layers import product

_Implementation = Literal["auto", "xla", "cudnn"]

# Bytes of scores alive at once: small enough for a CPU's caches, large enough to fill a GPU.
_SCORE_BYTES = {"cpu": 2 << 20, "gpu": 1 << 30}

# Pairs of queries and keys in all rows from which on a CPU computes of each row only the part that
# holds it: every part is code of its own, which has to be compiled.
_MANY_PAIRS = 1 << 22


def takes_parts(rows: int, queries: int, keys: int) -> bool:
    """Whether rows of one padded length cost what they hold; lengths of others needn't differ."""
    return jax.default_backend() == "cpu" and rows * queries * keys >= _MANY_PAIRS


def row_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    kv_lengths: jax.Array | None = None,
    key_mask: jax.Array | None = None,
    q_lengths: jax.Array | None = None,
    implementation: _Implementation = "auto",
) -> jax.Array:
    """Softmax attention within each row, scale head_dim^-0.5.

    Args:
      q: [R, Lq, heads, head_dim].
      k: [R, Lk, heads, head_dim]; padding must be finite.
      v: like k.
      kv_lengths: int [R], keys before it take part; or None.
      key_mask: bool [R, Lk], True takes part; or None. Give at most one of the two.
      q_lengths: int [R]; outputs at and after it are exactly zero.
      implementation: 'xla' anywhere; 'cudnn' on a GPU with bfloat16 inputs, a head width
        divisible by 8 and lengths instead of a mask; 'auto' takes 'cudnn' where it applies.

    Returns:
      [R, Lq, heads, head_dim] in the dtype of q.

    Raises:
      ValueError: both masks given, or 'cudnn' asked for where it does not apply.
    """
    if kv_lengths is not None and key_mask is not None:
        raise ValueError("give kv_lengths or key_mask to row_attention, not both")
    obstacle = _cudnn_obstacle(q, key_mask)
    if implementation == "cudnn" and obstacle:
        raise ValueError(f"attention implementation 'cudnn' {obstacle}; use 'xla'")
    if implementation not in ("auto", "xla", "cudnn"):
        raise ValueError(
            f"unknown attention implementation {implementation!r}; known: auto, xla, cudnn"
        )
    if implementation != "xla" and not obstacle:
        out = _cudnn(q, k, v, kv_lengths, q_lengths)
    else:
        if kv_lengths is not None:
            key_mask = jnp.arange(k.shape[1])[None, :] < kv_lengths[:, None]
        out = _plain(q, k, v, key_mask, _lengths(q, k, q_lengths, kv_lengths))
    if q_lengths is not None:
        valid = jnp.arange(q.shape[1])[None, :] < q_lengths[:, None]
        out = jnp.where(valid[:, :, None, None], out, jnp.zeros((), out.dtype))
    return out


def _cudnn_obstacle(q: jax.Array, key_mask: jax.Array | None) -> str:
    """Why the cuDNN kernel cannot be used, or ''."""
    if jax.default_backend() != "gpu":
        return "needs a GPU"
    if q.dtype != jnp.bfloat16:
        return f"needs bfloat16 inputs, got {q.dtype}"
    if q.shape[-1] % 8:
        return f"needs a head width divisible by 8, got {q.shape[-1]}"
    if key_mask is not None:
        return "takes lengths, not a key mask"
    return ""


def _cudnn(q, k, v, kv_lengths, q_lengths) -> jax.Array:
    rows = q.shape[0]
    full_q = jnp.full((rows,), q.shape[1], jnp.int32)
    full_k = jnp.full((rows,), k.shape[1], jnp.int32)
    q_len = full_q if q_lengths is None else q_lengths.astype(jnp.int32)
    k_len = full_k if kv_lengths is None else kv_lengths.astype(jnp.int32)
    # The kernel's result for zero lengths is not specified: attend to one (finite) padding
    # position instead and drop the result, which zeroes its gradient too.
    out = jax.nn.dot_product_attention(
        q,
        k,
        v,
        query_seq_lengths=jnp.maximum(q_len, 1),
        key_value_seq_lengths=jnp.maximum(k_len, 1),
        implementation="cudnn",
    )
    return jnp.where((k_len > 0)[:, None, None, None], out, jnp.zeros((), out.dtype))


def _ends(queries: int, keys: int) -> list[tuple[int, int]]:
    """Parts (queries, keys) of a padded row that are compiled for it, the cheapest first."""

    def ends(length: int, parts: int) -> list[int]:
        whole = 16 * parts  # full registers
        return [min(-(-length * n // whole) * 16, length) for n in range(1, parts + 1)]

    if queries == keys:
        return list(zip(ends(queries, 8), ends(keys, 8), strict=True))
    # Queries and keys are of different tokens, and their numbers independent.
    pairs = itertools.product(ends(queries, 4), ends(keys, 4))
    return sorted(pairs, key=lambda pair: pair[0] * pair[1])


def _lengths(q, k, q_lengths, kv_lengths) -> jax.Array | None:
    """int32 [R, 2]: what each row holds; None where rows are computed whole."""
    if q_lengths is None or kv_lengths is None:
        return None
    if not takes_parts(q.shape[0], q.shape[1], k.shape[1]):
        return None
    return jnp.stack([q_lengths, kv_lengths], axis=1).astype(jnp.int32)


def _plain(q, k, v, key_mask, lengths) -> jax.Array:
    scale = q.shape[-1] ** -0.5
    bias = jnp.zeros((q.shape[0], k.shape[1]), jnp.float32)
    if key_mask is not None:
        bias = jnp.where(key_mask, bias, -jnp.inf)
    # [R, H, L, d]: on a CPU batched products in this layout are several times faster.
    heads = q.shape[2]
    q, k, v = ((x.swapaxes(1, 2)) for x in (q * jnp.asarray(scale, q.dtype), k, v))
    # Heads become rows of their own, so that the scores at work stay within a CPU's caches.
    q, k, v = (x.reshape(-1, 1, *x.shape[2:]) for x in (q, k, v))
    bias = jnp.repeat(bias, heads, axis=0)
    lengths = None if lengths is None else jnp.repeat(lengths, heads, axis=0)
    out: Any = _softmax_attention(q, k, v, bias, lengths, key_mask is not None)
    return out.reshape(-1, heads, *out.shape[2:]).swapaxes(1, 2)


def _over_rows(fn, args, lengths=None):
    """Maps `fn` over the leading axis of all args, several rows at a time."""
    q, k = args[0], args[1]
    rows = q.shape[0]
    bytes_per_row = 4 * q.shape[1] * q.shape[2] * k.shape[2]
    budget = _SCORE_BYTES.get(jax.default_backend(), 1 << 30)
    most = max(1, budget // max(bytes_per_row, 1))
    if most >= rows:
        return fn(*args)
    # A divisor of the rows: no remainder that would have to be compiled as well.
    at_once = max(n for n in range(1, most + 1) if rows % n == 0)
    args = args if lengths is None else (*args, lengths)
    cut = [x.reshape(rows // at_once, at_once, *x.shape[1:]) for x in args]
    out = jax.lax.map(lambda xs: fn(*xs) if lengths is None else _one_part(fn, *xs), cut)
    return jax.tree.map(lambda x: x.reshape(rows, *x.shape[2:]), out)


def _one_part(fn, q, k, *rest):
    """`fn` of the first part that holds all rows; the last of the arguments are their lengths."""
    *rest, lengths = rest
    ends = _ends(q.shape[2], k.shape[2])
    first = jnp.argmax((jnp.max(lengths, axis=0) <= jnp.array(ends)).all(axis=1))
    return jax.lax.switch(first, [functools.partial(fn, ends=e) for e in ends], q, k, *rest)


def _grown(x, axis: int, length: int, fill: float = 0.0):
    widths = [(0, length - x.shape[axis] if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=fill)


def _scores(q, k, bias):
    s = product("rhqd,rhkd->rhqk", q, k)
    return s + bias[:, None, None, :]


def _forward_rows(q, k, v, bias, ends=None):
    """Output and log-sum-exp; what lies at and after `ends` of queries and keys is padding."""
    if ends is not None:
        (q_end, k_end), length = ends, q.shape[2]
        k, v = k[:, :, :k_end], v[:, :, :k_end]
        out, log_total = _forward_rows(q[:, :, :q_end], k, v, bias[:, :k_end])
        return _grown(out, 2, length), _grown(log_total, 2, length, jnp.inf)
    s = _scores(q, k, bias)
    top = jnp.max(s, axis=-1, keepdims=True)
    top = jnp.where(top == -jnp.inf, 0.0, top)
    p = jnp.exp(s - top)
    total = jnp.sum(p, axis=-1, keepdims=True)
    out = product("rhqk,rhkd->rhqd", p.astype(v.dtype), v)
    out = out / jnp.where(total > 0, total, 1.0)
    # +inf where nothing is attended: the backward pass then finds probabilities of exactly 0.
    log_total = jnp.where(total > 0, top + jnp.log(jnp.where(total > 0, total, 1.0)), jnp.inf)
    return out.astype(q.dtype), log_total[..., 0]


def _backward_rows(q, k, v, bias, log_total, delta, d_out, ends=None):
    """Gradients of q [R, 1, Lq, d], and of k and v as [R, 1, d, Lk]; `ends` as above."""
    if ends is not None:
        (q_end, k_end), lengths = ends, (q.shape[2], k.shape[2])
        q, log_total, delta, d_out = (x[:, :, :q_end] for x in (q, log_total, delta, d_out))
        k, v = k[:, :, :k_end], v[:, :, :k_end]
        d_q, d_k, d_v = _backward_rows(q, k, v, bias[:, :k_end], log_total, delta, d_out)
        return _grown(d_q, 2, lengths[0]), *(_grown(x, 3, lengths[1]) for x in (d_k, d_v))
    p = jnp.exp(_scores(q, k, bias) - log_total[..., None])
    d_out = d_out.astype(v.dtype)
    # As [d, k]: a product that reads the scores by column takes 2 to 7 times as long on a CPU.
    d_v = product("rhqd,rhqk->rhdk", d_out, p.astype(v.dtype))
    d_p = product("rhqd,rhkd->rhqk", d_out, v)
    d_s = (p * (d_p - delta)).astype(q.dtype)
    d_q = product("rhqk,rhkd->rhqd", d_s, k)
    d_k = product("rhqd,rhqk->rhdk", q, d_s)
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _softmax_attention(q, k, v, bias, lengths, masked):
    """Rows [R, 1, L, head_dim], bias [R, Lk], lengths [R, 2] or None (`_lengths`).

    Without `masked` the bias is known to be 0.
    """
    if jax.default_backend() == "cpu" and (blocks := cpu_attention.blocks(q.shape[2], k.shape[2])):
        return cpu_attention.attend(q[:, 0], k[:, 0], v[:, 0], bias == 0, blocks)[:, None]
    return _over_rows(_forward_rows, (q, k, v, bias), lengths)[0]


def _forward(q, k, v, bias, lengths, masked):
    del masked
    out, log_total = _over_rows(_forward_rows, (q, k, v, bias), lengths)
    return out, (q, k, v, bias, log_total, out, lengths)


def _backward(masked, saved, d_out):
    del masked
    *saved, out, lengths = saved
    # Here and not beside the scores, and as a product: a CPU is slow at sums of short vectors, and
    # at those in one loop with the scores.
    one = jnp.ones((out.shape[-1], 1), jnp.float32)
    delta = product("rhqd,de->rhqe", d_out.astype(jnp.float32) * out.astype(jnp.float32), one)
    d_q, d_k, d_v = _over_rows(_backward_rows, (*saved, delta, d_out), lengths)
    return d_q, d_k.swapaxes(-1, -2), d_v.swapaxes(-1, -2), None, None


_softmax_attention.defvjp(_forward, _backward)
