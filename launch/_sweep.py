"""Which runs an evaluation consists of, and running them one after another, resumably."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from olmoearth_jax.configlib.tasks import (
    EvalTaskConfig,
    RunOptions,
    change_all,
    check_task,
    eval_mode,
    has_own_stats,
)
from olmoearth_jax.evals import balanced_trials, runner
from olmoearth_jax.evals.models import Loaded
from olmoearth_jax.evals.runner import Hooks, describe, encoding_order, run_task
from olmoearth_jax.files import json_plain
from olmoearth_jax.proposals import known

_PROBE_LRS = (1e-4, 5e-4, 1e-3, 5e-3, 1e-2, 5e-2, 1e-1, 5e-1)
_FINETUNE_LRS = (1e-4, 5e-4, 1e-3)
SWEEPS = ("none", "lr", "full")
_BEST_VAL_INTERVAL = 5

Plan = list[tuple[str, EvalTaskConfig]]


class RunsFailed(RuntimeError):
    """Some runs of a plan failed; `found` has the results of the others."""

    def __init__(self, told: str, found: list[dict[str, Any]]):
        super().__init__(told)
        self.found = found


def expand(
    tasks: Mapping[str, EvalTaskConfig],
    sweep: str = "none",
    of: Callable[[EvalTaskConfig], EvalTaskConfig] | None = None,
) -> Plan:
    """The runs of a sweep (spec/evals.md section 12).

    'none': every task as it is set. 'lr': its learning rates, all else as set. 'full': also both
    poolings and, where the data set has statistics of its own, both normalisations. Learning
    rates do not matter to kNN and diagnostics, whose duplicates are left out.

    Args:
      of: gives what a model takes of a task; variants of which it takes the same are one run.

    Raises:
      ValueError: another sweep.
    """
    known("sweep", sweep, SWEEPS)
    plan: Plan = []
    for name, task in tasks.items():
        for variant in _variants(task, check_task(name, task), sweep):
            variant = variant if of is None else of(variant)
            if (name, variant) not in plan:
                plan.append((name, variant))
    return plan


def _variants(task: EvalTaskConfig, info: Any, sweep: str) -> list[EvalTaskConfig]:
    mode = eval_mode(task, info)
    if sweep == "none" or mode == "embedding_diagnostics":
        return [task]
    field, lrs = {
        "knn": ("probe_lr", (task.probe_lr,)),
        "linear_probe": ("probe_lr", _PROBE_LRS),
        "finetune": ("ft_lr", _FINETUNE_LRS),
    }[mode]
    out = [dataclasses.replace(task, **{field: lr}) for lr in lrs]
    if sweep == "lr" or mode == "finetune":
        return out
    norms = (True, False) if has_own_stats(info) else (True,)
    return [
        dataclasses.replace(t, norm_stats_from_pretrained=n, pooling_type=p)
        for t in out
        for n in norms
        for p in ("mean", "max")
    ]


def without_resamples(plan: Plan) -> list[str]:
    """Names of tasks whose test score is not resampled."""

    def single(name: str, task: EvalTaskConfig) -> bool:
        info = check_task(name, task)
        mode = eval_mode(task, info)
        return mode == "finetune" or (mode == "knn" and info.spatial)

    return list(dict.fromkeys(name for name, task in plan if single(name, task)))


def select_best_val(tasks: Mapping[str, EvalTaskConfig]) -> dict[str, EvalTaskConfig]:
    """Reports the best of validations every 5 epochs instead of the last."""
    return change_all(
        tasks, select_best_by_primary_metric=True, linear_probe_eval_interval=_BEST_VAL_INTERVAL
    )


def evaluate(
    loaded: Loaded,
    plan: Plan,
    options: RunOptions,
    folder: Path,
    *,
    say: Callable[[str], None] = print,
    stop: Callable[[], bool] = lambda: False,
) -> list[dict[str, Any]]:
    """Runs a plan on a model; what `folder` holds already is not run again.

    Every result is written at once: a line of `results.jsonl` and an entry of `<step>.json`. A
    task that fails is reported and does not stop the others. Runs on the same embeddings follow
    one another, so that these are made once; the results are given in the order of the plan.

    Raises:
      RunsFailed: at the end, if tasks failed; it names them and holds the other results.
    """
    done = {runner.identity(r): r for r in runner.read_results(folder)}
    out: dict[int, list[dict[str, Any]]] = {}
    failed, hooks = [], Hooks(stop, cache={})
    order = encoding_order([task for _, task in plan], options)
    for number, (place, (name, task)) in enumerate((place, plan[place]) for place in order):
        about = {"model": loaded.name, "checkpoint_step": loaded.step}
        info = check_task(name, task)
        tested = options.run_on_test and eval_mode(task, info) != "embedding_diagnostics"
        settings = json_plain(describe(task, info, loaded.model, options))
        wanted = {**about, "task": name, "settings": settings, "test": {} if tested else None}
        key = runner.identity(wanted)
        if key in done and runner.is_of(done[key], settings):
            out[place] = _trials_of(done.values(), done[key]) + [done[key]]
            for item in out[place]:
                runner.complete_step(folder, loaded.step, item)
            continue
        say(f"[{number + 1}/{len(plan)}] {name} on {loaded.name} step {loaded.step}")
        try:
            result = run_task(name, task, loaded.model, options, hooks)
        except runner.FAULTS as e:
            failed.append(name)
            say(f"error: {name}: {runner.fault_of(e)}")
            continue
        items = runner.records(result, **about)
        for item in items:
            runner.append_line(folder, item)
        runner.write_step(folder, loaded.step, items)
        out[place] = items
    found = [item for place in sorted(out) for item in out[place]]
    if failed:
        told = f"{len(failed)} of {len(plan)} runs failed: {', '.join(failed)}"
        raise RunsFailed(told, found)
    return found


def _trials_of(held: Iterable[dict[str, Any]], host: dict[str, Any]) -> list[dict[str, Any]]:
    """Records of balanced trials that were run on the embeddings of a task."""
    start = balanced_trials.task_name(host["task"], "")
    keys = ("model", "checkpoint_step")
    return [
        r
        for r in held
        if r["mode"] == "balanced_trials"
        and r["task"].startswith(start)
        and all(r.get(k) == host[k] for k in keys)
        and r["settings"] == host["settings"]
    ]
