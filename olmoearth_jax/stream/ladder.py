"""The ladder: a few rungs that between them waste little, the last a hard bound.

The rows of a rung are sorted by length into a few *classes*.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from olmoearth_jax import modalities
from olmoearth_jax.masking import TokenBounds
from olmoearth_jax.stream.stream_shape import (
    CROSS,
    SAMPLE,
    SELF,
    RowClass,
    RowPlan,
    Rung,
    StreamSpec,
    round_up,
)
from olmoearth_jax.stream.token_counts import Need

_SMALL_ROW = 72
"""Rows up to this length are not worth several classes."""

_CLASS_WORTH = 1.02
"""A class more must save this factor of the padded pairs: each is code to be compiled."""


_LOSS_CLASSES = 2
"""Row lengths of a loss; attention costs more and gets more."""

_LOSS_SHARE = 0.25
"""Work of a pair of tokens in a loss, relative to one in a layer of attention."""

_RARE_SLACK = 0.06
"""Head room of the rung for what is rarely drawn."""

_WORTH = 0.005
"""Share of the expected cost that is not worth further programs."""

_ROUNDS = 5
"""Rounds of moving needs to the cheapest rung that holds them."""

Bounds = Callable[[Mapping[str, tuple[int, int]], int], TokenBounds]
"""({modality: (tokens per band set, band sets)}, timesteps) -> bounds of one sample's tokens
under any missing pattern; see `masking.Strategy.bounds`."""


def class_of(lengths: np.ndarray, classes: Sequence[RowClass]) -> np.ndarray:
    """int [...]: the first class that holds each row; the number of classes where none does.

    Args:
      lengths: int [..., 2], queries and keys.
      classes: shortest first, each at least as long in both as the one before.
    """
    out = np.zeros(lengths.shape[:-1], np.int64)
    for c in classes:
        out += (lengths[..., 0] > c.queries) | (lengths[..., 1] > c.keys)
    return out


def fits(lengths: np.ndarray, classes: Sequence[RowClass]) -> np.ndarray:
    """bool [...]: whether rows [..., rows, 2] find places; longer classes take shorter rows."""
    held = class_of(lengths, classes)
    ok: Any = (held < len(classes)).all(-1)
    room = 0
    for number in range(len(classes) - 1, 0, -1):
        room += classes[number].rows
        ok &= (held >= number).sum(-1) <= room
    return ok


def best_cuts(costs: np.ndarray, most: int) -> list[list[int]]:
    """Ways to cut a line into 1, 2, ... `most` parts; each the last index of every part.

    Each minimises the sum of a part's size times its last cost; `costs` ascend.
    """
    n = len(costs)
    most = min(most, n)
    size = np.arange(n + 1)[None] - np.arange(n + 1)[:, None]  # [start, stop]
    price = np.where(size > 0, size * np.concatenate([[0.0], costs])[None], np.inf)
    best, back = np.full(n + 1, np.inf), []
    best[0] = 0.0
    for _ in range(most):
        total = best[:, None] + price
        back.append(total.argmin(0))
        best = total.min(0)
    out = []
    for parts in range(1, most + 1):
        cuts, stop = [], n
        for k in range(parts - 1, -1, -1):
            cuts.append(stop - 1)
            stop = int(back[k][stop])
        out.append(sorted(set(cuts)))
    return out


def choose_classes(
    lengths: np.ndarray, plan: RowPlan, most: int, spare: float, stretch: float
) -> tuple[RowClass, ...]:
    """Classes that hold all of several draws of rows with little padding.

    Args:
      lengths: int [draws, rows, 2], the rows of one device each.
      plan: their plan, whose bounds no class exceeds.
      most: at most this many classes.
      spare: share of the rows by which each class is larger than seen.
      stretch: share by which the classes are longer than seen.
    """
    bound = np.array([plan.queries, plan.keys])
    rows = lengths.shape[1]
    if bound.max() <= _SMALL_ROW:
        return (RowClass(rows, plan.queries, plan.keys),)
    order = np.argsort((lengths / np.maximum(bound, 1)).max(-1), axis=1, kind="stable")
    ascending = np.take_along_axis(lengths, order[..., None], axis=1)
    # The longest of the i shortest rows, over all draws: a class that ends at i is this long.
    longest = np.maximum.accumulate(ascending, axis=1).max(0)
    moved = np.minimum(np.arange(rows) + int(np.ceil(spare * rows)), rows - 1)
    stretched = np.ceil(longest[moved] * (1.0 + stretch)).astype(np.int64)
    sizes = np.minimum(np.maximum(-(-stretched // 8) * 8, 8), bound)
    costs = sizes.prod(1).astype(float)
    found = None
    for ends in best_cuts(costs, most):
        starts = [0, *(e + 1 for e in ends[:-1])]
        price = sum((e + 1 - s) * costs[e] for s, e in zip(starts, ends, strict=True))
        if found is None or price * _CLASS_WORTH < found[0]:
            found = (
                price,
                [
                    RowClass(e + 1 - s, int(sizes[e, 0]), int(sizes[e, 1]))
                    for s, e in zip(starts, ends, strict=True)
                ],
            )
    assert found is not None
    return tuple(found[1])


def row_plans(
    names: Sequence[str],
    band_sets: Mapping[str, int],
    grid_timesteps: Mapping[int, int],
    bounds: Bounds,
    whole_samples: bool = False,
) -> tuple[tuple[RowPlan, ...], int, int]:
    """Row plans from the masking's bounds over all grids.

    Args:
      names: modalities in sample order.
      band_sets: band sets of each.
      grid_timesteps: grid side -> timesteps.
      bounds: the masking's bounds (both views' maximum).
      whole_samples: plan rows of whole samples for the loss instead of one per modality.

    Returns:
      (plans, most visible tokens, most decoded tokens of a row).
    """
    enc = dec = 0
    per_modality = dict.fromkeys(names, 0)
    for grid, steps in grid_timesteps.items():
        counts = {n: (math.prod(modalities.get(n).axes(grid, steps)), band_sets[n]) for n in names}
        most = bounds(counts, steps)
        enc = max(enc, most.encode)
        dec = max(dec, sum(most.decode[n] for n in names))
        per_modality = {n: max(per_modality[n], most.decode[n]) for n in names}
    enc, dec = round_up(max(enc, 1), 4), round_up(max(dec, 1), 4)
    plans = [RowPlan(SELF, enc, enc), RowPlan(CROSS, dec, enc)]
    if whole_samples:
        plans.append(RowPlan(SAMPLE, dec, dec))
    else:
        plans += [RowPlan(n, m, m) for n, m in per_modality.items() if m]
    return tuple(plans), enc, dec


def _cost(spec: StreamSpec, totals: np.ndarray, pairs: Sequence[float]) -> float:
    """Work in token units: stream tokens plus pairs at a usual width."""
    slots = len(spec.slots)
    weights = [1.0 if p.is_attention else _LOSS_SHARE for p in spec.plans]
    rows = sum(w * n for w, n in zip(weights, pairs, strict=True)) / 1024.0
    return float(totals[2 * slots :].sum() + rows + 0.05 * totals[:slots].sum())


def _rung_cost(spec: StreamSpec, rung: Rung) -> float:
    """Work of a rung in token units."""
    return _cost(spec, rung.totals, [rung.pairs(p) for p in range(len(spec.plans))])


def fitting_rungs(ladder: Sequence[Rung], need: Need) -> int:
    """Bit i: rung i holds the need.

    Raises:
      ValueError: even the top rung is too small (a broken bound, never a full pipeline).
    """
    bits = 0
    for number, rung in enumerate(ladder):
        bits |= int(_holds(rung, need.totals, need.lengths)) << number
    if not bits >> (len(ladder) - 1):
        raise ValueError(
            f"a micro-step needs {need.totals.tolist()}, more than the ladder's top "
            f"{ladder[-1].totals.tolist()}"
        )
    return bits


def cheapest(bits: int) -> int:
    """Number of the lowest bit that is set: the cheapest of the fitting rungs."""
    return (bits & -bits).bit_length() - 1


def expected_use(ladder: Sequence[Rung], needs: Sequence[Need]) -> np.ndarray:
    """int [rungs]: how many of the observed needs run on each rung."""
    used = [cheapest(fitting_rungs(ladder, need)) for need in needs]
    return np.bincount(used, minlength=len(ladder))


def _holds(
    rung: Rung, totals: np.ndarray, lengths: np.ndarray, plans: Sequence[int] | None = None
) -> np.ndarray:
    """bool [...] for needs with totals [..., n] and lengths [..., plans, devices, rows, 2].

    `plans` leaves the others out.
    """
    ok: Any = (totals <= rung.totals).all(-1)
    for number in range(len(rung.rows)) if plans is None else plans:
        ok &= fits(lengths[..., number, :, :, :], rung.rows[number]).all(-1)
    return ok


class _Sizer:
    """Rungs for buckets of observed needs; made once by `build_ladder`."""

    def __init__(self, spec: StreamSpec, needs: Sequence[Need], classes: int):
        self.spec, self.classes = spec, classes
        self.totals = np.stack([n.totals for n in needs])
        self.lengths = np.stack([n.lengths for n in needs])
        pairs = self.lengths.prod(-1).sum(-1).max(-1)
        self.costs = np.array([_cost(spec, t, p) for t, p in zip(self.totals, pairs, strict=True)])

    def rung(self, bucket: np.ndarray, slack: float) -> Rung:
        """The smallest rung, with head room, for the needs numbered in `bucket`."""
        spec, slots = self.spec, len(self.spec.slots)
        most = spec.top_rung().totals
        multiple = 64 if most[2 * slots] > 4096 else 8
        totals = self.totals[bucket].max(0)
        # Patches get plenty: they cost little and must not decide about the rung.
        share = np.r_[np.full(2 * slots, 4 * slack), np.full(3, slack)]
        totals = -(-np.ceil(totals * (1.0 + share)).astype(np.int64) // multiple) * multiple
        totals[2 * slots :] = np.maximum(totals[2 * slots :], 8)
        totals = np.minimum(totals, most).tolist()
        rows = []
        for number, plan in enumerate(spec.plans):
            draws = self.lengths[bucket, number].reshape(-1, spec.rows, 2)
            if plan.is_attention:
                rows.append(choose_classes(draws, plan, self.classes, slack, 0.0))
            else:
                rows.append(choose_classes(draws, plan, _LOSS_CLASSES, 4 * slack, 2 * slack))
        patches, sparse = tuple(totals[:slots]), tuple(totals[slots : 2 * slots])
        enc, dec, loc = totals[2 * slots :]
        return Rung(patches, sparse, enc, dec, tuple(rows), loc)

    def owners(self, rungs: Sequence[Rung]) -> np.ndarray:
        """int [needs]: the first rung that holds each need, rows of losses aside."""
        plans = [p for p, plan in enumerate(self.spec.plans) if plan.is_attention]
        held = np.stack([_holds(r, self.totals, self.lengths, plans) for r in rungs])
        return held.argmax(0)


def build_ladder(
    spec: StreamSpec,
    needs: Sequence[Need],
    max_rungs: int,
    classes: int = 4,
) -> tuple[Rung, ...]:
    """Rungs that minimise the expected cost of the observed needs.

    A rung holds every need of its bucket; see `_refine` for the buckets. The top rung is the hard
    bound, so nothing is ever dropped.

    Args:
      spec: the stream.
      needs: from `token_counts.needs`, one per sampled micro-step.
      max_rungs: at most this many rungs, the top one included.
      classes: at most this many row lengths of an attention.

    Returns:
      Rungs, cheapest first.
    """
    top = spec.top_rung()
    if max_rungs < 1:
        raise ValueError(f"ladder.max_rungs must be at least 1, got {max_rungs}")
    if max_rungs == 1 or not needs:
        return (top,)
    sizer = _Sizer(spec, needs, classes)
    # What the fullest of several devices needs varies less from one micro-step to the next.
    slack = 0.02 if spec.devices == 1 else 0.01
    found = min(
        (_refine(sizer, parts, max_rungs - 1, slack) for parts in (1, 2, 3) if parts < max_rungs),
        key=lambda rungs: _expected(sizer, rungs),
    )
    return (*dict.fromkeys(r for r in _worthwhile(sizer, found) if r != top), top)


def own_rung(spec: StreamSpec, need: Need, classes: int) -> Rung:
    """The smallest rung for one micro-step alone: what no ladder of `classes` lengths can beat."""
    return _Sizer(spec, [need], classes).rung(np.zeros(1, np.int64), 0.0)


def _refine(sizer: _Sizer, parts: int, rungs: int, slack: float) -> list[Rung]:
    """Rungs, cheapest first.

    Needs are split into `parts` by their share of visible tokens (streams that are both long in
    one kind and short in the other should not have to share a rung), cut by cost within each, and
    then moved to the cheapest rung that holds them until nothing changes. The last rung holds all
    of them with more to spare, for the bound lies far above whatever is drawn.
    """
    enc, dec = (sizer.totals[:, 2 * len(sizer.spec.slots) + i] for i in range(2))
    visible = enc / np.maximum(dec, 1)
    count = len(visible)
    owner, used = np.zeros(count, np.int64), 0
    rare = sizer.rung(np.arange(count), _RARE_SLACK)
    if rungs == 1:
        return [rare]
    for part in np.array_split(np.argsort(visible, kind="stable"), min(parts, count)):
        ascending = part[np.argsort(sizer.costs[part], kind="stable")]
        start = 0
        for end in best_cuts(sizer.costs[ascending], max(1, (rungs - 1) // parts))[-1]:
            owner[ascending[start : end + 1]] = used
            start, used = end + 1, used + 1
    found: list[Rung] = []
    for _ in range(_ROUNDS):
        buckets = [np.flatnonzero(owner == k) for k in range(used)]
        found = [sizer.rung(b, slack) for b in buckets if len(b)]
        found = _share_patches(sorted(found, key=lambda r: _rung_cost(sizer.spec, r)))
        new = sizer.owners(found)
        used, changed = len(found), (new != owner).any()
        owner = new
        if not changed:
            break
    return _share_patches([*found, rare])


def _share_patches(rungs: list[Rung]) -> list[Rung]:
    """Rungs that also hold the patches of all cheaper ones: patches should decide nothing."""
    out: list[Rung] = []
    for rung in rungs:
        before = out[-1] if out else rung
        patches = tuple(map(max, rung.patches, before.patches))
        sparse = tuple(map(max, rung.sparse, before.sparse))
        out.append(dataclasses.replace(rung, patches=patches, sparse=sparse))
    return out


def _worthwhile(sizer: _Sizer, rungs: list[Rung]) -> list[Rung]:
    """Leaves rungs out while that raises the expected cost by less than `_WORTH` in all.

    Each is a program to be compiled. The last one stays: it holds all that was observed.
    """
    most = (1.0 + _WORTH) * _expected(sizer, rungs)
    while len(rungs) > 1:
        fewer = [rungs[:i] + rungs[i + 1 :] for i in range(len(rungs) - 1)]
        costs = [_expected(sizer, some) for some in fewer]
        if min(costs) > most:
            break
        rungs = fewer[int(np.argmin(costs))]
    return rungs


def _expected(sizer: _Sizer, rungs: Sequence[Rung]) -> float:
    """Mean cost of the observed needs on a ladder."""
    costs = np.array([_rung_cost(sizer.spec, r) for r in rungs])
    return float(costs[sizer.owners(rungs)].mean())
