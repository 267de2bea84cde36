"""Evaluates a checkpoint, converted weights or a baseline on downstream tasks.

    python -m launch.evaluate --run_name=my_run                        newest checkpoint of a run
    python -m launch.evaluate --checkpoint=DIR --tasks=mados,m_eurosat one checkpoint, some tasks
    python -m launch.evaluate --run_name=my_run --steps=all            every checkpoint
    python -m launch.evaluate --run_name=my_run --watch                checkpoints as they appear
    python -m launch.evaluate --run_name=my_run --sweep=full           rates, normalisation, pooling
    python -m launch.evaluate --baseline=raw_bands                     no model at all
    python -m launch.evaluate --embeddings=DIR                         arrays another program made

Every result is a line of `<run folder>/evals/results.jsonl` and an entry of `evals/<step>.json`,
with all settings that change a model's rank. What is there already is not run again. Settings of
all tasks: --set=patch_size=8 (repeatable); of one: --set=mados.probe_lr=0.05; of many from a file:
--settings_json=FILE with {"mados": {"probe_lr": 0.05, "pooling_type": "max"}, ...}.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from absl import flags
from absl import logging as absl_logging

from olmoearth_jax import commands
from olmoearth_jax.checkpoints import checkpoint
from olmoearth_jax.configlib import own_tasks, tasks, values
from olmoearth_jax.configlib.tasks import EvalTaskConfig, RunOptions, change_all
from olmoearth_jax.evals import models, runner
from olmoearth_jax.evals.datasets import split_available
from olmoearth_jax.evals.embeddings import Stopped
from olmoearth_jax.evals.models import Precomputed, as_shown, with_int8
from olmoearth_jax.outputs import check, check_folder

from . import _eval_report as report
from . import _sweep as sweep
from ._app import UserError

FLAGS = flags.FlagValues()
"""This program's own flags; other programs have flags of the same names."""

_bool, _enum, _float, _integer, _list, _multi_string, _string = commands.definers(
    FLAGS, "bool enum float integer list multi_string string"
)

_RUN_NAME = _string("run_name", None, "Run under local_output.")
_CHECKPOINT = _string("checkpoint", None, "Run, checkpoints or step folder.")
_BASELINE = _enum("baseline", None, models.BASELINES, "Evaluate without a checkpoint.")
_EMBEDDINGS = _string("embeddings", None, "Folder or .npz file of precomputed embeddings.")
_SIZE = _string("baseline_size", "nano", "Model size of --baseline=random_init.")
_VERSION = _string("baseline_version", "v1", "Model version of --baseline=random_init.")
_TASKS = _list("tasks", None, "Task names; default: all whose data is there.")
_SKIP = _list("skip_tasks", None, "Task names to leave out.")
_TASKS_JSON = _string("tasks_json", None, "File with tasks of your own (docs/new_task.md).")
_CATALOGUE = _enum("catalogue", "knn_lp", tasks.CATALOGUES, "List of known tasks.")
_SET = _multi_string("set", [], "[<task>.]<field>=<value> for the tasks.")
_JSON = _string("settings_json", None, "JSON file of settings: task name -> field -> value.")
_SWEEP = _enum("sweep", "none", sweep.SWEEPS, "Runs per task.")
_INT8 = _bool("int8_arm", False, "Every task again on embeddings stored as int8.")
_BEST = _bool("select_best_val", False, "Best of validations every 5 epochs.")
_DATASET_NORM = _bool("use_dataset_normalizer", False, "Datasets' own statistics.")
_H5 = _string("h5py_dir", None, "Pretraining H5 folder of the pretrain_* tasks.")
_TEST = _bool("run_on_test", True, "Score the test split too.")
_BOOTSTRAP = _integer("n_bootstrap", 0, "Resamples of the test score.", lower_bound=0)
_SEED = _integer("seed", 42, "Seed of probes, sample order and subsets.", lower_bound=0)
_STEPS = _list("steps", None, "Checkpoint steps, or 'all'; default: the newest.")
_WATCH = _bool("watch", False, "Wait for new checkpoints of the run.")
_POLL = _float("poll_seconds", 30.0, "How often --watch looks.", lower_bound=0.1)
_OUT = _string("out", None, "Folder of the results; default: evals in the run folder.")
_OVERWRITE = _bool("overwrite", False, "Replace a results.png that is not of this program.")
_DRY = _bool("dry_run", False, "Print the plan and stop.")
_LIST = _bool("list", False, "Say why tasks are skipped; without a model, of all tasks.")
_DTYPE = _enum("dtype", None, ["float32", "bfloat16"], "Type of matrix products.")


