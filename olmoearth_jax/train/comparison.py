"""Metrics of several runs side by side: as a table, and as curves."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from olmoearth_jax import outputs
from olmoearth_jax.train.metrics import is_timing, without_timing

Runs = dict[str, list[dict[str, Any]]]


def series(records: list[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    """(step, value) of one metric in a run."""
    found = [(r["step"], r[name]) for r in records if name in r]
    return [(step, float(value)) for step, value in found if not isinstance(value, list)]


def metric_names(runs: Runs) -> list[str]:
    """Metrics that describe learning: all under train/ and eval.../."""
    names = {name for records in runs.values() for record in records for name in record}
    chosen = [n for n in names if n.startswith(("train/", "eval")) and not is_timing(n)]
    return sorted(chosen)


def final(records: list[dict[str, Any]], name: str, average: int) -> float | None:
    """The mean of a training metric's last finite values, or the last value of an evaluation.

    None if the run has no such value.
    """
    values = [value for _, value in series(records, name) if math.isfinite(value)]
    last = values[-average:] if name.startswith("train/") else values[-1:]
    return sum(last) / len(last) if last else None


def table(runs: Runs, names: list[str], average: int) -> list[str]:
    """Markdown table: one row per metric, one column per run, see `final`."""
    lines = ["| metric | " + " | ".join(runs) + " |", "|---|" + "--:|" * len(runs)]
    steps = [str(max((r["step"] for r in records), default=0)) for records in runs.values()]
    lines.append("| last step | " + " | ".join(steps) + " |")
    for name in names:
        values = [final(records, name, average) for records in runs.values()]
        cells = ["-" if value is None else f"{value:.6g}" for value in values]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def first_difference(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> str | None:
    """Where two runs part, timing aside; None if they are equal."""
    for a, b in zip(one, other, strict=False):
        a, b = without_timing(a), without_timing(b)
        for name in sorted({*a, *b}):
            if repr(a.get(name)) != repr(b.get(name)):
                return f"step {a['step']}: {name} is {a.get(name)!r} and {b.get(name)!r}"
    if len(one) != len(other):
        return f"one has {len(one)} lines, the other {len(other)}"
    return None


def plot(runs: Runs, names: list[str], path: Path) -> None:
    """Curves of all metrics, one panel each. Raises ValueError without matplotlib."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise ValueError("--png needs matplotlib: pip install 'olmoearth-jax[viz]'.") from None
    size = (7, 3 * max(len(names), 1))
    figure, axes = pyplot.subplots(len(names) or 1, 1, figsize=size, squeeze=False)
    for axis, name in zip(axes[:, 0], names, strict=False):
        for run, records in runs.items():
            points = series(records, name)
            axis.plot([p[0] for p in points], [p[1] for p in points], label=run, linewidth=1)
        axis.set(title=name, xlabel="step")
        axis.legend()
    figure.tight_layout()
    # Other formats have other members.
    about: dict[str, Any] = {}
    if path.suffix == ".png":
        about = {"metadata": {"Software": outputs.MARK}}
    figure.savefig(path, dpi=120, **about)
    pyplot.close(figure)
