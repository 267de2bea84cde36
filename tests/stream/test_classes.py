"""Row classes: what holds, what is chosen, and how processes agree on a rung."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from olmoearth_jax.stream.engine import shared_bits
from olmoearth_jax.stream.ladder import (
    best_cuts,
    cheapest,
    choose_classes,
    class_of,
    fits,
    fitting_rungs,
)
from olmoearth_jax.stream.pack import assign_rows
from olmoearth_jax.stream.stream_shape import RowClass, RowPlan, Rung
from olmoearth_jax.stream.token_counts import Need

PLAN = RowPlan("self", 400, 300)


def drawn(seed: int, draws: int = 6, rows: int = 12) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, [PLAN.queries + 1, PLAN.keys + 1], (draws, rows, 2))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), most=st.integers(1, 5), spare=st.sampled_from([0.0, 0.2]))
def test_chosen_classes_hold_what_they_were_chosen_for(seed, most, spare):
    lengths = drawn(seed)
    classes = choose_classes(lengths, PLAN, most, spare, 0.1)
    assert 1 <= len(classes) <= most
    assert sum(c.rows for c in classes) == lengths.shape[1]
    assert all(c.queries <= PLAN.queries and c.keys <= PLAN.keys for c in classes)
    for shorter, longer in itertools.pairwise(classes):
        assert shorter.queries <= longer.queries and shorter.keys <= longer.keys
    assert fits(lengths, classes).all()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_fitting_rows_find_places(seed):
    lengths = drawn(seed, draws=1)[0]
    classes = choose_classes(drawn(seed + 1), PLAN, 3, 0.0, 0.0)
    counts = tuple(c.rows for c in classes)
    if fits(lengths, classes):
        places = assign_rows(class_of(lengths, classes), counts)
        ends = np.cumsum(counts)
        for place, (queries, keys) in zip(places, lengths, strict=True):
            mine = classes[int(np.searchsorted(ends, place, side="right"))]
            assert queries <= mine.queries and keys <= mine.keys
    else:
        held = class_of(lengths, classes)
        if (held < len(classes)).all():
            with pytest.raises(ValueError, match="too few rows"):
                assign_rows(held, counts)


def test_more_classes_never_pad_more():
    lengths = drawn(3, draws=20, rows=24)
    padded = [
        sum(c.rows * c.queries * c.keys for c in choose_classes(lengths, PLAN, most, 0.0, 0.0))
        for most in (1, 2, 4)
    ]
    assert padded[0] > padded[1] > padded[2]


def test_short_rows_have_one_class():
    classes = choose_classes(np.zeros((1, 5, 2), int), RowPlan("srtm", 40, 40), 4, 0.0, 0.0)
    assert classes == (RowClass(5, 40, 40),)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=8), st.integers(1, 4))
def test_best_cuts_are_the_best(costs, most):
    costs = np.sort(np.array(costs, float))
    n = len(costs)

    def price(ends):
        starts = [0, *(e + 1 for e in ends[:-1])]
        return sum((e + 1 - s) * costs[e] for s, e in zip(starts, ends, strict=True))

    for parts, ends in enumerate(best_cuts(costs, most), 1):
        ways = itertools.combinations(range(n - 1), parts - 1)
        assert price(ends) == min(price([*w, n - 1]) for w in ways)


def rung(enc: int, dec: int) -> Rung:
    return Rung((8,), (0,), enc, dec, ((RowClass(4, 64, 64),),))


def test_processes_agree_on_a_rung_that_holds_the_share_of_each():
    # Neither of the first two holds what the other holds.
    ladder = (rung(100, 400), rung(400, 100), rung(400, 400))
    rows = np.full((1, 1, 4, 2), 10)
    left = Need(np.array([8, 0, 90, 300, 0]), rows)
    right = Need(np.array([8, 0, 300, 90, 0]), rows)
    assert cheapest(fitting_rungs(ladder, left)) == 0
    assert cheapest(fitting_rungs(ladder, right)) == 1
    assert cheapest(shared_bits([fitting_rungs(ladder, left), fitting_rungs(ladder, right)])) == 2
    with pytest.raises(ValueError, match="more than the ladder's top"):
        fitting_rungs(ladder, Need(left.totals, rows + 60))
