"""Runs one downstream task on one model, from files to scores, and names and keeps the results.

Results are JSON lines, one file per folder, and one file per step of a run.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from olmoearth_jax.configlib.tasks import (
    BALANCED,
    DEFAULTS,
    BalancedTrials,
    DatasetInfo,
    EvalTaskConfig,
    RunOptions,
    check_task,
    dataset_info,
    eval_mode,
    modalities_of,
)
from olmoearth_jax.evals import balanced_trials, finetune, knn, linear_probe
from olmoearth_jax.evals.datasets import open_split, state_of
from olmoearth_jax.evals.embeddings import (
    Extraction,
    Stopped,
    diagnostics,
    extract,
    fit_pca,
    output_of,
    pooling_of,
)
from olmoearth_jax.evals.models import EmbeddingModel, Precomputed
from olmoearth_jax.evals.probe_heads import rng
from olmoearth_jax.evals.samples import Split
from olmoearth_jax.evals.scoring import EvalResult
from olmoearth_jax.files import (
    alone_in,
    append_json,
    json_plain,
    read_json_lines,
    remove_leftovers,
    write_atomically,
)
from olmoearth_jax.inference import quantize

log = logging.getLogger(__name__)

FAULTS = (ValueError, TypeError, OSError, jax.errors.JaxRuntimeError)
"""Errors of one task that end no other, nor a run: bad settings or data, too little memory."""


def fault_of(error: BaseException) -> str:
    """What an error of a task says, in one line; JAX says more."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


@dataclasses.dataclass
class TaskResult:
    """Scores of one task and every setting that can change its rank among models."""

    task: str
    mode: str
    valid: EvalResult | None
    test: EvalResult | None
    bootstrap: dict[str, Any]
    diagnostics: dict[str, float]
    settings: dict[str, Any]
    embedding_shape: tuple[int, ...]
    seconds: float
    trials: tuple[TaskResult, ...] = ()
    """Balanced trials on the same embeddings, a task of its own for each predictor."""


@dataclasses.dataclass(frozen=True)
class Hooks:
    """What a run asks and tells on its way."""

    stop: Callable[[], bool] = lambda: False
    """Asked between batches; true ends it."""
    log: Callable[[str], None] | None = None
    """Takes progress lines."""
    cache: dict | None = None
    """Keeps the embeddings of the last task, for runs that differ in the probe only or take fewer
    of the student's channels; one per model."""


@dataclasses.dataclass(frozen=True)
class _Run:
    """One task on one model."""

    name: str
    task: EvalTaskConfig
    info: DatasetInfo
    model: EmbeddingModel
    options: RunOptions
    hooks: Hooks

    @property
    def mode(self) -> str:
        return eval_mode(self.task, self.info)


def run_task(
    name: str,
    task: EvalTaskConfig,
    model: EmbeddingModel,
    options: RunOptions = DEFAULTS,
    hooks: Hooks = Hooks(),
) -> TaskResult:
    """Runs a task on a model.

    Raises:
      ValueError: bad settings or bad data (see `open_split`, `extract` and the probes).
      Stopped: `hooks.stop()` became true.
    """
    begun = time.perf_counter()
    run = _Run(name, task, check_task(name, task, options), model, options, hooks)
    shape: tuple[int, ...] = ()
    trials: tuple[TaskResult, ...] = ()
    settings = describe(task, run.info, model, options)
    if run.mode == "finetune":
        scores = finetune.run(name, task, model, options, stop=hooks.stop, log=hooks.log)
    else:
        splits = _embeddings(run)
        shape = splits["train"][0].shape[1:]
        scores = _scores(run, splits)
        trials = _trials(run, splits, settings)
    return TaskResult(
        name,
        run.mode,
        scores.get("valid"),
        scores.get("test"),
        scores.get("bootstrap", {}),
        scores.get("diagnostics", {}),
        settings,
        tuple(shape),
        round(time.perf_counter() - begun, 3),
        trials,
    )


