"""Recorded balanced trials: draws, predictors and statistics over folds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from olmoearth_jax.configlib.tasks import BalancedTrials
from olmoearth_jax.evals import balanced_trials as trials

from .common import Checks, Result
from .model import under

RIDGE = {"rtol": 1e-4, "atol": 1e-4}
KNN = {"rtol": 1e-4, "atol": 1e-5}
SPLITS = {"train": "train", "val": "valid", "test": "test"}


def settings_of(entry: Mapping[str, Any]) -> BalancedTrials:
    """The settings of a recorded case."""
    return BalancedTrials(
        n_per_class=entry["n_per_class_setting"],
        cap=entry["cap"],
        n_folds=entry["n_folds_setting"],
        seed=entry["seed"],
        ridge_lambdas=[lam for lam in entry["ridge_lambdas"] if lam],
        fit_intercept=entry["fit_intercept"],
    )


def check(entry: dict[str, Any], arrays: Mapping[str, np.ndarray]) -> Result:
    """One case: the plan, the recorded folds, and the statistics."""
    checks, settings, classes = Checks(), settings_of(entry), entry["classes"]
    splits = {
        ours: (arrays[f"in/{s}/embeddings"], arrays[f"in/{s}/labels"]) for s, ours in SPLITS.items()
    }
    said: list[str] = []
    pool = trials.make_pool(splits, settings.draw_pool, classes, said.append)
    plan = trials.make_plan(pool.y, settings, said.append)
    assert plan is not None
    wanted = tuple(entry[k] for k in ("n_per_class", "n_folds", "least_class", "pool_classes"))
    checks.equal("plan", tuple(plan), wanted)
    checks.equal("pool", len(pool.y), entry["pool_size"])
    draws = [arrays[f"fold{f}/drawn"] for f in range(plan.folds) if f"fold{f}/drawn" in arrays]
    for rows in draws:
        checks.equal("rows drawn", len(rows), entry["train_size"])
    _check_first(checks, entry, arrays, pool, draws[0], settings)
    some = dataclasses.replace(settings, n_folds=len(draws))
    for name, recorded in under(arrays, "per_fold/").items():
        for fold, rows in enumerate(draws):
            rest = np.setdiff1d(np.arange(len(pool.y)), rows)
            train = trials.Pool(pool.x[rows], pool.y[rows])
            scores = trials.fold_scores(train, pool.x[rest], classes, some)[name]
            got = trials.fold_metrics(scores, pool.y[rest])
            three = [got[m] for m in trials.METRICS[:3]]
            checks.array(f"fold {fold} of {name}", three, recorded[fold], atol=1e-6)
    given = draws if len(draws) == plan.folds else None
    found = trials.run_trials(splits, classes, settings, draws=given, say=said.append)
    checks.equal("predictors", sorted(found), sorted(entry["results"]))
    for name, results in entry["results"].items():
        for key, value in results.items():
            # Own draws agree within the error of the mean of both; their spread only roughly.
            atol = 1e-6
            if given is None:
                sem = results[key.removesuffix("_std").removesuffix("_sem") + "_sem"]
                atol = 4 * sem if not key.endswith(("_std", "_sem")) else 0.25 * value
            checks.array(f"{key} of {name}", found[name][key], value, atol=atol)
        for key in ("pool_size", "train_size", "eval_size", "least_class", "n_per_class"):
            checks.equal(key, found[name][key], entry[key])
    return checks.result("as recorded: ridge 1e-4, kNN 1e-5, folds 1e-6")


def _check_first(checks, entry, arrays, pool, rows, settings) -> None:
    """The first fold's weights and scores."""
    rest = np.setdiff1d(np.arange(len(pool.y)), rows)
    train = trials.Pool(pool.x[rows], pool.y[rows])
    scores = trials.fold_scores(train, pool.x[rest], entry["classes"], settings)
    for name, got in scores.items():
        recorded = under(arrays, f"fold0/{name}/")
        checks.array(f"scores of {name}", got, recorded["scores"],
                     **(KNN if name.startswith("knn") else RIDGE))  # fmt: skip
        if "weights" in recorded:
            penalty = next(
                (lam for lam in settings.ridge_lambdas if trials.penalty_name(lam) == name), 0.0
            )
            weights, bias = trials.fit_ridge(
                train.x, train.y, entry["classes"], penalty, settings.fit_intercept
            )
            checks.array(f"weights of {name}", weights, recorded["weights"], **RIDGE)
            checks.array(f"bias of {name}", bias, recorded["bias"], **RIDGE)


def check_folds(table: Mapping[str, int]) -> Result:
    """The number of folds by the samples of a class."""
    checks = Checks()
    for drawn, folds in table.items():
        checks.equal(f"folds for {drawn}", trials.fold_count(int(drawn)), folds)
    return checks.result()
