"""Cross-modality masks: some band sets are encoded, some decoded, per sample.

A base mask (random or by patch position) is thinned so that encoder tokens remain only in a
random set E of band sets, and decoder tokens leave those band sets of E that aren't in a second
random set X. Band sets outside E keep all their decoder tokens, whatever X is (quirk Q7).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from olmoearth_jax import modalities
from olmoearth_jax.masking import blocks
from olmoearth_jax.masking.base import Counts, MaskContext, Strategy, TokenBounds, Tokens
from olmoearth_jax.masking.random_tokens import random_mask
from olmoearth_jax.masking.space_time import space_mask
from olmoearth_jax.masks import DECODE, MISSING_TOKEN, TARGET_ONLY, VISIBLE
from olmoearth_jax.modalities import ModalityName

BandSet = tuple[str, int]
BandSets = set[BandSet]


@dataclass(frozen=True)
class ModalityCross(Strategy):
    """Common part of the cross strategies (spec/train.md section 2.2)."""

    allow_encoding_decoding_same_bandset: bool = False
    """Whether a band set may be both encoded and decoded."""
    min_encoded_bandsets: int | None = 2
    """Size range of E; None means all candidates."""
    max_encoded_bandsets: int | None = None
    """Likewise."""
    min_decoded_bandsets: int | None = None
    """Size range of X (only if band sets may be both)."""
    max_decoded_bandsets: int | None = None
    """Likewise."""
    only_decode_modalities: tuple[ModalityName, ...] = ()
    """Never encoded, unless just two band sets are present (quirk Q6)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_encoded_bandsets is not None and self.min_encoded_bandsets <= 1:
            raise ValueError("min_encoded_bandsets must be greater than 1, or None for all")
        for role in ("encoded", "decoded"):
            for name in (f"min_{role}_bandsets", f"max_{role}_bandsets"):
                value = getattr(self, name)
                if value is not None and (type(value) is not int or value < 1):
                    raise ValueError(
                        f"{name} must be a whole number of at least 1, or None, got {value!r}"
                    )
            low = getattr(self, f"min_{role}_bandsets")
            if getattr(self, f"max_{role}_bandsets") is not None and low is None:
                raise ValueError(f"max_{role}_bandsets needs min_{role}_bandsets as well")

    def base_mask(self, missing: Tokens, ctx: MaskContext) -> Tokens:
        """The mask that is thinned: by patch position, or at random in the subclass for that."""
        return space_mask(missing, self.encode_ratio, self.decode_ratio, ctx)

    def overrides(self, name: str) -> bool:
        """Whether all present tokens of a chosen band set of this modality get its role."""
        return not modalities.get(name).spatial

    def _present(self, masks: Tokens) -> list[list[BandSet]]:
        """Per sample the listed band sets, in masked-sample order."""
        size = len(next(iter(masks.values())))
        lists: list[list[BandSet]] = [[] for _ in range(size)]
        for name in blocks.ordered(masks):
            mask = masks[name]
            if name in self.only_decode_modalities:
                there = (mask.reshape(size, -1) != MISSING_TOKEN).any(axis=1)
                listed = np.repeat(there[:, None], mask.shape[-1], axis=1)
            else:
                listed = blocks.any_token(mask == VISIBLE)
            for b, k in zip(*np.nonzero(listed), strict=True):
                lists[b].append((name, int(k)))
        return lists

    def _choose(
        self, present: list[BandSet], rng: np.random.Generator
    ) -> tuple[BandSets, BandSets]:
        """(E, X) of one sample from its present list."""
        n = len(present)
        if n <= 1:
            return set(present), set()
        if n == 2:
            return {present[0]}, {present[1]}
        candidates = [p for p in present if p[0] not in self.only_decode_modalities]
        c = len(candidates)
        both = self.allow_encoding_decoding_same_bandset
        upper = max(c if both else c - 1, 0)
        high = min(self.max_encoded_bandsets or upper, upper)
        low = c if self.min_encoded_bandsets is None else min(self.min_encoded_bandsets, c)
        size = blocks.uniform_int(rng, min(low, high), high)
        encoded = blocks.uniform_subset(candidates, size, rng)
        if not both:
            return encoded, set(present) - encoded
        low = min(self.min_decoded_bandsets or 1, n)
        high = min(self.max_decoded_bandsets or n, n)
        size = blocks.uniform_int(rng, low, high)
        return encoded, blocks.uniform_subset(present, size, rng)

    def _apply(self, masks: Tokens, chosen: list[tuple[BandSets, BandSets]]) -> None:
        """Thins the masks in place."""
        for name, mask in masks.items():
            shape = (len(mask), *[1] * (mask.ndim - 2), mask.shape[-1])
            sets = [(name, k) for k in range(mask.shape[-1])]
            e = np.array([[s in enc for s in sets] for enc, _ in chosen]).reshape(shape)
            x = np.array([[s in dec for s in sets] for _, dec in chosen]).reshape(shape)
            if self.overrides(name):
                present = mask != MISSING_TOKEN
                mask[present & x] = DECODE
                mask[present & e] = VISIBLE
            else:
                drop = ((mask == VISIBLE) & ~e) | ((mask == DECODE) & (e & ~x))
                mask[drop] = TARGET_ONLY

    def _refill_empty(self, masks: Tokens, missing: Tokens, ctx: MaskContext) -> None:
        """New random roles for samples left without an encoder or without a decoder token."""
        size = len(ctx.rngs)
        roles = [
            sum((m.reshape(size, -1) == role).sum(axis=1) for m in masks.values())
            for role in (VISIBLE, DECODE)
        ]
        for b in map(int, np.flatnonzero((roles[0] == 0) | (roles[1] == 0))):
            for name in blocks.ordered(masks):
                if name not in self.only_decode_modalities:
                    masks[name][b] = blocks.refill(
                        missing[name][b], self.encode_ratio, self.decode_ratio, ctx.rngs[b]
                    )

    def __call__(self, missing: Tokens, ctx: MaskContext) -> Tokens:
        masks = self.base_mask(missing, ctx)
        present = self._present(masks)
        chosen = [self._choose(p, rng) for p, rng in zip(present, ctx.rngs, strict=True)]
        self._apply(masks, chosen)
        self._refill_empty(masks, missing, ctx)
        return masks

    def bounds(self, counts: Counts, timesteps: int | None = None) -> TokenBounds:
        base = TokenBounds.of_shares(counts, self.encode_ratio, self.decode_ratio)
        only_decode = [m for m in counts if m in self.only_decode_modalities]
        encode, decode = dict(base.encode_by_modality), dict(base.decode)
        for m, (t, s) in counts.items():
            if self.overrides(m):
                encode[m] = decode[m] = t * s
            elif m not in only_decode:
                # A refilled single token is always an encoder token.
                encode[m] = max(encode[m], min(t * s, 1))
        encodable = {m: n for m, n in encode.items() if m not in only_decode}
        # An only-decode band set is encoded only in samples that list hardly anything else. Then
        # it is the only one, beside modalities that were refilled because none of their tokens
        # had been encoded (or none decoded), which leaves at most the others.
        lone = max((encode[m] for m in only_decode), default=0)
        if lone:
            lone += self._refilled(counts, encodable, base)
        return TokenBounds(max(sum(encodable.values()), lone), encode, decode)

    def _refilled(self, counts: Counts, encodable: dict[str, int], base: TokenBounds) -> int:
        """Most encoder tokens that a refill gives beside a lone only-decode band set."""
        return sum(encodable.values())


