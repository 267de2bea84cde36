"""Properties of the token losses (spec/train.md section 12, items 4 and 5)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from olmoearth_jax import losses
from olmoearth_jax.losses import Rows, rows_value
from tests.losses.cases import SHAPES, TOKEN_LOSSES, build, tokens

ALL = pytest.mark.parametrize("key", TOKEN_LOSSES)
SEGMENT = jnp.array([0, 1, 0, 1, 0, 1])
ONES = jnp.ones(6)


@functools.cache
def compiled(key: str):
    """jitted (preds, targets, masks, segment, weight) -> (values [2], gradients of their sum)."""
    loss = build(key)

    def value(preds, targets, masks, segment, weight):
        out = loss(preds, targets, masks, losses.Groups(segment, weight, 2))
        return out.sum(), out

    return jax.jit(jax.value_and_grad(value, has_aux=True))


def run(key, preds, targets, masks, segment=SEGMENT, weight=ONES):
    (_, values), grads = compiled(key)(preds, targets, masks, segment, weight)
    return np.asarray(values), {m: np.asarray(g) for m, g in grads.items()}


def permute(tree, order):
    return {m: jnp.take(x, order[m], axis=1) for m, x in tree.items()}


@ALL
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 10**6), decoded=st.sampled_from([0.1, 0.5, 0.9]))
def test_invariances(key, seed, decoded):
    preds, targets, masks = tokens(seed, decoded=decoded)
    values, grads = run(key, preds, targets, masks)
    assert np.isfinite(values).all()
    for m, g in grads.items():
        assert np.isfinite(g).all()
        assert not g[np.asarray(masks[m]) != 2].any()
    rng = np.random.default_rng(seed)
    order = {m: rng.permutation(n) for m, n in SHAPES.items()}
    moved = run(key, *(permute(t, order) for t in (preds, targets, masks)))
    np.testing.assert_allclose(moved[0], values, rtol=2e-5, atol=1e-6)
    for m, g in grads.items():
        np.testing.assert_allclose(moved[1][m], g[:, order[m]], rtol=1e-3, atol=1e-5)
    # What isn't decoded doesn't matter, even if it is not a number.
    noise = {m: jnp.where((masks[m] == 2)[..., None], p, jnp.nan) for m, p in preds.items()}
    other = run(key, noise, targets, masks)
    np.testing.assert_array_equal(other[0], values)
    for m, g in grads.items():
        np.testing.assert_array_equal(other[1][m], g)
    if "patch" in key and "pred2unit" not in TOKEN_LOSSES[key]:
        scaled = run(key, {m: 3.0 * p for m, p in preds.items()}, targets, masks)[0]
        np.testing.assert_allclose(scaled, values, rtol=2e-5, atol=1e-6)


@ALL
def test_groups_are_separate_and_holes_take_no_part(key):
    preds, targets, masks = tokens(1)
    whole, grads = run(key, preds, targets, masks)
    alone = jax.jit(build(key))
    parts = []
    for g in (0, 1):
        rows = np.flatnonzero(np.asarray(SEGMENT) == g)
        parts.append(float(alone(*({m: x[rows] for m, x in t.items()}
                                   for t in (preds, targets, masks)))[0]))  # fmt: skip
    np.testing.assert_allclose(whole, parts, rtol=1e-5, atol=1e-6)
    # Two holes in group 1, full of junk: the same as if its third sample were alone.
    weight = jnp.array([1.0, 0.0, 1.0, 0.0, 1.0, 1.0])
    hole = np.asarray(weight) == 0
    junk = {m: jnp.where(hole[:, None, None], jnp.nan, p) for m, p in preds.items()}
    values, hole_grads = run(key, junk, targets, masks, weight=weight)
    single, _ = run(key, preds, targets, masks, segment=jnp.array([0, 0, 0, 0, 0, 1]))
    np.testing.assert_allclose(values[1], single[1], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(values[0], whole[0], rtol=1e-6)
    for m, g in hole_grads.items():
        assert np.isfinite(g).all() and not g[hole].any()
        np.testing.assert_allclose(g[0], grads[m][0], rtol=1e-4, atol=1e-6)


@ALL
def test_nothing_decoded_is_zero_without_gradient(key):
    preds, targets, masks = tokens(2)
    values, grads = run(key, preds, targets, {m: jnp.ones_like(x) for m, x in masks.items()})
    assert not values.any() and not any(g.any() for g in grads.values())


@ALL
def test_zero_predictions_have_finite_gradients(key):
    preds, targets, masks = tokens(3)
    zeros = {m: jnp.zeros_like(p) for m, p in preds.items()}
    values, grads = run(key, zeros, {m: jnp.zeros_like(t) for m, t in targets.items()}, masks)
    assert np.isfinite(values).all() and all(np.isfinite(g).all() for g in grads.values())


def stream_rows(loss, preds, targets, masks):
    """Decoded tokens packed to the front of padded rows in two length classes."""
    names = [("", tuple(preds))] if loss.scope in ("sample", "batch") else [
        (m, (m,)) for m in preds
    ]  # fmt: skip
    out = {}
    for label, members in names:
        pred, target, mask = (
            np.concatenate([np.asarray(t[m]) for m in members], axis=1)
            for t in (preds, targets, masks)
        )
        out[label] = []
        counts = (mask == 2).sum(axis=1)
        for low, high in ((0, 3), (3, mask.shape[1])):
            rows = [b for b in range(len(mask)) if low < counts[b] <= high]
            packed = [np.full((len(rows) + 1, high, pred.shape[-1]), np.nan, np.float32)
                      for _ in range(2)]  # fmt: skip
            valid = np.zeros((len(rows) + 1, high), bool)
            for i, b in enumerate(rows):
                where = np.flatnonzero(mask[b] == 2)
                valid[i, : len(where)] = True
                packed[0][i, : len(where)] = pred[b, where]
                packed[1][i, : len(where)] = target[b, where]
            segment = np.append(np.asarray(SEGMENT)[rows], 0).astype(np.int32)
            weight = np.append(np.ones(len(rows)), 0).astype(np.float32)
            out[label].append(Rows(*map(jnp.asarray, (*packed, valid, segment, weight))))
    return out


@ALL
def test_packed_rows_give_the_dense_value(key):
    loss = build(key)
    preds, targets, masks = tokens(4, decoded=0.4)
    dense, _ = run(key, preds, targets, masks)
    rows = stream_rows(loss, preds, targets, masks)
    packed = jax.jit(functools.partial(rows_value, loss, num_segments=2))(
        rows, group_samples=jnp.array([3.0, 3.0])
    )
    np.testing.assert_allclose(packed, dense, rtol=1e-5, atol=1e-6)


def test_threshold_of_one_is_the_plain_loss():
    preds, targets, masks = tokens(5)
    plain = losses.build({"type": "modality_patch_discrimination"})
    masked = losses.build(
        {"type": "modality_patch_discrimination_masked_negatives", "same_target_threshold": 1.0}
    )
    values = [jax.jit(loss)(preds, targets, masks) for loss in (plain, masked)]
    np.testing.assert_array_equal(*values)


def reference_masked(pred, target, threshold, tau):
    """One set's masked-negatives loss by loops, in float64; None where the set is skipped."""
    p = pred / np.linalg.norm(pred, axis=1, keepdims=True)
    t = target / np.linalg.norm(target, axis=1, keepdims=True)
    same = t @ t.T > threshold
    if len(p) > 1 and same.all(axis=1).any():
        return None
    total = 0.0
    for i in range(len(p)):
        kept = [j for j in range(len(p)) if j == i or not same[i, j]]
        scores = p[i] @ t[kept].T / tau
        total += 2 * tau * (np.log(np.exp(scores).sum()) - p[i] @ t[i] / tau)
    return total / len(p)


