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
    "missing_tokens",
]