def _trials(
    run: _Run, splits: dict[str, Split], settings: dict[str, Any]
) -> tuple[TaskResult, ...]:
    """What balanced trials on the task's embeddings give; none unless the task asks for them."""
    if run.task.balanced_trials is None:
        return ()
    begun, info = time.perf_counter(), run.info
    wanted = _resolved(run.task.balanced_trials, info)
    say = run.hooks.log or log.warning
    found = balanced_trials.run_trials(
        splits, info.num_classes, wanted, stop=run.hooks.stop, say=say
    )
    if run.hooks.stop():
        raise Stopped
    seconds = round((time.perf_counter() - begun) / max(len(found), 1), 3)
    shape = tuple(splits["train"][0].shape[1:])
    return tuple(
        TaskResult(
            balanced_trials.task_name(run.name, name),
            "balanced_trials",
            EvalResult(values[BALANCED], BALANCED, BALANCED, values),
            None,
            {},
            {},
            settings,
            shape,
            seconds,
        )
        for name, values in found.items()
    )


def _resolved(trials: BalancedTrials, info: DatasetInfo) -> BalancedTrials:
    return dataclasses.replace(trials, cap=trials.cap or balanced_trials.cap_of(info.name))


def _scores(run: _Run, splits: dict[str, Split]) -> dict[str, Any]:
    """Results by split, bootstrap and diagnostics of embeddings."""
    task, info, options = run.task, run.info, run.options
    if run.mode == "embedding_diagnostics":
        return {"diagnostics": diagnostics(splits["train"][0], options.seed)}
    if run.mode != "knn":
        extra = linear_probe.ProbeExtras(log=run.hooks.log)
        out = linear_probe.train_probe(task, info, splits, options, extra)
        return {"valid": out.valid, "test": out.test, "bootstrap": out.bootstrap}
    plain = dataclasses.replace(options, n_bootstrap=0)
    scores: dict[str, Any] = {}
    for split in ("valid", "test") if options.run_on_test else ("valid",):
        how = options if split == "test" else plain
        scores[split], scores["bootstrap"] = knn.run_knn(
            task, info, splits["train"], splits[split], how
        )
    return scores


_PROBE = ("probe_type", "probe_lr", "probe_batch_size", "epochs", "linear_probe_eval_interval",
    "select_best_by_primary_metric", "use_dice_loss")  # fmt: skip
_TUNE = ("ft_lr", "ft_batch_size", "ft_grad_accum_steps", "ft_head_type", "epochs", "use_dice_loss")
_PRETRAIN = ("h5py_dir", "pretrain_max_samples", "pretrain_target_modality", "pretrain_label_seed",
    "pretrain_train_samples", "pretrain_valid_samples", "pretrain_test_samples",
    "pretrain_split_strategy", "pretrain_geographic_bin_size_deg")  # fmt: skip
_OWN = ("task_type", "num_classes", "multilabel", "timeseries")
_BY_MODE = {"linear_probe": _PROBE, "finetune": _TUNE}


def describe(
    task: EvalTaskConfig, info: DatasetInfo, model: EmbeddingModel, options: RunOptions
) -> dict[str, Any]:
    """Every setting that changes the score or the rank of a model, ready for JSON."""
    mode = eval_mode(task, info)
    out: dict[str, Any] = {
        "dataset": info.name,
        "eval_mode": mode,
        "input_modalities": list(modalities_of(task, info)),
        "pooling": "centre" if task.use_center_token else task.pooling_type,
        "normalization": "pretrained" if task.norm_stats_from_pretrained else task.norm_method,
        "image_size": info.height_width,
        "patch_size": task.patch_size,
        "label_fraction": task.label_fraction,
        "max_train_samples": task.max_train_samples,
        "max_train_samples_seed": task.max_train_samples_seed,
        "embedding_dim": task.embedding_dim,
        "quantize_bits": (task.quantize_bits or 8) if task.quantize_embeddings else None,
        "quantile_config_path": task.quantile_config_path,
        "primary_metric": task.primary_metric,
        "primary_metric_class": task.primary_metric_class,
        "seed": task.finetune_seed if mode == "finetune" else options.seed,
        **getattr(model, "settings", {}),
    }
    output = "tokens" if mode == "finetune" else output_of(task, model)
    if output != "tokens":
        out |= {"output": output, "output_dim": task.output_dim}
        if not task.use_center_token:
            out["pooling"] = "grid" if info.spatial else "mean"
    if mode == "knn":
        out["k"] = options.k
    if task.balanced_trials is not None:
        out["balanced_trials"] = dataclasses.asdict(_resolved(task.balanced_trials, info))
    if (state := state_of(task, info)) is not None:  # may change between two evaluations
        out["data_state"] = state
    if info.folder:
        out |= {key: getattr(info, key) for key in _OWN}
    if options.n_bootstrap:
        out["n_bootstrap"], out["bootstrap_seed"] = options.n_bootstrap, options.bootstrap_seed
    own = _PRETRAIN if task.h5py_dir is not None else ()
    return out | {key: getattr(task, key) for key in (*_BY_MODE.get(mode, ()), *own)}


