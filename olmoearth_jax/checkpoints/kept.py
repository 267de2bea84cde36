"""The checkpoints that are kept beside the newest one and those of every so many steps."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orbax.checkpoint.checkpoint_managers import PreservationPolicy

from olmoearth_jax.checkpoints.folders import complete_steps

_INTERVAL = ("config", "trainer", "callbacks", "checkpointer", "save_interval")


class Kept(PreservationPolicy):
    """Preserves the checkpoint of one step, which may change, and what was promised before.

    Attributes:
      step: the one; None preserves nothing.
      before: the one before it, which is preserved until that of `step` is there.
      earlier: steps that were kept for good while the run saved at another interval.
    """

    def __init__(self) -> None:
        self.step: int | None = None
        self.before: int | None = None
        self.earlier: frozenset[int] = frozenset()

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        del context
        there = any(found.step == self.step for found in checkpoints)
        kept = {self.step if there else self.before, *self.earlier}
        return [found.step in kept for found in checkpoints]


def promised(folder: Path) -> frozenset[int]:
    """Steps whose checkpoints are kept for good by the interval that they were saved with."""
    return frozenset(s for s in complete_steps(folder) if _is_due(s, folder / str(s)))


def _is_due(step: int, folder: Path) -> bool:
    # Not by Orbax, in whose readers processes wait for one another.
    try:
        value: Any = json.loads((folder / "meta" / "metadata").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    for name in _INTERVAL:
        value = value.get(name) if isinstance(value, Mapping) else None
    return type(value) is int and value > 0 and step % value == 0
