"""Downstream tasks and data sets: the catalogues, and what a task's settings must satisfy.

The records live in ``tasks.json``, ``datasets.json`` and ``band_stats.json`` beside this file
(figures: spec/evals.md sections 2, 3.5 and 13). A new task is one record in the first, and, for a
data set of a new kind, one in the second and a reader.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from olmoearth_jax.configlib.tasks import EvalInterval, EvalTaskConfig
from olmoearth_jax.evals.normalize import METHODS, Stats
from olmoearth_jax.evals.probes import PROBE_TYPES, SPATIAL_TASKS
from olmoearth_jax.modalities import closest

TASK_TYPES = ("classification", "segmentation", "regression", "scalar_regression")
EVAL_MODES = ("knn", "linear_probe", "finetune", "embedding_diagnostics")
CATALOGUES = ("knn_lp", "finetune", "diagnostics")
PRETRAIN_PREFIX = "pretrain_subset"


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """What is known of a data set before any file is opened.

    Attributes:
      name: dataset key.
      task_type: one of TASK_TYPES.
      num_classes: 1 for the regression types.
      modalities: what it can give to a model.
      multilabel: several labels per sample (classification).
      height_width: pixels per side that spatial tasks are declared with.
      timeseries: several dates per sample.
      windowed: read through the windowed-raster format.
      imputes: pairs (source band, target band) for absent bands.
      sources: sensors the images really come from (GeoBench v2).
      target: mean and standard deviation that regression targets are scaled by.
    """

    name: str
    task_type: str
    num_classes: int
    modalities: tuple[str, ...]
    multilabel: bool = False
    height_width: int | None = None
    timeseries: bool = False
    windowed: bool = False
    imputes: tuple[tuple[str, str], ...] = ()
    sources: tuple[str, ...] = ()
    target: tuple[float, float] | None = None

    @property
    def spatial(self) -> bool:
        return self.task_type in SPATIAL_TASKS


def _load(name: str) -> dict[str, Any]:
    return json.loads((Path(__file__).parent / name).read_text())


@functools.cache
def datasets() -> dict[str, DatasetInfo]:
    """Every known data set by its key."""
    out = {}
    for name, record in _load("datasets.json")["datasets"].items():
        record = {**record, "modalities": tuple(record["modalities"])}
        for key in ("imputes", "sources", "target"):
            if key in record:
                record[key] = tuple(tuple(x) if isinstance(x, list) else x for x in record[key])
        out[name] = DatasetInfo(name=name, **record)
    return out


def dataset_info(name: str) -> DatasetInfo:
    """The data set of that key.

    Raises:
      ValueError: unknown key; the message names the nearest.
    """
    known = datasets()
    if name not in known:
        raise ValueError(f"unknown evaluation dataset {name!r}; {closest(name, known)}")
    return known[name]


@functools.cache
def band_stats(dataset: str) -> dict[str, Stats]:
    """The data set's own statistics: modality -> band name -> mean, std (min, max).

    Raises:
      ValueError: the data set has none, so it needs norm_stats_from_pretrained.
    """
    family = "fifty_cities" if dataset.startswith("fifty_cities") else dataset
    family = "pastis" if family.startswith("pastis") else family
    tables = _load("band_stats.json")
    if family not in tables:
        raise ValueError(
            f"dataset {dataset!r} has no band statistics of its own; set "
            "norm_stats_from_pretrained=true"
        )
    keys = ("mean", "std", "min", "max")
    return {
        modality: {b: dict(zip(keys, v, strict=False)) for b, v in bands.items()}
        for modality, bands in tables[family].items()
    }


def parse_task(record: Mapping[str, Any]) -> EvalTaskConfig:
    """A task from a record of the form used in ``tasks.json``.

    Raises:
      ValueError: unknown field.
    """
    fields = {f.name for f in dataclasses.fields(EvalTaskConfig)}
    for key in record:
        if key not in fields:
            raise ValueError(f"unknown task field {key!r}; {closest(key, fields)}")
    values = dict(record)
    if "eval_interval" in values:
        value, unit = values["eval_interval"]
        values["eval_interval"] = EvalInterval(value, unit)
    return EvalTaskConfig(**values)


def catalogue(which: str = "knn_lp") -> dict[str, EvalTaskConfig]:
    """Fresh settings of every task of a catalogue: 'knn_lp', 'finetune' or 'diagnostics'."""
    if which not in CATALOGUES:
        raise ValueError(f"unknown catalogue {which!r}; {closest(which, CATALOGUES)}")
    out = {name: parse_task(record) for name, record in _load("tasks.json")[which].items()}
    if which == "finetune":
        for task in out.values():
            task.eval_mode, task.ft_lr = "finetune", 1e-4
    return out


def official_tasks(version: str) -> dict[str, EvalTaskConfig]:
    """The in-loop tasks of the official runs of a version (spec/evals.md section 3.5)."""
    key = "v1" if version == "v1" else "v1_1"
    return {name: parse_task(record) for name, record in _load("tasks.json")[key].items()}


def select(
    tasks: Mapping[str, EvalTaskConfig], wanted: list[str] | None, skip: list[str] | None = None
) -> dict[str, EvalTaskConfig]:
    """The tasks named in `wanted` (None: all), in that order, less those in `skip`.

    Raises:
      ValueError: an unknown name; the message gives the nearest.
    """
    for name in [*(wanted or ()), *(skip or ())]:
        if name not in tasks:
            raise ValueError(f"unknown task {name!r}; {closest(name, tasks)}")
    chosen = list(tasks) if wanted is None else wanted
    return {name: tasks[name] for name in chosen if name not in (skip or ())}


def eval_mode(task: EvalTaskConfig, info: DatasetInfo) -> str:
    """The task's mode: as set, else kNN for classification and a linear probe for the rest."""
    return task.eval_mode or ("knn" if info.task_type == "classification" else "linear_probe")


