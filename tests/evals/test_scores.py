"""Metrics, kNN, transforms: against definitions and other implementations, and bad input."""

import numpy as np
import pytest
import sklearn.metrics as sk
from hypothesis import given, settings
from hypothesis import strategies as st

from olmoearth_jax.configlib.tasks import DatasetInfo, EvalTaskConfig, RunOptions
from olmoearth_jax.evals import embeddings, knn, scoring
from olmoearth_jax.evals.datasets.bands import Statistics, impute_stats, normalize
from olmoearth_jax.inference import quantize
from tools.convert_evals import fit_buckets, save_buckets

STATS = Statistics(np.zeros(2), np.ones(2))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(4, 60), st.integers(1, 6))
def test_ranking_scores_equal_sklearn(seed, n, levels):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, n).astype(bool)
    labels[:2] = (True, False)
    scores = rng.integers(0, levels, n) / levels
    assert scoring.roc_auc(labels, scores) == pytest.approx(sk.roc_auc_score(labels, scores))
    want = sk.average_precision_score(labels, scores)
    assert scoring.average_precision(labels, scores) == pytest.approx(want)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 5))
def test_confusion_counts_only_labelled_pixels(seed, classes):
    rng = np.random.default_rng(seed)
    labels = rng.integers(-1, classes, (2, 5, 5))
    guess = rng.integers(0, classes, (2, 5, 5))
    matrix = scoring.confusion_matrix(guess, labels, classes)
    assert matrix.sum() == (labels >= 0).sum()
    assert np.trace(matrix) == ((labels == guess) & (labels >= 0)).sum()


def test_perfect_segmentation_scores_one():
    labels = np.array([[[0, 1], [2, -1]]])
    out = scoring.segmentation_metrics(np.maximum(labels, 0), labels, 3)
    assert out["miou"] == pytest.approx(1) and out["f1_class_2"] == pytest.approx(1)


def test_metrics_refuse_what_cannot_be_scored():
    with pytest.raises(TypeError, match="integers"):
        scoring.confusion_matrix(np.zeros(3), np.zeros(3, int), 2)
    with pytest.raises(ValueError, match="label 5 lies outside"):
        scoring.confusion_matrix(np.zeros(1, int), np.array([5]), 2)
    with pytest.raises(ValueError, match="every label is the ignore value"):
        scoring.segmentation_metrics(np.zeros((1, 2, 2), int), np.full((1, 2, 2), -1), 2)
    with pytest.raises(ValueError, match="no finite"):
        scoring.regression_metrics(np.zeros(2), np.full(2, np.nan))
    with pytest.raises(ValueError, match="was not computed.*'miou'"):
        scoring.make_result({"miou": 0.5}, "segmentation", "mious")
    with pytest.raises(ValueError, match="primary_metric_class"):
        scoring.make_result({"miou": 0.5}, "segmentation", "class_f1")


@pytest.mark.parametrize("held", [[0, 1, 2, 3], [0, 2, 3], [3], [1, 3], [0]])
def test_f1_of_a_class_is_that_of_the_class(held):
    """Also if classes before it occur nowhere, or itself does not."""
    rng = np.random.default_rng(0)
    truth, guess = rng.choice(held, 40), rng.choice(held, 40)
    info = DatasetInfo("t", "classification", 4, ())
    for c in range(4):
        wanted = EvalTaskConfig(primary_metric="class_f1", primary_metric_class=c)
        out = scoring.score(wanted, info, guess, truth)
        want = sk.f1_score(truth == c, guess == c, zero_division=0)
        assert out.primary_key == f"f1_class_{c}" and out.primary == pytest.approx(want)
    # As the reference numbers them where no task asks.
    assert len(scoring.classification_metrics(guess, truth)) == 2 + len(np.union1d(truth, guess))


def test_knn_equals_the_full_similarity_matrix(monkeypatch):
    rng = np.random.default_rng(1)
    train, query = rng.normal(size=(333, 9)), rng.normal(size=(57, 9))
    whole = knn.neighbours(train, query, 7)
    monkeypatch.setattr(knn, "TRAIN_BLOCK", 50)
    monkeypatch.setattr(knn, "QUERY_BLOCK", 16)
    blocks = knn.neighbours(train, query, 7)
    unit = [a / np.linalg.norm(a, axis=1, keepdims=True) for a in (train, query)]
    want = np.argsort(-(unit[1] @ unit[0].T), axis=1)[:, :7]
    for values, index in (whole, blocks):
        assert np.array_equal(index, want)
        assert np.allclose(values, np.take_along_axis(unit[1] @ unit[0].T, want, 1), atol=1e-6)


def test_knn_can_skip_the_query_itself():
    x = np.random.default_rng(2).normal(size=(30, 4))
    _, index = knn.neighbours(x, x, 3, skip_nearest=True)
    assert not (index == np.arange(30)[:, None]).any()


