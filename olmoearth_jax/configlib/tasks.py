"""Downstream tasks and data sets: settings, the catalogues, and what settings must satisfy.

The records live in ``tasks.json``, ``datasets.json`` and ``band_stats.json`` beside this file
(figures: spec/evals.md sections 2, 3.5 and 13). A new task is one record in the first, and, for a
data set of a new kind, one in the second and a reader.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import field
from pathlib import Path
from typing import Any, Literal

from olmoearth_jax.configlib import schema
from olmoearth_jax.configlib.trials import BalancedTrials
from olmoearth_jax.modalities import ModalityName, closest
from olmoearth_jax.model.versions import VERSIONS
from olmoearth_jax.proposals import known

_CLIPPED = tuple(f"norm_yes_clip{k}{i}" for i in ("", "_int") for k in ("", "_2_std", "_3_std"))
METHODS = (
    "no_norm", "standardize", "norm_no_clip", "norm_no_clip_2_std", *_CLIPPED,
    "norm_yes_clip_min_max_int",
)  # fmt: skip
"""Ways of normalising by a data set's own statistics."""

DEFAULT_METHOD = "norm_no_clip_2_std"

Stats = Mapping[str, Mapping[str, float]]
"""Per band name: mean, std and, where known, min and max."""

SPATIAL_TASKS = ("segmentation", "regression")
"""Task types with one label per pixel; classification and scalar_regression have one per sample."""

_EVAL_MODES = ("knn", "linear_probe", "finetune", "embedding_diagnostics")
_POOLING_TYPES = ("mean", "max")
PROBE_TYPES = ("linear", "interpolate_linear", "bilinear_conv", "attnpool")
CATALOGUES = ("knn_lp", "finetune", "diagnostics")
BALANCED = "balanced_accuracy"
_RANKED = ("auroc", "prauc", "class_f1")
_VALUES = ("neg_rmse", "rmse", "mae", "r2")
METRICS = {
    "classification": ("accuracy", "macro_f1", *_RANKED, BALANCED),
    "multilabel": ("f1", "accuracy", "macro_f1", "micro_map", *_RANKED),
    "segmentation": ("miou", "overall_acc", "macro_acc", "macro_f1", "micro_f1", *_RANKED),
    "regression": _VALUES,
    "scalar_regression": _VALUES,
}
"""Primary metrics that a kind of task can have, the default one first."""

PRETRAIN_PREFIX = "pretrain_subset"

STATS_FILE = "stats.json"
"""Beside a user's windows: statistics of their own."""

_STUDENT_DIMS = (128, 64)
"""Widths at which official runs score the student."""

EvalMode = Literal["knn", "linear_probe", "finetune", "embedding_diagnostics"]


@dataclasses.dataclass
class EvalInterval:
    """How often a task runs during training."""

    value: int = 1
    unit: Literal["steps", "epochs"] = "epochs"


