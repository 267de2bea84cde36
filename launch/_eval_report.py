"""How results of evaluations are shown: a text table and a plot over steps and models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from olmoearth_jax.outputs import MARK


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
    figure.savefig(path, dpi=110, metadata={"Software": MARK})
    return True
