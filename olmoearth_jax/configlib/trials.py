"""Settings of balanced trials on the embeddings of a task."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterator
from dataclasses import field
from typing import Literal

from olmoearth_jax.modalities import closest

CLASSIFIERS = {
    "rf": ("sklearn.ensemble", "RandomForestClassifier", "scikit-learn"),
    "xgb": ("xgboost", "XGBClassifier", "xgboost"),
    "logreg": ("sklearn.linear_model", "LogisticRegression", "scikit-learn"),
}
"""Further predictors of balanced trials, at the defaults of their libraries: (module, class,
package to install)."""


@dataclasses.dataclass
class BalancedTrials:
    """Repeated small balanced training sets out of one pool (spec/evals_v1_3.md section 3)."""

    draw_pool: list[Literal["train", "valid", "test"]] = field(
        default_factory=lambda: ["train", "valid", "test"]
    )
    """Splits that make the pool, in this order."""
    n_per_class: int | None = None
    """Samples of a class that a fold draws; null derives it."""
    cap: int | None = None
    """Most of them where it is derived; null is the figure for the data set, else 300."""
    least_class_draw_fraction: float = 0.9
    """Share of the least class that is drawn at most."""
    n_folds: int | None = None
    """Folds; null derives them from the samples drawn of a class."""
    max_folds: int | None = None
    seed: int = 0
    """Of the first fold; the others count on."""
    knn_ks: list[int] = field(default_factory=lambda: [5, 20])
    """Neighbours of each nearest-neighbour predictor."""
    ridge_lambda: float = 0.0
    """Penalty of the predictor 'ridge'; 0 is least squares."""
    fit_intercept: bool = True
    ridge_lambdas: list[float] = field(default_factory=list)
    """Further penalties, a predictor each."""
    classifiers: list[Literal["rf", "xgb", "logreg"]] = field(default_factory=list)

    def problems(self) -> Iterator[str]:
        """What is wrong with the settings, a sentence each."""
        for name in ("n_per_class", "cap", "n_folds", "max_folds"):
            value = getattr(self, name)
            if value is not None and value < 1:
                yield f"{name} must be at least 1, got {value}"
        if not 0 < self.least_class_draw_fraction <= 1:
            yield (
                "least_class_draw_fraction must lie in (0, 1], got "
                f"{self.least_class_draw_fraction}"
            )
        if not self.draw_pool or len(set(self.draw_pool)) < len(self.draw_pool):
            yield f"draw_pool must name splits, each once, got {self.draw_pool}"
        if self.seed < 0:
            yield f"seed must not be negative, got {self.seed}"
        if any(k < 1 for k in self.knn_ks):
            yield f"knn_ks must be positive, got {self.knn_ks}"
        if any(not lam >= 0 for lam in (self.ridge_lambda, *self.ridge_lambdas)):
            yield "a ridge penalty must not be negative"
        for name in self.classifiers:
            if name not in CLASSIFIERS:
                yield f"unknown classifier {name!r}; {closest(name, CLASSIFIERS)}"
                continue
            module, _, package = CLASSIFIERS[name]
            if importlib.util.find_spec(module.partition(".")[0]) is None:
                yield f"the classifier {name!r} needs the package {package}"
