"""The shape sampler of v1.3: bounds, exact marginals, keyed draws."""

import dataclasses

import numpy as np
import pytest

from olmoearth_jax import masking
from olmoearth_jax.data import index
from olmoearth_jax.data.budget import max_timesteps
from olmoearth_jax.data.draws import rng
from olmoearth_jax.data.pipeline import TrainStream
from olmoearth_jax.data.shape_sampler import ShapeSampler, TokenRates, token_rates
from olmoearth_jax.modalities import (
    OFFICIAL_DECODE_ONLY,
    OFFICIAL_MODALITIES,
    SINGLE_BAND_SET_OVERRIDES,
    Tokenization,
)
from tests.data.streams import make_config

V1_3 = ShapeSampler(
    tuple(range(1, 9)),
    (*range(1, 17), 18, 20, 24, 28, 32),
    TokenRates(3),
    token_budget=3072,
    min_tokens=228,
    temporal_bias=2.75,
    time_priority=0.5,
)


def marginal(sampler, axis):
    out = {}
    for shape, p in sampler.probabilities().items():
        out[shape[axis]] = out.get(shape[axis], 0.0) + 100 * p
    return dict(sorted(out.items()))


def test_the_exact_marginals_of_the_recipe():
    steps = [4.81, 3.32, 4.63, 6.26, 4.96, 5.61, 6.47, 7.57, 9.41, 12.57, 15.15, 19.24]
    np.testing.assert_allclose(list(marginal(V1_3, 2).values()), steps, atol=0.0051)
    grids = [8.15, 9.35, 9.40, 9.43, 9.44, 9.44, 9.44, 6.01, 4.23, 3.68, 3.34, 3.14, 3.03, 3.03]
    grids += [2.52, 2.08, 1.68, 1.32, 1.32]
    got = marginal(V1_3, 1)
    assert list(got) == [*range(3, 17), 18, 20, 24, 28, 32]
    np.testing.assert_allclose(list(got.values()), grids, atol=0.0051)
    np.testing.assert_allclose(list(marginal(V1_3, 0).values()), 12.5)


def test_the_windows_of_the_recipe():
    windows = {3: (9, 12), 4: (5, 12), 9: (1, 12), 10: (1, 10), 14: (1, 5), 18: (1, 3), 32: (1, 1)}
    found = {g: (least, most) for g, least, most in V1_3.candidates(1)}
    assert windows.items() <= found.items() and not {1, 2} & set(found)


def test_the_cost_counts_bands_of_the_model_and_leaves_maps_out():
    tokens = Tokenization.from_mapping(SINGLE_BAND_SET_OVERRIDES)
    assert token_rates(OFFICIAL_MODALITIES, tokens, OFFICIAL_DECODE_ONLY) == (3, 0, 0, 0)
    assert token_rates(OFFICIAL_MODALITIES, None, OFFICIAL_DECODE_ONLY) == (6, 0, 0, 0)
    assert token_rates((*OFFICIAL_MODALITIES, "latlon", "era5_10")) == (6, 6, 0, 1)


def test_limits_agree_with_the_rule_of_older_recipes():
    old = dataclasses.replace(
        V1_3, rates=token_rates(OFFICIAL_MODALITIES), token_budget=2250, min_tokens=0
    )
    for grid in range(1, 13):
        assert old.most_steps(grid) == max_timesteps(OFFICIAL_MODALITIES, grid, 2250)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"time_priority": 0.0},
        {"time_priority": 1.0},
        {"temporal_bias": 0.0},
        {"token_budget": None, "min_tokens": 0},
        {"rates": TokenRates(6, 6, 1, 1)},
        {"patch_size_probs": (0.5, 0, 0, 0, 0, 0, 0, 0.5)},
        {"grids": (3, 20), "max_timesteps": 12},  # windows with a gap between them
    ],
)
def test_draws_keep_the_limits_and_have_the_probabilities(change):
    sampler = dataclasses.replace(V1_3, **change)
    exact = sampler.probabilities()
    assert abs(sum(exact.values()) - 1) < 1e-9
    draws = [sampler.draw(rng(7, "shape", 1, k)) for k in range(1500)]
    for shape in draws:
        patch, grid, steps = shape
        assert exact[shape] > 0 and patch * grid <= sampler.tile_px
        assert sampler.least_steps(grid) <= steps <= sampler.most_steps(grid)
        assert sampler.tokens(grid, steps) >= sampler.min_tokens
        assert sampler.token_budget is None or sampler.tokens(grid, steps) <= sampler.token_budget
    assert draws == [sampler.draw(rng(7, "shape", 1, k)) for k in range(1500)]
    mean = sum(steps * p for (_, _, steps), p in exact.items())
    spread = sum(steps**2 * p for (_, _, steps), p in exact.items()) - mean**2
    assert abs(np.mean([d[2] for d in draws]) - mean) <= 4 * (spread / 1500) ** 0.5 + 1e-9


BAD = {
    "leaves no grid": {"min_tokens": 4000},
    "tiles of 2 px": {"tile_px": 2},
    "patch_size_probs has 2 numbers for 8": {"patch_size_probs": (0.5, 0.5)},
    "add up to 1": {"patch_size_probs": (0.5,) * 8},
    "time_priority_prob": {"time_priority": 1.5},
    "temporal_bias": {"temporal_bias": float("nan")},
    "grid sizes": {"grids": ()},
    "patch sizes": {"patch_sizes": (0, 1)},
}


@pytest.mark.parametrize("text", BAD)
def test_impossible_settings_are_refused(text):
    with pytest.raises(ValueError, match=text):
        dataclasses.replace(V1_3, **BAD[text])


def test_groups_take_the_drawn_timesteps(dataset):
    strategy = masking.build(
        {"type": "random_time_with_decode", "only_decode_modalities": OFFICIAL_DECODE_ONLY}
    )
    sampler = dataclasses.replace(
        V1_3, patch_sizes=(1, 2), grids=(2, 3, 4), tile_px=16, token_budget=200, min_tokens=20
    )

    def stream(sampler):
        found = index.prepare(dataset, OFFICIAL_MODALITIES)
        return TrainStream(found, make_config(), [strategy], sampler=sampler)

    made = stream(sampler)
    assert made.timesteps == sampler.timesteps
    shapes = [s for step in range(12) for s in made.shapes(step)]
    assert len({s[2] for s in shapes}) > 3 and set(shapes) <= set(sampler.probabilities())
    for number in range(3):
        group, (patch, grid, steps) = made.group(number), made.shape(number)
        assert group["data"]["sentinel1"].shape == (4, patch * grid, patch * grid, steps, 2)
        assert group["timestamps"].shape == (4, steps, 3)
    with pytest.raises(ValueError, match="as large as 128 px, but the tiles of the dataset"):
        stream(V1_3)