def _encoding(task: EvalTaskConfig, options: RunOptions) -> str:
    """Equal for tasks whose embeddings are the same, or are the first channels of one another."""
    diagnosed = eval_mode(task, dataset_info(task.dataset)) == "embedding_diagnostics"
    ours = {
        "eval_mode",
        "eval_interval",
        "primary_metric",
        "primary_metric_class",
        "balanced_trials",
        *_PROBE,
    }
    ours.discard("probe_type")
    # Neither principal components nor the buckets of a table are the same for fewer channels.
    if task.output == "student" and not task.embedding_dim and not task.quantile_config_path:
        ours.add("output_dim")
    fields = {k: v for k, v in dataclasses.asdict(task).items() if k not in ours}
    return repr([options, diagnosed, fields])


def encoding_order(tasks: Sequence[EvalTaskConfig], options: RunOptions = DEFAULTS) -> list[int]:
    """The places of tasks in the order in which `Hooks.cache` spares most encoding.

    Tasks with the same embeddings follow the first of them, those with more channels before those
    with fewer; all else stays in order.

    Raises:
      ValueError: a task on a data set that is not known.
    """
    keys = [_encoding(task, options) for task in tasks]

    def rank(place: int) -> tuple[int, float]:
        return keys.index(keys[place]), -(tasks[place].output_dim or float("inf"))

    return sorted(range(len(tasks)), key=rank)


def _embeddings(run: _Run) -> dict[str, Split]:
    """The splits' embeddings, from the cache if they were made for the same settings."""
    # Embeddings from outside are taken as they are.
    width = None if isinstance(run.model, Precomputed) else run.task.output_dim
    cache = run.hooks.cache
    if cache is None:
        return _extract_all(run)
    key = _encoding(run.task, run.options)
    if cache.get("key") != key or not _holds(cache, width):
        cache.clear()
        cache.update(key=key, width=width, splits=_extract_all(run))
    splits = cache["splits"]
    if cache["width"] == width:
        return splits
    return {name: (np.ascontiguousarray(x[..., :width]), y) for name, (x, y) in splits.items()}


def _holds(cache: dict, width: int | None) -> bool:
    """Whether embeddings that are kept have so many channels; None is all there are."""
    if width is None:
        return cache["width"] is None
    return width <= cache["splits"]["train"][0].shape[-1]


def _extract_all(run: _Run) -> dict[str, Split]:
    task, info, model = run.task, run.info, run.model
    wanted = ["train"]
    if run.mode != "embedding_diagnostics":
        wanted += ["valid"] + (["test"] if run.options.run_on_test else [])
    if isinstance(model, Precomputed):
        splits = {split: model.split(task, info, split) for split in wanted}
    else:
        how = Extraction(
            task.patch_size,
            pooling_of(task, info, model),
            task.embedding_batch_size,
            task.num_workers,
        )
        stored, splits = _storage(task), {}
        for split, reader in {s: open_split(run.name, task, s) for s in wanted}.items():
            x, y = extract(model, reader, reader.modalities, how, run.hooks.stop)
            splits[split] = (stored(x), y)
    if run.mode == "embedding_diagnostics":
        return splits
    return _transformed(task, splits, run.hooks.log)


