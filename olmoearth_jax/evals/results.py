"""How results are named, kept and shown: metric keys, JSON lines, table, plot."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from olmoearth_jax.evals.metrics import EvalResult
from olmoearth_jax.evals.runner import TaskResult
from olmoearth_jax.train.runfolder import write_atomically

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
    return out | {f"eval_time/{name}": result.seconds}


def record(result: TaskResult, **about: Any) -> dict[str, Any]:
    """The JSON record of a result; `about` says which model (run, step, ...)."""
    return {**about, **result.to_dict()}


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
    with open(folder / LINES, "a", encoding="utf-8") as f:
        f.write(json.dumps(plain(item)) + "\n")


def read_lines(folder: Path) -> list[dict[str, Any]]:
    """Records of `results.jsonl`; a line cut short by a crash is left out."""
    path = folder / LINES
    out = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            out.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return out


def write_step(folder: Path, step: int, items: Sequence[Mapping[str, Any]]) -> Path:
    """Adds records to `evals/<step>.json`; the same task with the same settings is replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{step}.json"
    old = json.loads(path.read_text()) if path.exists() else []
    merged = {identity(r): r for r in [*old, *(plain(i) for i in items)]}
    write_atomically(path, json.dumps(list(merged.values()), indent=1) + "\n")
    return path


def identity(item: Mapping[str, Any]) -> str:
    """What makes two records the same measurement: model, task, settings, splits scored."""
    keys = ("model", "checkpoint_step", "task", "settings")
    scored = item.get("test") is not None
    return json.dumps([*(plain(item.get(k)) for k in keys), scored], sort_keys=True)


def table(items: Sequence[Mapping[str, Any]]) -> str:
    """Results as an aligned text table, one row each."""
    rows = [("model", "step", "task", "mode", "metric", "valid", "test", "settings")]
    for item in items:
        s = item["settings"]
        lr = s.get("probe_lr") or s.get("ft_lr")
        brief = f"{s['normalization']}, {s['pooling']}, p{s['patch_size']}"
        brief += f", {s['image_size']} px" if s.get("image_size") else ""
        brief += f", lr {lr:g}" if lr else ""
        metric = (item.get("valid") or item.get("test") or {}).get("primary_key", "-")
        rows.append(
            (
                str(item.get("model", "")),
                str(item.get("checkpoint_step", "")),
                item["task"],
                item["mode"],
                metric,
                _value(item.get("valid")),
                _value(item.get("test")),
                f"{brief}, seed {s['seed']}",
            )
        )
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _value(result: Mapping[str, Any] | None) -> str:
    value = (result or {}).get("primary")
    return "-" if value is None else f"{value:.4f}"


def plot(items: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """PNG of the primary values per task over checkpoint steps; False without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    scored = [i for i in items if (i.get("valid") or i.get("test"))]
    tasks = list(dict.fromkeys(i["task"] for i in scored))
    if not tasks:
        return False
    columns = min(3, len(tasks))
    rows = -(-len(tasks) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.2 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for number, task in enumerate(tasks):
        axes = figure.add_subplot(rows, columns, number + 1)
        mine = [i for i in scored if i["task"] == task]
        metric = (mine[0].get("valid") or mine[0]["test"])["primary_key"]
        for model in dict.fromkeys(str(i.get("model", "")) for i in mine):
            points = [i for i in mine if str(i.get("model", "")) == model]
            points.sort(key=lambda i: i.get("checkpoint_step") or 0)
            for split, style in (("valid", "o-"), ("test", "s--")):
                xy = [
                    (p.get("checkpoint_step") or 0, p[split]["primary"])
                    for p in points
                    if p.get(split) and p[split]["primary"] is not None
                ]
                if xy:
                    axes.plot(*zip(*xy, strict=True), style, label=f"{model} {split}")
        axes.set(title=task, xlabel="step", ylabel=metric)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=6)
    figure.savefig(path, dpi=110)
    return True