def test_knn_of_several_labels_is_one_vote_per_label():
    rng = np.random.default_rng(3)
    train, query = rng.normal(size=(40, 5)), rng.normal(size=(9, 5))
    labels = rng.integers(0, 2, (40, 3))
    scores, hard = knn.knn_scores((train, labels), query, 3, k=5)
    for c in range(3):
        single, guess = knn.knn_scores((train, labels[:, c]), query, 2, k=5)
        assert np.allclose(scores[:, c], single[:, 1], atol=1e-6)
        assert np.array_equal(hard[:, c], guess)


def test_knn_refuses_bad_input():
    x, y = np.eye(4), np.zeros(4, int)
    with pytest.raises(ValueError, match="at least 20 train samples"):
        knn.knn_scores((x, y), x, 2)
    with pytest.raises(ValueError, match="NaN"):
        knn.knn_scores((x * np.nan, y), x, 2, k=2)
    info, options = DatasetInfo("t", "classification", 2, ()), RunOptions(k=2)
    for train, query, message in (
        ((x, y + 7), (x, y), "train split holds label 7, outside 0...1"),
        ((x, y), (x[:0], y[:0]), "the query split is empty"),
        ((x, y), (x, y - 1), "every label of the query split is the ignore value"),
        ((x, np.array([0, -1, -1, -1])), (x, y), "at least 2 train samples for k=2, got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            knn.run_knn(EvalTaskConfig(), info, train, query, options)


def test_samples_without_a_label_neither_vote_nor_count():
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=(30, 4)), rng.integers(0, 3, 30)
    info, options = DatasetInfo("t", "classification", 3, ()), RunOptions(k=5)
    some = np.where(np.arange(30) < 20, y, -1)
    got, _ = knn.run_knn(EvalTaskConfig(), info, (x, some), (x, some), options)
    want, _ = knn.run_knn(EvalTaskConfig(), info, (x[:20], y[:20]), (x[:20], y[:20]), options)
    assert got == want


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(quantize.BITS))
def test_quantising_the_midpoints_changes_nothing(seed, bits):
    x = np.random.default_rng(seed).normal(size=(300, 3))
    table = fit_buckets(x, bits)
    once = table.dequantize(table.quantize(x))
    assert np.array_equal(table.dequantize(table.quantize(once)), once)


def test_quantile_tables_survive_a_file(tmp_path):
    x = np.random.default_rng(0).normal(size=(50, 4))
    tables = {b: fit_buckets(x, b) for b in (1, 8)}
    save_buckets(tmp_path / "q.h5", tables)
    back = quantize.load_buckets(tmp_path / "q.h5", 8)
    assert np.array_equal(back.quantiles, tables[8].quantiles)
    with pytest.raises(ValueError, match="4 bits"):
        quantize.load_buckets(tmp_path / "q.h5", 4)
    with pytest.raises(ValueError, match="one of"):
        quantize.load_buckets(tmp_path / "q.h5", 3)
    with pytest.raises(ValueError, match="4 dimensions"):
        back.quantize(np.zeros((2, 5)))


def test_pca_refuses_too_many_dimensions():
    with pytest.raises(ValueError, match="embedding_dim 9"):
        embeddings.fit_pca(np.zeros((20, 5)), 9)


def test_diagnostics_refuse_other_shapes():
    with pytest.raises(ValueError, match="shape"):
        embeddings.flat_diagnostics(np.zeros((2, 2, 2)))


def test_collapsed_embeddings_have_rank_one():
    x = np.ones((50, 8), np.float32)
    out = embeddings.flat_diagnostics(x)
    assert out["effective_rank"] == pytest.approx(1) and out["cosine_sim_std"] < 1e-6


def test_normalisation_names_unknown_methods():
    with pytest.raises(ValueError, match="did you mean 'standardize'"):
        normalize(np.zeros(2), STATS, "standardise")
    with pytest.raises(ValueError, match="minimum and maximum"):
        normalize(np.zeros(2), STATS, "norm_yes_clip_min_max_int")
    with pytest.raises(ValueError, match="statistics already"):
        impute_stats({"a": {}, "b": {}}, [("a", "b")], ["a", "b"])


@pytest.mark.parametrize("several", [False, True])
def test_resamples_of_knn_leave_out_what_has_no_label(several):
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, (60, 2) if several else 60)
    x = (np.atleast_2d(y.T).T * 4.0 + rng.normal(0, 0.1, (60, 2 if several else 1))) - 2.0
    x = np.concatenate([x, np.ones((60, 1))], 1).astype(np.float32)
    info = DatasetInfo("x", "classification", 2, (), multilabel=several)
    task, options = EvalTaskConfig(dataset="x"), RunOptions(k=3, n_bootstrap=20)
    whole, resampled = knn.run_knn(task, info, (x, y), (x, y), options)
    part = y.copy()
    part[::2] = -1  # what they are is not known
    some, resampled_some = knn.run_knn(task, info, (x, y), (x, part), options)
    assert whole.primary == some.primary == 1.0
    assert resampled["mean"] == resampled_some["mean"] == 1.0
