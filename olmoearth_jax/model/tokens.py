"""Tokens as the model core sees them: coordinates and a slot id, no grid (spec section 1)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from olmoearth_jax import modalities
from olmoearth_jax.modalities import Tokenization, closest

_DAYS_BEFORE_MONTH = np.array(
    [0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334], dtype=np.float32
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tokens:
    """Where each token of a [..., N] array comes from; every field has that shape.

    A slot of -1 marks a token without any encoding (registers, padding); its other fields must
    be 0, so that rotary encodings leave it unrotated.
    """

    slot: Any
    """int32 band-set slot id, an index into `SlotTable.slots`, or -1."""
    time: Any
    """int32 timestep index, 0 for tokens whose modality does not vary in time."""
    month: Any
    """int32 0..11 of that timestep."""
    row: Any
    """int32 row in the patch grid, 0 for non-spatial modalities."""
    col: Any
    """int32 column in the patch grid, 0 for non-spatial modalities."""
    gsd: Any
    """float32 patch side in units of 10 m: input_res * patch_size / 10."""
    days: Any
    """float32 days since 2000; static maps take timestep 0's, static scalars take 0."""

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.slot.shape)

    def map(self, fn) -> Tokens:
        """Applies `fn` to every field, for example a gather or a reshape."""
        return jax.tree.map(fn, self)

    @staticmethod
    def blank(shape: tuple[int, ...]) -> Tokens:
        """NumPy tokens without encodings or position (slot -1, the rest 0)."""
        ints = np.zeros(shape, np.int32)
        floats = np.zeros(shape, np.float32)
        return Tokens(ints - 1, ints, ints, ints, ints, floats, floats)


@dataclasses.dataclass(frozen=True)
class Slot:
    """One band set of one modality: one token per patch and timestep."""

    modality: str
    band_set: int
    """Its number among the modality's band sets."""
    channels: tuple[int, ...]
    """Channel indices."""
    patch_side: int
    """Pixels per side of an embedded patch; 1 where the modality has no pixel grid."""

    @property
    def width(self) -> int:
        """Numbers of one embedded patch."""
        return self.patch_side * self.patch_side * len(self.channels)


@dataclasses.dataclass(frozen=True)
class SlotTable:
    """All band sets a model supports, numbered in sample order; hashable."""

    names: tuple[str, ...]
    """Supported modalities in sample order."""
    tokenization: Tokenization = Tokenization()
    """Which bands make one token."""
    base_patch_size: int = 8
    """P, the side in base pixels of an embedded patch."""

    @classmethod
    def build(
        cls, names: Iterable[str], tokenization: Tokenization, base_patch_size: int = 8
    ) -> SlotTable:
        """Table of `names` (any order, upper case accepted)."""
        resolved = modalities.resolve(list(names))
        return cls(modalities.in_sample_order(resolved), tokenization, base_patch_size)

    @functools.cached_property
    def slots(self) -> tuple[Slot, ...]:
        return tuple(
            Slot(name, i, channels, self._patch_side(name))
            for name in self.names
            for i, channels in enumerate(self.tokenization.band_sets(name))
        )

    def _patch_side(self, name: str) -> int:
        modality = modalities.get(name)
        return self.base_patch_size * modality.image_factor if modality.spatial else 1

    def __len__(self) -> int:
        return len(self.slots)

    @functools.cached_property
    def _ranges(self) -> dict[str, range]:
        out, start = {}, 0
        for name in self.names:
            stop = start + self.tokenization.num_band_sets(name)
            out[name], start = range(start, stop), stop
        return out

    def of(self, modality: str) -> range:
        """Slot ids of a modality.

        Raises:
          ValueError: the model does not support it.
        """
        if modality not in self._ranges:
            raise ValueError(
                f"modality {modality!r} is not supported by this model; "
                f"{closest(modality, self.names)}"
            )
        return self._ranges[modality]

    def numbers(self, slots: Iterable[Slot]) -> list[int]:
        """The numbers that slots of another table have in this one.

        Raises:
          ValueError: this table cuts a modality into other band sets.
        """
        out = []
        for slot in slots:
            own = self.of(slot.modality)
            number = own[slot.band_set] if slot.band_set < len(own) else None
            if number is None or self.slots[number].channels != slot.channels:
                raise ValueError(f"model and stream use different band sets for {slot.modality!r}")
            out.append(number)
        return out

    def _per_slot(self, values, dtype) -> np.ndarray:
        return np.array([values(modalities.get(s.modality)) for s in self.slots], dtype)

    @functools.cached_property
    def multitemporal(self) -> np.ndarray:
        """bool [slots]: the modality varies in time."""
        return self._per_slot(lambda m: m.multitemporal, bool)

    @functools.cached_property
    def spatial(self) -> np.ndarray:
        """bool [slots]: the modality has a pixel grid."""
        return self._per_slot(lambda m: m.spatial, bool)


def days_since_2000(timestamps: Any) -> Any:
    """float32 days since 2000-01-01 of (day 1..31, month 0..11, year), shape [..., 3] -> [...].

    Years count 365.25 days and leap days are ignored, as the published weights expect
    (spec section 5). Works on NumPy and on traced arrays.
    """
    day, month, year = (timestamps[..., i] for i in range(3))
    before = _DAYS_BEFORE_MONTH
    if isinstance(timestamps, jax.Array):
        before = jax.numpy.asarray(before)
    years = (year - 2000).astype(np.float32) * np.float32(365.25)
    return years + before[month] + (day - 1).astype(np.float32)
