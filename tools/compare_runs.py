"""Compares runs by their metrics.jsonl: a table of last values, and curves if matplotlib is there.

    python -m tools.compare_runs [--metrics=train/loss] [--png=curves.png] RUN [RUN ...]

RUN is a run folder or a metrics.jsonl. With --exact it tells instead whether all runs wrote the
same values, timing aside, and exits with 1 if they did not.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

from absl import app, flags

from olmoearth_jax import outputs
from olmoearth_jax.train.metrics import is_timing, read_metrics, without_timing

_METRICS = flags.DEFINE_list("metrics", [], "Metrics to compare; default: those under train/, eval")
_PNG = flags.DEFINE_string("png", None, "File for the curves; needs matplotlib.")
_SMOOTH = flags.DEFINE_integer("average", 10, "The table averages this many last values.")
_EXACT = flags.DEFINE_bool("exact", False, "Compare bit for bit instead.")

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


def table(runs: Runs, names: list[str], average: int) -> list[str]:
    """Markdown table: one row per metric, one column per run, mean of the last finite values."""
    lines = ["| metric | " + " | ".join(runs) + " |", "|---|" + "--:|" * len(runs)]
    steps = [str(max((r["step"] for r in records), default=0)) for records in runs.values()]
    lines.append("| last step | " + " | ".join(steps) + " |")
    for name in names:
        cells = []
        for records in runs.values():
            values = [value for _, value in series(records, name) if math.isfinite(value)]
            last = values[-average:] if name.startswith("train/") else values[-1:]
            cells.append(f"{sum(last) / len(last):.6g}" if last else "-")
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


def load(paths: list[str]) -> Runs:
    """Runs by a short name: the folder's, or the whole path where folders share a name."""
    names = [Path(p).parent.name if Path(p).suffix == ".jsonl" else Path(p).name for p in paths]
    unique = [n if names.count(n) == 1 else p for n, p in zip(names, paths, strict=True)]
    return {name: read_metrics(path) for name, path in zip(unique, paths, strict=True)}


def main(argv: list[str]) -> None:
    if len(argv) < 2:
        raise app.UsageError("Name at least one run folder or metrics.jsonl.")
    try:
        if _PNG.value:
            outputs.check(Path(_PNG.value), overwrite=flags.FLAGS.overwrite)
        runs = load(argv[1:])
        if _EXACT.value:
            _compare_exactly(runs)
            return
        names = _METRICS.value or metric_names(runs)
        print("\n".join(table(runs, names, _SMOOTH.value)))
        if _PNG.value:
            plot(runs, names, Path(_PNG.value))
            print(f"curves: {_PNG.value}")
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


def _compare_exactly(runs: Runs) -> None:
    (first, records), *others = runs.items()
    different = False
    for name, other in others:
        found = first_difference(records, other)
        different = different or found is not None
        print(f"{first} and {name}: {found or 'equal'}")
    if different:
        raise SystemExit(1)


if __name__ == "__main__":
    flags.DEFINE_bool("overwrite", False, "Replace a picture that is not of this program.")
    app.run(main, argv=outputs.expand_home(sys.argv))
