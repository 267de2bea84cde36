"""AdamW by optax and its learning rate (spec/train.md sections 5.1-5.2): groups, clipping.

Decay applies to every trained parameter. A parameter off the loss path is marked untrained once,
by its path, and then has no state, no decay and no part in the gradient norm. The learning rate
is an argument of the update (`rate`), since the host computes it in float64: the schedules of
optax compute in float32, which is not what the reference logs and applies.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from olmoearth_jax.config import OptimConfig, SchedulerConfig
from olmoearth_jax.configlib import limits
from olmoearth_jax.mesh import path_text
from olmoearth_jax.modalities import closest

_OPTIONS = ("lr", "weight_decay", "betas", "eps")
_UNTRAINED = "untrained"


@dataclasses.dataclass(frozen=True)
class GroupOverride:
    """Other settings for the parameters whose path matches one of some patterns.

    Attributes:
      params: globs over paths such as 'encoder/blocks/*/attn/*' ('.' may stand for '/').
      opts: option -> value; options 'lr', 'weight_decay', 'betas', 'eps'.
    """

    params: tuple[str, ...]
    opts: Mapping[str, Any]

    @classmethod
    def from_config(cls, value: Any) -> GroupOverride:
        """Builds from {'params': [...], 'opts': {...}}; unknown options name the nearest."""
        if not isinstance(value, Mapping):
            raise ValueError(f"must be a list of {_GROUP}, got {value!r}")
        for name in set(value) - {"params", "opts"}:
            raise ValueError(f"has no member {name!r}; a group is {_GROUP}")
        patterns, opts = value.get("params"), value.get("opts", {})
        if not isinstance(patterns, list | tuple) or not patterns:
            raise ValueError(f"params must be a list of patterns, as in {_GROUP}, got {patterns!r}")
        for pattern in patterns:
            if not isinstance(pattern, str):
                raise ValueError(f"params must hold patterns in text, got {pattern!r}")
        if not isinstance(opts, Mapping):
            raise ValueError(f"opts must be a mapping, as in {_GROUP}, got {opts!r}")
        return cls(tuple(patterns), {k: _option(k, v) for k, v in opts.items()})


_GROUP = "{params: ['encoder/*'], opts: {lr: 0.0001}}"


def _option(name: str, value: Any) -> Any:
    """The value of an option of a group. Raises ValueError for an unknown or impossible one."""
    if name not in _OPTIONS:
        raise ValueError(f"unknown optimiser option {name!r}; {closest(str(name), _OPTIONS)}")
    if name == "betas":
        pair = isinstance(value, list | tuple) and len(value) == 2
        if not pair or not all(_is_number(b) and 0 <= b < 1 for b in value):
            raise ValueError(f"opts.betas must be two numbers in [0, 1), got {value!r}")
        return tuple(value)
    if not _is_number(value) or not value >= 0:
        raise ValueError(f"opts.{name} must be a number of at least 0, got {value!r}")
    if told := limits.judge({name: value}, "opts"):
        raise ValueError(told[f"opts.{name}"])
    return float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def overrides(settings: OptimConfig) -> list[GroupOverride]:
    """The groups of a config; of several that match a parameter, the first counts.

    Raises:
      ValueError: a group is malformed.
    """
    return [GroupOverride.from_config(group) for group in settings.group_overrides or ()]


def peak_rate(settings: OptimConfig) -> float:
    """Peak of the rate that updates are given: `lr`, or the groups' highest where that is 0."""
    return settings.lr or max((g.opts.get("lr", 0.0) for g in overrides(settings)), default=0.0)


def adamw(
    settings: OptimConfig, trained: Any, max_grad_norm: float | None = None
) -> optax.GradientTransformationExtraArgs:
    """The transformation of gradients; its update takes the learning rate as `rate`.

    Non-finite gradients spread; the caller decides whether to take such a step.

    Args:
      settings: rates, decay, betas and groups. `rate` is that of a parameter whose peak is
        `peak_rate(settings)`; others get their share of it.
      trained: tree of bools like the parameters. The others get no update and have no state.
      max_grad_norm: clip the joint gradient of what is trained to this norm; None: don't.

    Raises:
      ValueError: the pattern of a group matches no trained parameter.
    """
    groups, peak = overrides(settings), peak_rate(settings)
    _check_patterns(groups, trained)
    usual = {name: getattr(settings, name) for name in _OPTIONS}

    def one(opts: Mapping[str, Any]) -> optax.GradientTransformation:
        chosen = usual | dict(opts)
        return optax.chain(
            _adam(chosen["betas"], chosen["eps"], settings.count_offset),
            optax.add_decayed_weights(chosen["weight_decay"]),
            _scale_by_rate(chosen["lr"] / peak if peak else 0.0),
        )

    def label(path: tuple, keep: Any) -> str:
        if not keep:
            return _UNTRAINED
        matching = (i for i, g in enumerate(groups) if _matches(g, path_text(path)))
        return next((f"group_{i}" for i in matching), "usual")

    rules: dict[Hashable, Any] = {_UNTRAINED: optax.set_to_zero(), "usual": one({})}
    rules |= {f"group_{i}": one(group.opts) for i, group in enumerate(groups)}
    parts = optax.partition(rules, jax.tree_util.tree_map_with_path(label, trained))
    if max_grad_norm is None:
        return optax.chain(optax.identity(), parts)
    return optax.chain(optax.masked(clip_by_norm(max_grad_norm), trained), parts)