def modalities_of(task: EvalTaskConfig, info: DatasetInfo) -> tuple[str, ...]:
    """Modalities given to the model: the chosen ones sorted, or all that the data set has."""
    return tuple(sorted(task.input_modalities)) or info.modalities


def check_task(name: str, task: EvalTaskConfig) -> DatasetInfo:
    """Checks the settings of a task and returns its data set.

    Raises:
      ValueError: one sentence with the first thing that is wrong.
    """
    info = dataset_info(task.dataset)
    problem = _modality_problem(task, info) or _mode_problem(task, info)
    if problem:
        raise ValueError(f"task {name!r}: {problem}")
    return info


def _modality_problem(task: EvalTaskConfig, info: DatasetInfo) -> str | None:
    chosen = task.input_modalities
    if len(set(chosen)) != len(chosen):
        return f"input_modalities names a modality twice: {', '.join(chosen)}"
    extra = [m for m in chosen if m not in info.modalities]
    if extra:
        return f"dataset {info.name!r} has no {extra[0]!r}; {closest(extra[0], info.modalities)}"
    if info.name.startswith(("pastis", "fifty_cities")) and not chosen:
        return "input_modalities must be given; known: " + ", ".join(info.modalities)
    return None


def _mode_problem(task: EvalTaskConfig, info: DatasetInfo) -> str | None:
    mode = eval_mode(task, info)
    if mode not in EVAL_MODES:
        return f"unknown eval_mode {mode!r}; {closest(mode, EVAL_MODES)}"
    if task.probe_type not in PROBE_TYPES:
        return f"unknown probe_type {task.probe_type!r}; {closest(task.probe_type, PROBE_TYPES)}"
    if task.norm_method not in METHODS:
        return f"unknown norm_method {task.norm_method!r}; {closest(task.norm_method, METHODS)}"
    if mode == "linear_probe" and task.probe_lr is None:
        return "a linear probe needs probe_lr"
    if mode == "finetune" and (task.ft_lr is None or task.ft_grad_accum_steps < 1):
        return "fine-tuning needs ft_lr and ft_grad_accum_steps of at least 1"
    side = info.height_width if info.spatial else None
    if side and mode in ("linear_probe", "finetune") and side % task.patch_size:
        return f"patch_size {task.patch_size} does not divide the tile of {side} px"
    if "regression" in info.task_type and mode == "knn":
        return "kNN does not do regression; use linear_probe"
    if not 0 < task.label_fraction <= 1:
        return f"label_fraction must lie in (0, 1], got {task.label_fraction}"
    if task.h5py_dir is not None and not Path(task.h5py_dir).is_dir():
        return f"h5py_dir {task.h5py_dir} does not exist"
    return None
