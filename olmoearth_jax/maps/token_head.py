"""A linear head on the embeddings of tokens: the probe of the evaluations, one token a sample."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from olmoearth_jax.configlib.tasks import DatasetInfo, EvalTaskConfig, RunOptions
from olmoearth_jax.evals import linear_probe, probe_heads
from olmoearth_jax.maps.samples import Target

_SMALL, _STEPS = 16, 16
"""Least tokens per step, and least steps per epoch where there are more."""


@dataclasses.dataclass(frozen=True)
class HeadOptions:
    """How it is trained.

    Attributes:
      epochs, patience: at most so many, and stop after so many without a better validation.
      lr, batch: learning rate and most tokens per step.
      seed: of initial values and order.
    """

    epochs: int = 100
    patience: int = 10
    lr: float = 0.01
    batch: int = 256
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class TokenHead:
    """A trained head.

    Attributes:
      head: its form.
      params, stats: its values.
      scale: (mean, spread) of the values that it was trained on, (0, 1) for classes.
    """

    head: probe_heads.Head
    params: Any
    stats: Any
    scale: tuple[float, float]

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """float32 [N, K] probabilities, or [N, 1] values, of embeddings [N, D]."""
        fitted = linear_probe.FittedProbe(self.head, self.params, self.stats)
        guess, scores = linear_probe.predict(fitted, x, batch_size=max(len(x), 1))
        if scores is None:
            mean, spread = self.scale
            return (guess * spread + mean).astype(np.float32)[:, None]
        return scores


def head_of(target: Target, width: int) -> probe_heads.Head:
    """The form of the head for embeddings of a width."""
    if target.classes is None:
        return probe_heads.make_probe("linear", "scalar_regression", 1, (1, width), bf16=False)
    return probe_heads.make_probe(
        "linear", "classification", len(target.classes), (1, width), bf16=False
    )


def empty(head: probe_heads.Head) -> tuple[Any, Any]:
    """Parameters and statistics of a head before its training, which tell their form."""
    return probe_heads.init(head, 0)


def _batch(o: HeadOptions, count: int) -> int:
    """Tokens per step: less than asked for where an epoch would have only a few steps."""
    return max(1, min(o.batch, max(_SMALL, count // _STEPS), count))


def shares(weights: np.ndarray) -> np.ndarray:
    """Weights whose mean is 1, so that the rate of learning is that of labels that count alike.

    Args:
      weights: float [N] from 0 on; the result is float32 [N].

    Raises:
      ValueError: all are 0.
    """
    if not weights.any():
        raise ValueError("all labels of the training split have the weight 0")
    return (weights / weights.mean(dtype=np.float64)).astype(np.float32)


def fit(
    target: Target,
    train: tuple[np.ndarray, np.ndarray],
    valid: tuple[np.ndarray, np.ndarray],
    o: HeadOptions,
    class_weights: np.ndarray | None = None,
    log: Callable[[Mapping[str, Any]], None] | None = None,
    weights: np.ndarray | None = None,
) -> TokenHead:
    """Trains a head and keeps the epoch that validation likes best.

    Args:
      train, valid: embeddings [N, D] with class indices or values [N].
      class_weights: float [K].
      log: gets epoch, loss and the validation metric of each epoch.
      weights: float32 [N], how much each training label counts beside its class; None: alike.

    Raises:
      ValueError: an empty split.
    """
    values = target.classes is None
    kind = "scalar_regression" if values else "classification"
    info = DatasetInfo("map", kind, 1 if values else len(target.classes or ()), ())
    task = EvalTaskConfig(
        dataset="map", probe_lr=o.lr, probe_batch_size=_batch(o, len(train[0])),
        epochs=o.epochs, linear_probe_eval_interval=1,
        primary_metric="rmse" if values else "macro_f1",
    )  # fmt: skip
    extra = linear_probe.ProbeExtras(
        class_weights,
        o.patience,
        True,
        bf16=False,
        weights=None if weights is None else shares(weights),
    )
    splits = {"train": train, "valid": valid}
    got = linear_probe.train_probe(task, info, splits, RunOptions(seed=o.seed), extra)
    if log:
        each = np.array_split(got.losses, len(got.history))
        for epoch, (part, result) in enumerate(zip(each, got.history, strict=True)):
            log({
                "epoch": epoch + 1, "loss": float(part.mean()),
                result.primary_metric: result.primary, "best": epoch + 1 == got.best_epoch,
            })  # fmt: skip
    scale = linear_probe.target_scale(train[1]) if values else (0.0, 1.0)
    params = jax.tree.map(np.asarray, got.params)
    return TokenHead(head_of(target, train[0].shape[1]), params, got.stats, scale)