@dataclasses.dataclass
class EvalTaskConfig:
    """One downstream task (spec/evals.md section 2, spec/evals_v1_3.md section 1)."""

    dataset: str = ""
    """Key of the dataset, which need not be the name of the task."""
    num_workers: int = 8
    """Threads that read samples; 0 reads them in between."""
    pooling_type: Literal["mean", "max"] = "mean"
    norm_stats_from_pretrained: bool = True
    """Normalise with the pretraining statistics instead of the dataset's own."""
    norm_method: str = DEFAULT_METHOD
    input_modalities: list[ModalityName] = field(default_factory=list)
    """Modalities given to the model; empty means all that the dataset has."""
    embedding_batch_size: int = 128
    probe_lr: float | None = None
    probe_batch_size: int = 32
    probe_type: str = "linear"
    linear_probe_eval_interval: int = 50
    ft_lr: float | None = None
    ft_batch_size: int = 32
    ft_grad_accum_steps: int = 1
    ft_head_type: Literal["linear", "unet"] = "linear"
    finetune_seed: int = 42
    epochs: int = 50
    patch_size: int = 4
    eval_interval: EvalInterval = field(default_factory=EvalInterval)
    eval_mode: EvalMode | None = None
    """Null means kNN for classification and a linear probe for the rest."""
    output: Literal["tokens", "locations", "student"] | None = None
    """What of a model with an attention pooler is embedded: pooled patch tokens, its location
    grid, or its student's; null is the grid, and the tokens of models without a pooler."""
    output_dim: int | None = None
    """First channels of the student that are kept; null keeps all."""
    use_pooled_tokens: bool = False
    use_center_token: bool = False
    label_fraction: float = 1.0
    select_best_by_primary_metric: bool = False
    max_train_samples: int | None = None
    max_train_samples_seed: int = 42
    quantize_embeddings: bool = False
    quantize_bits: int | None = None
    quantile_config_path: str | None = None
    embedding_dim: int | None = None
    balanced_trials: BalancedTrials | None = None
    """Trials on the embeddings of a kNN task, besides its own score; null is none."""
    use_dice_loss: bool = False
    primary_metric: str | None = None
    primary_metric_class: int | None = None
    h5py_dir: str | None = None
    """Pretraining dataset of a pretrain_subset task (spec/evals.md section 13.7)."""
    pretrain_max_samples: int = 512
    pretrain_target_modality: str | None = None
    pretrain_label_seed: int = 42
    pretrain_train_samples: int = 512
    pretrain_valid_samples: int = 512
    pretrain_test_samples: int = 512
    pretrain_split_strategy: Literal["random", "geographic"] = "random"
    pretrain_geographic_bin_size_deg: float = 5.0


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """What is known of a data set before any file is opened."""

    name: str
    task_type: str
    """classification, segmentation, regression or scalar_regression."""
    num_classes: int
    """1 for the regression types."""
    modalities: tuple[str, ...]
    """What it can give to a model."""
    multilabel: bool = False
    """Several labels per sample (classification)."""
    height_width: int | None = None
    """Pixels per side that spatial tasks are declared with."""
    timeseries: bool = False
    """Several dates per sample."""
    windowed: bool = False
    """Read through the windowed-raster format."""
    stored: int | None = None
    """Pixels per side of the stored windows where samples are cut out of them: the one around the
    middle for classification, all that lie side by side for spatial tasks."""
    imputes: tuple[tuple[str, str], ...] = ()
    """Pairs (source band, target band) for absent bands."""
    sources: tuple[str, ...] = ()
    """Sensors the images really come from (GeoBench v2)."""
    folder: str = ""
    """Where a data set of the user lies; others are found by variables of the environment."""
    target: tuple[float, float] | None = None
    """Mean and standard deviation that regression targets are scaled by."""

    @property
    def spatial(self) -> bool:
        return self.task_type in SPATIAL_TASKS

    @property
    def scoring(self) -> str:
        """How it is scored: its task type, or 'multilabel'."""
        return "multilabel" if self.multilabel else self.task_type


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """What holds for all tasks of an evaluation."""

    run_on_test: bool = False
    """Score the test split too."""
    n_bootstrap: int = 0
    """Resamples of the test score; 0 for none."""
    bootstrap_seed: int = 42
    seed: int = 42
    """Of probe initialisation, sample order and subsets."""
    k: int = 20
    """Neighbours of kNN."""
    save_folder: Path | None = None
    """Where fine-tuning keeps its state; None keeps none."""
    skip_nearest: bool = False
    """kNN of samples that are in the train split themselves."""


DEFAULTS = RunOptions()


@functools.cache
def _load(name: str) -> dict[str, Any]:
    return json.loads((Path(__file__).parent / name).read_text())


OWN: dict[str, DatasetInfo] = {}
"""Data sets of the user, see `own_tasks`."""


def datasets() -> dict[str, DatasetInfo]:
    """Every known data set by its key."""
    return {**_published(), **OWN}


@functools.cache
def _published() -> dict[str, DatasetInfo]:

    def frozen(value: Any) -> Any:
        return tuple(frozen(v) for v in value) if isinstance(value, list) else value

    records = _load("datasets.json")["datasets"]
    return {n: DatasetInfo(n, **{k: frozen(v) for k, v in r.items()}) for n, r in records.items()}


def dataset_info(name: str) -> DatasetInfo:
    """The data set of that key; ValueError names the nearest of the known."""
    return datasets()[known("evaluation dataset", name, datasets())]


@functools.cache
def band_stats(dataset: str) -> dict[str, Stats]:
    """The data set's own statistics: modality -> band name -> mean, std (min, max).

    Raises:
      ValueError: the data set has none, so it needs norm_stats_from_pretrained.
    """
    tables = _load("band_stats.json")
    shared = ("fifty_cities", "pastis")
    family = next((f for f in shared if dataset.startswith(f)), dataset)
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


def has_own_stats(info: DatasetInfo) -> bool:
    """Whether statistics come with the data set's files or with us."""
    if info.folder:
        return (Path(info.folder) / STATS_FILE).is_file()
    if info.windowed or info.name.startswith("m-"):
        return True
    try:
        return bool(band_stats(info.name))
    except ValueError:
        return False


