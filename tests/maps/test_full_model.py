"""Parts of fine-tuning a whole encoder that need no training."""

import dataclasses

import jax
import numpy as np
import pytest

from olmoearth_jax import Sample
from olmoearth_jax.evals import probe_heads
from olmoearth_jax.inference.model import PretrainedModel
from olmoearth_jax.maps import full_model, labels, run_folder
from olmoearth_jax.maps.samples import NONE, Target, Window
from olmoearth_jax.maps.tokens import Settings
from tests.inference.test_model import S2, weights_of

TARGET = Target([labels.Class(1, "a", "#000000"), labels.Class(2, "b", "#ffffff")])


def _sample(seed, missing=False):
    rng = np.random.default_rng(seed)
    x = rng.uniform(200, 4000, (16, 16, 2, 12)).astype(np.float32)
    if missing:
        x[:4, :4] = np.nan
    return Sample.from_arrays(
        {"sentinel2_l2a": x}, ["2021-01", "2021-04"], bands={"sentinel2_l2a": S2},
        nan_pixels="mask",
    )  # fmt: skip


@pytest.fixture(scope="module")
def pixels():
    model = PretrainedModel(weights_of())
    head = full_model.head_of(TARGET, model)
    params = {"encoder": model.params, "head": probe_heads.init(head, 3)[0]}
    return full_model.FullPixels(model, Settings(4), head, params, (0.0, 1.0), 3)


def test_a_window_does_not_see_its_neighbours(pixels):
    samples = [_sample(0), _sample(1, missing=True), _sample(2), _sample(3)]
    values, seen = pixels(samples)
    assert values.shape == (4, 16, 16, 2) and np.allclose(values[seen].sum(-1), 1, atol=1e-5)
    assert not seen[1, :4, :4].any() and seen[1, 4:].all() and seen[0].all()
    for i, sample in enumerate(samples):
        alone, there = pixels([sample])
        np.testing.assert_allclose(alone[0], values[i], atol=1e-6)
        np.testing.assert_array_equal(there[0], seen[i])


def test_stored_values_come_back(pixels, tmp_path):
    changed = dataclasses.replace(
        pixels, params=jax.tree.map(lambda x: np.asarray(x) * 1.1, pixels.params)
    )
    run_folder.save_arrays(tmp_path / "encoder.npz", changed.params)
    base, path = pixels.base, tmp_path / "encoder.npz"
    again = full_model.load(base, Settings(4), TARGET, path, (0.0, 1.0), 3)
    samples = [_sample(5)]
    np.testing.assert_array_equal(again(samples)[0], changed(samples)[0])
    assert np.abs(again(samples)[0] - pixels(samples)[0]).max() > 1e-4
    held = run_folder.load_arrays(path)
    for name in (next(iter(held)), "head/linear/bias"):
        np.savez(path, **{k: v for k, v in held.items() if k != name})
        with pytest.raises(ValueError, match=f"lacks {name} in the form of the model"):
            full_model.load(base, Settings(4), TARGET, path, (0.0, 1.0), 3)


def test_pixels_count_by_their_weights_one_on_average():
    def window(codes, weights):
        return Window(0, 0, 0, (2, 2), np.array(codes), (0.0, 0.0), weights=weights)

    some = np.array([[1, np.nan], [2, 5]], np.float32)
    windows = [
        window([[0, NONE], [1, NONE]], some),
        window([[0, 0], [NONE, NONE]], None),
        window([[NONE, 1], [NONE, NONE]], np.full((2, 2), 4, np.float32)),
    ]
    got = full_model._weights(TARGET, windows)
    mean = (1 + 2 + 1 + 1 + 4) / 5
    want = [[[1, 0], [2, 0]], [[1, 1], [0, 0]], [[0, 4], [0, 0]]]
    np.testing.assert_allclose(got, np.array(want) / mean, rtol=1e-6)
    assert full_model._weights(TARGET, windows[1:2]) is None
    with pytest.raises(ValueError, match="training split have the weight 0"):
        full_model._weights(TARGET, [window([[0, 0], [0, 0]], np.zeros((2, 2), np.float32))])
