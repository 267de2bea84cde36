"""Repeated small balanced training sets out of one pool of embeddings (spec/evals_v1_3.md 3).

Every fold draws the same number of samples of each class, fits simple predictors on them and
scores all other samples of the pool. The pool holds the test split too, so these scores spend it.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from olmoearth_jax.configlib.tasks import BALANCED
from olmoearth_jax.configlib.trials import CLASSIFIERS, BalancedTrials
from olmoearth_jax.evals.knn import neighbours, vote
from olmoearth_jax.evals.samples import Split
from olmoearth_jax.evals.scoring import balanced_accuracy, classification_metrics

_CAPS = {
    "ethiopia_crops": 49,
    "africa_crop_mask": 200,
    "canada_crops_fine": 75,
    "canada_crops_coarse": 68,
    "descals": 200,
}
"""Most samples of a class that a fold draws, by the beginning of a data set's name."""

_DEFAULT_CAP = 300
METRICS = (BALANCED, "accuracy", "macro_f1", "auroc", "prauc")

Say = Callable[[str], None]


def cap_of(dataset: str) -> int:
    """Most samples of a class that a fold of this data set draws."""
    return next((cap for prefix, cap in _CAPS.items() if dataset.startswith(prefix)), _DEFAULT_CAP)


def task_name(host: str, predictor: str) -> str:
    """Name under which a predictor of the task `host` is reported."""
    return f"{host.removesuffix('_knn')}_aeftrial_{predictor}"


class Pool(NamedTuple):
    """All samples that folds draw from: embeddings float32 [N, D] and classes int64 [N]."""

    x: np.ndarray
    y: np.ndarray


def make_pool(
    splits: Mapping[str, Split], names: Sequence[str], num_classes: int, say: Say = print
) -> Pool:
    """Joins splits, less the samples whose label is no class.

    Raises:
      ValueError: none of the splits is there.
    """
    there = [n for n in names if n in splits]
    if not there:
        raise ValueError(f"balanced trials need one of the splits {', '.join(names)}")
    if missing := [n for n in names if n not in splits]:
        say(f"balanced trials go without the splits {', '.join(missing)}")
    x = np.concatenate([np.asarray(splits[n][0], np.float32) for n in there])
    y = np.concatenate([np.asarray(splits[n][1]).astype(np.int64) for n in there])
    keep = (y >= 0) & (y < num_classes)
    return Pool(x[keep], y[keep])


class Plan(NamedTuple):
    """What folds of a pool look like.

    Attributes:
      per_class: samples of a class that a fold draws.
      folds: number of folds.
      least: samples of the least populated class.
      classes: classes that the pool has.
    """

    per_class: int
    folds: int
    least: int
    classes: int


def fold_count(per_class: int) -> int:
    """Folds for a number of samples per class: fewer where each fold says more."""
    return 1 if per_class <= 1 else max(1, round(1000 / (2 * math.log10(per_class))))


def make_plan(y: np.ndarray, settings: BalancedTrials, say: Say = print) -> Plan | None:
    """The plan of a pool with the classes `y`; None, and a line that says why, if there is none."""
    classes, counts = np.unique(y, return_counts=True)
    if len(classes) < 2:
        say(f"no balanced trials: the pool has {len(classes)} classes, and two are needed")
        return None
    least = int(counts.min())
    drawn = settings.n_per_class
    if drawn is None:
        drawn = min(
            settings.cap or _DEFAULT_CAP,
            max(1, math.floor(settings.least_class_draw_fraction * least)),
        )
    if drawn > least:
        say(f"a fold draws {drawn} samples of a class, but the least class has only {least}")
    if gone := int((counts <= drawn).sum()):
        say(f"{gone} classes are drawn whole, so that none of them is left to be scored")
    if int(np.minimum(counts, drawn).sum()) == len(y):
        say("no balanced trials: a fold would draw every sample")
        return None
    folds = settings.n_folds or fold_count(drawn)
    return Plan(drawn, min(folds, settings.max_folds or folds), least, len(classes))


def draw_rows(y: np.ndarray, per_class: int, seed: int) -> np.ndarray:
    """Rows int64, ascending, of one fold's training set."""
    rng = np.random.Generator(np.random.PCG64(seed))
    rows = [rng.permutation(np.flatnonzero(y == c))[:per_class] for c in np.unique(y)]
    return np.sort(np.concatenate(rows))


