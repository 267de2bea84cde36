"""Static description of a stream: slots, row classes, per-device sizes, and the rungs."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from olmoearth_jax import modalities
from olmoearth_jax.modalities import MAX_TIMESTEPS, Tokenization


@dataclasses.dataclass(frozen=True)
class Slot:
    """One band set of one modality: one token per patch and timestep.

    Attributes:
      modality: modality name.
      channels: channel indices of the band set.
      patch_side: pixels per side of a base patch (1 for non-spatial modalities).
      max_tokens: most tokens of this slot in one sample, over all grids.
      encodable: whether the masking encodes it as a rule (if not, its rare visible tokens go
        through a small gather instead of projecting every patch online).
    """

    modality: str
    channels: tuple[int, ...]
    patch_side: int
    max_tokens: int
    encodable: bool

    @property
    def width(self) -> int:
        """Floats of one base patch."""
        return self.patch_side * self.patch_side * len(self.channels)


@dataclasses.dataclass(frozen=True)
class RowPlan:
    """Rows of one purpose: an attention or a loss sorts the rows by its own lengths.

    Attributes:
      name: SELF, CROSS, SAMPLE or a modality (the rows of its loss).
      queries, keys: the most of a row, whatever is drawn.
    """

    name: str
    queries: int
    keys: int


class RowClass(NamedTuple):
    """Rows of one length: how many, and the most queries and keys of each."""

    rows: int
    queries: int
    keys: int


SELF, CROSS, SAMPLE = "self", "cross", "sample"
"""Plans of the encoder's attention, the decoder's attention, and losses over whole samples."""


@dataclasses.dataclass(frozen=True)
class Rung:
    """Capacities of one compiled micro-step, per device.

    Attributes:
      patches: patches per slot.
      sparse: patches per slot that are projected online through a gather (non-encodable slots).
      enc, dec: encoder and decoder stream lengths.
      rows: per plan its classes, shortest first; their rows sum to those of a device.
    """

    patches: tuple[int, ...]
    sparse: tuple[int, ...]
    enc: int
    dec: int
    rows: tuple[tuple[RowClass, ...], ...]

    @functools.cached_property
    def totals(self) -> np.ndarray:
        """int64 [2 slots + 2]: patches, sparse patches, enc, dec."""
        return np.array([*self.patches, *self.sparse, self.enc, self.dec], np.int64)

    def pairs(self, plan: int) -> int:
        """Query-key pairs that one layer computes on the padded rows of a plan."""
        return sum(c.rows * c.queries * c.keys for c in self.rows[plan])


@dataclasses.dataclass(frozen=True)
class StreamSpec:
    """Everything static about a stream but its rungs.

    Attributes:
      slots: band sets in `modalities.in_sample_order` of the modalities.
      modalities: modality names in that order.
      plans: row classes per purpose.
      enc_bound, dec_bound: most visible and decoded tokens of a row.
      samples: samples per device and micro-step.
      devices: devices sharing a micro-step (all hosts).
      views: masked views per sample, 1 or 2.
      groups: groups per micro-step.
      max_patch_size: base patch size P.
      chunk: samples per call of a resize program.
    """

    slots: tuple[Slot, ...]
    modalities: tuple[str, ...]
    plans: tuple[RowPlan, ...]
    enc_bound: int
    dec_bound: int
    samples: int
    devices: int
    views: int
    groups: int
    max_patch_size: int
    chunk: int = 4

    @property
    def rows(self) -> int:
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
        return Rung(
            patches=tuple(s.max_tokens * self.samples for s in self.slots),
            sparse=tuple(0 if s.encodable else s.max_tokens * self.samples for s in self.slots),
            enc=round_up(self.enc_bound * self.rows, 8),
            dec=round_up(self.dec_bound * self.rows, 8),
            rows=tuple((RowClass(self.rows, p.queries, p.keys),) for p in self.plans),
        )


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def token_shape(name: str, grid: int, timesteps: int) -> tuple[int, ...]:
    """Token axes of a modality without band sets: (h, w, T), (h, w, 1), (T,) or ()."""
    kind = modalities.get(name).kind
    if kind == "space_time":
        return (grid, grid, timesteps)
    if kind == "space_only":
        return (grid, grid, 1)
    return (timesteps,) if kind == "time_only" else ()


@dataclasses.dataclass(frozen=True)
class GridTable:
    """Coordinates of all tokens of one sample of a given grid, slot-major.

    Attributes:
      coord: uint32 [N], packed by `pack_coordinates`.
      slot: int16 [N].
      starts: int [slots + 1], first token of each slot.
    """

    coord: np.ndarray
    slot: np.ndarray
    starts: np.ndarray


def pack_coordinates(slot, time, row, col) -> np.ndarray:
    """uint32 with eight bits each of slot, time, row and column (host side of `unpack`)."""
    parts = (np.asarray(x).astype(np.uint32) for x in (slot, time, row, col))
    s, t, r, c = parts
    return (s << np.uint32(24)) | (t << np.uint32(16)) | (r << np.uint32(8)) | c


@functools.lru_cache(maxsize=256)
def grid_table(slots: tuple[Slot, ...], grid: int, timesteps: int) -> GridTable:
    """Token coordinates of a (grid, timesteps) sample; the order is (slot, row, col, time)."""
    coords, numbers, starts = [], [], [0]
    for i, slot in enumerate(slots):
        shape = token_shape(slot.modality, grid, timesteps)
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
    names: Sequence[str],
    tokenization: Tokenization,
    max_patch_size: int,
    grid_timesteps: Mapping[int, int],
    encodable: Mapping[str, bool],
) -> tuple[Slot, ...]:
    """Slots of the trained modalities, in sample order.

    Args:
      names: trained modalities.
      tokenization: band sets of the model.
      max_patch_size: base patch size P.
      grid_timesteps: grid side -> timesteps the token budget allows.
      encodable: modality -> whether the masking encodes it as a rule.
    """
    out = []
    for name in modalities.in_sample_order(names):
        m = modalities.get(name)
        side = max_patch_size * m.image_factor if m.spatial else 1
        most = max(
            math.prod(token_shape(name, g, min(t, MAX_TIMESTEPS)))
            for g, t in grid_timesteps.items()
        )
        for channels in tokenization.band_sets(name):
            out.append(Slot(name, channels, side, most, encodable[name]))
    return tuple(out)
