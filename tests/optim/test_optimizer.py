"""AdamW, clipping, EMA and schedules."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from olmoearth_jax.checkpoints import optimizer_state
from olmoearth_jax.config import OptimConfig, SchedulerConfig
from olmoearth_jax.train import optimizer as opt
from olmoearth_jax.train import targets
from olmoearth_jax.train.optimizer import learning_rate, warmup_steps


def tree(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "encoder": {
            "proj": {"kernel": jnp.asarray(rng.normal(size=(3, 2)), jnp.float32)},
            "norm": {"scale": jnp.asarray(rng.normal(size=4), jnp.float32)},
        },
        "head": {"bias": jnp.asarray(rng.normal(size=2), jnp.float32)},
    }


def flat(nested: Any) -> dict[str, Any]:
    return flatten_dict(nested, sep="/")


class Descent:
    """Parameters under AdamW, all of them trained unless `trained` says otherwise."""

    def __init__(self, settings: OptimConfig, params: Any, clip=None, trained: Any = None):
        flags = jax.tree.map(lambda _: True, params) if trained is None else trained
        self.transform = opt.adamw(settings, flags, clip)
        self.params, self.state = params, self.transform.init(params)
        self.update = jax.jit(self.transform.update)

    def __call__(self, grads: Any, rate: float) -> dict[str, Any]:
        updates, self.state = self.update(grads, self.state, self.params, rate=rate)
        self.params = optax.apply_updates(self.params, updates)
        return flat(self.params)

    @property
    def stored(self) -> Any:
        return optimizer_state.stored(self.state)


def in_float64(settings: OptimConfig, params: Any, gradients: Any, clip: float, rate: float):
    """What AdamW by its definition makes of parameters, on the host."""
    p = {k: np.asarray(x, np.float64) for k, x in flat(params).items()}
    m, v = ({k: np.zeros_like(x) for k, x in p.items()} for _ in range(2))
    b1, b2 = settings.betas
    for t, grads in enumerate(gradients, start=1 + settings.count_offset):
        g = {k: np.asarray(x, np.float64) for k, x in flat(grads).items()}
        norm = np.sqrt(sum((x**2).sum() for x in g.values()))
        for k in p:
            part = g[k] * min(1, clip / (norm + 1e-6))
            m[k] = b1 * m[k] + (1 - b1) * part
            v[k] = b2 * v[k] + (1 - b2) * part**2
            step = m[k] / (1 - b1**t) / (np.sqrt(v[k] / (1 - b2**t)) + settings.eps)
            p[k] = p[k] * (1 - rate * settings.weight_decay) - rate * step
    return p


@pytest.mark.parametrize("betas", [[0.9, 0.999], [0.9, 0.95], [0.0, 0.0]])
@pytest.mark.parametrize("offset", [0, 1])
def test_is_adamw_from_the_first_update_on(betas, offset):
    settings = OptimConfig(lr=0.01, weight_decay=0.1, betas=betas, count_offset=offset)
    zeros = jax.tree.map(jnp.zeros_like, tree(0))  # all that they hold afterwards is updates
    descent, gradients = Descent(settings, zeros, clip=1.0), []
    for seed in range(1, 21):
        gradients.append(tree(seed))
        found = descent(gradients[-1], 0.01)
        expected = in_float64(settings, zeros, gradients, 1.0, 0.01)
        for path, value in expected.items():
            np.testing.assert_allclose(found[path], value, rtol=2e-6, atol=1e-8)
    assert int(descent.stored["count"]) == 20 + offset


def test_untrained_parameters_stay_and_zero_gradients_decay():
    start = tree(0)
    flags = jax.tree.map(lambda _: True, start)
    flags["head"]["bias"] = False
    descent = Descent(OptimConfig(lr=0.1, weight_decay=0.5), start, 1.0, flags)
    assert set(flat(descent.stored["m"])) == {"encoder/proj/kernel", "encoder/norm/scale"}
    zeros = jax.tree.map(jnp.zeros_like, start)
    zeros["head"]["bias"] = jnp.full(2, jnp.nan)  # no part in anything
    shrink = 1.0
    for lr in (0.1, 0.05, 0.2):
        found = descent(zeros, lr)
        shrink *= 1 - lr * 0.5
    np.testing.assert_array_equal(found["head/bias"], start["head"]["bias"])
    kernel = start["encoder"]["proj"]["kernel"]
    np.testing.assert_allclose(found["encoder/proj/kernel"], kernel * shrink, rtol=1e-5)


@pytest.mark.parametrize(
    ("norm", "scale"), [(0.5, 1.0), (4.0, 1 / (4 + 1e-6)), (0.0, 1.0), (np.nan, np.nan)]
)
def test_clipping(norm, scale):
    clip = opt.clip_by_norm(1.0)
    grads = {"a": jnp.asarray([0.6, 0.0]) * norm, "b": {"c": jnp.asarray(0.8) * norm}}
    clipped, _ = clip.update(grads, clip.init(grads))
    for found, given in zip(jax.tree.leaves(clipped), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(found, given * scale, rtol=1e-6)


def test_count_offset_shrinks_the_first_update():
    moves = []
    for offset in (0, 1):
        settings = OptimConfig(lr=1.0, weight_decay=0, count_offset=offset)
        descent = Descent(settings, {"w": jnp.zeros(1)})
        moves.append(float(descent({"w": jnp.ones(1)}, 1.0)["w"][0]))
        assert int(descent.stored["count"]) == offset + 1
    assert moves[1] / moves[0] == pytest.approx(0.744, abs=1e-3)


def test_group_overrides():
    groups = [
        {"params": ["*.norm.*", "*/bias"], "opts": {"weight_decay": 0.0}},
        {"params": ["encoder/*"], "opts": {"lr": 0.05}},
    ]
    params = tree(0)
    zeros = jax.tree.map(jnp.zeros_like, params)
    new = Descent(OptimConfig(lr=0.1, weight_decay=0.5, group_overrides=groups), params)(zeros, 0.1)
    for path, rate in (("encoder/norm/scale", 0), ("head/bias", 0), ("encoder/proj/kernel", 0.05)):
        np.testing.assert_allclose(new[path], flat(params)[path] * (1 - rate * 0.5), rtol=1e-6)
    missing = OptimConfig(group_overrides=[{"params": ["*.nope"], "opts": {}}])
    with pytest.raises(ValueError, match=r"'\*.nope' matches no trained parameter"):
        Descent(missing, params)
    wrong = OptimConfig(group_overrides=[{"params": ["*"], "opts": {"weight_decai": 1}}])
    with pytest.raises(ValueError, match="did you mean 'weight_decay'"):
        opt.overrides(wrong)


@pytest.mark.parametrize("patterns", [[], ["*/bias"], ["encoder/*", "*"]])
def test_a_stored_state_has_one_form_whatever_the_groups(patterns):
    groups = [{"params": [p], "opts": {"betas": [0.8, 0.9]}} for p in patterns]
    descent = Descent(OptimConfig(group_overrides=groups), tree(0), 1.0)
    descent(tree(1), 0.1)
    stored = descent.stored
    assert list(stored) == ["count", "m", "v"] and int(stored["count"]) == 1
    for moment in "mv":
        assert jax.tree.structure(stored[moment]) == jax.tree.structure(tree(0))
    again = optimizer_state.from_stored(stored, descent.state)
    assert jax.tree.structure(again) == jax.tree.structure(descent.state)
    jax.tree.map(np.testing.assert_array_equal, again, descent.state)


def test_ema():
    assert targets.ema_decay_at(3, 10, (1.0, 1.0)) is None
    assert targets.ema_decay_at(5, 10, (0.9, 1.0)) == pytest.approx(0.95)
    target = {"patch": {"kernel": jnp.ones(2)}}
    online = {"patch": {"kernel": jnp.zeros(2)}, "blocks": {"w": jnp.ones(1)}}
    out = targets.ema_update(target, online, 0.75)
    np.testing.assert_allclose(out["patch"]["kernel"], 0.75)
    assert set(out) == {"patch"}
    with pytest.raises(ValueError, match="no online counterpart"):
        targets.ema_update({"x": jnp.ones(1)}, online, 0.5)


def test_cosine_shape():
    plan = SchedulerConfig(warmup=10, t_max=100)
    rates = [learning_rate(plan, 1.0, s, 1000) for s in range(1, 121)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == 1.0
    assert all(a >= b for a, b in itertools.pairwise(rates[9:]))
    assert rates[99] == rates[-1] == pytest.approx(0.1)
    # The warm-up wins where it is longer than the horizon.
    assert learning_rate(SchedulerConfig(warmup=10, t_max=5), 1.0, 7, 5) == pytest.approx(0.7)


def test_other_schedules():
    line = SchedulerConfig("LinearWithWarmup", warmup=0, t_max=10, alpha_f=0.0)
    assert learning_rate(line, 1.0, 5, 10) == pytest.approx(0.5)
    assert learning_rate(line, 1.0, 12, 10) == 0
    constant = SchedulerConfig("ConstantWithWarmup", warmup=4)
    assert [learning_rate(constant, 1.0, s, 9) for s in (1, 4, 9)] == [0.25, 1.0, 1.0]
    low = SchedulerConfig("ConstantWithWarmup", warmup=4, warmup_min_lr=0.2)
    assert learning_rate(low, 1.0, 1, 9) == pytest.approx(0.4)


def test_warmup_may_be_a_share_of_the_horizon():
    plan = SchedulerConfig(warmup=None, warmup_fraction=0.1)
    assert warmup_steps(plan, 105) == 10
    plan.t_max = 50
    assert warmup_steps(plan, 105) == 5


def test_groups_learn_where_all_else_has_rate_zero():
    groups = [{"params": ["head/*"], "opts": {"lr": 0.2}}]
    groups.append({"params": ["encoder/norm/*"], "opts": {"lr": 0.1}})
    frozen = OptimConfig(lr=0.0, weight_decay=0.5, group_overrides=groups)
    usual = OptimConfig(lr=0.4, weight_decay=0.5, group_overrides=groups)
    peaks = [opt.peak_rate(c) for c in (frozen, usual, OptimConfig(lr=0.0))]
    assert peaks == [0.2, 0.4, 0.0]
    params = tree(0)
    grads = jax.tree.map(jnp.ones_like, params)
    got, same = (
        Descent(c, params)(grads, opt.peak_rate(c) / 2) for c in (frozen, usual)
    )  # half-way through the schedule
    for path, value in flat(params).items():
        learns = path.startswith(("head/", "encoder/norm/"))
        np.testing.assert_allclose(got[path], same[path] if learns else value, rtol=1e-6)
        assert bool((got[path] != value).any()) == learns
    new = Descent(OptimConfig(lr=0.0, weight_decay=0.5), params)(grads, 0.0)
    np.testing.assert_array_equal(new["head/bias"], params["head"]["bias"])
