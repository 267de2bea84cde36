"""Scores of a map: per class, over all, with intervals over blocks; None where undefined."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from olmoearth_jax.evals import scoring

DRAWS = 1000
"""Resamples of the blocks behind an interval."""
MOST_WEIGHT = 10.0
MOST_NUMBERED = 40
"""Classes up to which pictures of a confusion matrix show its numbers."""
_UNEVEN = 10
"""How many times as large as the smallest class the largest may be before classes are weighted."""


def _ratio(a: float, b: float) -> float | None:
    return float(a) / float(b) if b else None


def _mean(values: Sequence[float | None]) -> float | None:
    there = [v for v in values if v is not None]
    return float(np.mean(there)) if there else None


def class_scores(confusion: np.ndarray) -> dict[str, Any]:
    """Scores that follow from a confusion matrix.

    Args:
      confusion: int [K, K], rows are truth.

    Returns:
      overall_accuracy, balanced_accuracy, macro_f1, mean_iou, and per_class with support,
      predicted, precision, recall, f1 and iou. What is 0/0 is None and does not count in means.
    """
    per_class = []
    for c in range(len(confusion)):
        hit, support = confusion[c, c], confusion[c].sum()
        predicted = confusion[:, c].sum()
        per_class.append({
            "support": int(support), "predicted": int(predicted),
            "precision": _ratio(hit, predicted), "recall": _ratio(hit, support),
            "f1": _ratio(2 * hit, support + predicted),
            "iou": _ratio(hit, support + predicted - hit),
        })  # fmt: skip
    return {
        "overall_accuracy": _ratio(np.trace(confusion), confusion.sum()),
        "balanced_accuracy": _mean([c["recall"] for c in per_class]),
        "macro_f1": _mean([c["f1"] for c in per_class]),
        "mean_iou": _mean([c["iou"] for c in per_class]),
        "confusion": confusion.tolist(),
        "per_class": per_class,
    }


def value_scores(truth: np.ndarray, guess: np.ndarray) -> dict[str, Any]:
    """rmse, mae, bias (predicted - truth) and r2 of values [N]; r2 is None if all are equal."""
    if not len(truth):
        return {"rmse": None, "mae": None, "bias": None, "r2": None}
    found = scoring.regression_metrics(guess, truth)
    error = guess.astype(np.float64) - truth.astype(np.float64)
    r2 = found["r2"] if np.ptp(truth) > 0 else None
    return {"rmse": found["rmse"], "mae": found["mae"], "bias": float(error.mean()), "r2": r2}


def class_weights(counts: Sequence[int], mode: str = "balanced") -> np.ndarray:
    """Weight of each class in the loss, float64 [K].

    'balanced' is min(N / (K n_c), 10), scaled so that all labels together weigh N; 'none' is 1.

    Args:
      counts: labels of each class in training.

    Raises:
      ValueError: another mode, or a class without labels.
    """
    n = np.asarray(counts, np.float64)
    if mode == "none":
        return np.ones(len(n))
    if mode != "balanced":
        raise ValueError(f"class weights are 'balanced', 'none' or a file, not {mode!r}")
    if (n <= 0).any():
        raise ValueError("a class without training labels cannot be weighted")
    out = np.minimum(n.sum() / (len(n) * n), MOST_WEIGHT)
    return out * n.sum() / (n * out).sum()


def uneven(counts: Sequence[int]) -> bool:
    """Whether classes differ so much in size that they are weighted unless told otherwise."""
    return max(counts) > _UNEVEN * max(min(counts), 1)


def class_interval(confusions: np.ndarray, seed: int) -> list[float | None]:
    """95 % interval of macro F1 by resampling blocks.

    Args:
      confusions: int [blocks, K, K].
      seed: of the draws.
    """

    def score(rows: np.ndarray) -> float:
        found = class_scores(confusions[rows].sum(0))["macro_f1"]
        return np.nan if found is None else found

    return _interval(score, len(confusions), seed)


def value_interval(
    truth: np.ndarray, guess: np.ndarray, blocks: np.ndarray, seed: int
) -> list[float | None]:
    """95 % interval of RMSE by resampling blocks; `blocks` int [N], the block of each value."""
    numbers, mine = np.unique(blocks, return_inverse=True)
    squares = (guess.astype(np.float64) - truth) ** 2
    sums = np.bincount(mine, squares, len(numbers))
    sizes = np.bincount(mine, minlength=len(numbers))

    def score(rows: np.ndarray) -> float:
        return float(np.sqrt(sums[rows].sum() / sizes[rows].sum()))

    return _interval(score, len(numbers), seed)


def _interval(score: Any, blocks: int, seed: int) -> list[float | None]:
    if blocks < 2:  # nothing to resample
        return [None, None]
    found = scoring.bootstrap(score, blocks, DRAWS, seed)["bootstrap_scores"]
    kept = [x for x in found if np.isfinite(x)]
    if not kept:
        return [None, None]
    low, high = np.percentile(kept, [2.5, 97.5])
    return [float(low), float(high)]


def majority_confusion(truth: np.ndarray, train_counts: Sequence[int]) -> np.ndarray:
    """Confusion [K, K] of always saying the class that training has most of."""
    size = len(train_counts)
    guess = np.full(truth.shape, int(np.argmax(train_counts)), np.int64)
    return scoring.confusion_matrix(guess, truth, size)


def markdown(report: Mapping[str, Any]) -> str:
    """The report as text for people; see `maps.training` for its members."""
    names, primary = report.get("classes"), report["primary_metric"]
    keys = (
        ("overall_accuracy", "balanced_accuracy", "macro_f1", "mean_iou")
        if names else ("rmse", "mae", "bias", "r2")
    )  # fmt: skip
    test = report["scored_split"]
    low, high = report["interval"]
    out = [f"# {_as_text(report['title'])}", ""]
    span = "" if low is None else f" (95 % of resampled blocks: {_text(low)} to {_text(high)})"
    score = report["splits"][test][primary]
    out += [f"{primary} of the {test} split: **{_text(score)}**{span}", ""]
    out += ["| split | labels | " + " | ".join(keys) + " |", "|---" * (len(keys) + 2) + "|"]
    for name, scores in [*report["splits"].items(), *report["baselines"].items()]:
        row = " | ".join(_text(scores.get(k)) for k in keys)
        out.append(f"| {name} | {scores.get('labels', '')} | {row} |")
    if names:
        columns = ("support", "precision", "recall", "f1", "iou")
        out += ["", f"Classes in the {test} split:", "", "| class | " + " | ".join(columns) + " |"]
        out.append("|---" * (len(columns) + 1) + "|")
        for name, row in zip(names, report["splits"][test]["per_class"], strict=True):
            out.append(f"| {_as_text(name)} | " + " | ".join(_text(row[k]) for k in columns) + " |")
    counts = {k: v for k, v in report["labels"].items() if v}
    out += ["", "Labels: " + ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in counts.items())]
    out += ["", *(f"* {_as_text(note)}" for note in report["notes"])]
    return "\n".join(out).rstrip() + "\n"


def _as_text(text: str) -> str:
    """Markdown that shows a text as it is, on one line."""
    return re.sub(r"([|<\[\]`*\\])", r"\\\1", " ".join(text.split()))


def shortened(name: str) -> str:
    """A name on one line of at most 40 letters, for pictures."""
    name = " ".join(name.split())
    return name if len(name) <= 40 else f"{name[:38]} ..."


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.3f}"