@dataclass(frozen=True)
class ModalityCrossRandom(ModalityCross):
    """Over a random base mask; the masking of the v1 models."""

    key: ClassVar[str] = "modality_cross_random"

    def base_mask(self, missing: Tokens, ctx: MaskContext) -> Tokens:
        return random_mask(missing, self.encode_ratio, self.decode_ratio, ctx)

    def overrides(self, name: str) -> bool:
        return False

    def _refilled(self, counts: Counts, encodable: dict[str, int], base: TokenBounds) -> int:
        out = 0
        for m in encodable:
            n = math.prod(counts[m])
            left = n - min(base.encode_by_modality[m], base.decode[m])
            out += max(int(left * self.encode_ratio), min(n, 1))
        return out


@dataclass(frozen=True)
class ModalityCrossSpace(ModalityCross):
    """Over a mask by patch position; non-spatial band sets are encoded or decoded as a whole."""

    key: ClassVar[str] = "modality_cross_space"


@dataclass(frozen=True)
class ModalityCrossTime(ModalityCrossSpace):
    """The same as `modality_cross_space`: despite its name it masks by position (quirk Q5)."""

    key: ClassVar[str] = "modality_cross_time"


@dataclass(frozen=True)
class ModalityCrossSpaceTime(ModalityCrossSpace):
    """A coin toss between cross-time and cross-space, which are the same thing (quirk Q5)."""

    key: ClassVar[str] = "modality_cross_space_time"