def _parse(record: Mapping[str, Any]) -> EvalTaskConfig:
    task = EvalTaskConfig(**record)
    if "balanced_trials" in record:
        task.balanced_trials = BalancedTrials(**record["balanced_trials"])
    if "eval_interval" in record:
        task.eval_interval = EvalInterval(*record["eval_interval"])
    return task


def catalogue(which: str = "knn_lp") -> dict[str, EvalTaskConfig]:
    """Fresh settings of every task of a catalogue: 'knn_lp', 'finetune' or 'diagnostics'."""
    records = _load("tasks.json")[known("catalogue", which, CATALOGUES)]
    out = {name: _parse(record) for name, record in records.items()}
    if which == "finetune":
        for task in out.values():
            task.eval_mode, task.ft_lr = "finetune", 1e-4
    return out


def official_tasks(version: str) -> dict[str, EvalTaskConfig]:
    """The in-loop tasks of the official runs of a version (spec/evals.md section 3.5).

    Those of models with a student are scored at each of its widths (spec/evals_v1_3.md section 2).
    """
    what = VERSIONS[known("version", version, VERSIONS)]
    records = _load("tasks.json")[what.tasks]
    found = {name: _parse(record) for name, record in records.items()}
    if not what.pooler:
        return found
    return {
        f"{name}_proj{dim}": dataclasses.replace(task, output="student", output_dim=dim)
        for dim in _STUDENT_DIMS
        for name, task in found.items()
    }


def select(
    tasks: Mapping[str, EvalTaskConfig], wanted: list[str] | None, skip: list[str] | None = None
) -> dict[str, EvalTaskConfig]:
    """The tasks named in `wanted` (None: all), in that order, less those in `skip`.

    Raises:
      ValueError: an unknown name; the message gives the nearest.
    """
    for name in [*(wanted or ()), *(skip or ())]:
        known("task", name, tasks)
    chosen = list(tasks) if wanted is None else wanted
    return {name: tasks[name] for name in chosen if name not in (skip or ())}


def change_all(tasks: Mapping[str, EvalTaskConfig], /, **changes: Any) -> dict[str, EvalTaskConfig]:
    """The tasks with some settings changed.

    Raises:
      ValueError: a field that tasks do not have, or a value that a field does not take.
    """
    changes = {key: field_value(key, value) for key, value in changes.items()}
    return {name: dataclasses.replace(task, **changes) for name, task in tasks.items()}


def field_value(name: str, value: Any, written: bool = False) -> Any:
    """The value of a field of tasks; `written` as for `schema.set_path`.

    Raises:
      ValueError: a field that tasks do not have, or a value that it does not take.
    """
    fields = schema.hints(EvalTaskConfig)
    known("task field", name, list(fields))
    if dataclasses.is_dataclass(value):
        return value
    return schema.convert(fields[name], value, name, written=written)


def eval_mode(task: EvalTaskConfig, info: DatasetInfo) -> str:
    """The task's mode: as set, else kNN for classification and a linear probe for the rest."""
    return task.eval_mode or ("knn" if info.task_type == "classification" else "linear_probe")


def modalities_of(task: EvalTaskConfig, info: DatasetInfo) -> tuple[str, ...]:
    """Modalities given to the model: the chosen ones sorted, or all that the data set has."""
    return tuple(sorted(task.input_modalities)) or info.modalities


def check_task(name: str, task: EvalTaskConfig, options: RunOptions | None = None) -> DatasetInfo:
    """Checks the settings of a task, also against those of the evaluation; returns its data set.

    Raises:
      ValueError: one sentence with the first thing that is wrong.
    """
    info = dataset_info(task.dataset)
    problem = next(_problems(task, info), None)
    best = task.select_best_by_primary_metric and eval_mode(task, info) == "linear_probe"
    if not problem and best and options is not None and not options.run_on_test:
        problem = (
            "select_best_by_primary_metric reports the best of several validations; it needs "
            "run_on_test, whose score is not chosen by itself"
        )
    if problem:
        raise ValueError(f"task {name!r}: {problem}")
    return info


