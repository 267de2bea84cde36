"""The static shape of a stream: its slots, its rows, its sizes per device, and what a rung is.

A *rung* is a set of capacities that one compiled program has room for. The rungs of a run form a
*ladder*, cheapest first, whose top holds whatever the masking can produce; each micro-step runs on
the cheapest rung that holds it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from olmoearth_jax import modalities
from olmoearth_jax.modalities import MAX_TIMESTEPS
from olmoearth_jax.model.tokens import Slot, SlotTable


@dataclasses.dataclass(frozen=True)
class StreamSlot(Slot):
    """A slot of the model and what a stream must know about it."""

    max_tokens: int
    """Most tokens of this slot in one sample, over all grids."""
    encodable: bool
    """Whether the masking encodes it as a rule (if not, its rare visible tokens go through a small
    gather instead of projecting every patch online)."""


@dataclasses.dataclass(frozen=True)
class RowPlan:
    """Rows of one purpose: an attention or a loss sorts the rows by its own lengths."""

    name: str
    """SELF, CROSS, READ, GRID, SAMPLE, TARGET or a modality (the rows of its loss)."""
    queries: int
    """The most of a row, whatever is drawn."""
    keys: int
    """Likewise."""

    @property
    def is_attention(self) -> bool:
        """Whether these are the rows of an attention rather than of a loss."""
        return self.name in (SELF, CROSS, READ, GRID, TARGET)


class RowClass(NamedTuple):
    """Rows of one length: how many, and the most queries and keys of each."""

    rows: int
    queries: int
    keys: int


SELF, CROSS, SAMPLE, TARGET = "self", "cross", "sample", "target"
"""Plans of the encoder's attention, the decoder's attention, losses over whole samples, and the
target encoder's attention (over all tokens of a sample that aren't missing)."""

READ, GRID = "read", "grid"
"""Plans of the pooler's attentions: its locations read visible tokens, and one another."""


@dataclasses.dataclass(frozen=True)
class Rung:
    """Capacities of one compiled micro-step, per device."""

    patches: tuple[int, ...]
    """Patches per slot."""
    sparse: tuple[int, ...]
    """Patches per slot that are projected online through a gather (non-encodable slots)."""
    enc: int
    """Length of the encoder's stream."""
    dec: int
    """Length of the decoder's stream."""
    rows: tuple[tuple[RowClass, ...], ...]
    """Per plan its classes, shortest first; their rows sum to those of a device."""
    loc: int = 0
    """Length of the stream of locations, 0 without a pooler."""

    @functools.cached_property
    def totals(self) -> np.ndarray:
        """int64 [2 slots + 3]: patches, sparse patches, enc, dec, loc."""
        return np.array([*self.patches, *self.sparse, self.enc, self.dec, self.loc], np.int64)

    def pairs(self, plan: int) -> int:
        """Query-key pairs that one layer computes on the padded rows of a plan."""
        return sum(c.rows * c.queries * c.keys for c in self.rows[plan])


@dataclasses.dataclass(frozen=True)
class StreamSpec:
    """Everything static about a stream but its rungs.

    With a plan named TARGET, or with `all_pixels`, every token that isn't missing has a patch.
    The target encoder runs on all of them: one row per sample, in the place of its row of the first
    view.
    """

    slots: tuple[StreamSlot, ...]
    """In the model's order."""
    modalities: tuple[str, ...]
    """In sample order."""
    plans: tuple[RowPlan, ...]
    enc_bound: int
    """Most visible tokens of a row, registers included."""
    dec_bound: int
    """Most decoded tokens of a row."""
    samples: int
    """Samples per device and micro-step."""
    devices: int
    """Devices sharing a micro-step (all hosts)."""
    views: int
    """Masked views per sample, 1 or 2."""
    groups: int
    """Groups per micro-step."""
    max_patch_size: int
    """Base patch size P."""
    chunk: int = 4
    """Samples per call of a resize program."""
    registers: int = 0
    """Register tokens at the front of an encoder row."""
    pixels: bool = False
    """Whether tokens are compared with their pixels."""
    all_pixels: bool = False
    """Whether that holds for all tokens that aren't missing rather than for decoded ones."""
    loc_bound: int = 0
    """Most locations of a row, where the encoder has an attention pooler; else 0."""
    maps: tuple[str, ...] = ()
    """Modalities that are drawn from the locations of the first view."""

    @property
    def deep(self) -> bool:
        """Whether the target encoder runs on a stream of its own."""
        return any(p.name == TARGET for p in self.plans)

    @property
    def group_size(self) -> int:
        """Samples of a group, over all hosts."""
        return self.samples * self.devices // self.groups

    @property
    def rows(self) -> int:
        """Rows of a device: its samples in every view."""
        return self.samples * self.views

    @functools.cached_property
    def slot_modality(self) -> np.ndarray:
        """int [slots]: modality number of each slot."""
        return np.array([self.modalities.index(s.modality) for s in self.slots])

    def plan(self, name: str) -> int:
        """Number of the plan of that name."""
        return [p.name for p in self.plans].index(name)

    def top_rung(self) -> Rung:
        """The hard bound: holds whatever the masking can produce on one device."""
        rows: list[tuple[RowClass, ...]] = [
            (RowClass(self.rows, p.queries, p.keys),) for p in self.plans
        ]
        others = self.rows - self.samples
        if self.deep and others:  # views beyond the first have no tokens of the target
            number = self.plan(TARGET)
            most = self.plans[number].queries
            rows[number] = (RowClass(others, 8, 8), RowClass(self.samples, most, most))
        return Rung(
            patches=tuple(s.max_tokens * self.samples for s in self.slots),
            sparse=tuple(0 if s.encodable else s.max_tokens * self.samples for s in self.slots),
            enc=round_up(self.enc_bound * self.rows, 8),
            dec=round_up(self.dec_bound * self.rows, 8),
            rows=tuple(rows),
            loc=round_up(self.loc_bound * self.rows, 8),
        )


