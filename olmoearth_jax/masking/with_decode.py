"""Strategies that split band sets into encoded and decoded ones per sample.

`random_with_decode` and `random_time_with_decode` (the masking of v1.1 and v1.2). Maps listed in
`only_decode_modalities` are decoded in full.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from olmoearth_jax import modalities
from olmoearth_jax.masking import blocks
from olmoearth_jax.masking.base import Counts, MaskContext, Strategy, TokenBounds, Tokens
from olmoearth_jax.masks import DECODE, MISSING_TOKEN, TARGET_ONLY, VISIBLE
from olmoearth_jax.modalities import ModalityName

BandSet = tuple[str, int]


@dataclass(frozen=True)
class RandomWithDecode(Strategy):
    """ceil(n * encode_ratio) of a sample's n band sets are encoded, the others decoded.

    An encoded band set has a share `encode_ratio` of encoder tokens and no decoder token, a
    decoded one a share `decode_ratio` of decoder tokens and no encoder token. A single band set
    gets both, and a band set with a single token always encodes it (quirk Q3).
    """

    only_decode_modalities: tuple[ModalityName, ...] = ()
    key: ClassVar[str] = "random_with_decode"

    def __call__(self, missing: Tokens, ctx: MaskContext) -> Tokens:
        masks = {
            m: np.where(flags, MISSING_TOKEN, DECODE).astype(np.int8)
            for m, flags in missing.items()
        }
        order = [
            m for m in modalities.in_sample_order(missing) if m not in self.only_decode_modalities
        ]
        present = {m: blocks.any_token(~missing[m]) for m in order}
        for b, rng in enumerate(ctx.rngs):
            listed = [(m, int(k)) for m in order for k in np.flatnonzero(present[m][b])]
            self._mask_sample(masks, missing, b, listed, rng)
        return masks

    def _mask_sample(
        self,
        masks: Tokens,
        missing: Tokens,
        b: int,
        listed: list[BandSet],
        rng: np.random.Generator,
    ) -> None:
        steps = self._timesteps(missing, b, listed, rng)
        e, d = self.encode_ratio, self.decode_ratio
        if len(listed) == 1:
            name, k = listed[0]
            masks[name][b, ..., k] = blocks.refill(missing[name][b, ..., k], e, d, rng)
            return
        shuffled = [listed[i] for i in rng.permutation(len(listed))]
        n_encoded = math.ceil(len(listed) * e)
        for i, (name, k) in enumerate(shuffled):
            role = VISIBLE if i < n_encoded else DECODE
            absent = missing[name][b, ..., k]
            mask = None
            if steps is not None and modalities.get(name).kind == "space_time":
                mask = _by_time(absent, steps[role], role)
            if mask is None:
                shares = (e, 0.0) if role == VISIBLE else (0.0, d)
                mask = blocks.refill(absent, *shares, rng)
            masks[name][b, ..., k] = mask

    def _timesteps(
        self, missing: Tokens, b: int, listed: list[BandSet], rng: np.random.Generator
    ) -> dict[int, np.ndarray] | None:
        """Encoded and decoded timesteps of a sample masked by time; None: masked at random."""
        return None

    def bounds(self, counts: Counts, timesteps: int | None = None) -> TokenBounds:
        encode, decode, best = {}, {}, []
        only_decode = self.only_decode_modalities
        band_sets = sum(s for m, (_, s) in counts.items() if m not in only_decode)
        chosen = math.ceil(band_sets * self.encode_ratio)
        for m, (t, s) in counts.items():
            if m in only_decode:
                encode[m], decode[m] = 0, t * s
                continue
            share_e, share_d = self._most_of_band_set(m, t, timesteps)
            best += [share_e] * s
            # The band sets not chosen for encoding may hold a single token, which is encoded.
            encode[m] = share_e * min(s, max(chosen, 1)) + max(s - max(chosen, 1), 0)
            decode[m] = share_d * min(s, max(band_sets - chosen, 1))
        best.sort(reverse=True)
        total = sum(best[: max(chosen, 1)]) + max(band_sets - max(chosen, 1), 0)
        return TokenBounds(min(total, sum(encode.values())), encode, decode)

    def _most_of_band_set(self, name: str, tokens: int, timesteps: int | None) -> tuple[int, int]:
        """Most encoder and decoder tokens of one band set of that many tokens."""
        return max(int(tokens * self.encode_ratio), min(tokens, 1)), int(tokens * self.decode_ratio)


def _by_time(absent: np.ndarray, steps: np.ndarray, role: int) -> np.ndarray | None:
    """Mask [h, w, T] of one band set whose role is taken at `steps`, or None if none is there."""
    mask = np.where(absent, MISSING_TOKEN, TARGET_ONLY).astype(np.int8)
    chosen = np.zeros(absent.shape, bool)
    chosen[..., steps] = True
    chosen &= ~absent
    if not chosen.any():
        return None
    mask[chosen] = role
    return mask


@dataclass(frozen=True)
class RandomTimeWithDecode(RandomWithDecode):
    """`random_with_decode` for a share `random_ratio` of samples, the others masked by time.

    Masked by time, all encoded band sets share the encoded timesteps, ceil(e * n) of the n that
    hold anything, and all decoded band sets the remaining ones; other tokens are targets only.
    """

    random_ratio: float = 0.5
    key: ClassVar[str] = "random_time_with_decode"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.random_ratio <= 1.0:
            raise ValueError(f"random_ratio must lie in 0..1, got {self.random_ratio}")

    def _timesteps(
        self, missing: Tokens, b: int, listed: list[BandSet], rng: np.random.Generator
    ) -> dict[int, np.ndarray] | None:
        found: np.ndarray | None = None
        for name, k in listed:
            if modalities.get(name).kind == "space_time":
                there = np.asarray((~missing[name][b, ..., k]).any(axis=(0, 1)))
                found = there if found is None else found | there
        available = np.flatnonzero(found) if found is not None else np.zeros(0, int)
        if len(available) <= 1 or rng.random() < self.random_ratio:
            return None
        mixed = rng.permutation(available)
        n_encoded = math.ceil(len(mixed) * self.encode_ratio)
        return {VISIBLE: mixed[:n_encoded], DECODE: mixed[n_encoded:]}

    def _most_of_band_set(self, name: str, tokens: int, timesteps: int | None) -> tuple[int, int]:
        share_e, share_d = super()._most_of_band_set(name, tokens, timesteps)
        if self.random_ratio >= 1.0 or modalities.get(name).kind != "space_time":
            return share_e, share_d
        # Without knowing the time axis, all tokens could be at the chosen timesteps.
        steps = timesteps or 1
        chosen = math.ceil(steps * self.encode_ratio)
        share_e = max(share_e, tokens // steps * chosen)
        by_time = tokens // steps * (steps - chosen) if timesteps else tokens
        return share_e, max(share_d, by_time)