def _chosen_tasks() -> tuple[dict[str, EvalTaskConfig], bool]:
    """The tasks of the flags, and whether they were named one by one."""
    own = own_tasks.add_file(_TASKS_JSON.value) if _TASKS_JSON.value else {}
    known = own or tasks.catalogue(_CATALOGUE.value)
    if _TASKS.value:
        official = {**tasks.official_tasks("v1"), **tasks.official_tasks("v1_3")}
        known = {**official, **tasks.catalogue(_CATALOGUE.value), **own}
    picked = tasks.select(known, _TASKS.value or None, _SKIP.value)
    if _BEST.value:
        picked = sweep.select_best_val(picked)
    if _DATASET_NORM.value:
        picked = change_all(picked, norm_stats_from_pretrained=False)
    if _H5.value:
        mine = {n: t for n, t in picked.items() if t.dataset.startswith(tasks.PRETRAIN_PREFIX)}
        picked |= change_all(mine, h5py_dir=_H5.value)
    if _JSON.value:
        picked |= _settings_of(Path(_JSON.value), picked)
    for text in _SET.value:
        picked = _with_setting(picked, text)
    return picked, bool(_TASKS.value or own)


def _settings_of(path: Path, picked: dict[str, EvalTaskConfig]) -> dict[str, EvalTaskConfig]:
    """The tasks that a settings file names, changed as it says."""
    try:
        table = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"--settings_json={path} cannot be read: {e}") from e
    if not isinstance(table, dict) or not all(isinstance(v, dict) for v in table.values()):
        raise UserError(f"--settings_json={path} must map task names to fields and values")
    out = {}
    for name, fields in table.items():
        out |= change_all(tasks.select(picked, [name]), **fields)
    return out


def _with_setting(picked: dict[str, EvalTaskConfig], text: str) -> dict[str, EvalTaskConfig]:
    path, equals, value = text.partition("=")
    name, dot, field = path.rpartition(".")
    if not equals or not path:
        raise UserError(f"--set={text} is not of the form [<task>.]<field>=<value>")
    whom = tasks.select(picked, [name]) if dot else picked
    change = tasks.field_value(field, values.parse(value), written=True)
    return {**picked, **change_all(whom, **{field: change})}


def _plan_for(loaded: models.Loaded, say: Callable[[str], None]) -> sweep.Plan:
    """The runs on a model; tasks that cannot run are listed (an error if they were asked for)."""
    picked, named = _chosen_tasks()
    shown = isinstance(loaded.model, Precomputed)
    if isinstance(loaded.model, Precomputed):
        able, skipped = loaded.model.able(picked, _TEST.value)
    else:
        able, skipped = split_available(picked, loaded.model.modalities)
        able = with_int8(able) if _INT8.value else able
    if named and skipped:
        raise UserError("; ".join(f"{name}: {reason}" for name, reason in skipped.items()))
    if skipped and not _LIST.value:
        say(f"skipping {len(skipped)} tasks for want of data or modalities (--list says which)")
    elif skipped:
        say(f"skipping {len(skipped)} tasks:")
        _say_why(skipped)
    if not able:
        raise UserError("no task can run" + ("" if _LIST.value else "; --list says why"))
    plan = sweep.expand(able, _SWEEP.value, as_shown if shown else None)
    if _BOOTSTRAP.value and (single := sweep.without_resamples(plan)):
        say(f"no resamples of {', '.join(single)}: neither fine-tuning nor kNN of pixels has any")
    return plan


