"""How results are named and kept: metric keys, JSON lines, one file per step."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from olmoearth_jax.evals.metrics import EvalResult
from olmoearth_jax.evals.runner import TaskResult
from olmoearth_jax.files import append_json, read_json_lines, remove_leftovers, write_atomically

LINES = "results.jsonl"


def log_keys(name: str, result: EvalResult, test: bool = False) -> dict[str, float]:
    """Metric names of one split's result (spec/evals.md section 3.4)."""
    part = "/test" if test else ""
    out = {f"eval{part}/{name}": result.primary}
    for key, value in result.metrics.items():
        if key != result.primary_key:
            out[f"eval_other{part}/{name}/{key}"] = value
    return out


def log_values(result: TaskResult) -> dict[str, float]:
    """Every value of a task to log, by name."""
    name = result.task
    out: dict[str, float] = {}
    if result.valid is not None:
        out |= log_keys(name, result.valid)
    if result.test is not None:
        out |= log_keys(name, result.test, test=True)
    for key in ("mean", "std", "ci_lower", "ci_upper"):
        if key in result.bootstrap:
            out[f"eval/test/{name}_bootstrap_{key}"] = result.bootstrap[key]
    out |= {f"eval_embed_diagnostics/{name}/{k}": v for k, v in result.diagnostics.items()}
    for trial in result.trials:
        out |= log_values(trial)
    return out | {f"eval_time/{name}": result.seconds}


def records(result: TaskResult, **about: Any) -> list[dict[str, Any]]:
    """The JSON records of a result, its trials' first; `about` says which model (run, step, ...).

    The record of the task itself is the last: where it stands, the others do.
    """
    fields = dataclasses.asdict(dataclasses.replace(result, trials=()))
    fields.pop("trials")
    own = plain({**about, **fields})
    return [item for trial in result.trials for item in records(trial, **about)] + [own]


def plain(value: Any) -> Any:
    """JSON-able copy in which NaN and infinities are null."""
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def append_line(folder: Path, item: Mapping[str, Any]) -> None:
    """Adds one record to `results.jsonl` of a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    append_json(folder / LINES, item)


def read_lines(folder: Path) -> list[dict[str, Any]]:
    """Records of `results.jsonl`; a line cut short by a crash is left out."""
    return read_json_lines(folder / LINES)


def write_step(folder: Path, step: int, items: Sequence[Mapping[str, Any]]) -> Path:
    """Adds records to `evals/<step>.json`; the same task with the same settings is replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{step}.json"
    remove_leftovers(path)
    old = _step_records(path)
    merged = {identity(r): r for r in [*old, *items]}
    write_atomically(path, json.dumps(list(merged.values()), indent=1) + "\n")
    return path


def complete_step(folder: Path, step: int, item: Mapping[str, Any]) -> None:
    """Adds a record of `results.jsonl` to `evals/<step>.json` where a crash came between them."""
    held = {identity(r) for r in _step_records(folder / f"{step}.json")}
    if identity(item) not in held:
        write_step(folder, step, [item])


def _step_records(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path} is damaged ({e}): delete it and evaluate again") from None
    if not isinstance(held, list) or not all(isinstance(item, dict) for item in held):
        raise ValueError(f"{path} is no list of results: delete it and evaluate again")
    return held


def identity(item: Mapping[str, Any]) -> str:
    """What makes two records the same measurement: model, task, settings, splits scored."""
    keys = ("model", "checkpoint_step", "task", "settings")
    scored = item.get("test") is not None
    return json.dumps([*(item.get(k) for k in keys), scored], sort_keys=True)
