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
from olmoearth_jax.masking.base import Strategy
from olmoearth_jax.masking.bounds import TokenBounds, max_tokens
from olmoearth_jax.masking.context import (
    MaskContext,
)
from olmoearth_jax.masking.tokens import missing_tokens
from olmoearth_jax.masks import DECODE, MISSING_TOKEN, TARGET_ONLY, VISIBLE

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
    "DECODE",
    "VISIBLE",
    "MISSING_TOKEN",
    "STRATEGIES",
    "TARGET_ONLY",
    "MaskContext",
    "Strategy",
    "TokenBounds",
    "build",
    "max_tokens",
    "missing_tokens",
]
