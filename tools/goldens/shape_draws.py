"""Recorded counts of the shape sampler against the exact probabilities and our own draws."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from olmoearth_jax.data.draws import rng
from olmoearth_jax.data.shape_sampler import ShapeSampler, TokenRates

from .common import Checks, Result

DRAWS = 10_000


def sampler_of(entry: Mapping[str, Any]) -> ShapeSampler:
    """The sampler of a recorded setting."""
    probs = entry["patch_size_probs"]
    return ShapeSampler(
        tuple(entry["patch_sizes"]),
        tuple(entry["sampled_hw_p_list"]),
        TokenRates(
            entry["space_time_tokens"],
            entry["space_tokens"],
            entry["static_tokens"],
            entry["time_tokens"],
        ),
        tile_px=entry["tile_size"],
        token_budget=entry["token_budget"],
        min_tokens=entry["min_tokens_per_instance"],
        temporal_bias=entry["temporal_bias"],
        time_priority=entry["time_priority_prob"],
        patch_size_probs=None if probs is None else tuple(probs),
        max_timesteps=entry["max_timesteps"],
    )


def check(entry: dict[str, Any], counts: np.ndarray) -> Result:
    """One setting: every recorded cell, then the distribution of our own draws."""
    sampler, checks = sampler_of(entry), Checks()
    exact = np.zeros(counts.shape)
    for (patch, grid, steps), p in sampler.probabilities().items():
        place = sampler.patch_sizes.index(patch), sampler.grids.index(grid), steps
        exact[place] += p
    checks.array("sum of the probabilities", exact.sum(), 1.0, atol=1e-9)
    n = entry["n"]
    checks.equal("recorded draws", int(counts.sum()), n)
    checks.true("a shape was recorded that we never draw", not counts[exact == 0].any())
    error = np.abs(counts / n - exact)
    allowed = 4.5 * np.sqrt(exact * (1 - exact) / n) + 2 / n
    checks.worst = float(error.max())
    checks.true(f"{int((error > allowed).sum())} cells are off", (error <= allowed).all())
    own = Counter(sampler.draw(rng(1, "shape", 1, k)) for k in range(DRAWS))
    expected = {s: p * DRAWS for s, p in sampler.probabilities().items()}
    checks.true("a shape was drawn that has no probability", set(own) <= set(expected))
    common = [s for s, e in expected.items() if e >= 5]
    square = sum((own[s] - expected[s]) ** 2 / expected[s] for s in common)
    p = chi_square_tail(square, len(common) - 1)
    checks.true(f"chi-square of our draws: p = {p:.2g}", p > 1e-4)
    return checks.result("4.5 standard errors; chi-square p > 1e-4")


def chi_square_tail(x: float, freedom: int) -> float:
    """P(chi-square > x), by the cube root that is all but normal (Wilson and Hilferty)."""
    if freedom < 1:
        return 1.0
    spread = 2.0 / (9.0 * freedom)
    z = ((x / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)
    return 0.5 * math.erfc(z / math.sqrt(2))