@dataclasses.dataclass(frozen=True)
class MicroStepSize:
    """How many samples a micro-step has."""

    samples: int
    """Per device."""
    devices: int = 1
    groups: int = 1
    """Groups that the samples of all devices belong to."""


def round_up(n: int, multiple: int) -> int:
    """The smallest multiple that is at least n."""
    return -(-n // multiple) * multiple


@dataclasses.dataclass(frozen=True)
class GridTable:
    """Coordinates of all tokens of one sample of a given grid, slot-major."""

    coord: np.ndarray
    """uint32 [N], packed by `pack_coordinates`"""
    slot: np.ndarray
    """int16 [N]"""
    starts: np.ndarray
    """int [slots + 1], first token of each slot"""


def pack_coordinates(slot, time, row, col) -> np.ndarray:
    """uint32 with eight bits each of slot, time, row and column (`stream_tokens` reads it)."""
    parts = (np.asarray(x).astype(np.uint32) for x in (slot, time, row, col))
    s, t, r, c = parts
    return (s << np.uint32(24)) | (t << np.uint32(16)) | (r << np.uint32(8)) | c


REGISTER_SLOT = 255
"""Slot byte of packed coordinates that marks a register token."""

REGISTER = pack_coordinates(REGISTER_SLOT, 0, 0, 0)


@functools.lru_cache(maxsize=256)
def grid_table(slots: tuple[StreamSlot, ...], grid: int, timesteps: int) -> GridTable:
    """Token coordinates of a (grid, timesteps) sample; the order is (slot, row, col, time)."""
    coords, numbers, starts = [], [], [0]
    for i, slot in enumerate(slots):
        shape = modalities.get(slot.modality).axes(grid, timesteps)
        axes = np.indices(shape).reshape(len(shape), -1) if shape else np.zeros((0, 1), int)
        zero = np.zeros(axes.shape[1], int)
        if len(shape) == 3:
            row, col, time = axes
        else:
            row, col, time = zero, zero, (axes[0] if shape else zero)
        coords.append(pack_coordinates(np.full_like(zero, i), time, row, col))
        numbers.append(np.full(zero.size, i, np.int16))
        starts.append(starts[-1] + zero.size)
    return GridTable(np.concatenate(coords), np.concatenate(numbers), np.array(starts))


def make_slots(
    table: SlotTable, grid_timesteps: Mapping[int, int], encodable: Mapping[str, bool]
) -> tuple[StreamSlot, ...]:
    """The slots of a stream.

    Args:
      table: the encoder's slots.
      grid_timesteps: grid side -> timesteps the token budget allows.
      encodable: modality -> whether the masking encodes it as a rule.
    """
    out = []
    for slot in table.slots:
        m = modalities.get(slot.modality)
        shapes = (m.axes(g, min(t, MAX_TIMESTEPS)) for g, t in grid_timesteps.items())
        most = max(math.prod(shape) for shape in shapes)
        own = (slot.modality, slot.band_set, slot.channels, slot.patch_side)
        out.append(StreamSlot(*own, most, encodable[slot.modality]))
    return tuple(out)
