"""The ladder: a few capacities that between them waste little, the last a hard bound."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from olmoearth_jax import modalities
from olmoearth_jax.masking.bounds import TokenBounds
from olmoearth_jax.stream.spec import RowClass, Rung, StreamSpec, round_up, token_shape

ROW_FRACTIONS = (0.25, 0.5, 1.0)
"""Row lengths of the classes, relative to the hard bound."""

SMALL_ROW = 72
"""Per-modality loss rows up to this length are not worth shortening."""

Bounds = Callable[[Mapping[str, tuple[int, int]], int], TokenBounds]
"""({modality: (tokens per band set, band sets)}, timesteps) -> bounds of one sample's tokens
under any missing pattern; see `masking.bounds.max_tokens`."""


def row_classes(
    names: Sequence[str],
    band_sets: Mapping[str, int],
    grid_timesteps: Mapping[int, int],
    bounds: Bounds,
    fractions: Sequence[float] = ROW_FRACTIONS,
) -> tuple[RowClass, ...]:
    """Row classes from the masking's bounds over all grids.

    Args:
      names: modalities in sample order.
      band_sets: band sets of each.
      grid_timesteps: grid side -> timesteps.
      bounds: the masking's bounds (both views' maximum).
      fractions: row lengths relative to the bound, ascending to 1.
    """
    enc = dec = 0
    per_modality = np.zeros(len(names), np.int64)
    for grid, steps in grid_timesteps.items():
        counts = {
            n: (int(np.prod(token_shape(n, grid, steps), dtype=np.int64)), band_sets[n])
            for n in names
        }
        most = bounds(counts, steps)
        decoded = np.array([most.decode[n] for n in names])
        enc, dec = max(enc, most.encode), max(dec, int(decoded.sum()))
        per_modality = np.maximum(per_modality, decoded)
    top = RowClass(round_up(enc, 4), round_up(dec, 4), tuple(int(x) for x in per_modality))
    classes = [top.scaled(f, SMALL_ROW) for f in fractions[:-1]] + [top]
    return tuple(c for i, c in enumerate(classes) if i == len(classes) - 1 or c != classes[i + 1])


def rung_cost(spec: StreamSpec, vector: np.ndarray) -> float:
    """Work of a rung in token units: stream tokens plus attention pairs at a usual width."""
    slots = len(spec.slots)
    enc, dec = float(vector[2 * slots]), float(vector[2 * slots + 1])
    above = vector[2 * slots + 2 :].astype(float)
    rows = above - np.append(above[1:], 0.0)
    pairs = sum(
        r * (c.enc * c.enc + c.enc * c.dec) for r, c in zip(rows, spec.classes, strict=True)
    )
    return enc + dec + pairs / 1024.0 + 0.05 * float(vector[:slots].sum())


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
    rungs = [Rung.from_vector(held[i], len(spec.slots)) for i in cuts]
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
    out[:, 2 * slots + 2] = spec.rows
    out[:, 2 * slots + 2 :] = np.minimum(out[:, 2 * slots + 2 :], spec.rows)
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
