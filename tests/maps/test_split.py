"""What the split by blocks promises."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from olmoearth_jax.maps import split

SIDE, WINDOW = 1280, 640


@st.composite
def samples(draw):
    """Zones, places and classes of some samples in one or two zones."""
    count = draw(st.integers(1, 60))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    zone = rng.integers(32, 33 + draw(st.integers(0, 1)), count)
    place = rng.uniform(-8000, 8000, (2, count)).round(2)
    kinds = [str(c) for c in rng.choice(list("abcd"), count, p=[0.6, 0.25, 0.1, 0.05])]
    return zone, *place, kinds


def _split(zone, east, north, kinds, seed=3, **more):
    half = WINDOW / 2
    place = np.stack([east, north], 1)
    boxes = (place - half, place + half)
    counts = [{c: 1} for c in kinds]
    return split.split_blocks(zone, east, north, counts, SIDE, seed, boxes=boxes, **more), boxes


@given(samples(), st.integers(0, 1000))
def test_blocks_stay_whole_and_windows_apart(given_, seed):
    zone, east, north, kinds = given_
    got, (low, high) = _split(*given_, seed=seed)
    own = split.blocks_of(zone, east, north, SIDE)
    # G1: no block in two splits.
    assert all(got.blocks[b] == name for b, name in zip(own, got.names, strict=True))
    # G2: with enough blocks no split is empty.
    if len(got.blocks) >= 3:
        assert set(got.blocks.values()) == set(split.SPLITS)
    # G3: no window of a training sample overlaps a block of another split.
    for i in got.rows("train"):
        for (number, x, y), name in got.blocks.items():
            corner = np.array([x, y]) * SIDE
            apart = (high[i] <= corner).any() or (low[i] >= corner + SIDE).any()
            assert name == "train" or number != zone[i] or apart
    assert not got.dropped[[n != "train" for n in got.names]].any()


@given(samples(), st.randoms(use_true_random=False))
def test_the_order_of_samples_does_not_matter(given_, random):
    zone, east, north, kinds = given_
    order = list(range(len(zone)))
    random.shuffle(order)
    turned = zone[order], east[order], north[order], [kinds[i] for i in order]
    one, other = _split(*given_)[0], _split(*turned)[0]
    assert one.blocks == other.blocks
    assert [one.names[i] for i in order] == other.names
    assert (one.dropped[order] == other.dropped).all()


@given(samples())
def test_more_samples_elsewhere_do_not_move_positions(given_):
    """The same labels, side and seed give the same split however they are cut into files."""
    zone, east, north, kinds = given_
    whole = _split(*given_)[0]
    again = _split(zone.copy(), east.copy(), north.copy(), list(kinds))[0]
    assert whole.names == again.names and whole.blocks == again.blocks


def test_a_share_of_zero_removes_a_split():
    rng = np.random.default_rng(0)
    east, north = rng.uniform(0, 20_000, (2, 50))
    got, _ = _split(
        np.full(50, 33), east, north, ["a"] * 50,
        fractions={"train": "0.8", "valid": "0.2", "test": "0"},
    )  # fmt: skip
    assert set(got.names) == {"train", "valid"}


@pytest.mark.parametrize(
    "shares", [{"train": "0.7", "valid": "0.2"}, {"train": "0", "valid": "1"}, {"trian": "1"},
               {"train": "1.2", "test": "-0.2"}, {"train": "x"}],
)  # fmt: skip
def test_bad_shares(shares):
    with pytest.raises(ValueError, match="share|split"):
        split.fractions_of(shares)


def test_the_side_of_blocks_follows_the_labels():
    zone = np.full(400, 33)
    east, north = (a.ravel() * 500.0 for a in np.meshgrid(np.arange(20), np.arange(20)))
    assert split.auto_side(zone, east, north) == 1280
    assert split.auto_side(zone[:6], np.arange(6) * 700.0, np.zeros(6)) == 1280
    with pytest.raises(ValueError, match="in 1 blocks of 640 m.*--block"):
        split.auto_side(zone[:6], np.zeros(6), np.zeros(6))


def test_a_given_split_is_taken_and_overlaps_are_told():
    zone = np.array([33, 33, 33, 34])
    low = np.array([[0.0, 0], [300, 300], [5000, 0], [300, 300]])
    got = split.given_split(["train", "val", "test", "test"], zone, (low, low + 640))
    assert got.names == ["train", "valid", "test", "test"]
    assert got.notes[0].startswith("2 samples")
    assert not split.given_split(["train", "test"], zone[:2], (low[1:3], low[1:3] + 640)).notes
    # The window of the next zone sees the first one's ground.
    beyond = np.array([3]), np.array([33]), low[:1] + 600, low[:1] + 1240
    across = split.given_split(["train", "test", "test", "train"], zone, (low, low + 640), beyond)
    assert across.notes[0].startswith("3 samples")
    with pytest.raises(ValueError, match="'tset'.*test"):
        split.given_split(["train", "tset"], zone[:2], (low[:2], low[:2]))


def test_an_uneven_split_is_told():
    zone, east = np.full(3, 33), np.array([0.0, 2000, 4000])
    got = split.split_blocks(zone, east, np.zeros(3), [{"a": 100}, {"a": 1}, {"b": 1}], SIDE, 0)
    assert any("instead of" in note for note in got.notes)
    assert any("fewer than 3 blocks" in note for note in got.notes)
