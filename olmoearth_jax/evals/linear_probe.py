"""Training and scoring of probes on frozen embeddings (spec/evals.md sections 7.2 and 7.3)."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from olmoearth_jax.evals import layers, losses, metrics, probes
from olmoearth_jax.evals.metrics import IGNORE, EvalResult

CHUNK_BYTES = 256 << 20
"""Embeddings sent to the device at once while training."""

Split = tuple[np.ndarray, np.ndarray]
"""Embeddings and labels of one split."""


@dataclasses.dataclass(frozen=True)
class ProbeSettings:
    """How a probe is trained and selected; defaults as in spec/evals.md section 2."""

    task_type: str
    num_classes: int
    lr: float
    height_width: int | None = None
    epochs: int = 50
    eval_interval: int = 50
    batch_size: int = 32
    probe_type: str = "linear"
    use_dice_loss: bool = False
    select_best: bool = False
    primary_metric: str | None = None
    primary_class: int | None = None
    bf16: bool = True
    seed: int = 42
    n_bootstrap: int = 0
    bootstrap_seed: int = 42


@dataclasses.dataclass
class ProbeOutcome:
    """What a probe run gives: `valid` is the reported validation result, `test` may be None."""

    valid: EvalResult
    test: EvalResult | None
    bootstrap: dict[str, Any]
    history: list[EvalResult]
    best_epoch: int
    losses: np.ndarray
    lrs: np.ndarray
    params: Any
    stats: Any


def learning_rate(max_lr: float, epochs: int, position: np.ndarray | float) -> np.ndarray:
    """Warm-up then cosine to 1e-5; `position` is in epochs, fractions for batches within one."""
    t = np.asarray(position, np.float64)
    warmup = int(0.1 * epochs)
    floor = 1e-5
    rise = max_lr * t / max(warmup, 1)
    fall = 0.5 * (1 + np.cos(np.pi * (t - warmup) / (epochs - warmup)))
    return np.where(t < warmup, rise, floor + (max_lr - floor) * fall)


def _loss(probe: probes.Probe, dice: bool, params, stats, x, y, weight):
    out, stats = probes.forward(probe, params, stats, x, weight)
    if probe.spatial:
        shape = y.shape[1:3]
        out = layers.resize_bilinear(out if out.ndim == 4 else out[..., None], *shape)
    if "regression" in probe.task_type:
        return losses.masked_mse(out.reshape(y.shape), y), stats
    rule = losses.dice_cross_entropy if dice else losses.cross_entropy
    return rule(out, y), stats


@functools.partial(jax.jit, static_argnames=("probe", "dice"))
def _train_chunk(probe: probes.Probe, dice: bool, state, xs, ys, weights, lrs):
    """Runs the batches xs [n, B, ...]; batches without a sample leave the state untouched."""

    def step(state, batch):
        params, stats, moments, count = state
        x, y, weight, lr = batch
        grad = jax.value_and_grad(_loss, argnums=2, has_aux=True)
        (loss, new_stats), grads = grad(probe, dice, params, stats, x, y, weight)
        new_params, new_moments = layers.adamw_update(params, grads, moments, count + 1, lr)
        real = weight.sum() > 0
        new = (new_params, new_stats, new_moments, count + 1)
        return jax.tree.map(lambda a, b: jnp.where(real, a, b), new, state), loss

    return jax.lax.scan(step, state, (xs, ys, weights, lrs))


@functools.partial(jax.jit, static_argnames=("probe", "size"))
def _predict(probe: probes.Probe, size: tuple[int, int] | None, params, stats, x):
    """Predictions and, for classes, probabilities with the class axis last."""
    out, _ = probes.forward(probe, params, stats, x)
    if size is not None:
        out = layers.resize_bilinear(out if out.ndim == 4 else out[..., None], *size)
    if "regression" in probe.task_type:
        return (out[..., 0] if size is not None else out), None
    return jnp.argmax(out, -1), jax.nn.softmax(out.astype(jnp.float32))


def predict(probe: probes.Probe, params, stats, x: np.ndarray, size=None, batch_size: int = 64):
    """Predictions [N, ...] and probabilities [N, ..., C] (None for regression) of embeddings."""
    guesses, scores = [], []
    step = min(batch_size, len(x))
    for start in range(0, len(x), step):
        part = x[start : start + step]
        padded = np.concatenate([part, np.repeat(part[-1:], step - len(part), 0)])
        guess, score = _predict(probe, size, params, stats, padded)
        guesses.append(np.asarray(guess)[: len(part)])
        if score is not None:
            scores.append(np.asarray(score)[: len(part)])
    return np.concatenate(guesses), np.concatenate(scores) if scores else None


def score(
    settings: ProbeSettings, guess: np.ndarray, labels: np.ndarray, scores: np.ndarray | None
) -> EvalResult:
    """Metrics of predictions; scores have the class axis last."""
    task = settings.task_type
    if "regression" in task:
        values = metrics.regression_metrics(guess, labels)
    elif task == "segmentation":
        channels_first = None if scores is None else np.moveaxis(scores, -1, 1)
        values = metrics.segmentation_metrics(guess, labels, settings.num_classes, channels_first)
    else:
        known = labels != IGNORE
        if not known.any():
            raise ValueError("no sample carries a label: every label is the ignore value")
        values = metrics.classification_metrics(
            guess[known], labels[known], None if scores is None else scores[known]
        )
    return metrics.make_result(values, task, settings.primary_metric, settings.primary_class)


class _Trainer:
    """Feeds shuffled batches, in order, to the compiled chunk."""

    def __init__(self, settings: ProbeSettings, train: Split, order: np.ndarray | None):
        self.settings, self.order = settings, order
        self.x, labels = train
        self.probe = probes.make_probe(
            settings.probe_type, settings.task_type, settings.num_classes,
            self.x.shape, settings.height_width, settings.bf16,
        )  # fmt: skip
        self.mean, self.std = 0.0, 1.0
        if "regression" in settings.task_type:
            self.mean, self.std = target_scale(labels)
            self.y = ((labels - self.mean) / self.std).astype(np.float32)
        else:
            self.y = labels.astype(np.int32)
        n, size = len(self.x), settings.batch_size
        self.batches = -(-n // size)
        per_batch = size * (self.x[0].nbytes + self.y[0].nbytes)
        parts = math.ceil(self.batches * per_batch / CHUNK_BYTES)
        self.chunk = math.ceil(self.batches / max(parts, 1))
        self.filler = np.nan if np.issubdtype(self.y.dtype, np.floating) else IGNORE

    def train_chunk(self, params, stats, epochs: range):
        """Parameters and statistics after some epochs, and (loss, rate) of every batch."""
        # The reference makes a new optimiser for every chunk of epochs; results depend on it.
        state = (params, stats, layers.adamw_init(params), jnp.asarray(0))
        found, rates = [], []
        for epoch in epochs:
            if self.order is not None:
                rows = self.order[epoch]
            else:
                rows = layers.rng(self.settings.seed, 1, epoch).permutation(len(self.y))
            state, loss, lr = self.epoch(state, rows, epoch)
            found.append(loss)
            rates.append(lr)
        return state[0], state[1], (np.concatenate(found), np.concatenate(rates))

    def evaluate(self, params, stats, split: Split):
        """Predictions, probabilities and scores of a split, in the unit of its labels."""
        size = tuple(split[1].shape[1:3]) if self.probe.spatial else None
        guess, scores = predict(self.probe, params, stats, split[0], size)
        if "regression" in self.settings.task_type:
            guess = guess * self.std + self.mean
        return guess, scores, score(self.settings, guess, split[1], scores)

    def epoch(self, state, order: np.ndarray, epoch: int):
        """One pass over `order`; returns the state, and the loss and rate of every batch."""
        size, found = self.settings.batch_size, []
        position = epoch + np.arange(self.batches) / self.batches
        lrs = learning_rate(self.settings.lr, self.settings.epochs, position)
        for start in range(0, self.batches, self.chunk):
            steps = min(self.chunk, self.batches - start)
            rows = order[start * size : (start + steps) * size]
            room = self.chunk * size
            weight = (np.arange(room) < len(rows)).astype(np.float32)
            rows = np.concatenate([rows, np.zeros(room - len(rows), rows.dtype)])
            x, y = self.x[rows], self.y[rows]
            y[weight == 0] = self.filler
            shape = (self.chunk, size)
            rate = np.zeros(self.chunk, np.float32)
            rate[:steps] = lrs[start : start + steps]
            state, loss = _train_chunk(
                self.probe, self.settings.use_dice_loss, state,
                x.reshape(*shape, *x.shape[1:]), y.reshape(*shape, *y.shape[1:]),
                weight.reshape(shape), rate,
            )  # fmt: skip
            found.append(np.asarray(loss)[:steps])
        return state, np.concatenate(found), lrs


def train_probe(
    settings: ProbeSettings,
    train: Split,
    valid: Split,
    test: Split | None = None,
    *,
    order: np.ndarray | None = None,
    start: tuple[Any, Any] | None = None,
    log: Callable[[str], None] | None = None,
) -> ProbeOutcome:
    """Trains a probe and scores it.

    Args:
      train, valid, test: (embeddings, labels): [N, D] with labels [N], or [N, h, w, D] (attnpool:
        [N, h, w, T, D]) with labels [N, H, W]; class labels are integers, -1 = ignored.
      order: int [epochs, N] sample order of every epoch instead of the seeded one.
      start: (params, stats) instead of the seeded initial ones.

    Raises:
      ValueError: empty split, no label in a split, labels out of range, NaN embeddings.
    """
    splits = {"train": train, "valid": valid} | ({"test": test} if test is not None else {})
    for name, (x, y) in splits.items():
        check_split(name, x, y, settings.task_type, settings.num_classes)
    trainer = _Trainer(settings, train, order)
    probe = trainer.probe
    params, stats = jax.tree.map(jnp.asarray, start or probes.init(probe, settings.seed))
    history, traces, best = [], [], None
    for first in range(0, settings.epochs, settings.eval_interval):
        last = min(first + settings.eval_interval, settings.epochs)
        params, stats, trace = trainer.train_chunk(params, stats, range(first, last))
        traces.append(trace)
        result = trainer.evaluate(params, stats, valid)[2]
        history.append(result)
        if log:
            log(f"epoch {last}: {result.primary_key} {result.primary:.4f}")
        if best is None or _better(result, best[1]):
            best = (last, result, params, stats)
    assert best is not None
    test_result, resampled = None, {}
    if test is not None:
        guess, scores, test_result = trainer.evaluate(best[2], best[3], test)
        if settings.n_bootstrap:
            resampled = _bootstrap(settings, guess, test[1], scores)
    reported = history[-1]
    if settings.select_best:
        reported = history[max(best[0] // settings.eval_interval - 1, 0)]
    losses_, lrs = (np.concatenate([t[i] for t in traces]) for i in range(2))
    host = jax.tree.map(np.asarray, best[2:])
    return ProbeOutcome(
        reported, test_result, resampled, history, best[0], losses_, lrs, host[0], host[1]
    )


def _better(result: EvalResult, best: EvalResult) -> bool:
    sign = 1 if metrics.higher_is_better(result.primary_metric) else -1
    return math.isnan(best.primary) or sign * result.primary > sign * best.primary


def _bootstrap(settings: ProbeSettings, guess, labels, scores) -> dict[str, Any]:
    ranked = settings.primary_metric in ("auroc", "prauc", "micro_map")

    def primary(rows: np.ndarray) -> float:
        part = scores[rows] if ranked else None
        return score(settings, guess[rows], labels[rows], part).primary

    return metrics.bootstrap(primary, len(labels), settings.n_bootstrap, settings.bootstrap_seed)


def target_scale(labels: np.ndarray) -> tuple[float, float]:
    """Mean and unbiased standard deviation (at least 1e-6) of finite labels; (0, 1) if none."""
    known = labels[np.isfinite(labels)].astype(np.float64)
    if not len(known):
        return 0.0, 1.0
    return float(known.mean()), max(float(known.std(ddof=1)) if len(known) > 1 else 0.0, 1e-6)


def check_split(name: str, x: np.ndarray, y: np.ndarray, task_type: str, num_classes: int) -> None:
    """Raises ValueError for an empty split, lengths that differ, NaN embeddings or bad labels."""
    if not len(x):
        raise ValueError(f"the {name} split is empty")
    if len(x) != len(y):
        raise ValueError(f"the {name} split has {len(x)} embeddings but {len(y)} labels")
    if not np.isfinite(x).all():
        raise ValueError(f"the {name} embeddings hold NaN or infinite values")
    if "regression" in task_type:
        if not np.isfinite(y).any():
            raise ValueError(f"the {name} split has no finite regression label")
        return
    if y.ndim > 1 and task_type == "classification":
        raise ValueError("the linear probe does not do multi-label classification; use kNN")
    if not np.issubdtype(y.dtype, np.integer):
        raise TypeError(f"{task_type} labels must be integers, got {y.dtype}")
    known = y[y != IGNORE]
    if not known.size:
        raise ValueError(f"every label of the {name} split is the ignore value {IGNORE}")
    if known.min() < 0 or known.max() >= num_classes:
        bad = int(known.min() if known.min() < 0 else known.max())
        raise ValueError(f"the {name} split has label {bad}, outside 0...{num_classes - 1}")
