"""Compares runs by their metrics.jsonl, step by step: a table, and curves if matplotlib is there.

    python -m tools.compare_runs [--metrics=train/loss] [--png=curves.png] RUN [RUN ...]

RUN is a run folder or a metrics.jsonl. Values are those of the last steps that all runs have, so
that a longer run has no advantage; training metrics are means of --average of them, with the
standard error of the mean. The last columns are differences to the first run at the same steps:
runs of the same seed draw the same samples and shapes, whose part in the noise is gone there. A
validation or an evaluation counts by its last shared step.

With --exact it tells instead whether all runs wrote the same values, timing aside, and exits with 1
if they did not.
"""

from __future__ import annotations

from pathlib import Path

from absl import app, flags

from olmoearth_jax import commands, outputs
from olmoearth_jax.proposals import closest
from olmoearth_jax.train.comparison import Runs, first_difference, metric_names, plot, table
from olmoearth_jax.train.metrics import read_metrics

_METRICS = flags.DEFINE_list(
    "metrics", [], "Metrics to compare; default: those under train/, val/ and eval/."
)
_PNG = flags.DEFINE_string("png", None, "File for the curves; needs matplotlib.")
_SMOOTH = flags.DEFINE_integer(
    "average", 10, "The table averages this many of the last steps that the runs share.", 1
)
_EXACT = flags.DEFINE_bool("exact", False, "Compare bit for bit instead.")


def load(paths: list[str]) -> Runs:
    """Runs by a short name: the folder's, or the whole path where folders share a name.

    Raises:
      ValueError: a run is named twice, or has no metrics.
    """
    if len(set(paths)) < len(paths):
        raise ValueError("name each run once")
    whole = [Path(p).absolute() for p in paths]  # '.' has no name of its own
    names = [p.parent.name if p.suffix == ".jsonl" else p.name for p in whole]
    unique = [n if names.count(n) == 1 else p for n, p in zip(names, paths, strict=True)]
    return {name: read_metrics(path) for name, path in zip(unique, paths, strict=True)}


def main(argv: list[str]) -> None:
    if len(argv) < 2:
        raise app.UsageError("Name at least one run folder or metrics.jsonl.")
    try:
        if _PNG.value:
            _check_picture(Path(_PNG.value), argv[1:])
        runs = load(argv[1:])
        if _EXACT.value:
            _compare_exactly(runs)
            return
        _check_metrics(_METRICS.value, runs)
        names = _METRICS.value or metric_names(runs)
        print("\n".join(table(runs, names, _SMOOTH.value)))
        if _PNG.value:
            plot(runs, names, Path(_PNG.value))
            print(f"curves: {_PNG.value}")
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


def _check_metrics(names: list[str], runs: Runs) -> None:
    """Raises ValueError for a metric that no run has."""
    held = {name for records in runs.values() for record in records for name in record}
    for name in names:
        if name not in held:
            raise ValueError(f"no run has the metric {name!r}; {closest(name, metric_names(runs))}")


def _check_picture(path: Path, runs: list[str]) -> None:
    """Raises ValueError if the curves cannot be written, or would replace a run's metrics."""
    if not path.suffix:
        raise ValueError(f"--png={path} must end in .png, or in .pdf or .svg for these")
    read = [Path(run) / "metrics.jsonl" if Path(run).is_dir() else Path(run) for run in runs]
    outputs.check(path, read, flags.FLAGS.overwrite)


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
    commands.run(main)
