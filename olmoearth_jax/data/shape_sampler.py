"""Patch size, grid and timesteps drawn together within a token budget (spec/train_v1_3.md 5).

v1.3 draws the number of timesteps; the recipes before it take as many as fit (`budget`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np

from olmoearth_jax import modalities as registry
from olmoearth_jax.data.budget import usable_grids
from olmoearth_jax.modalities import MAX_TIMESTEPS, Tokenization

Shape = tuple[int, int, int]
"""(patch size, grid side, timesteps)."""


class TokenRates(NamedTuple):
    """Tokens of a sample: per cell and timestep, per cell, per sample, and per timestep."""

    space_time: int = 0
    space: int = 0
    static: int = 0
    time: int = 0


def token_rates(
    names: Sequence[str],
    tokenization: Tokenization | None = None,
    excluded: Collection[str] = (),
) -> TokenRates:
    """What the modalities `names` cost, less the `excluded` ones; latlon is free.

    `tokenization` None counts by the registry's band sets.
    """
    tokenization = tokenization or Tokenization()
    kinds = {"space_time": 0, "space_only": 0, "static": 0, "time_only": 0}
    for name in names:
        if name != "latlon" and name not in excluded:
            kinds[registry.get(name).kind] += tokenization.num_band_sets(name)
    return TokenRates(*kinds.values())


@dataclasses.dataclass(frozen=True)
class ShapeSampler:
    """The rule by which shapes are drawn.

    Attributes:
      patch_sizes: patch sizes to draw from (10 m pixels).
      grids: grid sides to draw from (patches).
      rates: what a sample costs.
      tile_px: side of the tiles; a crop may not be larger.
      token_budget: most tokens of a sample; None for no limit.
      min_tokens: fewest tokens of a sample.
      temporal_bias: timesteps are drawn with weight T ** bias.
      time_priority: probability that the timesteps are drawn before the grid.
      patch_size_probs: probability of each patch size; None for equal ones.
      max_timesteps: most timesteps.

    Raises:
      ValueError: a value out of range, or a patch size for which no shape is left.
    """

    patch_sizes: tuple[int, ...]
    grids: tuple[int, ...]
    rates: TokenRates
    tile_px: int = 128
    token_budget: int | None = None
    min_tokens: int = 0
    temporal_bias: float = 0.0
    time_priority: float = 0.0
    patch_size_probs: tuple[float, ...] | None = None
    max_timesteps: int = MAX_TIMESTEPS

    def __post_init__(self) -> None:
        for what, values in (("patch sizes", self.patch_sizes), ("grid sizes", self.grids)):
            if not values or min(values) < 1:
                raise ValueError(
                    f"{what} must be a non-empty list of positive whole numbers, got {list(values)}"
                )
        if not 0 <= self.time_priority <= 1:
            raise ValueError(
                f"time_priority_prob must be a number from 0 to 1, got {self.time_priority}"
            )
        if not abs(self.temporal_bias) <= 100:
            raise ValueError(
                f"temporal_bias must be a number from -100 to 100, got {self.temporal_bias}"
            )
        self._check_probs()
        for patch in self.patch_sizes:
            self.candidates(patch)

    def _check_probs(self) -> None:
        probs = self.patch_size_probs
        if probs is None:
            return
        if len(probs) != len(self.patch_sizes):
            raise ValueError(
                f"patch_size_probs has {len(probs)} numbers for {len(self.patch_sizes)} patch sizes"
            )
        if not all(p >= 0 for p in probs) or abs(sum(probs) - 1) > 1e-6:
            raise ValueError(
                f"patch_size_probs must not be negative and must add up to 1, got {list(probs)}"
            )

    def tokens(self, grid: int, steps: int) -> int:
        """Tokens of a sample of `grid` x `grid` patches and `steps` timesteps."""
        fixed, per_step = self._costs(grid)
        return fixed + steps * per_step

    def _costs(self, grid: int) -> tuple[int, int]:
        r, cells = self.rates, grid * grid
        return r.space * cells + r.static, r.space_time * cells + r.time

    def most_steps(self, grid: int) -> int:
        """Most timesteps of a grid within the budget; 0 if not even one fits."""
        fixed, per_step = self._costs(grid)
        if self.token_budget is None:
            return self.max_timesteps
        left = self.token_budget - fixed
        if per_step == 0:
            return self.max_timesteps if left >= 0 else 0
        return max(0, min(self.max_timesteps, left // per_step))

    def least_steps(self, grid: int) -> int:
        """Fewest timesteps of a grid that reach the floor; may be more than are allowed."""
        fixed, per_step = self._costs(grid)
        lacking = self.min_tokens - fixed
        if self.min_tokens <= 0 or lacking <= 0:
            return 1
        if per_step == 0:
            return self.max_timesteps + 1
        return max(1, -(-lacking // per_step))

    def candidates(self, patch: int) -> tuple[tuple[int, int, int], ...]:
        """(grid, fewest timesteps, most timesteps) of every grid that a patch size can have.

        Raises:
          ValueError: there is none.
        """
        return _candidates(self, patch)

    @property
    def timesteps(self) -> dict[int, int]:
        """Most timesteps of every grid that can be drawn."""
        return {g: most for p in self.patch_sizes for g, _, most in self.candidates(p)}

    @property
    def mean_timesteps(self) -> dict[int, int]:
        """Mean timesteps of every grid that can be drawn, to the nearest whole number."""
        total: dict[int, float] = {}
        weight: dict[int, float] = {}
        for (_, grid, steps), p in self.probabilities().items():
            total[grid] = total.get(grid, 0.0) + p * steps
            weight[grid] = weight.get(grid, 0.0) + p
        return {g: max(1, round(total[g] / weight[g])) for g in sorted(total)}

    def draw(self, rng: np.random.Generator) -> Shape:
        """Draws one shape."""
        probs = self.patch_size_probs or [1.0] * len(self.patch_sizes)
        patch = self.patch_sizes[_pick(rng, probs)]
        time_first = rng.random() < self.time_priority
        candidates = self.candidates(patch)
        if not time_first:
            grid, least, most = candidates[_pick(rng, [1.0] * len(candidates))]
            return patch, grid, least + _pick(rng, self._weights(least, most))
        reachable = _reachable(candidates)
        steps = reachable[0] + _pick(rng, self._weights(reachable[0], reachable[-1]))
        if steps not in reachable:
            steps = reachable[_pick(rng, [1.0] * len(reachable))]
        fitting = [g for g, least, most in candidates if least <= steps <= most]
        return patch, fitting[_pick(rng, [1.0] * len(fitting))], steps

    def _weights(self, least: int, most: int) -> np.ndarray:
        steps = np.arange(least, most + 1, dtype=np.float64)
        return (steps / most) ** self.temporal_bias

    def probabilities(self) -> dict[Shape, float]:
        """The exact probability of every shape that can be drawn."""
        out: dict[Shape, float] = {}
        count = len(self.patch_sizes)
        for number, patch in enumerate(self.patch_sizes):
            share = self.patch_size_probs[number] if self.patch_size_probs else 1.0 / count
            for (grid, steps), p in self._given(patch).items():
                if share * p > 0:
                    shape = (patch, grid, steps)
                    out[shape] = out.get(shape, 0.0) + share * p
        return out

    def _given(self, patch: int) -> dict[tuple[int, int], float]:
        """Probability of every (grid, timesteps) once the patch size is known."""
        candidates, out = self.candidates(patch), {}
        space = (1.0 - self.time_priority) / len(candidates)
        for grid, least, most in candidates:
            weights = self._weights(least, most)
            for steps, p in zip(range(least, most + 1), weights / weights.sum(), strict=True):
                out[grid, steps] = out.get((grid, steps), 0.0) + space * p
        reachable = _reachable(candidates)
        weights = self._weights(reachable[0], reachable[-1])
        first = dict(
            zip(range(reachable[0], reachable[-1] + 1), weights / weights.sum(), strict=True)
        )
        again = sum(p for steps, p in first.items() if steps not in reachable) / len(reachable)
        for steps in reachable:
            fitting = [g for g, least, most in candidates if least <= steps <= most]
            for grid in fitting:
                p = self.time_priority * (first[steps] + again) / len(fitting)
                out[grid, steps] = out.get((grid, steps), 0.0) + p
        return out


@functools.lru_cache(maxsize=256)
def _candidates(sampler: ShapeSampler, patch: int) -> tuple[tuple[int, int, int], ...]:
    out = []
    for grid in usable_grids(patch, sampler.grids, sampler.tile_px):
        least, most = sampler.least_steps(grid), sampler.most_steps(grid)
        if least <= most:
            out.append((grid, least, most))
    if not out:
        budget = "no token budget" if sampler.token_budget is None else (
            f"a token budget of {sampler.token_budget}"
        )  # fmt: skip
        raise ValueError(
            f"patch size {patch} leaves no grid with {budget}, at least {sampler.min_tokens} "
            f"tokens and tiles of {sampler.tile_px} px; change one of them or the grids"
        )
    return tuple(out)


def _reachable(candidates: Sequence[tuple[int, int, int]]) -> list[int]:
    """All numbers of timesteps that some grid can have, ascending."""
    return sorted({t for _, least, most in candidates for t in range(least, most + 1)})


def _pick(rng: np.random.Generator, weights: Sequence[float] | np.ndarray) -> int:
    """A place drawn with probability proportional to its weight."""
    edges = np.cumsum(np.asarray(weights, np.float64))
    return min(int(np.searchsorted(edges, rng.random() * edges[-1], "right")), len(edges) - 1)
