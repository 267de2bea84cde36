"""Masking strategies: which tokens are encoded, decoded, targets only, or missing.

Pure NumPy, on the host, at token level (spec/train.md section 2).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from olmoearth_jax import registry
from olmoearth_jax.masking import (
    modality_choice,
    modality_cross,
    random_tokens,
    space_time,
    with_decode,
)
from olmoearth_jax.masking.base import (
    Counts,
    MaskContext,
    Strategy,
    TokenBounds,
    Tokens,
    checked_masks,
    missing_tokens,
)

_FAMILIES = (random_tokens, space_time, modality_cross, modality_choice, with_decode)
STRATEGIES: dict[str, type[Strategy]] = {
    item.key: item
    for family in _FAMILIES
    for item in vars(family).values()
    if isinstance(item, type) and issubclass(item, Strategy) and item.key
}
"""Strategy class of every registered key."""


def register(strategy: type[Strategy]) -> type[Strategy]:
    """Makes a strategy known to configs by its `key`; a decorator (docs/new_masking.md).

    Raises:
      ValueError: it has no key, or another class has it.
    """
    key = getattr(strategy, "key", "")
    if not key or not issubclass(strategy, Strategy):
        raise ValueError(f"{strategy.__name__} needs to be a Strategy with a `key` of its own")
    held = STRATEGIES.get(key)
    if held is not None and (held.__module__, held.__name__) != (
        strategy.__module__,
        strategy.__name__,
    ):
        raise ValueError(f"the masking strategy {key!r} is there already: {held.__name__}")
    STRATEGIES[key] = strategy
    return strategy


def build(config: Mapping[str, Any]) -> Strategy:
    """The strategy of a config {'type': key, **constructor arguments}; the config is not changed.

    Raises:
      ValueError: no or unknown type, unknown argument (the nearest one is named), bad value.
    """
    return registry.build(STRATEGIES, config, "masking strategy")


__all__ = [
    "STRATEGIES",
    "Counts",
    "MaskContext",
    "Strategy",
    "TokenBounds",
    "Tokens",
    "build",
    "checked_masks",
    "missing_tokens",
    "register",
]
