"""Evaluation tasks of a user with their data: a JSON file (docs/new_task.md)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from olmoearth_jax.configlib import schema, tasks, texts
from olmoearth_jax.configlib.schema import ConfigError
from olmoearth_jax.configlib.tasks import (
    CATALOGUES,
    DatasetInfo,
    EvalTaskConfig,
    catalogue,
    check_task,
    official_tasks,
)
from olmoearth_jax.modalities import ModalityName, closest
from olmoearth_jax.model.versions import VERSIONS

if TYPE_CHECKING:
    from olmoearth_jax.config import DownstreamEvaluatorConfig

PREFIXES = (
    "pretrain_subset", "gb2-", "m-", "mados", "sen1floods11", "pastis", "fifty_cities",
    "breizhcrops", "cropharvest", "sickle", "brandenburg", "similar_but_different",
)  # fmt: skip
"""Data sets whose names begin so have readers of their own."""


@dataclasses.dataclass
class OwnDataset:
    """A data set of windows (docs/new_task.md)."""

    folder: str = ""
    """Holds `windows/`; relative ones start at the JSON file."""
    task_type: Literal["classification", "segmentation", "regression", "scalar_regression"] = (
        "segmentation"
    )
    num_classes: int = 1
    """1 for the regression types."""
    modalities: list[ModalityName] = field(default_factory=list)
    multilabel: bool = False
    height_width: int | None = None
    """Pixels per side of a window."""
    timeseries: bool = False
    """Several dates per window."""


@dataclasses.dataclass
class OwnTasks:
    """What a file holds."""

    datasets: dict[str, OwnDataset] = field(default_factory=dict)
    tasks: dict[str, EvalTaskConfig] = field(default_factory=dict)


def add_file(path: str | Path) -> dict[str, EvalTaskConfig]:
    """Makes the data sets of a file known, and gives its tasks.

    Raises:
      ValueError: not readable, or a record that cannot be; the message names file and member.
    """
    path = Path(path).expanduser()
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise ValueError(f"the tasks file {path} cannot be read: {e}") from None
    try:
        found = schema.convert(OwnTasks, values)
    except ConfigError as e:
        raise ValueError(f"{path}: {'; '.join(e.problems)}") from None
    if not found.tasks:
        raise ValueError(f"{path} names no tasks: it holds {{'datasets': ..., 'tasks': ...}}")
    for name in (*found.datasets, *found.tasks):
        if problem := texts.name_problem(name):
            raise ValueError(f"{path}: the name {texts.shown(name)} {problem}")
    for name, dataset in found.datasets.items():
        try:
            tasks.OWN[name] = _info(name, dataset, path.absolute().parent)
        except ValueError as e:
            raise ValueError(f"{path}: datasets.{name}: {e}") from None
    taken = {n for which in CATALOGUES for n in catalogue(which)}
    taken |= {n for version in VERSIONS for n in official_tasks(version)}
    for name, task in found.tasks.items():
        if name in taken:
            raise ValueError(f"{path}: the task {name!r} is in the catalogue; choose another name")
        try:
            check_task(name, task)
        except ValueError as e:
            raise ValueError(f"{path}: {e}") from None
    return found.tasks


def _info(name: str, given: OwnDataset, start: Path) -> DatasetInfo:
    if name in tasks.datasets() and name not in tasks.OWN:
        raise ValueError("a data set of the catalogue has this name; choose another")
    if name.startswith(PREFIXES):
        begin = next(p for p in PREFIXES if name.startswith(p))
        raise ValueError(
            f"names that begin with {begin!r} are read as that data set; choose another"
        )
    if not given.folder:
        raise ValueError("it needs 'folder', which holds windows/")
    if not given.modalities:
        raise ValueError("it needs 'modalities', which the windows hold")
    few = "regression" not in given.task_type and given.num_classes < 2
    if few or ("regression" in given.task_type and given.num_classes != 1):
        raise ValueError(
            f"num_classes must be {'at least 2' if few else '1'} for {given.task_type}, got "
            f"{given.num_classes}"
        )
    if given.height_width is not None and given.height_width < 1:
        raise ValueError(f"height_width must be at least 1, got {given.height_width}")
    if given.task_type in tasks.SPATIAL_TASKS and given.height_width is None:
        raise ValueError("it needs 'height_width', the pixels per side of a window")
    values: dict[str, Any] = dataclasses.asdict(given) | {"modalities": tuple(given.modalities)}
    values["folder"] = str(start / Path(given.folder).expanduser())
    return DatasetInfo(name, windowed=True, **values)


def known_tasks(evaluator: DownstreamEvaluatorConfig) -> dict[str, EvalTaskConfig]:
    """What an evaluator can run: its own tasks, those of its file, and, by name, the catalogue.

    Raises:
      ValueError: see `add_file`.
    """
    own = add_file(evaluator.tasks_json) if evaluator.tasks_json else {}
    held = {**own, **evaluator.tasks}
    return {**catalogue(), **held} if evaluator.tasks_to_run else held


def problems(evaluator: DownstreamEvaluatorConfig, runs: bool) -> Iterator[str]:
    """What is wrong with the tasks of a run, one sentence each.

    Args:
      runs: whether any is run at all.
    """
    path = "trainer.callbacks.downstream_evaluator.tasks"
    try:
        held: Mapping[str, Any] = known_tasks(evaluator)
    except ValueError as e:
        yield f"{path}_json: {e}"
        held = evaluator.tasks
    for name in evaluator.tasks_to_run or ():
        if name not in held:
            near = closest(name, [*evaluator.tasks, *(t for t in held if t not in evaluator.tasks)])
            yield f"{path}_to_run: unknown task {name!r}; {near}"
    if not runs:
        return
    for name, task in evaluator.tasks.items():
        if task.eval_interval.value < 1:
            yield (
                f"{path}.{name}.eval_interval.value must be greater than 0, "
                f"got {task.eval_interval.value}"
            )
        if evaluator.tasks_to_run is None or name in evaluator.tasks_to_run:
            try:
                check_task(name, task)
            except ValueError as e:
                yield f"{path}: {e}"
