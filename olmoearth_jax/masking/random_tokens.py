"""Random roles for tokens: `random`, `random_increasing`, `random_range`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from olmoearth_jax import modalities
from olmoearth_jax.masking import blocks
from olmoearth_jax.masking.base import (
    Counts,
    MaskContext,
    Strategy,
    TokenBounds,
    Tokens,
    check_ratios,
)
from olmoearth_jax.masks import DECODE, TARGET_ONLY, VISIBLE


def random_mask(missing: Tokens, e: float, d: float, ctx: MaskContext) -> Tokens:
    """Block (b) for every modality, then the missing flags."""
    order = blocks.ordered(missing)
    masks = {m: blocks.random_tokens(m, missing[m].shape, e, d, ctx) for m in order}
    return {m: blocks.with_missing(masks[m], missing[m]) for m in missing}


@dataclass(frozen=True)
class Random(Strategy):
    """Exact shares of each modality's tokens; missing tokens use up their part of the shares."""

    key: ClassVar[str] = "random"

    def __call__(self, missing: Tokens, ctx: MaskContext) -> Tokens:
        return random_mask(missing, self.encode_ratio, self.decode_ratio, ctx)

    def bounds(self, counts: Counts, timesteps: int | None = None) -> TokenBounds:
        return TokenBounds.of_shares(counts, self.encode_ratio, self.decode_ratio)


@dataclass(frozen=True)
class RandomIncreasing(Strategy):
    """`random` with ratios that move linearly from initial to final over `steps` groups."""

    encode_ratio: float = field(init=False, default=0.5)
    decode_ratio: float = field(init=False, default=0.5)
    initial_encode_ratio: float = 0.5
    final_encode_ratio: float = 0.1
    initial_decode_ratio: float = 0.5
    final_decode_ratio: float = 0.9
    steps: int = 1000
    key: ClassVar[str] = "random_increasing"

    def __post_init__(self) -> None:
        check_ratios(self.final_encode_ratio, self.final_decode_ratio)
        object.__setattr__(self, "encode_ratio", self.initial_encode_ratio)
        object.__setattr__(self, "decode_ratio", self.initial_decode_ratio)
        super().__post_init__()
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")

    def ratios_at(self, step: int) -> tuple[float, float]:
        """(encode, decode) after `step` groups were masked before this one."""
        t = min((step + 1) / self.steps, 1.0)
        first = (self.initial_encode_ratio, self.initial_decode_ratio)
        last = (self.final_encode_ratio, self.final_decode_ratio)
        e, d = (a + (b - a) * t if t < 1.0 else b for a, b in zip(first, last, strict=True))
        return e, d

    def __call__(self, missing: Tokens, ctx: MaskContext) -> Tokens:
        return random_mask(missing, *self.ratios_at(ctx.step or 0), ctx)

    def bounds(self, counts: Counts, timesteps: int | None = None) -> TokenBounds:
        e = max(self.initial_encode_ratio, self.final_encode_ratio)
        d = max(self.initial_decode_ratio, self.final_decode_ratio)
        return TokenBounds.of_shares(counts, e, d)


@dataclass(frozen=True)
class RandomRange(Strategy):
    """Ratios drawn per modality and sample; without decode bounds all the rest is decoded.

    Static modalities take the midpoint ratios, over the group.
    """

    encode_ratio: float = field(init=False, default=0.3)
    decode_ratio: float = field(init=False, default=0.7)
    min_encode_ratio: float = 0.1
    max_encode_ratio: float = 0.5
    min_decode_ratio: float | None = None
    max_decode_ratio: float | None = None
    key: ClassVar[str] = "random_range"

    def __post_init__(self) -> None:
        if (self.min_decode_ratio is None) != (self.max_decode_ratio is None):
            raise ValueError("give both min_decode_ratio and max_decode_ratio, or neither")
        bounds = [("encode", self.min_encode_ratio, self.max_encode_ratio)]
        if self.min_decode_ratio is not None and self.max_decode_ratio is not None:
            bounds.append(("decode", self.min_decode_ratio, self.max_decode_ratio))
            decode = (self.min_decode_ratio + self.max_decode_ratio) / 2
            check_ratios(self.max_encode_ratio, self.max_decode_ratio)
        for label, low, high in bounds:
            if not 0.0 <= low <= high <= 1.0:
                raise ValueError(f"the {label} ratios must be 0 <= min <= max <= 1")
        encode = (self.min_encode_ratio + self.max_encode_ratio) / 2
        object.__setattr__(self, "encode_ratio", encode)
        object.__setattr__(self, "decode_ratio", decode if len(bounds) > 1 else 1.0 - encode)
        super().__post_init__()

    def _draw_ratios(self, ctx: MaskContext) -> tuple[np.ndarray, np.ndarray]:
        """float64 [B] encode and decode ratios of one modality."""
        e = np.array([r.uniform(self.min_encode_ratio, self.max_encode_ratio) for r in ctx.rngs])
        if self.min_decode_ratio is None or self.max_decode_ratio is None:
            return e, 1.0 - e
        low, high = self.min_decode_ratio, self.max_decode_ratio
        return e, np.array([r.uniform(low, high) for r in ctx.rngs])

    def _one(self, name: str, missing: np.ndarray, ctx: MaskContext) -> np.ndarray:
        if modalities.get(name).kind == "static":
            return blocks.random_tokens(
                name, missing.shape, self.encode_ratio, self.decode_ratio, ctx
            )
        n = math.prod(missing.shape[1:])
        e, d = self._draw_ratios(ctx)
        n_encode = (n * e).astype(int)[:, None]
        n_used = n_encode + (n * d).astype(int)[:, None]
        place = np.arange(n)
        values = np.where(
            place < n_encode, VISIBLE, np.where(place < n_used, DECODE, TARGET_ONLY)
        ).astype(np.int8)
        return blocks.shuffled(values, ctx).reshape(missing.shape)

    def __call__(self, missing: Tokens, ctx: MaskContext) -> Tokens:
        masks = {m: self._one(m, missing[m], ctx) for m in blocks.ordered(missing)}
        return {m: blocks.with_missing(masks[m], missing[m]) for m in missing}

    def bounds(self, counts: Counts, timesteps: int | None = None) -> TokenBounds:
        most = self.max_decode_ratio
        most = 1.0 - self.min_encode_ratio if most is None else most
        return TokenBounds.of_shares(counts, self.max_encode_ratio, most)
