"""The ladder: a few capacities that between them waste little, the last a hard bound."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from olmoearth_jax import modalities
from olmoearth_jax.masking.bounds import TokenBounds
from olmoearth_jax.stream.spec import (
    CROSS,
    SAMPLE,
    SELF,
    RowPlan,
    Rung,
    StreamSpec,
    round_up,
    token_shape,
)

ROW_FRACTIONS = (0.25, 0.5, 0.75, 1.0)
"""Row lengths of the attention classes, relative to the hard bound."""

LOSS_FRACTIONS = (0.5, 1.0)
"""Row lengths of the loss classes."""

SMALL_ROW = 72
"""Rows up to this length are not worth several classes."""

Bounds = Callable[[Mapping[str, tuple[int, int]], int], TokenBounds]
"""({modality: (tokens per band set, band sets)}, timesteps) -> bounds of one sample's tokens
under any missing pattern; see `masking.bounds.max_tokens`."""


def row_plans(
    names: Sequence[str],
    band_sets: Mapping[str, int],
    grid_timesteps: Mapping[int, int],
    bounds: Bounds,
    fractions: Sequence[float] = ROW_FRACTIONS,
    whole_samples: bool = False,
) -> tuple[tuple[RowPlan, ...], int, int]:
    """Row plans from the masking's bounds over all grids.

    Args:
      names: modalities in sample order.
      band_sets: band sets of each.
      grid_timesteps: grid side -> timesteps.
      bounds: the masking's bounds (both views' maximum).
      fractions: row lengths of the attentions relative to the bound, ascending to 1.
      whole_samples: plan rows of whole samples for the loss instead of one per modality.

    Returns:
      (plans, most visible tokens, most decoded tokens of a row).
    """
    enc = dec = 0
    per_modality = dict.fromkeys(names, 0)
    for grid, steps in grid_timesteps.items():
        counts = {
            n: (int(np.prod(token_shape(n, grid, steps), dtype=np.int64)), band_sets[n])
            for n in names
        }
        most = bounds(counts, steps)
        enc = max(enc, most.encode)
        dec = max(dec, sum(most.decode[n] for n in names))
        per_modality = {n: max(per_modality[n], most.decode[n]) for n in names}
    enc, dec = round_up(max(enc, 1), 4), round_up(max(dec, 1), 4)
    plans = [_plan(SELF, enc, enc, fractions), _plan(CROSS, dec, enc, fractions)]
    if whole_samples:
        plans.append(_plan(SAMPLE, dec, dec, LOSS_FRACTIONS))
    else:
        plans += [_plan(n, m, m, LOSS_FRACTIONS) for n, m in per_modality.items() if m]
    return tuple(plans), enc, dec


def _plan(name: str, queries: int, keys: int, fractions: Sequence[float]) -> RowPlan:
    """Classes at fractions of the bounds; short rows are not worth several."""

    def cut(n: int, fraction: float) -> int:
        return n if fraction == 1 else round_up(math.ceil(n * fraction), 4)

    if max(queries, keys) <= SMALL_ROW:
        fractions = (1.0,)
    pairs = [(min(cut(queries, f), queries), min(cut(keys, f), keys)) for f in fractions]
    return RowPlan(name, tuple(dict.fromkeys(pairs)))


def rung_cost(spec: StreamSpec, vector: np.ndarray) -> float:
    """Work of a rung in token units: stream tokens plus row pairs at a usual width."""
    slots = len(spec.slots)
    start, pairs = 2 * slots + 2, 0.0
    for plan in spec.plans:
        above = np.append(vector[start : start + len(plan.bounds)], 0).astype(float)
        rows = above[:-1] - above[1:]
        weight = 1.0 if plan.name in (SELF, CROSS) else 0.25
        pairs += weight * sum(r * q * k for r, (q, k) in zip(rows, plan.bounds, strict=True))
        start += len(plan.bounds)
    streams = float(vector[2 * slots] + vector[2 * slots + 1])
    return streams + pairs / 1024.0 + 0.05 * float(vector[:slots].sum())


def build_ladder(
    spec: StreamSpec, needs: Sequence[np.ndarray], max_rungs: int, slack: float = 0.03
) -> tuple[Rung, ...]:
    """Rungs that minimise the expected cost of the observed needs.

    Needs are sorted by cost and cut into contiguous buckets; a rung holds the largest of every
    component of its bucket and those below. The cuts come from dynamic programming over the
    total cost. The top rung is the hard bound, so nothing is ever dropped.

    Args:
      spec: the stream.
      needs: vectors from `census.needs`, one per sampled micro-step.
      max_rungs: at most this many rungs, the top one included.
      slack: head room of every rung but the top.

    Returns:
      Rungs, cheapest first.
    """
    top = spec.top_rung()
    top_vector = top.as_vector()
    if max_rungs < 1:
        raise ValueError(f"ladder.max_rungs must be at least 1, got {max_rungs}")
    if max_rungs == 1 or not len(needs):
        return (top,)
    ordered = sorted((np.asarray(n) for n in needs), key=lambda v: rung_cost(spec, v))
    held = np.maximum.accumulate(np.stack(ordered), axis=0)
    held = _with_slack(spec, held, slack, top_vector)
    costs = np.array([rung_cost(spec, v) for v in held])
    cuts = _best_cuts(costs, max_rungs - 1)
    rungs = [Rung.from_vector(held[i], spec) for i in cuts]
    unique = list(dict.fromkeys(rungs))
    if unique and unique[-1] == top:
        return tuple(unique)
    return (*unique, top)


def _with_slack(spec: StreamSpec, held: np.ndarray, slack: float, top: np.ndarray) -> np.ndarray:
    """Adds head room and rounds stream lengths; rows get one spare, never beyond the bound."""
    slots = len(spec.slots)
    out = np.ceil(held * (1.0 + slack)).astype(np.int64)
    multiple = 64 if top[2 * slots] > 4096 else 8
    out[:, : 2 * slots + 2] = -(-out[:, : 2 * slots + 2] // multiple) * multiple
    streams = slice(2 * slots, 2 * slots + 2)
    out[:, streams] = np.maximum(out[:, streams], 8)
    out[:, 2 * slots + 2 :] = np.minimum(out[:, 2 * slots + 2 :], spec.rows)
    start = 2 * slots + 2
    for plan in spec.plans:  # every row has a place, if only in the shortest class
        out[:, start] = spec.rows
        start += len(plan.bounds)
    return np.minimum(out, np.where(top > 0, top, 0))


def _best_cuts(costs: np.ndarray, rungs: int) -> list[int]:
    """Last index of each bucket; `costs` ascend. Minimises sum of bucket size times last cost."""
    n = len(costs)
    rungs = min(rungs, n)
    best = np.full((rungs + 1, n + 1), np.inf)
    back = np.zeros((rungs + 1, n + 1), np.int64)
    best[0, 0] = 0.0
    for k in range(1, rungs + 1):
        for stop in range(1, n + 1):
            starts = np.arange(stop)
            total = best[k - 1, :stop] + (stop - starts) * costs[stop - 1]
            back[k, stop] = int(np.argmin(total))
            best[k, stop] = total[back[k, stop]]
    cuts, stop = [], n
    for k in range(rungs, 0, -1):
        cuts.append(stop - 1)
        stop = int(back[k, stop])
    return sorted(set(cuts))


def pick_rung(ladder: Sequence[Rung], need: np.ndarray) -> int:
    """Number of the first rung that holds `need`.

    Raises:
      ValueError: even the top rung is too small (a broken bound, never a full pipeline).
    """
    for i, rung in enumerate(ladder):
        if (need <= rung.as_vector()).all():
            return i
    raise ValueError(
        f"a micro-step needs {need.tolist()}, more than the ladder's top "
        f"{ladder[-1].as_vector().tolist()}"
    )


def band_set_counts(names: Sequence[str], tokenization: modalities.Tokenization) -> dict[str, int]:
    """{modality: band sets}."""
    return {n: tokenization.num_band_sets(n) for n in names}
