"""Row classes: sorting rows by length into a few sizes, and choosing those sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from olmoearth_jax.stream.spec import RowClass, RowPlan

SMALL_ROW = 72
"""Rows up to this length are not worth several classes."""

WORTH = 1.02
"""A class more must save this factor of the padded pairs: each is code to be compiled."""


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


def choose(
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
    if bound.max() <= SMALL_ROW:
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
        if found is None or price * WORTH < found[0]:
            found = (
                price,
                [
                    RowClass(e + 1 - s, int(sizes[e, 0]), int(sizes[e, 1]))
                    for s, e in zip(starts, ends, strict=True)
                ],
            )
    assert found is not None
    return tuple(found[1])
