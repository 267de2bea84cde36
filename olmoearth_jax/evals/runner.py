"""Runs one downstream task on one model, from files to scores."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from olmoearth_jax.evals import diagnostics, finetune, knn, linear_probe, transforms
from olmoearth_jax.evals.datasets import Reader, open_split
from olmoearth_jax.evals.embeddings import EmbeddingModel, extract, pooling_of
from olmoearth_jax.evals.layers import rng
from olmoearth_jax.evals.metrics import IGNORE, EvalResult, make_result, segmentation_metrics
from olmoearth_jax.evals.tasks import (
    DatasetInfo,
    EvalTaskConfig,
    check_task,
    eval_mode,
    modalities_of,
)

Split = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """What holds for all tasks of an evaluation.

    Attributes:
      run_on_test: score the test split too.
      n_bootstrap: resamples of the test score; 0 for none.
      bootstrap_seed: their seed.
      seed: of probe initialisation, sample order and subsets.
      k: neighbours of kNN.
      workers: threads that read samples.
      save_folder: where fine-tuning keeps its state; None keeps none.
    """

    run_on_test: bool = False
    n_bootstrap: int = 0
    bootstrap_seed: int = 42
    seed: int = 42
    k: int = knn.DEFAULT_K
    workers: int = 2
    save_folder: Path | None = None


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

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def run_task(
    name: str,
    task: EvalTaskConfig,
    model: EmbeddingModel,
    options: RunOptions = RunOptions(),
    *,
    cache: dict | None = None,
    stop: Callable[[], bool] = lambda: False,
    log: Callable[[str], None] | None = None,
) -> TaskResult:
    """Runs a task on a model.

    Args:
      cache: keeps the embeddings of the last call, for runs that differ in the probe only; make
        one per model.
      stop: asked between batches.
      log: takes progress lines.

    Raises:
      ValueError: bad settings or bad data (see `open_split`, `extract` and the probes).
      Stopped: `stop()` became true.
    """
    begun = time.perf_counter()
    info = check_task(name, task)
    mode = eval_mode(task, info)
    if mode == "finetune":
        scores = finetune.run(
            name,
            task,
            model,
            run_on_test=options.run_on_test,
            folder=options.save_folder,
            stop=stop,
            log=log,
        )
        shape: tuple[int, ...] = ()
    else:
        splits = _embeddings(name, task, info, mode, model, options, cache, stop)
        shape = splits["train"][0].shape[1:]
        scores = _score(task, info, mode, splits, options, log)
    return TaskResult(
        name,
        mode,
        scores.get("valid"),
        scores.get("test"),
        scores.get("bootstrap", {}),
        scores.get("diagnostics", {}),
        describe(task, info, mode, model, options),
        tuple(shape),
        round(time.perf_counter() - begun, 3),
    )


def describe(
    task: EvalTaskConfig, info: DatasetInfo, mode: str, model: EmbeddingModel, options: RunOptions
) -> dict[str, Any]:
    """Every setting that changes the score or the rank of a model, ready for JSON."""
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
        "embedding_dim": task.embedding_dim,
        "quantize_bits": (task.quantize_bits or 8) if task.quantize_embeddings else None,
        "seed": task.finetune_seed if mode == "finetune" else options.seed,
        **getattr(model, "settings", {}),
    }
    if mode == "knn":
        out["k"] = options.k
    elif mode == "linear_probe":
        out |= {
            "probe_type": task.probe_type,
            "probe_lr": task.probe_lr,
            "probe_batch_size": task.probe_batch_size,
            "epochs": task.epochs,
            "probe_eval_interval": task.linear_probe_eval_interval,
            "select_best": task.select_best_by_primary_metric,
            "dice_loss": task.use_dice_loss,
        }
    elif mode == "finetune":
        out |= {
            "ft_lr": task.ft_lr,
            "ft_batch_size": task.ft_batch_size * task.ft_grad_accum_steps,
            "head": task.ft_head_type,
            "epochs": task.epochs,
        }
    return out


_PROBE_FIELDS = {
    "eval_mode", "eval_interval", "probe_lr", "probe_batch_size", "linear_probe_eval_interval",
    "epochs", "select_best_by_primary_metric", "use_dice_loss", "primary_metric",
    "primary_metric_class",
}  # fmt: skip
"""Task fields that do not change embeddings (nor which splits and labels there are)."""


def _embeddings(name, task, info, mode, model, options, cache, stop) -> dict[str, Split]:
    """The splits' embeddings, from the cache if they were made for the same settings."""
    fields = dataclasses.asdict(task)
    key = repr([options, mode == "embedding_diagnostics"])
    key += repr({k: v for k, v in fields.items() if k not in _PROBE_FIELDS})
    if cache is not None and cache.get("key") == key:
        return cache["splits"]
    splits = _extract_all(name, task, info, mode, model, options, stop)
    if cache is not None:
        cache.update(key=key, splits=splits)
    return splits


