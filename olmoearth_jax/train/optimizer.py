"""AdamW as pure functions on plain nested dicts (spec/train.md sections 5.1-5.2).

Decay applies to every trained parameter. A parameter off the loss path is marked untrained once,
by its path, and then has no state, no decay and no part in the gradient norm.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from olmoearth_jax.modalities import closest

Tree = dict[str, Any]
"""A nested dict of arrays."""

OPTIONS = ("lr", "weight_decay", "betas", "eps")


@dataclasses.dataclass(frozen=True)
class GroupOverride:
    """Other settings for the parameters whose path matches one of some patterns.

    Attributes:
      params: globs over paths such as 'encoder/blocks/*/attn/*' ('.' may stand for '/').
      opts: pairs (option, value); options 'lr', 'weight_decay', 'betas', 'eps'.
    """

    params: tuple[str, ...]
    opts: tuple[tuple[str, Any], ...]

    @classmethod
    def from_config(cls, value: GroupOverride | Mapping[str, Any]) -> GroupOverride:
        """Builds from {'params': [...], 'opts': {...}}; unknown options name the nearest."""
        if isinstance(value, GroupOverride):
            return value
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
        return cls(tuple(patterns), tuple((k, _option(k, v)) for k, v in opts.items()))


_GROUP = "{params: ['encoder/*'], opts: {lr: 0.0001}}"


def _option(name: str, value: Any) -> Any:
    """The value of an option of a group. Raises ValueError for an unknown or impossible one."""
    if name not in OPTIONS:
        raise ValueError(f"unknown optimiser option {name!r}; {closest(str(name), OPTIONS)}")
    if name == "betas":
        pair = isinstance(value, list | tuple) and len(value) == 2
        if not pair or not all(_is_number(b) and 0 <= b < 1 for b in value):
            raise ValueError(f"opts.betas must be two numbers in [0, 1), got {value!r}")
        return tuple(value)
    if not _is_number(value) or not 0 <= value <= 1e6:
        raise ValueError(f"opts.{name} must be a number from 0 to 1e6, got {value!r}")
    return float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclasses.dataclass(frozen=True)
class AdamWConfig:
    """Settings of AdamW and of gradient clipping.

    Attributes:
      lr: peak learning rate; the schedule scales it, and `update` is given the result.
      max_grad_norm: clip the joint gradient to this norm; None: no clipping.
      count_offset: count the state starts with. 1 gives the reference's fresh runs, whose bias
        correction runs one update ahead (quirk Q12); 0 is standard.
      group_overrides: `GroupOverride`s (or dicts of that form); the first match counts.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    max_grad_norm: float | None = 1.0
    count_offset: int = 0
    group_overrides: Sequence[GroupOverride | Mapping[str, Any]] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        overrides = tuple(GroupOverride.from_config(g) for g in self.group_overrides or ())
        object.__setattr__(self, "group_overrides", overrides)
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {self.betas}")
        if self.lr < 0 or self.weight_decay < 0 or self.eps < 0:
            raise ValueError("lr, weight_decay and eps must not be negative")

    @property
    def peak(self) -> float:
        """Peak of the rate that updates are given: `lr`, or the groups' highest where that is 0."""
        rates = [g.opts for g in self.group_overrides if isinstance(g, GroupOverride)]
        return self.lr or max((dict(opts).get("lr", 0.0) for opts in rates), default=0.0)

    def settings(self, path: str) -> dict[str, Any]:
        """Options that hold for the parameter at `path`."""
        out = {name: getattr(self, name) for name in OPTIONS}
        for group in self.group_overrides:
            assert isinstance(group, GroupOverride)
            if any(_matches(pattern, path) for pattern in group.params):
                return out | dict(group.opts)
        return out


