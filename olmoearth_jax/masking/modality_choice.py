"""Strategies that decode or hide whole modalities: `random_fixed_modality`, `selectable_*`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from olmoearth_jax.masking import blocks
from olmoearth_jax.masking.base import Counts, MaskContext, Strategy, TokenBounds, Tokens
from olmoearth_jax.masking.random_tokens import RandomRange, random_mask
from olmoearth_jax.masks import DECODE, MISSING_TOKEN
from olmoearth_jax.modalities import ModalityName


@dataclass(frozen=True)
class RandomFixedModality(Strategy):
    """`random`, with some modalities decoded in full.

    Of `randomize_missing_modalities`, those that lack nothing in a sample are hidden from it in
    a random number, all but one at most. (The reference looks for gaps in the whole batch, Q8.)
    """

    decoded_modalities: tuple[ModalityName, ...] = ()
    randomize_missing_modalities: tuple[ModalityName, ...] = ()
    key: ClassVar[str] = "random_fixed_modality"

    def __call__(self, missing: Tokens, ctx: MaskContext) -> Tokens:
        masks = random_mask(missing, self.encode_ratio, self.decode_ratio, ctx)
        for name in self.decoded_modalities:
            if name in masks:
                masks[name][~missing[name]] = DECODE
        for b, rng in enumerate(ctx.rngs if self.randomize_missing_modalities else ()):
            whole = [
                m
                for m in self.randomize_missing_modalities
                if m in missing and not missing[m][b].any()
            ]
            if len(whole) >= 2:
                hidden = blocks.uniform_int(rng, 0, len(whole) - 1)
                for i in rng.permutation(len(whole))[:hidden]:
                    masks[whole[i]][b] = MISSING_TOKEN
        return masks

    def bounds(self, counts: Counts, timesteps: int | None = None) -> TokenBounds:
        base = TokenBounds.of_shares(counts, self.encode_ratio, self.decode_ratio)
        decoded = [m for m in self.decoded_modalities if m in counts]
        encode = base.encode_by_modality | dict.fromkeys(decoded, 0)
        decode = base.decode | {m: math.prod(counts[m]) for m in decoded}
        return TokenBounds(sum(encode.values()), encode, decode)


def _overwrite(
    strategy: SelectableModality | SelectableRandomRangeModality,
    masks: Tokens,
    rows: slice,
    rng: np.random.Generator,
) -> None:
    """Decodes or hides a random number of modalities in these rows; missing stays missing."""
    decodable = strategy.decodable_modalities
    names = [m for m in (*decodable, *strategy.fully_mask_modalities) if m in masks]
    count = min(blocks.uniform_int(rng, 0, strategy.max_to_mask), len(names))
    for i in rng.permutation(len(names))[:count]:
        part = masks[names[i]][rows]
        role = DECODE if names[i] in decodable else MISSING_TOKEN
        part[part != MISSING_TOKEN] = role


def _check_count(most: int) -> None:
    if most < 0:
        raise ValueError(f"max_to_mask must not be negative, got {most}")


@dataclass(frozen=True)
class SelectableModality(Strategy):
    """`random`, then up to `max_to_mask` modalities of the whole group are decoded or hidden.

    Unlike in the reference, missing tokens stay missing (quirk Q9).
    """

    decodable_modalities: tuple[ModalityName, ...] = ()
    fully_mask_modalities: tuple[ModalityName, ...] = ()
    max_to_mask: int = 1
    key: ClassVar[str] = "selectable_modality"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_count(self.max_to_mask)

    def __call__(self, missing: Tokens, ctx: MaskContext) -> Tokens:
        masks = random_mask(missing, self.encode_ratio, self.decode_ratio, ctx)
        _overwrite(self, masks, slice(None), ctx.group_rng)
        return masks

    def bounds(self, counts: Counts, timesteps: int | None = None) -> TokenBounds:
        return TokenBounds.of_all(counts)


@dataclass(frozen=True)
class SelectableRandomRangeModality(RandomRange):
    """`random_range`, then up to `max_to_mask` modalities of each sample are decoded or hidden."""

    decodable_modalities: tuple[ModalityName, ...] = ()
    fully_mask_modalities: tuple[ModalityName, ...] = ()
    max_to_mask: int = 1
    key: ClassVar[str] = "selectable_random_range_modality"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_count(self.max_to_mask)

    def __call__(self, missing: Tokens, ctx: MaskContext) -> Tokens:
        masks = super().__call__(missing, ctx)
        for b, rng in enumerate(ctx.rngs):
            _overwrite(self, masks, slice(b, b + 1), rng)
        return masks

    def bounds(self, counts: Counts, timesteps: int | None = None) -> TokenBounds:
        return TokenBounds.of_all(counts)
