"""InfoNCE, KoLeo, MAE, and building losses from configs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from olmoearth_jax import losses
from olmoearth_jax.modalities import MISSING

RNG = np.random.default_rng(0)
A, B = (jnp.asarray(RNG.normal(size=(6, 4)), jnp.float32) for _ in range(2))
SEGMENT = jnp.array([0, 1, 0, 2, 0, 1])


def groups(count, weight=None):
    return losses.Groups(SEGMENT, jnp.ones(6) if weight is None else weight, count)


def by_hand(a, b, tau):
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    s = a @ b.T / tau
    return float(np.mean(np.log(np.exp(s).sum(axis=1)) - np.diag(s)))


def test_info_nce_stays_within_groups():
    loss = losses.build({"type": "InfoNCE", "weight": 0.5})
    values = loss(A, B, groups(3))
    for g, rows in enumerate(([0, 2, 4], [1, 5], [3])):
        expected = 0.5 * by_hand(np.asarray(A)[rows], np.asarray(B)[rows], 0.1)
        np.testing.assert_allclose(values[g], expected, rtol=1e-5, atol=1e-7)
    assert values[2] == 0


def test_info_nce_leaves_holes_out():
    weight = jnp.array([1.0, 1.0, 0.0, 0.0, 1.0, 1.0])
    hole = (weight == 0)[:, None]

    def value(a, b):
        return losses.InfoNCE()(a, b, groups(3, weight))

    junk = [jnp.where(hole, jnp.nan, x) for x in (A, B)]
    values = value(*junk)
    expected = by_hand(np.asarray(A)[[0, 4]], np.asarray(B)[[0, 4]], 0.1)
    np.testing.assert_allclose(values[0], expected, rtol=1e-5)
    assert values[2] == 0
    grads = jax.grad(lambda *x: value(*x).sum(), argnums=(0, 1))(*junk)
    for g in grads:
        assert np.isfinite(g).all() and not np.where(hole, g, 0).any()


def test_info_nce_is_finite_for_zero_vectors():
    grads = jax.grad(lambda a: losses.InfoNCE()(a, a)[0])(jnp.zeros((3, 4)))
    assert np.isfinite(grads).all()


def koleo_by_hand(x, weight, eps=1e-8):
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    s = x @ x.T
    np.fill_diagonal(s, -1)
    d = np.linalg.norm(x - x[s.argmax(axis=1)] + eps, axis=1)
    return -weight * np.log(d + eps).mean()


def test_koleo_per_group():
    loss = losses.build({"type": "KoLeo"})
    values = loss(A, groups(4))
    for g, rows in ((0, [0, 2, 4]), (1, [1, 5])):
        expected = koleo_by_hand(np.asarray(A, np.float64)[rows], 0.1)
        np.testing.assert_allclose(values[g], expected, rtol=1e-4)
    assert values[2] == 0 and values[3] == 0
    same = jnp.ones((4, 3))
    assert np.isfinite(loss(same)).all() and np.isfinite(jax.grad(lambda x: loss(x)[0])(same)).all()


def test_koleo_pools_encoder_tokens():
    tokens = {"worldcover": jnp.asarray(RNG.normal(size=(3, 4, 2)), jnp.float32)}
    masks = {"worldcover": jnp.array([[0, 0, 2, 3], [1, 0, 1, 1], [2, 2, 3, 1]])}
    x, found = losses.build({"type": "KoLeo"}).tokens_to_vectors(tokens, masks)
    np.testing.assert_allclose(x[0], tokens["worldcover"][0, :2].mean(axis=0), rtol=1e-6)
    assert found.weight.tolist() == [1, 1, 0] and np.isfinite(x).all()
    patch = losses.build({"type": "KoLeo", "mode": "patch"})
    x, found = patch.tokens_to_vectors(tokens, masks)
    assert x.shape == (12, 2) and found.weight.sum() == 3 and found.segment.shape == (12,)


def mae_case(masked_value=2):
    target = RNG.normal(size=(2, 4, 4, 1, 1)).astype(np.float32)
    target[0, 1, 1] = MISSING
    pred = jnp.asarray(RNG.normal(size=target.shape), jnp.float32)
    mask = np.ones((2, 2, 2, 1, 1), np.int8)
    mask[0, 0, 0] = mask[1, 1, 0] = masked_value
    return {"srtm": pred}, {"srtm": jnp.asarray(target)}, {"srtm": jnp.asarray(mask)}


def test_mae_token_masks_skip_missing_pixels():
    preds, targets, masks = mae_case()
    values = losses.build({"type": "mae"})(
        preds, targets, masks, losses.Groups(jnp.array([0, 1]), jnp.ones(2), 2)
    )
    error = np.square(np.asarray(preds["srtm"]) - np.asarray(targets["srtm"]))[..., 0, 0]
    first = [error[0, i, j] for i, j in ((0, 0), (0, 1), (1, 0))]
    np.testing.assert_allclose(values, [np.mean(first), error[1, 2:, :2].mean()], rtol=1e-5)


def test_mae_of_nothing_is_zero():
    preds, targets, masks = mae_case(masked_value=0)
    loss = losses.build({"type": "mae", "loss_function": "SmoothL1Loss", "beta": 0.1})
    value, grads = jax.value_and_grad(lambda p: loss(p, targets, masks)[0])(preds)
    assert value == 0 and not grads["srtm"].any()


def test_every_loss_builds_by_its_key():
    names = {key: losses.build({"type": key}).name for key in losses.LOSSES}
    assert names["patch_discrimination_new"] == "PatchDisc"
    assert names["modality_patch_discrimination_new"] == "ModalityPatchDisc"
    key = "modality_patch_discrimination_masked_negatives_vec"
    assert names[key] == "ModalityPatchDiscMaskedVec"
    config = {"type": "l1"}
    losses.build(config)
    losses.build(config)
    assert config == {"type": "l1"}
    assert losses.build({"tau": 0.2}, default="patch_discrimination").tau == 0.2


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "needs a 'type'"),
        ({"type": "patch_discriminator"}, "did you mean 'patch_discrimination'"),
        ({"type": "l1", "tau": 0.1}, "has no argument 'tau'"),
        ({"type": "InfoNCE", "tau": 0}, "must be positive"),
        ({"type": "InfoNCE", "weight": "x"}, "weight must be a number, got 'x'"),
        ({"type": "patch_discrimination", "pred2unit": 1}, "true or false"),
        ({"type": "KoLeo", "mode": "pixel"}, "'instance' or 'patch'"),
        ({"type": "mae", "loss_function": "MSE"}, "MSELoss"),
        ({"type": "mae", "beta": 0.1}, "no parameter 'beta'"),
        ({"type": "mae", "loss_function": "SmoothL1Loss", "beta": "x"}, "beta must be a number"),
        ({"type": "mae", "loss_function": "SmoothL1Loss", "beta": -1}, "beta must be a number"),
        ({"type": "mae", "loss_function": "HuberLoss", "delta": 0}, "delta must be a number above"),
        ({"type": "mae", "loss_function": "HuberLoss", "delta": [1]}, "wrong type"),
        ({"type": "KoLeo", "eps": 0.0}, "eps must be greater than 0"),
    ],
)
def test_errors_name_what_is_wrong(config, message):
    with pytest.raises(ValueError, match=message):
        losses.build(config)


def test_a_modality_without_a_weight_is_an_error():
    loss = losses.build({"type": "modality_patch_discrimination", "modality_weights": {"srtm": 1}})
    x = {"worldcover": jnp.ones((1, 2, 3))}
    with pytest.raises(ValueError, match="no entry for 'worldcover'"):
        loss(x, x, {"worldcover": jnp.full((1, 2), 2)})