def _check_patterns(groups: Iterable[GroupOverride], trained: Any) -> None:
    leaves = jax.tree_util.tree_leaves_with_path(trained)
    paths = [path_text(path) for path, keep in leaves if keep]
    for pattern in (p for group in groups for p in group.params):
        if not any(_matches_one(pattern, path) for path in paths):
            raise ValueError(
                f"group override pattern {pattern!r} matches no trained parameter; "
                f"paths look like {next(iter(paths), 'none')!r}"
            )


def _matches(group: GroupOverride, path: str) -> bool:
    return any(_matches_one(pattern, path) for pattern in group.params)


def _matches_one(pattern: str, path: str) -> bool:
    return fnmatch.fnmatchcase(path.replace(".", "/"), pattern.replace(".", "/"))


def clip_by_norm(max_norm: float) -> optax.GradientTransformation:
    """Gradients times min(1, max_norm / (norm + 1e-6)), as the reference clips."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        scale = jnp.minimum(1.0, max_norm / (optax.tree.norm(updates) + 1e-6))
        return jax.tree.map(lambda g: g * scale, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _scale_by_rate(share: float) -> optax.GradientTransformationExtraArgs:
    """Updates times -rate * share, where `rate` is an argument of the update."""

    def update(updates: Any, state: Any, params: Any = None, **arguments: Any) -> tuple[Any, Any]:
        del params
        step = jnp.asarray(arguments["rate"], jnp.float32)
        step = step if share == 1.0 else step * share
        return jax.tree.map(lambda u: -step * u, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def _adam(betas: Sequence[float], eps: float, count: int) -> optax.GradientTransformation:
    """`optax.scale_by_adam` from an initial count, with bias corrections that do not cancel.

    In float32, its 1 - 0.999 ** 1 is off by 1.3e-5. So is every early update, unless it is
    corrected by how far that is from 1 - beta**t.
    """

    b1, b2 = betas

    def init(params: Any) -> optax.ScaleByAdamState:
        state: Any = optax.scale_by_adam(b1, b2, eps).init(params)
        return state._replace(count=jnp.asarray(count, jnp.int32))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        off1, off2 = (_off(b, state.count + 1) for b in (b1, b2))
        root = jnp.sqrt(off2)
        updates, state = optax.scale_by_adam(b1, b2, eps / root).update(updates, state, params)
        return jax.tree.map(lambda u: u * (off1 / root), updates), state

    return optax.GradientTransformation(init, update)


def _off(beta: float, t: jax.Array) -> jax.Array:
    """What optax takes for 1 - beta**t, over what it is."""
    if beta == 0:
        return jnp.ones((), jnp.float32)
    return (1 - jnp.float32(beta) ** t) / -jnp.expm1(t * math.log(beta))


def warmup_steps(plan: SchedulerConfig, max_steps: int) -> int:
    """Steps of warm-up for a run of `max_steps`."""
    if plan.warmup is not None:
        return plan.warmup
    return round((plan.t_max or max_steps) * (plan.warmup_fraction or 0.0))


def learning_rate(plan: SchedulerConfig, peak: float, step: int, max_steps: int) -> float:
    """Rate of the update at `step` (the first one is 1), in float64, for a peak rate `peak`.

    Linear from `warmup_min_lr` at step 0 (which is never run) to the peak; then half a cosine, a
    straight line, or none, down to `alpha_f` times the peak at the horizon; constant afterwards.
    """
    warmup, horizon = warmup_steps(plan, max_steps), plan.t_max or max_steps
    if step < warmup:
        low = min(plan.warmup_min_lr, peak)
        return low + (peak - low) * step / warmup
    progress = 1.0 if step >= horizon else (step - warmup) / (horizon - warmup)
    if plan.name == "CosWithWarmup":
        return peak * (plan.alpha_f + (1 - plan.alpha_f) * (1 + math.cos(math.pi * progress)) / 2)
    return peak * (1 - (1 - plan.alpha_f) * progress if plan.name == "LinearWithWarmup" else 1.0)