def _source_folder() -> Path:
    """Run folder, checkpoints folder or step folder that the flags name."""
    run_name = _RUN_NAME.value
    if _CHECKPOINT.value is None and run_name is None:
        raise UserError(
            "give --run_name=NAME, --checkpoint=DIR, --baseline=... or --embeddings=DIR"
        )
    if run_name is None:
        return Path(str(_CHECKPOINT.value))
    folder = Path("local_output") / run_name
    if not folder.is_dir() and not _WATCH.value:
        raise UserError(f"there is no run folder {folder}; elsewhere? --checkpoint=DIR")
    return folder


def _step_folders(source: Path) -> list[Path]:
    """Step folders to evaluate, ascending."""
    if _STEPS.value is None and not _WATCH.value:
        return [checkpoint.find_checkpoint(source)]
    root = source / "checkpoints" if (source / "checkpoints").is_dir() else source
    there = checkpoint.complete_steps(root)
    if not there and not _WATCH.value:
        checkpoint.find_checkpoint(source)  # says what is there instead
        raise UserError(f"{source} is a checkpoint by itself; leave out --steps")
    if _STEPS.value in (None, ["all"]):
        return [root / str(s) for s in there]
    steps = {text: int(text) if text.isdecimal() else -1 for text in _STEPS.value}
    for text, step in steps.items():
        if step not in there and not (_WATCH.value and step >= 0):
            raise UserError(f"there is no checkpoint of step {text} in {root}; known: {there}")
    return [root / str(step) for step in there if step in steps.values()]


def _results_folder(source: Path | None) -> Path:
    """Where results are written."""
    if _OUT.value:
        return Path(_OUT.value)
    if source is None:
        return Path("local_output") / "baselines" / "evals"
    folder = Path(os.path.abspath(source))
    # A run may have a number for a name, too.
    if folder.parent.name == "checkpoints" or (folder / "meta").is_dir():
        folder = folder.parent
    if folder.name == "checkpoints":
        folder = folder.parent
    folder /= "evals"
    return folder if source.is_absolute() else Path(os.path.relpath(folder))


def _run_model(loaded: models.Loaded, folder: Path, stop: Callable[[], bool]) -> list[dict]:
    """All runs on one model; prints the plan alone with --dry_run."""
    plan = _plan_for(loaded, commands.say)
    kept = folder / "finetune" / f"{loaded.name}_{loaded.step}"
    options = RunOptions(_TEST.value, _BOOTSTRAP.value, seed=_SEED.value, save_folder=kept)
    if _DRY.value:
        for name, task in plan:
            commands.say(f"{name}: {task}")
        return []
    return sweep.evaluate(loaded, plan, options, folder, say=commands.say, stop=stop)


def _run_each(every: Iterable[models.Loaded], folder: Path, stop: threading.Event) -> None:
    """All runs on each of some models, and what was found.

    Raises:
      RuntimeError: at the end, if runs failed: neither other models nor the table wait for them.
    """
    found, failed = [], []
    for loaded in every:
        try:
            found += _run_model(loaded, folder, stop.is_set)
        except sweep.RunsFailed as e:
            found += e.found
            failed.append(f"{loaded.name} step {loaded.step}: {e}")
    _show(folder, found)
    if failed:
        raise RuntimeError("; ".join(failed))


