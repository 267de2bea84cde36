"""Metrics of downstream tasks, computed on the host in float64 (spec/evals.md section 8)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from olmoearth_jax.configlib.tasks import BALANCED, METRICS, DatasetInfo, EvalTaskConfig
from olmoearth_jax.evals.samples import IGNORE
from olmoearth_jax.modalities import closest

_EPS = 1e-8
LOWER_IS_BETTER = ("mae", "rmse")


@dataclasses.dataclass(frozen=True)
class EvalResult:
    """Scores of one split."""

    primary: float
    """Value of the primary metric."""
    primary_metric: str
    """Its name as asked for ('class_f1' for the F1 of one class)."""
    primary_key: str
    """The key of `metrics` that it was taken from."""
    metrics: dict[str, float]
    """Every metric by name."""

    def beats(self, best: float) -> bool:
        """Whether it is strictly better than the primary value `best`; NaN is beaten by all."""
        sign = -1 if self.primary_metric in LOWER_IS_BETTER else 1
        return math.isnan(best) or sign * self.primary > sign * best


def make_result(
    metrics: dict[str, float], task: str, primary: str | None = None, class_id: int | None = None
) -> EvalResult:
    """Picks the primary metric.

    Raises:
      ValueError: the metric wanted was not computed for this kind of task.
    """
    name = primary or METRICS[task][0]
    if name == "class_f1" and class_id is None:
        raise ValueError("primary_metric=class_f1 needs primary_metric_class, the class number")
    key = f"f1_class_{class_id}" if name == "class_f1" else name
    if key not in metrics:
        raise ValueError(f"metric {key!r} was not computed for {task}; {closest(key, metrics)}")
    return EvalResult(float(metrics[key]), name, key, {k: float(v) for k, v in metrics.items()})


def average_precision(labels: np.ndarray, scores: np.ndarray) -> float:
    """Area under the precision-recall steps: labels bool [N], scores [N]; NaN without positives."""
    hits, seen = _threshold_counts(labels, scores)
    if hits[-1] == 0:
        return math.nan
    recall = hits / hits[-1]
    return float(np.sum(np.diff(recall, prepend=0.0) * (hits / seen)))


def roc_auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Area under the ROC curve: labels bool [N], scores [N]; NaN if one class is absent."""
    hits, seen = _threshold_counts(labels, scores)
    misses = seen - hits
    if hits[-1] == 0 or misses[-1] == 0:
        return math.nan
    tpr = np.concatenate([[0.0], hits / hits[-1]])
    fpr = np.concatenate([[0.0], misses / misses[-1]])
    return float(np.sum(np.diff(fpr) * (tpr[1:] + tpr[:-1]) / 2))