def _storage(task: EvalTaskConfig) -> Callable[[np.ndarray], np.ndarray]:
    """What is left of embeddings after storing them as small integers, if the task asks for it."""
    if not task.quantize_embeddings:
        return lambda x: x
    if task.quantize_bits is None or task.quantile_config_path is None:
        return lambda x: quantize.dequantize_int8(quantize.quantize_int8(x))
    table = quantize.load_buckets(task.quantile_config_path, task.quantize_bits)
    return lambda x: table.dequantize(table.quantize(x))


def _transformed(task: EvalTaskConfig, splits: dict[str, Split], log) -> dict[str, Split]:
    """Subsamples the train split and projects all splits, as far as the task asks for it."""
    x, y = splits["train"]
    if task.max_train_samples is not None and task.max_train_samples < len(x):
        rows = rng(task.max_train_samples_seed, 3).permutation(len(x))[: task.max_train_samples]
        splits["train"] = x, y = x[rows], y[rows]
    if task.embedding_dim is None:
        return splits
    pca = fit_pca(x, task.embedding_dim)
    if log:
        log(f"PCA to {task.embedding_dim} dimensions keeps {pca.variance_retained:.1%} of variance")
    return {name: (pca(a), b) for name, (a, b) in splits.items()}


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
    for trial in result.trials:
        out |= log_values(trial)
    return out | {f"eval_time/{name}": result.seconds}


def records(result: TaskResult, **about: Any) -> list[dict[str, Any]]:
    """The JSON records of a result, its trials' first; `about` says which model (run, step, ...).

    The record of the task itself is the last: where it stands, the others do.
    """
    fields = dataclasses.asdict(dataclasses.replace(result, trials=()))
    fields.pop("trials")
    own = json_plain({**about, **fields})
    return [item for trial in result.trials for item in records(trial, **about)] + [own]


def append_line(folder: Path, item: Mapping[str, Any]) -> None:
    """Adds one record to `results.jsonl` of a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    append_json(folder / LINES, item)


def read_lines(folder: Path) -> list[dict[str, Any]]:
    """Objects in `results.jsonl`; lines cut short by a crash are left out."""
    return [r for r in read_json_lines(folder / LINES) if isinstance(r, dict)]


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Of `read_lines` the records of tasks, which others may have lines among."""
    known = ("task", str), ("mode", str), ("settings", dict)
    found = read_lines(folder)
    return [r for r in found if all(isinstance(r.get(key), kind) for key, kind in known)]


def write_step(folder: Path, step: int, items: Sequence[Mapping[str, Any]]) -> Path:
    """Adds records to `evals/<step>.json`; the same task with the same settings is replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{step}.json"
    with alone_in(folder):  # evaluations side by side
        remove_leftovers(path)
        merged = {identity(r): r for r in [*_step_records(path), *items]}
        write_atomically(path, json.dumps(list(merged.values()), indent=1) + "\n")
    return path


def complete_step(folder: Path, step: int, item: Mapping[str, Any]) -> None:
    """Adds a record of `results.jsonl` to `evals/<step>.json` where a crash came between them."""
    held = {identity(r) for r in _step_records(folder / f"{step}.json")}
    if identity(item) not in held:
        write_step(folder, step, [item])


def _step_records(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path} is damaged ({e}): delete it and evaluate again") from None
    if not isinstance(held, list) or not all(isinstance(item, dict) for item in held):
        raise ValueError(f"{path} is no list of results: delete it and evaluate again")
    return held


def identity(item: Mapping[str, Any]) -> str:
    """What makes two records the same measurement: model, task, settings, splits scored.

    Other weights of the same model and step make a measurement anew, not another; see `is_of`.
    """
    settings = {k: v for k, v in (item.get("settings") or {}).items() if k != "weights"}
    scored = item.get("test") is not None
    keys = (item.get(k) for k in ("model", "checkpoint_step", "task"))
    return json.dumps([*keys, settings, scored], sort_keys=True)


def is_of(item: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Whether a record was made with the weights of `settings`; old ones do not say."""
    mine = settings.get("weights")
    return item["settings"].get("weights", mine) == mine
