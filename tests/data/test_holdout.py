"""The split by location: blocks as a whole, the same ones whatever else is in the dataset."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch import _samples
from olmoearth_jax import overrides
from olmoearth_jax.checkpoints import integrity
from olmoearth_jax.configlib.official import official
from olmoearth_jax.data import index
from olmoearth_jax.data.holdout import held_out
from olmoearth_jax.data.sample import sample_dataset_dir

NAMES = ["sentinel2_l2a", "openstreetmap_raster"]
SAMPLE = sample_dataset_dir()
KNOWN = [[False, False, False, False], [True, True, False, False], [True, True, True, True]]


def numbers(fraction, part="train", **changes) -> list[int]:
    found = index.chosen_numbers(
        SAMPLE, NAMES, validation_fraction=fraction, part=part, **{"seed": 3, **changes}
    )
    return found.tolist()


def test_nothing_changes_without_a_fraction():
    plain = index.prepare(SAMPLE, NAMES, seed=3)
    none = index.prepare(SAMPLE, NAMES, seed=3, validation_fraction=0.0)
    assert none.content == plain.content and none.fingerprint == plain.fingerprint
    np.testing.assert_array_equal(none.parts[0].numbers, plain.parts[0].numbers)
    assert numbers(0.0, "validation") == []


def test_parts_are_whole_blocks_and_everything():
    train, held = numbers(0.4), numbers(0.4, "validation")
    assert train and held and sorted(train + held) == numbers(0.0)
    latlon = np.load(SAMPLE / index.LATLON_FILE).astype(np.float64)
    blocks = [{tuple(b) for b in np.floor(latlon[part] * 10 + 1e-4).tolist()} for part in
              (train, held)]  # fmt: skip
    assert not blocks[0] & blocks[1]
    other = index.prepare(SAMPLE, NAMES, seed=3, validation_fraction=0.4)
    assert other.latlon is not None and len(other.latlon) == len(other) == len(train)
    assert other.content != index.prepare(SAMPLE, NAMES, seed=3).content


def test_a_share_of_the_samples_is_split_alike():
    some = numbers(0.4, dataset_percentage=0.5), numbers(0.4, "validation", dataset_percentage=0.5)
    whole = set(numbers(0.4)), set(numbers(0.4, "validation"))
    assert set(some[0]) < whole[0] and set(some[1]) < whole[1]


@given(
    st.lists(
        st.tuples(st.floats(-90, 90), st.floats(-180, 180)), min_size=1, max_size=30, unique=True
    ),
    st.integers(0, 2**62),
)
def test_the_lot_of_a_place_is_its_own(places, seed):
    whole = held_out(np.array(places), 0.3, seed)
    alone = [bool(held_out(np.array([p]), 0.3, seed)[0]) for p in places]
    assert whole.tolist() == alone
    assert (held_out(np.array(places), 0.6, seed) >= whole).all()  # larger ones hold smaller ones
    assert not held_out(np.array(places), 0.0, seed).any()


def test_the_fraction_is_that_of_the_blocks():
    rng = np.random.Generator(np.random.Philox(0))
    places = rng.uniform([-60, -180], [70, 180], (20_000, 2))
    assert held_out(places, 0.1, 0).mean() == pytest.approx(0.1, abs=0.01)
    seeds = [held_out(places, 0.1, seed) for seed in (0, 1)]
    assert (seeds[0] & seeds[1]).mean() == pytest.approx(0.01, abs=0.005)


def test_known_lots():
    """The split never changes: runs that go on must find their own."""
    places = np.array([[52.31, 12.45], [52.41, 12.45], [52.3, 12.5], [-0.05, 179.99]])
    lots = [0.25, 0.5, 0.75]
    found = [held_out(places, fraction, 7).tolist() for fraction in lots]
    assert found == KNOWN


def test_refused(tmp_path):
    with pytest.raises(ValueError, match="leaves no sample of .* for validation"):
        numbers(1e-9, "validation")
    with pytest.raises(ValueError, match="some are no numbers"):
        held_out(np.array([[np.nan, 1.0]]), 0.5, 0)
    for file in SAMPLE.iterdir():
        if file.name != index.LATLON_FILE and not file.name.endswith(".h5"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match="needs .*latlon_distribution.npy"):
        index.chosen_numbers(tmp_path, NAMES, validation_fraction=0.2)


def test_plans_count_what_is_trained_on():
    cfg = overrides.apply_values(
        official("nano"),
        {
            "dataset.h5py_dir": str(SAMPLE),
            "common.training_modalities": NAMES,
            "dataset.validation_fraction": 0.4,
            "dataset.seed": 3,
        },
    )
    assert _samples.known(cfg).count == len(numbers(0.4))
    cfg.dataset.h5py_dir = "/nowhere/1000"
    assert _samples.known(cfg).count == 600


def test_older_checkpoints_had_no_split():
    saved, now = {"dataset": {"seed": 0}}, {"dataset": {"seed": 0, "validation_fraction": 0.0}}
    assert integrity.config_differences(saved, now) == []
    now["dataset"]["validation_fraction"] = 0.1
    assert integrity.config_differences(saved, now) == ["dataset.validation_fraction: 0.0 -> 0.1"]
