"""Scores, weights and intervals."""

import numpy as np
import pytest
from sklearn import metrics as known

from olmoearth_jax.maps import report


def test_scores_agree_with_another_library():
    rng = np.random.default_rng(1)
    truth, guess = rng.integers(0, 4, (2, 500))
    got = report.class_scores(known.confusion_matrix(truth, guess))
    assert got["macro_f1"] == pytest.approx(known.f1_score(truth, guess, average="macro"))
    assert got["balanced_accuracy"] == pytest.approx(known.balanced_accuracy_score(truth, guess))
    assert got["mean_iou"] == pytest.approx(known.jaccard_score(truth, guess, average="macro"))
    assert got["overall_accuracy"] == pytest.approx(known.accuracy_score(truth, guess))


def test_nothing_to_score_is_none():
    got = report.class_scores(np.zeros((3, 3), int))
    assert got["macro_f1"] is None and got["overall_accuracy"] is None
    assert set(report.value_scores(np.zeros(0), np.zeros(0)).values()) == {None}
    assert report.value_scores(np.ones(4), np.zeros(4))["r2"] is None


def test_weights_keep_the_sum():
    counts = [1000, 10, 300]
    weights = report.class_weights(counts)
    assert weights @ counts == pytest.approx(sum(counts))
    assert report.uneven(counts) and not report.uneven([10, 100])
    assert report.class_weights(counts, "none").tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="'balancd'"):
        report.class_weights(counts, "balancd")


def test_intervals_hold_the_score_and_repeat():
    rng = np.random.default_rng(2)
    confusions = rng.integers(0, 20, (12, 3, 3)) + 30 * np.eye(3, dtype=int)
    low, high = report.class_interval(confusions, 5)
    assert low < report.class_scores(confusions.sum(0))["macro_f1"] < high
    assert [low, high] == report.class_interval(confusions, 5)
    truth = rng.normal(size=200)
    guess, blocks = truth + rng.normal(size=200), rng.integers(0, 9, 200)
    low, high = report.value_interval(truth, guess, blocks, 5)
    assert low < report.value_scores(truth, guess)["rmse"] < high
    assert report.class_interval(confusions[:1], 0) == [None, None]


def test_the_majority():
    got = report.majority_confusion(np.array([0, 1, 2, 1]), [3, 9, 1])
    assert got.tolist() == [[0, 1, 0], [0, 2, 0], [0, 1, 0]]