def fit_ridge(
    x: np.ndarray, y: np.ndarray, num_classes: int, penalty: float = 0.0, intercept: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Weights [D, C] and bias [C], float64, of a regression on +1 for the class and -1 else.

    Without a penalty it is the solution of least norm.
    """
    x = np.asarray(x, np.float64)
    target = np.where(np.asarray(y)[:, None] == np.arange(num_classes), 1.0, -1.0)
    x_mean = x.mean(0) if intercept else np.zeros(x.shape[1])
    y_mean = target.mean(0) if intercept else np.zeros(num_classes)
    a, b = x - x_mean, target - y_mean
    if penalty:
        weights = np.linalg.solve(a.T @ a + penalty * np.eye(a.shape[1]), a.T @ b)
    else:
        weights = np.linalg.pinv(a, rcond=max(a.shape) * np.finfo(np.float64).eps) @ b
    return weights, y_mean - x_mean @ weights


def _ridge_scores(x: np.ndarray, weights: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Scores float32 [N, C] of embeddings."""
    return (np.asarray(x, np.float64) @ weights + bias).astype(np.float32)


def penalty_name(penalty: float) -> str:
    """Name of the ridge predictor with a further penalty."""
    return f"ridge_lam{penalty:g}".replace(".", "p")


def _classifier_scores(
    name: str, train: Pool, query: np.ndarray, num_classes: int, seed: int
) -> np.ndarray:
    module, kind, _ = CLASSIFIERS[name]
    model = getattr(importlib.import_module(module), kind)(random_state=seed % 2**32)
    classes, numbers = np.unique(train.y, return_inverse=True)
    model.fit(train.x, numbers)
    scores = np.zeros((len(query), num_classes), np.float32)
    scores[:, classes] = model.predict_proba(query)
    return scores


def fold_scores(
    train: Pool, query: np.ndarray, num_classes: int, settings: BalancedTrials, seed: int = 0
) -> dict[str, np.ndarray]:
    """Scores [Q, C] of every predictor, fitted on one training set; `seed` of those that draw."""
    out: dict[str, np.ndarray] = {}
    penalties = {"ridge": settings.ridge_lambda}
    penalties |= {penalty_name(lam): lam for lam in settings.ridge_lambdas if lam > 0}
    for name, penalty in penalties.items():
        fit = fit_ridge(train.x, train.y, num_classes, penalty, settings.fit_intercept)
        out[name] = _ridge_scores(query, *fit)
    if settings.knn_ks:
        most = min(max(settings.knn_ks), len(train.y))
        sims, index = neighbours(train.x, query, most)
        for k in settings.knn_ks:
            out[f"knn{k}"] = vote(sims[:, :k], train.y[index[:, :k]], num_classes)
    for name in settings.classifiers:
        out[name] = _classifier_scores(name, train, query, num_classes, seed)
    return out


def fold_metrics(scores: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """Metrics of one fold by the names of `METRICS`."""
    guess = scores.argmax(1)
    out = classification_metrics(guess, y, scores)
    return {BALANCED: balanced_accuracy(guess, y), **{m: out[m] for m in METRICS[1:]}}


def over_folds(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean, standard deviation and standard error of the values that are numbers."""
    x = np.asarray([v for v in values if not math.isnan(v)], np.float64)
    if not len(x):
        return math.nan, math.nan, math.nan
    spread = float(x.std(ddof=1)) if len(x) > 1 else 0.0
    return float(x.mean()), spread, spread / math.sqrt(len(x))


def run_trials(
    splits: Mapping[str, Split],
    num_classes: int,
    settings: BalancedTrials,
    *,
    draws: Sequence[np.ndarray] | None = None,
    stop: Callable[[], bool] = lambda: False,
    say: Say = print,
) -> dict[str, dict[str, float]]:
    """Balanced trials on the embeddings of a classification task.

    Args:
      splits: embeddings float [N, D] and classes int [N] by split.
      num_classes: classes of the data set.
      draws: training rows of every fold, instead of drawing them.
      stop: asked between folds; once it is true the folds so far are reported.
      say: takes warnings.

    Returns:
      Per predictor its metrics (mean over folds, with `_std` and `_sem`) and what the folds were:
      n_per_class, n_folds, least_class, pool_size, train_size, eval_size, embedding_dim,
      eval_classes, pool_classes. {} where no trials can be drawn.

    Raises:
      ValueError: wrong settings, no split, not one vector per sample, a missing package.
    """
    if problem := next(settings.problems(), None):
        raise ValueError(problem)
    pool = make_pool(splits, settings.draw_pool, num_classes, say)
    if pool.x.ndim != 2:
        raise ValueError("balanced trials need one embedding per sample")
    plan = make_plan(pool.y, settings, say)
    if plan is None:
        return {}
    found: dict[str, list[dict[str, float]]] = {}
    sizes: list[tuple[int, int]] = []
    least_seen = plan.classes
    for fold in range(plan.folds):
        if fold and stop():
            break
        seed = settings.seed + fold
        rows = draw_rows(pool.y, plan.per_class, seed) if draws is None else draws[fold]
        rest = np.setdiff1d(np.arange(len(pool.y)), rows, assume_unique=True)
        train, query = Pool(pool.x[rows], pool.y[rows]), Pool(pool.x[rest], pool.y[rest])
        if not fold and settings.ridge_lambda == 0 and len(rows) <= pool.x.shape[1]:
            say(f"ridge has {len(rows)} samples for {pool.x.shape[1]} dimensions: least norm")
        made = fold_scores(train, query.x, num_classes, settings, seed)
        for name, scores in made.items():
            found.setdefault(name, []).append(fold_metrics(scores, query.y))
        sizes.append((len(rows), len(rest)))
        least_seen = min(least_seen, len(np.unique(query.y)))
    about = {
        "n_per_class": plan.per_class, "n_folds": len(sizes), "least_class": plan.least,
        "pool_size": len(pool.y), "train_size": sizes[0][0], "eval_size": sizes[0][1],
        "embedding_dim": pool.x.shape[1], "eval_classes": least_seen, "pool_classes": plan.classes,
    }  # fmt: skip
    if least_seen < plan.classes:
        say(f"scores are over {least_seen} of {plan.classes} classes")
    return {name: _summary(folds) | about for name, folds in found.items()}


def _summary(folds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    out: dict[str, float] = {}
    for metric in METRICS:
        mean, spread, error = over_folds([f[metric] for f in folds])
        out |= {metric: mean, f"{metric}_std": spread, f"{metric}_sem": error}
    return out