def _matches(pattern: str, path: str) -> bool:
    return fnmatch.fnmatchcase(path.replace(".", "/"), pattern.replace(".", "/"))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'a/b': leaf} of a nested dict."""
    return dict(_walk(tree, prefix))


def _walk(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _walk(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def unflatten(leaves: Mapping[str, Any]) -> Tree:
    """The nested dict of {'a/b': leaf}."""
    tree: Tree = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        node = tree
        for p in parents:
            node = node.setdefault(p, {})
        node[last] = leaf
    return tree


def init(
    params: Tree,
    trainable: Callable[[str], bool] | Mapping[str, Any] | None = None,
    config: AdamWConfig | None = None,
) -> Tree:
    """Fresh optimiser state {'count': int32, 'm': nested, 'v': nested}, float32 moments.

    Args:
      params: nested dict of parameters.
      trainable: a predicate of the path 'a/b/c', or a nested dict of bools of the same form;
        None: everything is trained. `m` and `v` hold the trained leaves only.
      config: its count offset is used, and its overrides are checked.

    Raises:
      ValueError: an override pattern matches no trained parameter.
    """
    config = config or AdamWConfig()
    leaves = flatten(params)
    if isinstance(trainable, Mapping):
        flags = flatten(trainable)
        leaves = {p: x for p, x in leaves.items() if flags[p]}
    elif trainable is not None:
        leaves = {p: x for p, x in leaves.items() if trainable(p)}
    for group in config.group_overrides:
        assert isinstance(group, GroupOverride)
        for pattern in group.params:
            if not any(_matches(pattern, p) for p in leaves):
                raise ValueError(
                    f"group override pattern {pattern!r} matches no trained parameter; "
                    f"paths look like {next(iter(leaves), 'none')!r}"
                )
    m, v = (unflatten({p: jnp.zeros(x.shape, jnp.float32) for p, x in leaves.items()})
            for _ in range(2))  # fmt: skip
    return {"count": jnp.asarray(config.count_offset, jnp.int32), "m": m, "v": v}


def global_norm(grads: Mapping[str, Any]) -> jax.Array:
    """2-norm over all leaves of a nested dict, float32."""
    squares = [jnp.sum(jnp.square(g.astype(jnp.float32))) for g in flatten(grads).values()]
    return jnp.sqrt(sum(squares, start=jnp.zeros((), jnp.float32)))


def clip_scale(norm: jax.Array, max_norm: float | None) -> jax.Array:
    """Factor that clips gradients of that norm: min(1, max_norm / (norm + 1e-6))."""
    if max_norm is None:
        return jnp.ones((), jnp.float32)
    return jnp.minimum(1.0, max_norm / (norm + 1e-6))


def apply(
    grads: Tree,
    state: Tree,
    params: Tree,
    lr: jax.Array | float,
    config: AdamWConfig,
    scale: jax.Array | float = 1.0,
) -> tuple[Tree, Tree]:
    """One AdamW update with gradients times `scale`; untrained leaves are returned as they are.

    Args:
      grads: nested dict; leaves of untrained parameters are ignored and may be absent.
      state: from `init`.
      params: nested dict.
      lr: learning rate of this update, for a parameter whose peak is `config.peak`.
      config: settings.

    Returns:
      (new params, new state).
    """
    gradients, leaves = flatten(grads), flatten(params)
    old_m, old_v = flatten(state["m"]), flatten(state["v"])
    count = state["count"] + 1
    t = count.astype(jnp.float32)
    new_m, new_v, new = {}, {}, dict(leaves)
    for path in old_m:
        if path not in gradients:
            raise ValueError(f"trained parameter {path!r} has no gradient")
        options = config.settings(path)
        b1, b2 = options["betas"]
        rate = jnp.asarray(lr, jnp.float32)
        if options["lr"] != config.peak:
            rate = rate * (options["lr"] / config.peak)
        g = gradients[path].astype(jnp.float32) * scale
        m = b1 * old_m[path] + (1.0 - b1) * g
        v = b2 * old_v[path] + (1.0 - b2) * jnp.square(g)
        denominator = jnp.sqrt(v) / jnp.sqrt(_bias(b2, t)) + options["eps"]
        p = leaves[path].astype(jnp.float32) * (1.0 - rate * options["weight_decay"])
        p = p - (rate / _bias(b1, t)) * (m / denominator)
        new[path], new_m[path], new_v[path] = p.astype(leaves[path].dtype), m, v
    return unflatten(new), {"count": count, "m": unflatten(new_m), "v": unflatten(new_v)}


def _bias(beta: float, t: jax.Array) -> jax.Array:
    """1 - beta**t without cancellation."""
    return -jnp.expm1(t * math.log(beta)) if beta > 0 else jnp.ones_like(t)


def update(
    grads: Tree, state: Tree, params: Tree, lr: jax.Array | float, config: AdamWConfig
) -> tuple[Tree, Tree, jax.Array]:
    """Clips by the global norm, then updates.

    Non-finite gradients spread; the caller decides whether to take such a step.

    Returns:
      (new params, new state, float32 gradient norm before clipping).
    """
    gradients = flatten(grads)
    norm = global_norm({p: gradients[p] for p in flatten(state["m"]) if p in gradients})
    scale = clip_scale(norm, config.max_grad_norm)
    new_params, new_state = apply(grads, state, params, lr, config, scale)
    return new_params, new_state, norm