def _problems(task: EvalTaskConfig, info: DatasetInfo) -> Iterator[str]:
    chosen, mode = task.input_modalities, eval_mode(task, info)
    if len(set(chosen)) != len(chosen):
        yield f"input_modalities names a modality twice: {', '.join(chosen)}"
    for name in chosen:
        if name not in info.modalities:
            yield f"dataset {info.name!r} has no {name!r}; {closest(name, info.modalities)}"
    if info.name.startswith(("pastis", "fifty_cities")) and not chosen:
        yield "input_modalities must be given; known: " + ", ".join(info.modalities)
    metrics = METRICS[info.scoring]
    for kind, name, names in (
        ("eval_mode", mode, _EVAL_MODES),
        ("probe_type", task.probe_type, PROBE_TYPES),
        ("norm_method", task.norm_method, METHODS),
        ("pooling_type", task.pooling_type, _POOLING_TYPES),
        ("primary_metric", task.primary_metric or metrics[0], metrics),
    ):
        if name not in names:
            yield f"unknown {kind} {name!r}; {closest(name, names)}"
    if task.primary_metric == "class_f1" and task.primary_metric_class is None:
        yield "primary_metric=class_f1 needs primary_metric_class, the class number"
    number = task.primary_metric_class
    if number is not None and not 0 <= number < info.num_classes:
        yield f"primary_metric_class must lie in 0...{info.num_classes - 1}"
    yield from _number_problems(task, info, mode)
    yield from _probe_problems(task, info, mode)
    if "regression" in info.task_type and mode == "knn":
        yield "kNN does not do regression; use linear_probe"
    yield from _output_problems(task, info, mode)
    if task.quantize_bits is not None and task.quantile_config_path is None:
        yield "quantize_bits needs quantile_config_path, the file with the buckets"
    if task.quantile_config_path is not None and task.quantize_bits is None:
        yield "quantile_config_path has buckets for several numbers of bits; it needs quantize_bits"
    if task.quantize_bits is not None and not task.quantize_embeddings:
        yield "quantize_bits needs quantize_embeddings=true"
    if task.h5py_dir is not None and not Path(task.h5py_dir).is_dir():
        yield f"h5py_dir {task.h5py_dir} does not exist"


def _output_problems(task: EvalTaskConfig, info: DatasetInfo, mode: str) -> Iterator[str]:
    if task.output_dim is not None and task.output != "student":
        yield "output_dim keeps the first channels of the student; it needs output=student"
    if task.output in ("locations", "student") and task.probe_type == "attnpool":
        yield f"probe_type=attnpool takes patch tokens; it does not go with output={task.output}"
    if task.output in ("locations", "student") and mode == "finetune":
        yield f"fine-tuning takes patch tokens; it does not go with output={task.output}"
    if task.balanced_trials is None:
        return
    if mode != "knn" or info.multilabel or info.spatial:
        yield "balanced_trials needs a kNN task with one class per sample"
    yield from task.balanced_trials.problems()


def _probe_problems(task: EvalTaskConfig, info: DatasetInfo, mode: str) -> Iterator[str]:
    """What would be told only when all embeddings are made."""
    ranked = task.primary_metric in ("auroc", "prauc")
    if mode == "knn" and info.spatial and ranked:
        yield f"kNN of pixels gives no probabilities, which {task.primary_metric} needs"
    if mode != "linear_probe":
        return
    if info.multilabel:
        yield "the linear probe does not do multi-label classification; use kNN"
    if task.probe_type != "linear" and not info.spatial:
        yield f"probe_type={task.probe_type} needs a per-pixel task, not {info.task_type}"
    if task.probe_type == "attnpool" and info.task_type == "regression":
        yield "probe_type=attnpool does not do regression"


def _number_problems(task: EvalTaskConfig, info: DatasetInfo, mode: str) -> Iterator[str]:
    if mode == "linear_probe" and task.probe_lr is None:
        yield "a linear probe needs probe_lr"
    if mode == "finetune" and (task.ft_lr is None or task.ft_grad_accum_steps < 1):
        yield "fine-tuning needs ft_lr and ft_grad_accum_steps of at least 1"
    for name in (
        "patch_size", "epochs", "embedding_batch_size", "probe_batch_size", "ft_batch_size",
        "linear_probe_eval_interval", "max_train_samples", "embedding_dim", "output_dim",
        "pretrain_max_samples", "pretrain_train_samples", "pretrain_valid_samples",
        "pretrain_test_samples",
    ):  # fmt: skip
        value = getattr(task, name)
        if value is not None and value < 1:
            yield f"{name} must be at least 1, got {value}"
    for name in ("finetune_seed", "max_train_samples_seed", "pretrain_label_seed"):
        if getattr(task, name) < 0:
            yield f"{name} must not be negative, got {getattr(task, name)}"
    for name in ("probe_lr", "ft_lr", "pretrain_geographic_bin_size_deg"):
        value = getattr(task, name)
        if value is not None and not 0 < value < math.inf:
            yield f"{name} must be a number above 0, got {value}"
    side = info.height_width if info.spatial else None
    if side and mode != "embedding_diagnostics" and side % task.patch_size:
        yield f"patch_size {task.patch_size} does not divide the tile of {side} px"
    if not 0 < task.label_fraction <= 1:
        yield f"label_fraction must lie in (0, 1], got {task.label_fraction}"
