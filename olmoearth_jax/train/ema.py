"""Exponential moving average of the online encoder into the target (spec/train.md 5.3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import jax
from flax.traverse_util import flatten_dict, unflatten_dict


def ema_decay_at(step: int, max_steps: int, bounds: Sequence[float]) -> float | None:
    """Decay at the 1-based `step`, linear from start to end; None if both are exactly 1.

    None means no update and no metric. Online parameters at that point are those after
    step - 1 updates.
    """
    start, end = bounds
    if start == 1.0 and end == 1.0:
        return None
    return start + step * (end - start) / max_steps


def ema_update(target: Any, online: Any, decay: jax.Array | float) -> Any:
    """decay * target + (1 - decay) * online for each leaf of `target`, paired by path.

    Raises:
      ValueError: `online` lacks a leaf of `target`.
    """
    sources = cast(dict[tuple, Any], flatten_dict(online))
    out, leaves = {}, cast(dict[tuple, Any], flatten_dict(target))
    for path, leaf in leaves.items():
        if path not in sources:
            raise ValueError(f"target parameter {'/'.join(path)!r} has no online counterpart")
        out[path] = (decay * leaf + (1.0 - decay) * sources[path]).astype(leaf.dtype)
    return unflatten_dict(out)
