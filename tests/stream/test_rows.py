"""Gathers between stream and rows, and their transposes."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from olmoearth_jax.stream.rows import gather_rows, row_map, scatter_rows


def _extents(lengths, size):
    offset = np.cumsum([0, *lengths])[:-1]
    member = np.full(size, len(lengths))
    member[: sum(lengths)] = np.repeat(np.arange(len(lengths)), lengths)
    arrays = (offset, lengths, member)
    return tuple(jnp.asarray(np.asarray(a, np.int32)[None]) for a in arrays)


@settings(max_examples=20, deadline=None)
@given(
    short=st.lists(st.integers(0, 3), min_size=1, max_size=4),
    long=st.lists(st.integers(0, 6), min_size=1, max_size=3),
    spare=st.integers(0, 4),
)
def test_rows_round_trip_and_gradients_are_gathers(short, long, spare):
    lengths = short + long
    size = sum(lengths) + spare + 1
    order = jnp.arange(len(lengths), dtype=jnp.int32)[None]
    rows = row_map(*_extents(lengths, size), order, order, (len(short), len(long)), (3, 6))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, size, 2)), jnp.float32)
    parts = gather_rows(x, rows)
    for part, n in zip(parts, rows.lengths, strict=True):
        beyond = np.arange(part.shape[2]) >= np.asarray(n)[..., None]
        assert not np.asarray(part)[beyond].any()
    back = scatter_rows(parts, rows)
    used = sum(lengths)
    np.testing.assert_array_equal(back[:, :used], x[:, :used])
    assert not np.asarray(back[:, used:]).any()

    def value(x):
        parts = gather_rows(x, rows)
        return sum((p**2).sum() for p in parts) + (scatter_rows(parts, rows) ** 3).sum()

    grad = jax.grad(value)(x)
    expected = np.where(np.arange(size)[None, :, None] < used, 2 * x + 3 * x**2, 0.0)
    np.testing.assert_allclose(grad, expected, rtol=1e-6)


def test_gradient_needs_no_scatter():
    order = jnp.arange(2, dtype=jnp.int32)[None]
    rows = row_map(*_extents([2, 3], 8), order, order, (1, 1), (2, 4))

    def value(x):
        return (scatter_rows(gather_rows(x, rows), rows) ** 2).sum()

    text = jax.jit(jax.grad(value)).lower(jnp.ones((1, 8, 4))).as_text()
    assert "scatter" not in text
