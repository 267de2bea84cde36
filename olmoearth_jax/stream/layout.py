"""Streams with more than visible and decoded tokens: registers, deep targets, pixel targets."""

from __future__ import annotations

import dataclasses

from olmoearth_jax.stream.spec import RowClass, Rung, StreamSpec, pack_coordinates

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
        others = self.rows - self.samples  # views beyond the first have no tokens there
        if not self.deep or not others:
            return rung
        rows, number = list(rung.rows), self.plan(TARGET)
        most = rung.rows[number][0].queries
        rows[number] = (RowClass(others, 8, 8), RowClass(self.samples, most, most))
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
