"""Balanced trials: plans, draws, predictors and what is said of them."""

import numpy as np
import pytest

from olmoearth_jax.configlib.trials import CLASSIFIERS, BalancedTrials
from olmoearth_jax.evals import balanced_trials as trials


def splits(counts=(12, 20, 9), width=6, seed=0):
    """Classes that differ in one direction each, spread over three splits."""
    rng = np.random.default_rng(seed)
    y = np.repeat(np.arange(len(counts)), counts)
    x = rng.normal(size=(len(y), width)).astype(np.float32)
    x[np.arange(len(y)), y] += 4
    parts = np.array_split(rng.permutation(len(y)), 3)
    return {s: (x[p], y[p]) for s, p in zip(("train", "valid", "test"), parts, strict=True)}


def test_every_fold_is_balanced_and_scored_on_the_rest():
    said = []
    found = trials.run_trials(splits(), 3, BalancedTrials(max_folds=5), say=said.append)
    assert sorted(found) == ["knn20", "knn5", "ridge"] and not said
    for values in found.values():
        assert values["n_per_class"] == 8 and values["n_folds"] == 5
        assert values["train_size"] == 24 and values["eval_size"] == 17
        assert values["pool_classes"] == values["eval_classes"] == 3
        assert 0.5 < values["balanced_accuracy"] <= 1 and values["auroc"] > 0.6
        assert np.isclose(values["accuracy_sem"], values["accuracy_std"] / 5**0.5)


def test_draws_depend_on_the_seed_alone():
    y = np.repeat([0, 1, 4], [9, 5, 7])
    rows = trials.draw_rows(y, 4, 3)
    np.testing.assert_array_equal(rows, trials.draw_rows(y, 4, 3))
    assert np.any(rows != trials.draw_rows(y, 4, 4)) and np.all(np.diff(rows) > 0)
    assert np.unique(y[rows], return_counts=True)[1].tolist() == [4, 4, 4]
    assert len(trials.draw_rows(y, 6, 0)) == 6 + 5 + 6


def test_the_number_drawn_and_the_folds():
    said = []

    def plan(counts, **settings):
        y = np.repeat(np.arange(len(counts)), counts)
        found = trials.make_plan(y, BalancedTrials(**settings), said.append)
        return tuple(found or ())

    assert plan([96, 500], cap=49)[:2] == (49, 296)
    assert plan([30, 500])[:2] == (27, trials.fold_count(27))
    assert plan([1, 50])[:2] == (1, 1)
    assert plan([30, 40], n_folds=9, max_folds=4)[1] == 4
    assert plan([5]) == () and "two are needed" in said[-1]
    assert plan([5, 5], n_per_class=5) == () and "every sample" in said[-1]
    said.clear()
    assert plan([3, 50], n_per_class=10)
    assert "only 3" in said[0] and "1 classes are drawn whole" in said[1]


def test_missing_splits_are_said_and_bad_labels_dropped():
    data, said = splits(), []
    del data["test"]
    x, y = data["train"]
    data["train"] = (x, np.where(np.arange(len(y)) < 2, -1, y))
    pool = trials.make_pool(data, ("train", "valid", "test"), 3, said.append)
    assert len(pool.y) == len(y) - 2 + len(data["valid"][1]) and "test" in said[0]
    with pytest.raises(ValueError, match="need one of the splits train"):
        trials.make_pool({}, ("train",), 3)
    grids = {"train": (np.zeros((4, 2, 2, 3)), np.arange(4) % 2)}
    with pytest.raises(ValueError, match="one embedding per sample"):
        trials.run_trials(grids, 2, BalancedTrials(), say=said.append)


def test_classes_without_samples_and_penalties():
    data, said = splits((30, 30), width=5), []
    settings = BalancedTrials(n_folds=2, ridge_lambdas=(0.1, 1), knn_ks=(3,), n_per_class=2)
    found = trials.run_trials(data, 4, settings, say=said.append)
    assert sorted(found) == ["knn3", "ridge", "ridge_lam0p1", "ridge_lam1"]
    assert "least norm" in said[0] and found["ridge"]["pool_classes"] == 2


def test_ridge_solves_what_it_says():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(20, 4)), rng.integers(0, 3, 20)
    weights, bias = trials.fit_ridge(x, y, 3, 2.0)
    centred, target = x - x.mean(0), np.where(y[:, None] == np.arange(3), 1.0, -1.0)
    gradient = centred.T @ (centred @ weights - (target - target.mean(0))) + 2.0 * weights
    np.testing.assert_allclose(gradient, 0, atol=1e-9)
    np.testing.assert_allclose(x.mean(0) @ weights + bias, target.mean(0))


def test_values_that_are_no_numbers_do_not_count():
    assert trials.over_folds([1.0, float("nan"), 3.0])[0] == 2.0
    assert trials.over_folds([5.0])[1:] == (0.0, 0.0)
    assert np.isnan(trials.over_folds([float("nan")])[0])


def test_a_stop_reports_the_folds_so_far():
    found = trials.run_trials(splits(), 3, BalancedTrials(), stop=lambda: True, say=lambda _: None)
    assert found["ridge"]["n_folds"] == 1


def test_names():
    assert trials.task_name("descals_ws16_knn", "ridge") == "descals_ws16_aeftrial_ridge"
    assert trials.task_name("descals_knn_proj128", "knn5") == "descals_knn_proj128_aeftrial_knn5"
    assert (
        trials.cap_of("canada_crops_coarse_year_aligned") == 68 and trials.cap_of("glance") == 300
    )


@pytest.mark.parametrize("name", list(CLASSIFIERS))
def test_further_classifiers_say_what_they_need(name, monkeypatch):
    for module in ("sklearn", "sklearn.ensemble", "sklearn.linear_model", "xgboost"):
        monkeypatch.setitem(__import__("sys").modules, module, None)
    settings = BalancedTrials(classifiers=(name,), n_folds=1)
    with pytest.raises(ValueError, match=f"{name!r} needs the package"):
        trials.run_trials(splits(), 3, settings, say=lambda _: None)


def test_forests_of_one_seed_are_one():
    """What a seed promises goes for predictors that draw, too."""
    rng = np.random.default_rng(0)
    held = {"train": (rng.normal(size=(60, 4)).astype("f4"), np.arange(60) % 3)}
    how = {"classifiers": ["rf"], "n_folds": 2, "draw_pool": ["train"], "knn_ks": []}

    def forest(seed):
        found = trials.run_trials(held, 3, BalancedTrials(**how, seed=seed), say=lambda _: None)
        return found["rf"]

    assert forest(0) == forest(0) != forest(1)


@pytest.mark.parametrize(
    "settings, text",
    [
        ({"n_folds": 0}, "n_folds must be at least 1"),
        ({"least_class_draw_fraction": 0}, "least_class_draw_fraction"),
        ({"knn_ks": (0,)}, "knn_ks"),
        ({"ridge_lambdas": (-1.0,)}, "penalty"),
        ({"classifiers": ("xbg",)}, "did you mean 'xgb'"),
    ],
)
def test_settings_that_cannot_be(settings, text):
    with pytest.raises(ValueError, match=text):
        trials.run_trials(splits(), 3, BalancedTrials(**settings), say=lambda _: None)