def _threshold_counts(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positives and items at or above each distinct score, from the highest down."""
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    last = np.append(np.flatnonzero(np.diff(ranked)), len(ranked) - 1)
    return np.cumsum(labels[order], dtype=np.float64)[last], last + 1.0


def _one_vs_rest(truth: np.ndarray, scores: np.ndarray) -> dict[str, float]:
    """Macro auroc and prauc of bool truth and scores [N, C]; constant classes do not count."""
    rocs, aps = [], []
    for c in range(truth.shape[1]):
        if truth[:, c].any() and not truth[:, c].all():
            rocs.append(roc_auc(truth[:, c], scores[:, c]))
            aps.append(average_precision(truth[:, c], scores[:, c]))
    return {
        "auroc": float(np.mean(rocs)) if rocs else math.nan,
        "prauc": float(np.mean(aps)) if aps else math.nan,
    }


def _f1(tp: np.ndarray, fp: np.ndarray, fn: np.ndarray) -> np.ndarray:
    total = 2 * tp + fp + fn
    return np.where(total > 0, 2 * tp / np.maximum(total, 1), 0.0)


def classification_metrics(
    predictions: np.ndarray, labels: np.ndarray, scores: np.ndarray | None = None
) -> dict[str, float]:
    """Single-label metrics: predictions and labels int [N], scores float [N, C] or None.

    Class F1 keys number the classes that occur, in sorted order, as the reference does.
    """
    classes = np.unique(np.concatenate([labels, predictions]))
    hit = (labels[:, None] == classes, predictions[:, None] == classes)
    tp, fp = (hit[0] & hit[1]).sum(0), (~hit[0] & hit[1]).sum(0)
    f1 = _f1(tp, fp, hit[0].sum(0) - tp)
    out = {"accuracy": float(np.mean(predictions == labels)), "macro_f1": float(f1.mean())}
    if scores is not None:
        out |= _one_vs_rest(labels[:, None] == np.arange(scores.shape[1]), scores)
    return out | {f"f1_class_{i}": float(v) for i, v in enumerate(f1)}


def balanced_accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Mean share of right predictions over the classes that `labels` hold; both int [N]."""
    return float(np.mean([np.mean(predictions[labels == c] == c) for c in np.unique(labels)]))


def multilabel_metrics(
    predictions: np.ndarray, labels: np.ndarray, scores: np.ndarray | None = None
) -> dict[str, float]:
    """Multi-label metrics: predictions and labels 0/1 [N, C], scores float [N, C] or None."""
    truth, guess = labels.astype(bool), predictions.astype(bool)
    tp, fp, fn = ((a & b).sum(0) for a, b in ((truth, guess), (~truth, guess), (truth, ~guess)))
    f1 = _f1(tp, fp, fn)
    out = {
        "accuracy": float(np.mean((truth == guess).all(1))),
        "f1": float(_f1(tp.sum(), fp.sum(), fn.sum())),
        "macro_f1": float(f1.mean()),
    }
    if scores is not None:
        out["micro_map"] = average_precision(truth.ravel(), scores.ravel())
        out |= _one_vs_rest(truth, scores)
    return out | {f"f1_class_{i}": float(v) for i, v in enumerate(f1)}


def confusion_matrix(predictions: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Counts int64 [C, C], rows = truth, over pixels whose label is not IGNORE.

    Raises:
      TypeError: predictions or labels are not integers.
      ValueError: a label or prediction lies outside the classes.
    """
    for name, a in (("predictions", predictions), ("labels", labels)):
        if not np.issubdtype(a.dtype, np.integer):
            raise TypeError(f"segmentation {name} must be integers, got {a.dtype}")
    valid = labels != IGNORE
    truth, guess = labels[valid], predictions[valid]
    for name, a in (("label", truth), ("prediction", guess)):
        if a.size and (a.min() < 0 or a.max() >= num_classes):
            raise ValueError(
                f"{name} {int(a.min() if a.min() < 0 else a.max())} lies outside 0..."
                f"{num_classes - 1} (use {IGNORE} for pixels to ignore)"
            )
    flat = truth.astype(np.int64) * num_classes + guess
    return np.bincount(flat, minlength=num_classes**2).reshape(num_classes, num_classes)


def _confusion_metrics(confusion: np.ndarray) -> dict[str, float]:
    """Segmentation metrics that follow from a confusion matrix.

    Raises:
      ValueError: the matrix is empty (no labelled pixel).
    """
    m = confusion.astype(np.float64)
    if not m.sum():
        raise ValueError("no pixel carries a label: every label is the ignore value")
    tp = np.diag(m)
    fp, fn = m.sum(0) - tp, m.sum(1) - tp
    recall, precision = tp / (tp + fn + _EPS), tp / (tp + fp + _EPS)
    f1 = 2 * precision * recall / (precision + recall + _EPS)
    present, used = tp + fn > 0, tp + fp + fn > 0
    out = {
        "miou": float((tp / (tp + fp + fn + _EPS))[used].mean()),
        "overall_acc": float(tp.sum() / (m.sum() + _EPS)),
        "macro_acc": float(recall[present].mean()),
        "macro_f1": float(f1[present].mean()),
        "micro_f1": float(2 * tp.sum() / (2 * tp.sum() + fp.sum() + fn.sum() + _EPS)),
    }
    return out | {f"f1_class_{i}": float(v) for i, v in enumerate(f1)}


def segmentation_metrics(
    predictions: np.ndarray, labels: np.ndarray, num_classes: int, scores: np.ndarray | None = None
) -> dict[str, float]:
    """Segmentation metrics of int predictions, labels [N, H, W]; scores [N, C, H, W] or None."""
    out = _confusion_metrics(confusion_matrix(predictions, labels, num_classes))
    if scores is not None:
        valid = labels != IGNORE
        flat = np.moveaxis(scores, 1, -1)[valid]
        out |= _one_vs_rest(labels[valid][:, None] == np.arange(num_classes), flat)
    return out


def regression_metrics(predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Regression metrics over finite labels; predictions and labels of one shape.

    Raises:
      ValueError: no finite label.
    """
    valid = np.isfinite(labels)
    if not valid.any():
        raise ValueError("no finite regression label to score against")
    truth = labels[valid].astype(np.float64)
    error = predictions[valid].astype(np.float64) - truth
    rmse = float(np.sqrt(np.mean(error**2)))
    spread = np.sum((truth - truth.mean()) ** 2)
    return {
        "mae": float(np.abs(error).mean()),
        "rmse": rmse,
        "neg_rmse": -rmse,
        "r2": float(1 - np.sum(error**2) / (spread + _EPS)),
    }


def labelled_rows(labels: np.ndarray) -> np.ndarray:
    """bool [N]: the samples whose label, or whose every label, is known; labels [N] or [N, C]."""
    return (labels != IGNORE).reshape(len(labels), -1).all(1)


def any_label(labels: np.ndarray) -> np.ndarray:
    """bool [N]: the samples that have a known label anywhere; labels [N, ...]."""
    known = np.isfinite(labels) if labels.dtype.kind == "f" else labels != IGNORE
    return np.asarray(known.reshape(len(labels), -1).any(1))


def score(
    task: EvalTaskConfig,
    info: DatasetInfo,
    guess: np.ndarray,
    labels: np.ndarray,
    scores: np.ndarray | None = None,
) -> EvalResult:
    """Metrics of predictions of any kind of task.

    Args:
      task: names the primary metric.
      info: what the labels are.
      guess, labels: of one shape; labels of IGNORE, or NaN targets, do not count.
      scores: probabilities, the class axis last, or None.

    Class F1 are named by the class; one that was asked for and occurs nowhere has 0.
    """
    kind = info.scoring
    if "regression" in kind:
        values = regression_metrics(guess, labels)
    elif kind == "segmentation":
        first = None if scores is None else np.moveaxis(scores, -1, 1)
        values = segmentation_metrics(guess, labels, info.num_classes, first)
    else:
        rows = labelled_rows(labels)
        if not rows.any():
            raise ValueError("no sample carries a label: every label is the ignore value")
        guess, labels = guess[rows], labels[rows]
        scores = None if scores is None else scores[rows]
        if kind == "multilabel":
            values = multilabel_metrics(guess, labels, scores)
        else:
            values = _by_class(classification_metrics(guess, labels, scores), guess, labels)
        if task.primary_metric == BALANCED:
            values[BALANCED] = balanced_accuracy(guess, labels)
        if task.primary_metric == "class_f1":
            values.setdefault(f"f1_class_{task.primary_metric_class}", 0.0)
    return make_result(values, kind, task.primary_metric, task.primary_metric_class)


def _by_class(values: dict[str, float], guess: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Class F1 by the class itself, not by its rank among those that occur."""
    classes = np.union1d(guess, labels)
    f1 = {f"f1_class_{c}": values.pop(f"f1_class_{i}") for i, c in enumerate(classes)}
    return values | f1


def bootstrap(
    score: Callable[[np.ndarray], float], n: int, iterations: int, seed: int
) -> dict[str, Any]:
    """Bootstrap of `score(indices)` over n items: scores, mean, std and the 95 % interval.

    Scores that are NaN, of resamples in which nothing can be scored, do not count.
    """
    rng = np.random.default_rng(seed)
    scores = [float(score(rng.choice(n, size=n, replace=True))) for _ in range(iterations)]
    real = [x for x in scores if not math.isnan(x)] or [math.nan]
    low, high = np.percentile(real, [2.5, 97.5])
    return {
        "bootstrap_scores": scores,
        "mean": float(np.mean(real)),
        "std": float(np.std(real)),
        "ci_lower": float(low),
        "ci_upper": float(high),
        "n_bootstrap": iterations,
    }
