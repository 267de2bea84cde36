"""Structured masks: `space`, `time`, `space_time`, `random_space`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from olmoearth_jax import modalities
from olmoearth_jax.masking import blocks
from olmoearth_jax.masking.base import Counts, MaskContext, Strategy, TokenBounds, Tokens
from olmoearth_jax.masking.random_tokens import random_mask
from olmoearth_jax.masks import TARGET_ONLY

_MIN_TIMESTEPS = 3
"""Fewer complete timesteps than this and nothing is masked by time."""


def space_mask(missing: Tokens, e: float, d: float, ctx: MaskContext) -> Tokens:
    """One role per patch position and sample, shared by all spatial modalities."""
    spatial = [m for m in blocks.ordered(missing) if modalities.get(m).spatial]
    masks: Tokens = {}
    if spatial:
        grid = missing[spatial[0]].shape[1:3]
        for m in spatial:
            if missing[m].shape[1:3] != grid:
                raise ValueError(
                    f"masking by space needs one patch grid for all modalities, but {spatial[0]!r} "
                    f"has {grid} and {m!r} has {missing[m].shape[1:3]}"
                )
        n = grid[0] * grid[1]
        shared = blocks.shuffled(blocks.role_values(n, int(n * e), int(n * d)), ctx)
        shared = shared.reshape(-1, *grid, 1, 1)
        for m in spatial:
            masks[m] = np.broadcast_to(shared, missing[m].shape).copy()
    for m in blocks.ordered(missing):
        if m not in masks:
            masks[m] = blocks.random_tokens(m, missing[m].shape, e, d, ctx)
    return {m: blocks.with_missing(masks[m], missing[m]) for m in missing}


def _time_mask(missing: Tokens, e: float, d: float, ctx: MaskContext, steps: np.ndarray) -> Tokens:
    """One role per timestep of `steps` and sample, shared by all multitemporal modalities."""
    v = len(steps)
    n_encode = min(max(int(e * v), 1), v)
    n_decode = min(max(int(d * v), 1), v - n_encode)
    roles = blocks.shuffled(blocks.role_values(v, n_encode, n_decode), ctx)
    masks: Tokens = {}
    for m in blocks.ordered(missing):
        shape = missing[m].shape
        if modalities.get(m).multitemporal:
            by_time = np.full((shape[0], shape[-2]), TARGET_ONLY, np.int8)
            by_time[:, steps] = roles
            by_time = by_time.reshape(shape[0], *[1] * (len(shape) - 3), shape[-2], 1)
            masks[m] = np.broadcast_to(by_time, shape).copy()
        else:
            masks[m] = blocks.random_tokens(m, shape, e, d, ctx)
    return {m: blocks.with_missing(masks[m], missing[m]) for m in missing}


@dataclass(frozen=True)
class Space(Strategy):
    """Masks whole patch positions; non-spatial modalities are masked at random."""

    key: ClassVar[str] = "space"

    def __call__(self, missing: Tokens, ctx: MaskContext) -> Tokens:
        return space_mask(missing, self.encode_ratio, self.decode_ratio, ctx)

    def bounds(self, counts: Counts, timesteps: int | None = None) -> TokenBounds:
        return TokenBounds.of_shares(counts, self.encode_ratio, self.decode_ratio)


@dataclass(frozen=True)
class Time(Strategy):
    """Masks whole timesteps; without three complete ones everything is masked at random."""

    key: ClassVar[str] = "time"
    needs_whole_group: ClassVar[bool] = True

    def __call__(self, missing: Tokens, ctx: MaskContext) -> Tokens:
        self.check_group(ctx)
        steps = blocks.complete_timesteps(missing)
        if len(steps) < _MIN_TIMESTEPS:
            return random_mask(missing, self.encode_ratio, self.decode_ratio, ctx)
        return _time_mask(missing, self.encode_ratio, self.decode_ratio, ctx, steps)

    def bounds(self, counts: Counts, timesteps: int | None = None) -> TokenBounds:
        return TokenBounds.of_all(counts)


@dataclass(frozen=True)
class SpaceTime(Strategy):
    """`space` or `time` for the whole group, by a coin; `space` without three full timesteps."""

    key: ClassVar[str] = "space_time"
    needs_whole_group: ClassVar[bool] = True

    def __call__(self, missing: Tokens, ctx: MaskContext) -> Tokens:
        self.check_group(ctx)
        coin = ctx.group_rng.random() < 0.5
        steps = blocks.complete_timesteps(missing)
        if coin or len(steps) < _MIN_TIMESTEPS:
            return space_mask(missing, self.encode_ratio, self.decode_ratio, ctx)
        return _time_mask(missing, self.encode_ratio, self.decode_ratio, ctx, steps)

    def bounds(self, counts: Counts, timesteps: int | None = None) -> TokenBounds:
        return TokenBounds.of_all(counts)


@dataclass(frozen=True)
class RandomSpace(Strategy):
    """`space` or `random` for the whole group, by a coin."""

    key: ClassVar[str] = "random_space"

    def __call__(self, missing: Tokens, ctx: MaskContext) -> Tokens:
        chosen = space_mask if ctx.group_rng.random() < 0.5 else random_mask
        return chosen(missing, self.encode_ratio, self.decode_ratio, ctx)

    def bounds(self, counts: Counts, timesteps: int | None = None) -> TokenBounds:
        return TokenBounds.of_shares(counts, self.encode_ratio, self.decode_ratio)
