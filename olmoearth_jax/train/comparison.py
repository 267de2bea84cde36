"""Metrics of several runs side by side: as a table, and as curves."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from olmoearth_jax import outputs
from olmoearth_jax.files import replacing
from olmoearth_jax.train.metrics import is_timing, without_timing

Runs = dict[str, list[dict[str, Any]]]


def series(records: Sequence[Mapping[str, Any]], name: str) -> list[tuple[int, float]]:
    """(step, value) of one metric in a run."""
    found = [(r["step"], r[name]) for r in records if name in r]
    return [(step, float(value)) for step, value in found if isinstance(value, int | float)]


def metric_names(runs: Runs) -> list[str]:
    """Metrics that describe learning: all under train/, val/ and eval.../."""
    names = {name for records in runs.values() for record in records for name in record}
    chosen = [n for n in names if n.startswith(("train/", "val/", "eval")) and not is_timing(n)]
    return sorted(chosen)


def final(records: list[dict[str, Any]], name: str, average: int) -> float | None:
    """The mean of a training metric's last finite values, or the last value of an evaluation.

    None if the run has no such value.
    """
    values = [value for _, value in series(records, name) if math.isfinite(value)]
    last = values[-average:] if name.startswith("train/") else values[-1:]
    return sum(last) / len(last) if last else None


@dataclasses.dataclass(frozen=True)
class Side:
    """What one run says of a metric at the steps that all runs share.

    Attributes:
      mean: of the values.
      error: standard error of the mean, or the deviation that the run itself recorded; None if
        neither is known.
      change: mean difference to the first run at the same steps; None for that run itself.
      change_error: its standard error, which what both runs have drawn alike does not enter.
    """

    mean: float
    error: float | None = None
    change: float | None = None
    change_error: float | None = None


def _common_steps(runs: Runs, name: str) -> list[int]:
    """Steps at which all runs that have a metric at all have a finite value of it."""
    held = [_finite(records, name) for records in runs.values()]
    held = [values for values in held if values]
    return sorted(set.intersection(*map(set, held))) if held else []


def compare(runs: Runs, name: str, average: int) -> tuple[list[int], dict[str, Side]]:
    """A metric of several runs at the last steps that they share.

    Args:
      average: how many steps of a training metric; of all others the last one counts.

    Returns:
      (the steps, {run: what it says}); runs without the metric are left out, and without a shared
      step there is nothing.
    """
    steps = _common_steps(runs, name)[-average if name.startswith("train/") else -1 :]
    out: dict[str, Side] = {}
    first: np.ndarray | None = None
    for run, records in runs.items():
        held = _finite(records, name)
        if not held or not steps:
            continue
        values = np.array([held[s] for s in steps])
        mean, error = _mean_error(values)
        if error is None:
            error = _finite(records, f"{name}_bootstrap_std").get(steps[-1])
        if first is None:
            first = values
            out[run] = Side(mean, error)
        else:
            out[run] = Side(mean, error, *_mean_error(values - first))
    return steps, out


def _finite(records: list[dict[str, Any]], name: str) -> dict[int, float]:
    return {step: value for step, value in series(records, name) if math.isfinite(value)}


def _mean_error(values: np.ndarray) -> tuple[float, float | None]:
    error = None if len(values) < 2 else float(values.std(ddof=1) / math.sqrt(len(values)))
    return float(values.mean()), error


def table(runs: Runs, names: list[str], average: int) -> list[str]:
    """Markdown table: a row per metric, a column per run, and one per difference to the first.

    Values are compared at the last steps that the runs share, see `compare`.
    """
    first, *others = runs
    heads = ["metric", "steps", *runs, *(f"{run} - {first}" for run in others)]
    lines = [_line(heads), "|---|---|" + "--:|" * (len(heads) - 2)]
    last = [str(max((r["step"] for r in records), default=0)) for records in runs.values()]
    lines.append(_line(["last step", "", *last, *("" for _ in others)]))
    for name in names:
        steps, sides = compare(runs, name, average)
        cells = [name, _span(steps)]
        for run, records in runs.items():
            side = sides.get(run)
            alone = "-" if not _finite(records, name) else "(no step in common)"
            cells.append(alone if side is None else _text(side.mean, side.error))
        for run in others:
            side = sides.get(run)
            if side is None or side.change is None:
                cells.append("")
            else:
                cells.append(_text(side.change, side.change_error, "+"))
        lines.append(_line(cells))
    return lines


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _span(steps: list[int]) -> str:
    if not steps:
        return "-"
    return str(steps[0]) if len(steps) == 1 else f"{steps[0]} to {steps[-1]}"


def _text(value: float, error: float | None, sign: str = "") -> str:
    text = f"{value:{sign}.6g}"
    return text if error is None else f"{text} ± {error:.2g}"


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
    with replacing(path) as scratch:
        figure.savefig(scratch, format=path.suffix[1:].lower(), dpi=120, **about)
    pyplot.close(figure)
