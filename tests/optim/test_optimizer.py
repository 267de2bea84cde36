"""AdamW, clipping, EMA and schedules."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from olmoearth_jax.train import ema, schedule
from olmoearth_jax.train import optimizer as opt


def tree(seed: int) -> opt.Tree:
    rng = np.random.default_rng(seed)
    return {
        "encoder": {
            "proj": {"kernel": jnp.asarray(rng.normal(size=(3, 2)), jnp.float32)},
            "norm": {"scale": jnp.asarray(rng.normal(size=4), jnp.float32)},
        },
        "head": {"bias": jnp.asarray(rng.normal(size=2), jnp.float32)},
    }


def test_matches_optax():
    config = opt.AdamWConfig(lr=0.01, weight_decay=0.1, max_grad_norm=None)
    params, ours = tree(0), tree(0)
    state = opt.init(ours, config=config)
    theirs = optax.adamw(0.01, weight_decay=0.1)
    other = theirs.init(params)
    for s in range(1, 6):
        grads = tree(s)
        updates, other = theirs.update(grads, other, params)
        params = optax.apply_updates(params, updates)
        ours, state, norm = jax.jit(opt.update, static_argnums=4)(grads, state, ours, 0.01, config)
        np.testing.assert_allclose(norm, optax.tree.norm(grads), rtol=1e-6)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert int(state["count"]) == 5


def test_untrained_parameters_stay_and_zero_gradients_decay():
    config = opt.AdamWConfig(lr=0.1, weight_decay=0.5)
    params = start = tree(0)
    state = opt.init(params, lambda path: not path.startswith("head"), config)
    assert set(opt.flatten(state["m"])) == {"encoder/proj/kernel", "encoder/norm/scale"}
    zeros = jax.tree.map(jnp.zeros_like, params)
    zeros["head"]["bias"] = jnp.full(2, jnp.nan)  # no part in anything
    shrink = 1.0
    for lr in (0.1, 0.05, 0.2):
        params, state, norm = opt.update(zeros, state, params, lr, config)
        shrink *= 1 - lr * 0.5
        assert norm == 0
    np.testing.assert_array_equal(params["head"]["bias"], start["head"]["bias"])
    kernel = start["encoder"]["proj"]["kernel"]
    np.testing.assert_allclose(params["encoder"]["proj"]["kernel"], kernel * shrink, rtol=1e-5)


def test_trainable_may_be_a_tree_of_flags():
    params = tree(0)
    flags = jax.tree.map(lambda x: x.ndim == 1, params)
    state = opt.init(params, flags)
    assert set(opt.flatten(state["v"])) == {"encoder/norm/scale", "head/bias"}


def test_clipping():
    assert opt.clip_scale(jnp.float32(0.5), 1.0) == 1
    np.testing.assert_allclose(opt.clip_scale(jnp.float32(4.0), 1.0), 1 / (4 + 1e-6), rtol=1e-7)
    assert opt.clip_scale(jnp.float32(4.0), None) == 1
    assert np.isnan(opt.clip_scale(jnp.float32(np.nan), 1.0))


def test_count_offset_shrinks_the_first_update():
    moves = []
    for offset in (0, 1):
        config = opt.AdamWConfig(lr=1.0, weight_decay=0, max_grad_norm=None, count_offset=offset)
        params = {"w": jnp.zeros(1)}
        new, state, _ = opt.update({"w": jnp.ones(1)}, opt.init(params, config=config), params,
                                   1.0, config)  # fmt: skip
        moves.append(float(new["w"][0]))
        assert int(state["count"]) == offset + 1
    assert moves[1] / moves[0] == pytest.approx(0.744, abs=1e-3)


def test_group_overrides():
    config = opt.AdamWConfig(
        lr=0.1,
        weight_decay=0.5,
        group_overrides=[
            {"params": ["*.norm.*", "*/bias"], "opts": {"weight_decay": 0.0}},
            {"params": ["encoder/*"], "opts": {"lr": 0.05}},
        ],
    )
    params = tree(0)
    zeros = jax.tree.map(jnp.zeros_like, params)
    state = opt.init(params, config=config)
    new, _, _ = jax.jit(opt.update, static_argnums=4)(zeros, state, params, 0.1, config)
    for path, rate in (("encoder/norm/scale", 0), ("head/bias", 0), ("encoder/proj/kernel", 0.05)):
        expected = opt.flatten(params)[path] * (1 - rate * 0.5)
        np.testing.assert_allclose(opt.flatten(new)[path], expected, rtol=1e-6)
    missing = opt.AdamWConfig(group_overrides=[{"params": ["*.nope"], "opts": {}}])
    with pytest.raises(ValueError, match=r"'\*.nope' matches no trained parameter"):
        opt.init(params, config=missing)
    with pytest.raises(ValueError, match="did you mean 'weight_decay'"):
        opt.AdamWConfig(group_overrides=[{"params": ["*"], "opts": {"weight_decai": 1}}])


def test_a_trained_parameter_needs_a_gradient():
    params = tree(0)
    grads = {"encoder": params["encoder"]}
    with pytest.raises(ValueError, match="'head/bias' has no gradient"):
        opt.update(grads, opt.init(params), params, 0.1, opt.AdamWConfig())


def test_flatten_and_unflatten_are_inverse():
    params = tree(3)
    again = opt.unflatten(opt.flatten(params))
    assert jax.tree.structure(again) == jax.tree.structure(params)


def test_ema():
    assert ema.ema_decay_at(3, 10, (1.0, 1.0)) is None
    assert ema.ema_decay_at(5, 10, (0.9, 1.0)) == pytest.approx(0.95)
    target = {"patch": {"kernel": jnp.ones(2)}}
    online = {"patch": {"kernel": jnp.zeros(2)}, "blocks": {"w": jnp.ones(1)}}
    out = ema.ema_update(target, online, 0.75)
    np.testing.assert_allclose(out["patch"]["kernel"], 0.75)
    assert set(out) == {"patch"}
    with pytest.raises(ValueError, match="no online counterpart"):
        ema.ema_update({"x": jnp.ones(1)}, online, 0.5)


def test_cosine_shape():
    cosine = schedule.build({"type": "CosWithWarmup", "warmup": 10, "t_max": 100})
    rates = [cosine.lr(1.0, s, 1000) for s in range(1, 121)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == 1.0
    assert all(a >= b for a, b in itertools.pairwise(rates[9:]))
    assert rates[99] == rates[-1] == pytest.approx(0.1)
    # The warm-up wins where it is longer than the horizon.
    assert schedule.CosWithWarmup(warmup=10, t_max=5).lr(1.0, 7, 5) == pytest.approx(0.7)


def test_other_schedules():
    assert schedule.build(None).lr(0.3, 1, 10) == 0.3
    line = schedule.build({"type": "LinearWithWarmup", "warmup": 0, "t_max": 10, "alpha_f": 0.0})
    assert line.lr(1.0, 5, 10) == pytest.approx(0.5) and line.lr(1.0, 12, 10) == 0
    constant = schedule.build({"type": "ConstantWithWarmup", "warmup": 4})
    assert [constant.lr(1.0, s, 9) for s in (1, 4, 9)] == [0.25, 1.0, 1.0]


def test_schedule_configs():
    assert schedule.build({"warmup": 8, "warmup_steps": 3}).warmup == 3
    assert schedule.build({"warmup_fraction": 0.1}).warmup_steps(105) == 10
    for config in ({}, {"warmup": 1, "warmup_fraction": 0.1}):
        with pytest.raises(ValueError, match="Either 'warmup_fraction' or 'warmup'"):
            schedule.build(config)
    with pytest.raises(ValueError, match="did you mean 'CosWithWarmup'"):
        schedule.build({"type": "CosineWithWarmup", "warmup": 1})
    with pytest.raises(ValueError, match="did you mean 'alpha_f'"):
        schedule.build({"warmup": 1, "alpha": 1})


def test_groups_learn_where_all_else_has_rate_zero():
    groups = [{"params": ["head/*"], "opts": {"lr": 0.2}}]
    groups.append({"params": ["encoder/norm/*"], "opts": {"lr": 0.1}})
    frozen = opt.AdamWConfig(lr=0.0, weight_decay=0.5, group_overrides=groups)
    usual = opt.AdamWConfig(lr=0.4, weight_decay=0.5, group_overrides=groups)
    assert (frozen.peak, usual.peak, opt.AdamWConfig(lr=0.0).peak) == (0.2, 0.4, 0.0)
    params = tree(0)
    grads = jax.tree.map(jnp.ones_like, params)
    got, same = (
        opt.flatten(opt.update(grads, opt.init(params, config=c), params, c.peak / 2, c)[0])
        for c in (frozen, usual)
    )  # half-way through the schedule
    for path, value in opt.flatten(params).items():
        learns = path.startswith(("head/", "encoder/norm/"))
        np.testing.assert_allclose(got[path], same[path] if learns else value, rtol=1e-6)
        assert bool((got[path] != value).any()) == learns
    none = opt.AdamWConfig(lr=0.0, weight_decay=0.5)
    new, _, _ = opt.update(grads, opt.init(params, config=none), params, 0.0, none)
    np.testing.assert_array_equal(new["head"]["bias"], params["head"]["bias"])
