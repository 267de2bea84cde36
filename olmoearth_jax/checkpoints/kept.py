"""The checkpoint that is kept beside the newest one and those of every so many steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from orbax.checkpoint.checkpoint_managers import PreservationPolicy


class Kept(PreservationPolicy):
    """Preserves the checkpoint of one step, which may change; None preserves nothing."""

    def __init__(self) -> None:
        self.step: int | None = None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        del context
        return [found.step == self.step for found in checkpoints]
