"""Attention in blocks on a CPU against softmax in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from olmoearth_jax.model import cpu_attention
from olmoearth_jax.model.attention import row_attention
from olmoearth_jax.model.layers import precision

BLOCK = (6, 8)


def _inputs(seed, rows=2, queries=12, keys=24, width=4, scale=1.0):
    rng = np.random.default_rng(seed)
    shapes = ((rows, queries, width), (rows, keys, width), (rows, keys, width))
    q, k, v = (rng.standard_normal(s).astype(np.float32) for s in shapes)
    return q * np.float32(scale), k, v


def _softmax(q, k, v, keep):
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    scores = np.where(keep[:, None], q @ k.swapaxes(1, 2), -np.inf)
    top = scores.max(-1, keepdims=True)
    p = np.exp(scores - np.where(np.isfinite(top), top, 0))
    total = p.sum(-1, keepdims=True)
    return p @ v / np.where(total > 0, total, 1)


_attend = jax.jit(lambda *x: cpu_attention.attend(*x, BLOCK))


# A scale of 30 makes scores of hundreds, whose powers of two do not fit into float32.
@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.floats(0, 1), st.sampled_from([0.1, 1.0, 5.0, 30.0]))
def test_matches_softmax(seed, share, scale):
    q, k, v = _inputs(seed, scale=scale)
    keep = np.random.default_rng(seed).random(k.shape[:2]) < share
    np.testing.assert_allclose(
        _attend(q, k, v, keep), _softmax(q, k, v, keep), rtol=1e-4, atol=1e-5 * max(scale, 1)
    )


def test_common_part_of_the_keys_needs_no_careful_way(monkeypatch):
    q, k, v = _inputs(0)
    k += 300.0
    keep = np.ones(k.shape[:2], bool)
    expected = _softmax(q, k - 300.0, v, keep)

    def refuse(sums, *_):
        return tuple(jnp.full_like(x, jnp.nan) for x in sums)

    monkeypatch.setattr(cpu_attention, "_add_carefully", refuse)
    out = jax.jit(lambda *x: cpu_attention.attend(*x, (12, 12)))(q, k, v, keep)
    np.testing.assert_allclose(out, expected, atol=3e-4)


def test_rows_without_keys_are_zero_and_dropped_keys_unseen():
    q, k, v = _inputs(1)
    keep = np.ones(k.shape[:2], bool)
    keep[0], keep[1, 5:] = False, False
    out = np.asarray(_attend(q, k, v, keep))
    assert not out[0].any()
    k[1, 5:], v[1, 5:] = 1e30, 1e30
    np.testing.assert_array_equal(_attend(q, k, v, keep), out)


def test_nan_stays_in_its_row():
    q, k, v = _inputs(2)
    q[0, 3, 1] = np.nan
    out = np.asarray(_attend(q, k, v, np.ones(k.shape[:2], bool)))
    assert np.isnan(out[0, 3]).all()
    assert np.isfinite(out[1]).all()


def test_powers_of_two():
    x = np.linspace(-125, 125, 100_001).astype(np.float32)
    got = np.asarray(jax.jit(cpu_attention._exp2)(x), np.float64)
    np.testing.assert_allclose(got, np.exp2(x.astype(np.float64)), rtol=3e-7)


@pytest.mark.parametrize(
    ("queries", "keys", "expected"),
    [
        (2304, 2304, (1152, 384)),
        (64, 64, None),  # short
        (2003, 2003, None),  # prime
        (64, 100_000, (64, 250)),
        (9216, 9216, (1152, 384)),
    ],
)
def test_blocks(queries, keys, expected):
    block = cpu_attention.blocks(queries, keys)
    assert block == expected
    if block:
        assert queries % block[0] == 0 and keys % block[1] == 0


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_long_rows_take_it(monkeypatch, dtype):
    monkeypatch.setattr(cpu_attention, "_SCORE_BYTES", 1 << 10)
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((2, 48, 3, 8)), dtype) for _ in range(3))
    keep = rng.random((2, 48)) < 0.7
    if jax.default_backend() == "cpu":
        assert cpu_attention.blocks(48, 48)
    out = jax.jit(lambda *x: row_attention(*x, key_mask=jnp.asarray(keep)))(q, k, v)
    assert out.dtype == dtype
    wide = [np.asarray(x, np.float32).swapaxes(1, 2).reshape(6, 48, 8) for x in (q, k, v)]
    expected = _softmax(wide[0] * 8**-0.5, wide[1], wide[2], np.repeat(keep, 3, 0))
    expected = expected.reshape(2, 3, 48, 8).swapaxes(1, 2)
    exact = precision(dtype) is not None
    np.testing.assert_allclose(np.asarray(out, np.float32), expected, atol=2e-6 if exact else 0.03)
