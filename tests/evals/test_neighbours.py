"""The search for nearest neighbours against sorting everything."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from olmoearth_jax.evals import knn


@given(
    seed=st.integers(0, 2**16),
    columns=st.sampled_from([1, 31, 64, 320, 352, 1024]),
    k=st.integers(1, 6),
    values=st.sampled_from([2, 5, 1000]),
)
@settings(max_examples=60, deadline=None)
def test_the_largest_are_those_of_top_k_ties_included(seed, columns, k, values):
    rng = np.random.default_rng(seed)
    x = rng.integers(0, values, (3, columns)).astype(np.float32)
    x[rng.random(x.shape) < 0.1] = -np.inf
    k = min(k, columns)
    expected, found = jax.lax.top_k(x, k), knn._largest(jax.numpy.asarray(x), k)
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("train", "query"), [(50, 7), (131, 40), (320, 33), (1000, 70)])
def test_blocks_of_any_number_give_the_nearest(train, query, monkeypatch):
    monkeypatch.setattr(knn, "TRAIN_BLOCK", 320)
    monkeypatch.setattr(knn, "QUERY_BLOCK", 32)
    rng = np.random.default_rng(train)
    table, asked = (rng.standard_normal((n, 16)).astype(np.float32) for n in (train, query))
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (asked, table)]
    truth = unit[0].astype(np.float64) @ unit[1].T.astype(np.float64)
    values, index = knn.neighbours(table, asked, 4)
    np.testing.assert_array_equal(index, np.argsort(-truth, axis=1, kind="stable")[:, :4])
    np.testing.assert_allclose(values, np.take_along_axis(truth, index, 1), atol=1e-6)