@jax.jit
def masked_set_value(pred, target, valid):
    loss = losses.build({"type": "modality_patch_discrimination_masked_negatives"})
    return loss.set_value(pred, target, valid, "worldcover")


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.integers(1, 6), kinds=st.integers(1, 4))
def test_masked_negatives_by_definition(seed, size, kinds):
    rng = np.random.default_rng(seed)
    palette = rng.normal(size=(kinds, 5))
    target, pred = palette[rng.integers(0, kinds, size)], rng.normal(size=(size, 5))
    pad = ((0, 6 - size), (0, 0))
    value, count = masked_set_value(
        jnp.asarray(np.pad(pred, pad), jnp.float32),
        jnp.asarray(np.pad(target, pad), jnp.float32),
        jnp.arange(6) < size,
    )
    expected = reference_masked(pred, target, 0.999, 0.1)
    assert float(count) == (expected is not None)
    if expected is not None:
        np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-5)


def test_low_precision_inputs_are_computed_in_float32():
    preds, targets, masks = tokens(6)
    low = [{m: x.astype(jnp.bfloat16) for m, x in t.items()} for t in (preds, targets)]
    high = [{m: x.astype(jnp.float32) for m, x in t.items()} for t in low]
    loss = jax.jit(build("patch_discrimination"))
    value = loss(*low, masks)
    assert value.dtype == jnp.float32
    np.testing.assert_array_equal(value, loss(*high, masks))


def test_cross_entropy_takes_class_numbers():
    loss = losses.build({"type": "cross_entropy"})
    logits = {"worldcover": jnp.array([[[2.0, 0.0], [0.0, 1.0], [5.0, -5.0]]])}
    masks = {"worldcover": jnp.array([[2, 2, 0]])}
    value = loss(logits, {"worldcover": jnp.array([[[0], [0], [1]]])}, masks)
    expected = (np.log(1 + np.exp(-2.0)) + np.log(1 + np.exp(1.0))) / 2
    np.testing.assert_allclose(value, [expected], rtol=1e-6)
    with pytest.raises(ValueError, match="integer class"):
        loss(logits, {"worldcover": jnp.zeros((1, 3, 2))}, masks)


def test_microbatch_gradients_average():
    loss, (preds, targets, masks) = build("patch_discrimination"), tokens(7, batch=4)

    def part(rows, p):
        pick = [{m: x[rows] for m, x in t.items()} for t in (p, targets, masks)]
        return loss(*pick)[0]

    halves = [slice(0, 2), slice(2, 4)]
    each = [jax.jit(jax.grad(functools.partial(part, rows)))(preds) for rows in halves]
    groups = losses.Groups(jnp.array([0, 0, 1, 1]), jnp.ones(4), 2)
    joint = jax.jit(jax.grad(lambda p: loss(p, targets, masks, groups).mean()))(preds)
    for m in preds:
        np.testing.assert_allclose(joint[m], (each[0][m] + each[1][m]) / 2, rtol=1e-5, atol=1e-7)
