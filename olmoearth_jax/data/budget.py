"""Token budget: how many timesteps fit beside a grid of patches (spec/data.md section 7)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from olmoearth_jax import modalities as registry
from olmoearth_jax.modalities import MAX_TIMESTEPS, Tokenization


def token_costs(
    names: Sequence[str], grid: int, tokenization: Tokenization | None = None
) -> tuple[int, int]:
    """(tokens per timestep, tokens that do not depend on time) of one sample.

    Every modality counts whether or not a sample has it; latlon is free.
    """
    tokenization = tokenization or Tokenization()
    per_step = fixed = 0
    for name in names:
        if name == "latlon":
            continue
        sets = tokenization.num_band_sets(name)
        modality = registry.get(name)
        tokens = math.prod(modality.axes(grid, 1)) * sets
        if modality.multitemporal:
            per_step += tokens
        else:
            fixed += tokens
    return per_step, fixed


def max_timesteps(
    names: Sequence[str],
    grid: int,
    budget: int | None,
    tokenization: Tokenization | None = None,
) -> int:
    """Timesteps of a crop of `grid` x `grid` patches within `budget` tokens, at most 12.

    `budget` None is no limit; `tokenization` None counts by the registry's band sets.

    Raises:
      ValueError: not even one timestep fits.
    """
    if budget is None:
        return MAX_TIMESTEPS
    per_step, fixed = token_costs(names, grid, tokenization)
    if per_step == 0:
        return 1
    steps = (budget - fixed) // per_step
    if steps < 1:
        raise ValueError(
            f"token budget {budget} is too small for a grid of {grid} x {grid} patches, which "
            f"needs at least {fixed + per_step} tokens ({fixed} without time and {per_step} per "
            f"timestep); raise the token budget or lower the largest grid"
        )
    return min(steps, MAX_TIMESTEPS)


def check_grids(
    names: Sequence[str],
    patch_sizes: Sequence[int],
    grids: Sequence[int],
    budget: int | None,
    tile_px: int,
    tokenization: Tokenization | None = None,
) -> dict[int, int]:
    """Timesteps per grid side, after checking that every grid and patch size can be drawn.

    Raises:
      ValueError: empty or non-positive lists, a grid beyond the budget, or a patch size for
        which no grid fits the tile.
    """
    for what, values in (("patch sizes", patch_sizes), ("grid sizes", grids)):
        if not values or any(v < 1 for v in values):
            raise ValueError(
                f"{what} must be a non-empty list of positive whole numbers, got {list(values)}"
            )
    for p in patch_sizes:
        if min(grids) * p > tile_px:
            raise ValueError(
                f"patch size {p} leaves no grid that fits the {tile_px} px tiles: the smallest "
                f"grid, {min(grids)}, needs {min(grids) * p} px; lower the patch size or the grid"
            )
    usable = [g for g in grids if g * min(patch_sizes) <= tile_px]
    return {g: max_timesteps(names, g, budget, tokenization) for g in usable}


def usable_grids(patch_size: int, grids: Sequence[int], tile_px: int) -> list[int]:
    """The grids of `grids` whose crop of `patch_size` px patches fits a `tile_px` px tile."""
    return [g for g in grids if 0 < g <= tile_px // patch_size]
