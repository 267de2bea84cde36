"""Token counts, balancing over devices, ladder and packing."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from olmoearth_jax.masks import DECODE, VISIBLE
from olmoearth_jax.stream.ladder import build_ladder
from olmoearth_jax.stream.pack import assign_rows, online_sections, pack_device, target_sections
from olmoearth_jax.stream.stream_shape import REGISTER
from olmoearth_jax.stream.token_counts import Need, balance_devices, count_tokens, needs
from tests.stream.builders import make_group, make_spec, pick_rung, small_model


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 1000), min_size=4, max_size=4 * 6), st.sampled_from([1, 2, 4]))
def test_deal_gives_equal_counts_and_balances(costs, devices):
    costs = np.array(costs[: len(costs) // 4 * 4])
    costs = np.stack([costs, costs[::-1]], axis=1)
    owner = balance_devices(costs, devices)
    counts = np.bincount(owner, minlength=devices)
    assert (counts == len(costs) // devices).all()
    np.testing.assert_array_equal(owner, balance_devices(costs, devices))


def test_deal_refuses_an_uneven_split():
    with pytest.raises(ValueError, match="do not divide over 3 devices"):
        balance_devices(np.ones((4, 1)), 3)


def test_rows_overflow_into_longer_classes():
    rows = assign_rows(np.array([0, 0, 1]), (1, 2))
    assert sorted(rows) == [0, 1, 2] and rows[2] in (1, 2)
    with pytest.raises(ValueError, match="too few rows"):
        assign_rows(np.array([1, 1, 1]), (1, 2))


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), grid=st.integers(1, 4), missing=st.sampled_from([0.0, 0.3, 0.9]))
def test_packing_keeps_every_token_once(seed, grid, missing):
    rng = np.random.default_rng(seed)
    group, strategy = make_group(rng, 4, grid, 2, missing=missing, holes=(1,))
    spec = make_spec(small_model(), strategy, samples=4)
    counts = count_tokens(group, spec)
    assert not counts.alive[1]
    rung = spec.top_rung()
    assert pick_rung([rung], needs([counts], np.zeros(4, int), spec, 1)) == 0
    pack = pack_device(spec, rung, [counts], [np.arange(4)]).arrays
    assert (pack.enc_row < spec.rows).sum() == counts.enc.sum()
    assert (pack.dec_row < spec.rows).sum() == counts.dec.sum()
    table = pack.enc_inverse.shape[1]
    real = np.flatnonzero(pack.enc_patch < table)
    views = pack.row_view[pack.enc_row[real]]
    # The inverse index undoes the gather, per view.
    np.testing.assert_array_equal(pack.enc_inverse[views, pack.enc_patch[real]], real)
    assert (pack.enc_inverse < rung.enc).sum() == len(real)
    np.testing.assert_array_equal(pack.mod_length.sum(1), pack.dec_length)
    assert pack.weight.tolist() == counts.alive.astype(float).tolist()


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), registers=st.sampled_from([0, 3]), dead=st.booleans())
def test_rows_of_several_groups_stand_one_behind_another(seed, registers, dead):
    """Token by token: what each row holds, and where its patches lie."""
    rng = np.random.default_rng(seed)
    groups, strategy = [], None
    for size, grid, patch in ((4, 2, 2), (3, 3, 1)):
        holes = tuple(range(size)) if dead and size == 3 else (1,)
        group, strategy = make_group(rng, size, grid, patch, holes=holes)
        groups.append(group)
    spec = make_spec(small_model(), strategy, samples=5)
    spec = dataclasses.replace(
        spec, registers=registers, enc_bound=spec.enc_bound + registers,
        plans=tuple(
            dataclasses.replace(p, queries=p.queries + registers, keys=p.keys + registers)
            for p in spec.plans
        ),
    )  # fmt: skip
    rung, members = spec.top_rung(), [np.array([0, 1, 3]), np.array([0, 2])]
    counts = [count_tokens(group, spec) for group in groups]
    pack = pack_device(spec, rung, counts, members)
    got, online, target = pack.arrays, online_sections(spec, rung), target_sections(rung)
    places = {}
    for run in pack.runs:
        number = next(i for i, c in enumerate(counts) if c is run.counts)
        places |= {(number, b): o for b, o in zip(run.members, run.offsets, strict=True)}
    samples = [(g, b) for g, mine in enumerate(members) for b in mine]
    alive = [i for i, (g, b) in enumerate(samples) if counts[g].alive[b]]
    rare = [n for n, slot in enumerate(spec.slots) if not slot.encodable]
    enc = dec = 0
    for row, (view, i) in enumerate((v, i) for v in range(spec.views) for i in alive):
        g, b = samples[i]
        table, mask = counts[g].table, counts[g].masks[view, b]
        assert (got.row_view[row], got.row_sample[row], got.sample_row[view, i]) == (view, i, row)
        assert (got.enc_offset[row], got.dec_offset[row]) == (enc, dec)
        assert (got.enc_coord[enc : enc + registers] == REGISTER).all()
        local = places[g, b][table.slot] + counts[g].rank[b]
        for tokens, stream, at in (
            (np.flatnonzero(mask == VISIBLE), "enc", enc + registers),
            (np.flatnonzero(mask == DECODE), "dec", dec),
        ):
            own = slice(at, at + len(tokens))
            patch = getattr(got, f"{stream}_patch")[own]
            assert getattr(got, f"{stream}_length")[row] == own.stop - (enc, dec)[stream == "dec"]
            assert (getattr(got, f"{stream}_row")[own] == row).all()
            np.testing.assert_array_equal(getattr(got, f"{stream}_coord")[own], table.coord[tokens])
            expected = target[table.slot[tokens]] + local[tokens]
            if stream == "enc":
                inside = patch - online[table.slot[tokens]]
                for k, s in enumerate(rare):
                    inside[table.slot[tokens] == s] = got.sparse[k][inside[table.slot[tokens] == s]]
                patch, expected = inside, local[tokens]
                assert (got.table_sample[got.enc_patch[own]] == i).all()
            np.testing.assert_array_equal(patch, expected)
        enc, dec = enc + got.enc_length[row], dec + got.dec_length[row]
    assert (got.row_sample == spec.samples).sum() == spec.rows - spec.views * len(alive)
    np.testing.assert_array_equal(np.take_along_axis(got.order, got.rank, 1)[0], range(spec.rows))


def test_ladder_holds_what_it_saw_and_ends_at_the_bound():
    rng = np.random.default_rng(3)
    vectors = []
    for i in range(40):
        group, strategy = make_group(rng, 4, 1 + i % 4, 2)
        spec = make_spec(small_model(), strategy, samples=4)
        vectors.append(needs([count_tokens(group, spec)], np.zeros(4, int), spec, 1))
    ladder = build_ladder(spec, vectors, 5)
    assert 2 <= len(ladder) <= 5
    assert ladder[-1] == spec.top_rung()
    picked = [pick_rung(ladder, v) for v in vectors]
    assert len(set(picked)) > 1
    with pytest.raises(ValueError, match="more than the ladder's top"):
        pick_rung(ladder, Need(spec.top_rung().totals + 1, vectors[0].lengths))