def _extract_all(name, task, info, mode, model, options, stop) -> dict[str, Split]:
    wanted = ["train"]
    if mode != "embedding_diagnostics":
        wanted += ["valid"] + (["test"] if options.run_on_test else [])
    readers: dict[str, Reader] = {s: open_split(name, task, s) for s in wanted}
    pool = pooling_of(task, info)
    splits = {}
    for split, reader in readers.items():
        found = extract(
            model,
            reader,
            reader.modalities,
            patch_size=task.patch_size,
            pool=pool,
            batch_size=task.embedding_batch_size,
            workers=options.workers,
            stop=stop,
        )
        splits[split] = (_quantized(task, found[0]), found[1])
    if mode == "embedding_diagnostics":
        return splits
    return _transformed(task, splits)


def _quantized(task: EvalTaskConfig, x: np.ndarray) -> np.ndarray:
    """What is left of embeddings after storing them as small integers."""
    if not task.quantize_embeddings:
        return x
    if task.quantize_bits is None:
        return transforms.dequantize_int8(transforms.quantize_int8(x))
    if task.quantile_config_path is None:
        raise ValueError("quantize_bits needs quantile_config_path, the file with the buckets")
    table = transforms.load_buckets(task.quantile_config_path, task.quantize_bits)
    return table.dequantize(table.quantize(x))


def _transformed(task: EvalTaskConfig, splits: dict[str, Split]) -> dict[str, Split]:
    """Subsamples the train split and projects all splits, as far as the task asks for it."""
    x, y = splits["train"]
    if task.max_train_samples is not None and task.max_train_samples < len(x):
        rows = rng(task.max_train_samples_seed, 3).permutation(len(x))[: task.max_train_samples]
        splits["train"] = x, y = x[rows], y[rows]
    if task.embedding_dim is None:
        return splits
    pca = transforms.fit_pca(x, task.embedding_dim)
    return {name: (pca(a), b) for name, (a, b) in splits.items()}


def _score(task, info, mode, splits, options, log) -> dict[str, Any]:
    if mode == "embedding_diagnostics":
        return {"diagnostics": diagnostics.diagnostics(splits["train"][0], options.seed)}
    if mode == "knn":
        return _run_knn(task, info, splits, options)
    settings = linear_probe.ProbeSettings(
        task_type=info.task_type,
        num_classes=info.num_classes,
        lr=task.probe_lr or 0.0,
        height_width=info.height_width,
        epochs=task.epochs,
        eval_interval=min(task.linear_probe_eval_interval, task.epochs),
        batch_size=task.probe_batch_size,
        probe_type=task.probe_type,
        use_dice_loss=task.use_dice_loss,
        select_best=task.select_best_by_primary_metric,
        primary_metric=task.primary_metric,
        primary_class=task.primary_metric_class,
        seed=options.seed,
        n_bootstrap=options.n_bootstrap,
        bootstrap_seed=options.bootstrap_seed,
    )
    out = linear_probe.train_probe(
        settings, splits["train"], splits["valid"], splits.get("test"), log=log
    )
    return {"valid": out.valid, "test": out.test, "bootstrap": out.bootstrap}


def _run_knn(task, info, splits, options) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name in ("valid", "test"):
        if name not in splits:
            continue
        if info.spatial:
            out[name] = patch_knn(task, info, splits["train"], splits[name], options.k)
            continue
        out[name], resampled = knn.run_knn(
            splits["train"],
            splits[name],
            info.num_classes,
            k=options.k,
            primary_metric=task.primary_metric,
            primary_class=task.primary_metric_class,
            n_bootstrap=options.n_bootstrap if name == "test" else 0,
            bootstrap_seed=options.bootstrap_seed,
        )
        if resampled:
            out["bootstrap"] = resampled
    return out


def patch_labels(labels: np.ndarray, height: int, width: int, num_classes: int) -> np.ndarray:
    """Most frequent class of every patch, IGNORE where none is labelled: [N, H, W] -> [N, h, w]."""
    n, rows, columns = labels.shape
    tiles = labels.reshape(n, height, rows // height, width, columns // width)
    counts = np.stack([(tiles == c).sum((2, 4)) for c in range(num_classes)], -1)
    return np.where(counts.sum(-1) > 0, counts.argmax(-1), IGNORE)


def patch_knn(
    task: EvalTaskConfig, info: DatasetInfo, train: Split, query: Split, k: int
) -> EvalResult:
    """kNN for segmentation: a patch takes, for all its pixels, the class of similar train patches.

    Train patches count with their most frequent class. Scored per pixel, as a probe is.
    """
    height, width = train[0].shape[1:3]
    for x, y in (train, query):
        linear_probe.check_split("kNN", x, y, info.task_type, info.num_classes)
    known = patch_labels(train[1], height, width, info.num_classes)
    rows = known != IGNORE
    _, guess = knn.knn_scores(
        train[0][rows], known[rows], query[0].reshape(-1, query[0].shape[-1]), info.num_classes, k
    )
    guess = guess.reshape(query[0].shape[:3])
    p = query[1].shape[1] // height, query[1].shape[2] // width
    pixels = np.repeat(np.repeat(guess, p[0], 1), p[1], 2)
    values = segmentation_metrics(pixels, query[1], info.num_classes)
    return make_result(values, info.task_type, task.primary_metric, task.primary_metric_class)