def _watch(source: Path, folder: Path, stop: threading.Event) -> list[dict]:
    """Evaluates checkpoints as they are completed, oldest first, until a signal ends it."""
    found, seen = [], set()
    while not stop.is_set():
        fresh = [p for p in _step_folders(source) if p not in seen] if source.is_dir() else []
        for path in fresh:
            seen.add(path)
            try:
                loaded = models.load_checkpoint(path, dtype=_DTYPE.value)
            except (ValueError, OSError) as e:
                commands.say(f"step {path.name}: {e}")  # an ephemeral one may be gone
                continue
            try:
                found += _run_model(loaded, folder, stop.is_set)
            except RuntimeError as e:
                found += getattr(e, "found", [])
                commands.say(f"error: step {path.name}: {e}")  # later ones are still of interest
            _show(folder, found)
        stop.wait(_POLL.value)
    return found


def _show(folder: Path, items: list[dict]) -> None:
    if not items:
        return
    commands.say(report.table(items))
    everything = runner.read_results(folder)
    picture = folder / "results.png"
    try:
        check(picture, overwrite=_OVERWRITE.value)
    except ValueError as e:
        commands.say(f"no plot: {e}")  # hours of work are not lost for a picture
    else:
        if report.plot(everything, picture):
            commands.say(f"plot: {picture}")
    commands.say(f"results: {folder / runner.LINES}")


def _checked(folder: Path) -> Path:
    """The folder, which can be written to if something will be."""
    if not _DRY.value:
        check_folder(folder)
    return folder


def _list_tasks() -> None:
    """Which tasks' data is there, and why that of the others is not; needs no model."""
    able, skipped = split_available(_chosen_tasks()[0], None)
    commands.say(f"data of {len(able)} tasks is there: {', '.join(able) or 'none'}")
    _say_why(skipped)


def _say_why(skipped: Mapping[str, str]) -> None:
    """The tasks of each reason."""
    for reason in dict.fromkeys(skipped.values()):
        commands.say(f"  {', '.join(n for n, r in skipped.items() if r == reason)}: {reason}")


def execute(stop: threading.Event) -> None:
    """Does what the flags say."""
    if _BOOTSTRAP.value and not _TEST.value:
        raise UserError("--n_bootstrap resamples the test score; leave out --norun_on_test")
    named = [f"--{f.name}" for f in (_RUN_NAME, _CHECKPOINT, _BASELINE, _EMBEDDINGS) if f.present]
    if len(named) > 1:
        raise UserError(f"one thing is evaluated at a time: give {' or '.join(named)}")
    if _LIST.value and not named:
        _list_tasks()
        return
    if (_WATCH.value or _STEPS.value) and named and named[0] in ("--baseline", "--embeddings"):
        raise UserError(f"--watch and --steps are for runs and checkpoints, not {named[0]}")
    if _EMBEDDINGS.value is not None:
        if _INT8.value:
            raise UserError("--int8_arm is for models: --embeddings are taken as they are")
        model = Precomputed(_EMBEDDINGS.value)
        folder = _checked(_results_folder(None))
        loaded = models.Loaded(model, Path(os.path.abspath(model.path)).stem, 0, {})
        _run_each([loaded], folder, stop)
        return
    if _BASELINE.value is not None:
        folder = _checked(_results_folder(None))
        loaded = models.baseline(
            _BASELINE.value, _SIZE.value, _VERSION.value, _SEED.value, _DTYPE.value
        )
        _run_each([loaded], folder, stop)
        return
    source = _source_folder()
    folder = _checked(_results_folder(source))
    if _WATCH.value:
        _watch(source, folder, stop)
        return
    steps = _step_folders(source)
    _run_each((models.load_checkpoint(p, dtype=_DTYPE.value) for p in steps), folder, stop)


def main(argv: list[str]) -> int:
    """Exit code: 0, 1 if runs failed, 2 for a mistake on the command line or in the data."""
    absl_logging.set_verbosity(absl_logging.ERROR)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    try:
        if len(argv) > 1:
            raise UserError(f"unexpected argument {argv[1]!r}")
        execute(stop)
    except RuntimeError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    except Stopped:
        print("stopped; finished results are kept", file=sys.stderr)
        return 130
    except (ValueError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    commands.run(main, FLAGS)
