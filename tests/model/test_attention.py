"""Row attention against a plain softmax, forward and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from olmoearth_jax.model import attention
from olmoearth_jax.model.attention import row_attention


def _inputs(seed, rows=4, lq=5, lk=7, heads=2, width=8, dtype=np.float32):
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((rows, lq, heads, width)).astype(dtype)
    k, v = (rng.standard_normal((rows, lk, heads, width)).astype(dtype) for _ in range(2))
    return q, k, v


def _plain(q, k, v, mask):
    scores = jnp.einsum("rqhd,rkhd->rhqk", q, k) * q.shape[-1] ** -0.5
    p = jax.nn.softmax(jnp.where(mask[:, None, None], scores, -1e30), axis=-1)
    p = jnp.where(mask.any(-1)[:, None, None, None], p, 0.0)
    return jnp.einsum("rhqk,rkhd->rqhd", p, v)


@jax.jit
def _ours_and_gradient(q, k, v, weight, lengths):
    out, pull = jax.vjp(lambda *x: row_attention(*x, kv_lengths=lengths), q, k, v)
    return out, *pull(weight)


@jax.jit
def _plain_and_gradient(q, k, v, weight, mask):
    out, pull = jax.vjp(lambda *x: _plain(*x, mask), q, k, v)
    return out, *pull(weight)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.lists(st.integers(0, 7), min_size=4, max_size=4))
def test_matches_softmax_forward_and_gradient(seed, lengths):
    q, k, v = _inputs(seed)
    lengths = jnp.asarray(lengths)
    mask = jnp.arange(7)[None] < lengths[:, None]
    weight = np.random.default_rng(1).standard_normal(q.shape).astype(np.float32)
    ours = _ours_and_gradient(q, k, v, weight, lengths)
    for a, b in zip(ours, _plain_and_gradient(q, k, v, weight, mask), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_rows_at_a_time_do_not_matter(monkeypatch):
    q, k, v = _inputs(0, rows=5)
    mask = np.random.default_rng(0).random((5, 7)) < 0.6
    mask[2] = False

    def value_and_grads():
        def loss(*x):
            return jnp.sum(row_attention(*x, key_mask=jnp.asarray(mask)) ** 2)

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(q, k, v)

    whole = value_and_grads()
    for rows in (1, 2):
        monkeypatch.setitem(attention._SCORE_BYTES, jax.default_backend(), rows * 4 * 2 * 5 * 7)
        for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(value_and_grads()), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="only a CPU computes parts of rows")
@pytest.mark.parametrize("lq, lk, at_once", [(70, 70, 1), (70, 90, 1), (70, 90, 4), (20, 130, 2)])
def test_parts_of_rows_equal_whole_rows(monkeypatch, lq, lk, at_once):
    rows, rng = 8, np.random.default_rng(lq + at_once)
    inputs = _inputs(9, rows=rows, lq=lq, lk=lk)
    queries, keys = rng.integers(0, lq + 1, rows), rng.integers(0, lk + 1, rows)
    queries[:3], keys[:3] = (lq, 0, 3), (lk, 2, 0)  # full, and without queries or keys
    weight = rng.standard_normal(inputs[0].shape).astype(np.float32)

    def out_and_gradient():
        @jax.jit
        def run(*x):
            out, pull = jax.vjp(
                lambda *y: row_attention(
                    *y, kv_lengths=jnp.asarray(keys), q_lengths=jnp.asarray(queries)
                ),
                *x,
            )
            return out, *pull(weight)

        assert ("cond" in str(jax.make_jaxpr(run)(*inputs))) == (attention._MANY_PAIRS == 0)
        return run(*inputs)

    monkeypatch.setitem(attention._SCORE_BYTES, "cpu", at_once * 4 * lq * lk)
    whole = out_and_gradient()
    monkeypatch.setattr(attention, "_MANY_PAIRS", 0)
    for a, b in zip(whole, out_and_gradient(), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
        assert (np.asarray(a) == 0).all(axis=(1, 2, 3))[[1, 2]].all()


def test_empty_rows_and_queries_are_exactly_zero():
    q, k, v = _inputs(3)
    lengths, queries = jnp.array([0, 3, 7, 1]), jnp.array([5, 0, 2, 5])

    def loss(q, k, v):
        out = row_attention(q, k, v, kv_lengths=lengths, q_lengths=queries)
        return jnp.sum(out), out

    grads, out = jax.grad(loss, (0, 1, 2), has_aux=True)(q, k, v)
    assert not np.asarray(out[0]).any() and not np.asarray(out[1]).any()
    assert not np.asarray(out[2, 2:]).any() and np.asarray(out[3]).all()
    for g in grads:
        assert np.isfinite(g).all() and not np.asarray(g[:2]).any()


def test_masked_keys_have_no_influence():
    q, k, v = _inputs(4)
    out = row_attention(q, k, v, kv_lengths=jnp.full(4, 3))
    k[:, 3:], v[:, 3:] = 1e4, -1e4
    np.testing.assert_array_equal(row_attention(q, k, v, kv_lengths=jnp.full(4, 3)), out)


def test_bfloat16_inputs_keep_a_float32_softmax():
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in _inputs(5))
    out = row_attention(q, k, v)
    assert out.dtype == jnp.bfloat16
    exact = _plain(*(x.astype(jnp.float32) for x in (q, k, v)), jnp.ones((4, 7), bool))
    np.testing.assert_allclose(out.astype(np.float32), exact, atol=0.02)


def test_unsupported_requests_are_refused():
    q, k, v = _inputs(6)
    with pytest.raises(ValueError, match="not both"):
        row_attention(q, k, v, kv_lengths=jnp.ones(4, int), key_mask=jnp.ones((4, 7), bool))
    with pytest.raises(ValueError, match="unknown attention implementation"):
        row_attention(q, k, v, implementation="flash")  # type: ignore[arg-type]
    if jax.default_backend() != "gpu":
        with pytest.raises(ValueError, match="needs a GPU"):
            row_attention(q, k, v, implementation="cudnn")


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN attention needs a GPU")
def test_cudnn_matches_the_plain_implementation():
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in _inputs(7, lq=64, lk=96, width=64))
    options = {"kv_lengths": jnp.array([96, 0, 17, 64]), "q_lengths": jnp.array([64, 5, 0, 33])}

    def run(implementation):
        def loss(q, k, v):
            out = row_attention(q, k, v, **options, implementation=implementation)
            return jnp.sum(out.astype(jnp.float32) ** 2), out

        return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(q, k, v)

    for a, b in zip(jax.tree.leaves(run("cudnn")), jax.tree.leaves(run("xla")), strict=True):
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        np.testing.assert_allclose(a, b, atol=0.02 * max(float(np.abs(b).max()), 1.0))
    (dq, dk, dv), out = run("cudnn")
    for x in (out[1:3], out[3, 33:], dq[1:3], dk[1:3], dv[1:3], dk[3, 64:], dv[3, 64:]):
        assert not np.asarray(x, np.float32).any()
