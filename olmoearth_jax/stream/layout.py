"""Streams with more than visible and decoded tokens: registers, deep targets, pixel targets."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from olmoearth_jax.stream.spec import RowPlan, Rung, StreamSpec, pack_coordinates, round_up

TARGET = "target"
"""Plan of the target encoder's attention: all tokens of a sample that aren't missing."""

REGISTER_SLOT = 255
"""Slot byte of packed coordinates that marks a register token."""

REGISTER = pack_coordinates(REGISTER_SLOT, 0, 0, 0)


@dataclasses.dataclass(frozen=True)
class Layout(StreamSpec):
    """A stream whose encoder rows begin with register tokens.

    With a plan named TARGET, every token that isn't missing has a patch, and the target encoder
    runs on all of them: one row per sample, in the place of its row of the first view.

    Attributes:
      registers: register tokens of an encoder row; `enc_bound` and the plan of the encoder's
        attention include them.
      pixels: whether decoded tokens are compared with their pixels.
    """

    registers: int = 0
    pixels: bool = False

    @property
    def deep(self) -> bool:
        """Whether the target encoder runs on a stream of its own."""
        return any(p.name == TARGET for p in self.plans)

    def top_rung(self) -> Rung:
        rung = super().top_rung()
        if not self.deep:
            return rung
        rows = list(rung.rows)
        number = self.plan(TARGET)
        classes = len(self.plans[number].bounds)
        counts = [0] * classes
        counts[-1] = self.samples
        counts[0] += self.rows - self.samples  # views beyond the first have no tokens there
        rows[number] = tuple(counts)
        return dataclasses.replace(rung, rows=tuple(rows))


def registers_of(spec: StreamSpec) -> int:
    """Register tokens of an encoder row."""
    return spec.registers if isinstance(spec, Layout) else 0


def is_deep(spec: StreamSpec) -> bool:
    """Whether the target encoder runs on a stream of its own."""
    return isinstance(spec, Layout) and spec.deep


def wants_pixels(spec: StreamSpec) -> bool:
    """Whether decoded tokens are compared with their pixels."""
    return isinstance(spec, Layout) and spec.pixels


def lengthen(plan: RowPlan, by: int) -> RowPlan:
    """The plan with every row `by` tokens longer."""
    return RowPlan(plan.name, tuple((q + by, k + by) for q, k in plan.bounds))


def target_plan(longest: int, fractions: Sequence[float]) -> RowPlan:
    """Row classes of the target encoder's attention."""
    sizes = [min(round_up(int(np.ceil(longest * f)), 4), longest) for f in fractions]
    return RowPlan(TARGET, tuple(dict.fromkeys((n, n) for n in sizes)))
