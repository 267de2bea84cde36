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

ROW_FRACTIONS = (0.15, 0.3, 0.45, 0.6, 0.8, 1.0)
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
    spec: StreamSpec, needs: Sequence[np.ndarray], max_rungs: int, slack: float = 0.06
) -> tuple[Rung, ...]:
    """Rungs that minimise the expected cost of the observed needs.

    A rung holds the largest of every component of its bucket of needs; see `_refine` for the
    buckets. The top rung is the hard bound, so nothing is ever dropped.

    Args:
      spec: the stream.
      needs: vectors from `census.needs`, one per sampled micro-step.
      max_rungs: at most this many rungs, the top one included.
      slack: head room of every rung but the top.

    Returns:
      Rungs, cheapest first.
    """
    top = spec.top_rung()
    if max_rungs < 1:
        raise ValueError(f"ladder.max_rungs must be at least 1, got {max_rungs}")
    if max_rungs == 1 or not len(needs):
        return (top,)
    observed = np.stack([np.asarray(n) for n in needs])
    found = min(
        (_refine(spec, observed, parts, max_rungs - 1, slack) for parts in (1, 2, 3)),
        key=lambda vectors: _expected(spec, observed, vectors),
    )
    rungs = [Rung.from_vector(v, spec) for v in found]
    unique = list(dict.fromkeys(r for r in rungs if r != top))
    return (*unique, top)


def _refine(
    spec: StreamSpec, observed: np.ndarray, parts: int, rungs: int, slack: float
) -> list[np.ndarray]:
    """Rung vectors, cheapest first.

    Needs are split into `parts` by their share of visible tokens (streams that are both long in
    one kind and short in the other should not have to share a rung), cut by cost within each, and
    then moved to the cheapest rung that holds them until nothing changes.
    """
    slots = len(spec.slots)
    ratio = observed[:, 2 * slots] / np.maximum(observed[:, 2 * slots + 1], 1)
    owner = np.zeros(len(observed), np.int64)
    used = 0
    for part in np.array_split(np.argsort(ratio, kind="stable"), min(parts, len(observed))):
        costs = np.array([rung_cost(spec, observed[i]) for i in part])
        ascending = part[np.argsort(costs, kind="stable")]
        for stop in _cuts(spec, observed[ascending], max(1, rungs // parts)):
            owner[ascending[stop]] = used
            used += 1
    for _ in range(20):
        held = [observed[owner == k].max(0) for k in range(used) if (owner == k).any()]
        held.sort(key=lambda v: rung_cost(spec, v))
        new = np.array([next(k for k, v in enumerate(held) if (n <= v).all()) for n in observed])
        used, changed = len(held), (new != owner).any()
        owner = new
        if not changed:
            break
    top = spec.top_rung().as_vector()
    held = [observed[owner == k].max(0) for k in range(used) if (owner == k).any()]
    held.sort(key=lambda v: rung_cost(spec, v))
    vectors = np.stack(held)
    # Patches are cheap: a rung holds those of the cheaper ones too, so that they decide nothing.
    vectors[:, : 2 * slots] = np.maximum.accumulate(vectors[:, : 2 * slots], axis=0)
    return list(_with_slack(spec, vectors, slack, top))


def _cuts(spec: StreamSpec, ascending: np.ndarray, rungs: int) -> list[slice]:
    """Buckets of needs in order of cost."""
    held = np.maximum.accumulate(ascending, axis=0)
    ends = _best_cuts(np.array([rung_cost(spec, v) for v in held]), rungs)
    starts = [0, *(e + 1 for e in ends[:-1])]
    return [slice(a, b + 1) for a, b in zip(starts, ends, strict=True)]


def _expected(spec: StreamSpec, observed: np.ndarray, vectors: list[np.ndarray]) -> float:
    """Mean cost of the observed needs on a ladder."""
    costs = [rung_cost(spec, v) for v in vectors]
    total = 0.0
    for need in observed:
        total += next(c for c, v in zip(costs, vectors, strict=True) if (need <= v).all())
    return total / len(observed)


def _with_slack(spec: StreamSpec, held: np.ndarray, slack: float, top: np.ndarray) -> np.ndarray:
    """Adds head room and rounds, never beyond the bound.

    Patches and loss rows get plenty: they cost little, and must not push a micro-step that fits
    otherwise into the next rung. Attention rows get a few, streams the share `slack`.
    """
    slots = len(spec.slots)
    out = held.astype(np.int64)
    multiple = 64 if top[2 * slots] > 4096 else 8

    def up(x: np.ndarray, share: float) -> np.ndarray:
        return -(-np.ceil(x * (1.0 + share)).astype(np.int64) // multiple) * multiple

    out[:, : 2 * slots] = up(out[:, : 2 * slots], 4 * slack)
    streams = slice(2 * slots, 2 * slots + 2)
    out[:, streams] = np.maximum(up(out[:, streams], slack), 8)
    start = 2 * slots + 2
    for plan in spec.plans:
        mine = slice(start, start + len(plan.bounds))
        share = slack if plan.name in (SELF, CROSS) else 6 * slack
        out[:, mine] += np.ceil(share * spec.rows).astype(np.int64) * (out[:, mine] > 0)
        out[:, mine] = np.minimum(out[:, mine], spec.rows)
        out[:, start] = spec.rows  # every row has a place, if only in the shortest class
        start += len(plan.bounds)
    return np.minimum(out, top)


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
