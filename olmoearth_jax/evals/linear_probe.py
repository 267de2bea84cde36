"""Training and scoring of probes on frozen embeddings (spec/evals.md sections 7.2 and 7.3)."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from olmoearth_jax.configlib.tasks import DEFAULTS, DatasetInfo, EvalTaskConfig, RunOptions
from olmoearth_jax.evals import probe_heads, scoring
from olmoearth_jax.evals.samples import IGNORE, Split, check_split
from olmoearth_jax.evals.scoring import EvalResult

CHUNK_BYTES = 256 << 20
"""Embeddings kept on the device at once while training."""


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


@dataclasses.dataclass(frozen=True)
class ProbeExtras:
    """What a task does not say; by default everything is as the reference has it."""

    class_weights: Any = None
    """float [C], how much labels of a class count."""
    patience: int | None = None
    """Stop after so many epochs without a better validation."""
    one_optimizer: bool = False
    """Keep its moments from one validation to the next."""
    bf16: bool = True
    """Round matrix products to bfloat16."""
    weights: np.ndarray | None = None
    """float32 [N], how much each training sample counts; its labels are [N]."""
    order: np.ndarray | None = None
    """int [epochs, N], sample order of every epoch instead of the seeded one."""
    start: tuple[Any, Any] | None = None
    """(params, stats) instead of the seeded initial ones."""
    log: Callable[[str], None] | None = None
    """Takes progress lines."""


class FittedProbe(NamedTuple):
    """A probe that can predict."""

    head: probe_heads.Head
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


class _Rule(NamedTuple):
    """The static part of a training step."""

    probe: probe_heads.Head
    dice: bool


def _loss(rule: _Rule, fixed, flat, stats, batch):
    unravel, class_weights = fixed
    x, y, weight, counts = batch
    out, stats = probe_heads.forward(rule.probe, unravel(flat), stats, x, weight)
    out = probe_heads.at_labels(rule.probe, out, y.shape[1:3])
    return probe_heads.loss(rule.probe, out, y, rule.dice, class_weights, weights=counts), stats


@functools.partial(jax.jit, static_argnames="rule")
def _train_steps(rule: _Rule, class_weights, state, table, plan):
    """Runs batches of a table of embeddings and labels; parameters and moments are one vector each.

    Args:
      class_weights: float [C] or None, see `probe_heads.cross_entropy`.
      state: (parameters, running statistics, moments, steps taken).
      table: embeddings, labels, and weights of samples if there are any.
      plan: rows int [batches, batch] of the table, -1 for no sample; rates [batches]; and how many
        of the batches to run.

    Returns:
      The state afterwards, and losses [batches], 0 where none was run.
    """
    rows, lrs, steps = plan
    start, unravel = ravel_pytree(state[0])
    fixed = unravel, class_weights
    real = rows >= 0
    nothing = jnp.nan if jnp.issubdtype(table[1].dtype, jnp.floating) else IGNORE
    x, y, *counts = (a[jnp.maximum(rows, 0)] for a in table)  # once: in the loop it takes longer
    y = jnp.where(real.reshape(*real.shape, *[1] * (y.ndim - 2)), y, nothing)
    grad = jax.value_and_grad(_loss, argnums=2, has_aux=True)

    def step(i, carry):
        (flat, stats, moments, count), found = carry
        weight = real[i].astype(jnp.float32)
        batch = (x[i], y[i], weight, counts[0][i] if counts else None)
        (loss, stats), grads = grad(rule, fixed, flat, stats, batch)
        flat, moments = probe_heads.adamw_update(flat, grads, moments, count + 1, lrs[i])
        return (flat, stats, moments, count + 1), found.at[i].set(loss)

    carry = (start, *state[1:]), jnp.zeros(len(rows), jnp.float32)
    (flat, stats, moments, count), found = jax.lax.fori_loop(0, steps, step, carry)
    return (unravel(flat), stats, moments, count), found


@functools.partial(jax.jit, static_argnames=("probe", "size"))
def _predict(probe: probe_heads.Head, size: tuple[int, int] | None, params, stats, x):
    """Predictions and, for classes, probabilities with the class axis last."""
    out, _ = probe_heads.forward(probe, params, stats, x)
    out = probe_heads.at_labels(probe, out, size)
    if "regression" in probe.task_type:
        return out, None
    return jnp.argmax(out, -1), jax.nn.softmax(out.astype(jnp.float32))


def predict(fitted: FittedProbe, x: np.ndarray, size=None, batch_size: int = 64):
    """Predictions [N, ...] and probabilities [N, ..., C] (None for regression) of embeddings."""
    found = []
    step = min(batch_size, len(x))
    for start in range(0, len(x), step):
        part = x[start : start + step]
        padded = np.concatenate([part, np.repeat(part[-1:], step - len(part), 0)])
        out = _predict(fitted.head, size, fitted.params, fitted.stats, padded)
        found.append([None if a is None else np.asarray(a)[: len(part)] for a in out])
    guess, scores = zip(*found, strict=True)
    return np.concatenate(guess), None if scores[0] is None else np.concatenate(scores)


class _Trainer:
    """Feeds shuffled batches, in order, to the compiled steps."""

    def __init__(self, task, info, train: Split, seed: int, extra: ProbeExtras):
        self.extra, self.moments = extra, None
        self.task, self.info, self.seed = task, info, seed
        self.x, labels = train
        self.probe = probe_heads.make_probe(
            task.probe_type,
            info.task_type,
            info.num_classes,
            self.x.shape,
            info.height_width,
            extra.bf16,
        )
        self.mean, self.std = 0.0, 1.0
        if "regression" in info.task_type:
            self.mean, self.std = target_scale(labels)
            self.y = ((labels - self.mean) / self.std).astype(np.float32)
        else:
            self.y = labels.astype(np.int32)
        size = task.probe_batch_size
        self.batches = -(-len(self.x) // size)
        parts = math.ceil((self.x.nbytes + self.y.nbytes) / CHUNK_BYTES)
        self.chunk = math.ceil(self.batches / parts)
        self.arrays = (self.x, self.y, *([] if extra.weights is None else [extra.weights]))
        self.table = tuple(map(jnp.asarray, self.arrays)) if parts == 1 else None

    def train(self, params, stats, epochs: range):
        """Parameters and statistics after some epochs, and (loss, rate) of every batch."""
        # The reference makes a new optimiser for every chunk of epochs; results depend on it.
        flat = ravel_pytree(params)[0]
        fresh = (probe_heads.adamw_init(flat), jnp.asarray(0))
        state = (params, stats, *(self.moments or fresh))
        found, rates = [], []
        for epoch in epochs:
            if self.extra.order is not None:
                order = self.extra.order[epoch]
            else:
                order = probe_heads.rng(self.seed, 1, epoch).permutation(len(self.y))
            position = epoch + np.arange(self.batches) / self.batches
            lrs = learning_rate(self.task.probe_lr or 0.0, self.task.epochs, position)
            rates.append(lrs)
            for start in range(0, self.batches, self.chunk):
                state, loss = self._steps(state, order, lrs, start)
                found.append(loss)
        if self.extra.one_optimizer:
            self.moments = state[2:]
        return state[0], state[1], (np.concatenate(found), np.concatenate(rates))

    def _steps(self, state, order: np.ndarray, lrs: np.ndarray, start: int):
        """`chunk` batches from batch `start` on, as far as there are."""
        size, steps = self.task.probe_batch_size, min(self.chunk, self.batches - start)
        mine = order[start * size : (start + steps) * size]
        rows = np.full(self.chunk * size, -1, np.int32)
        rates = np.zeros(self.chunk, np.float32)
        rates[:steps] = lrs[start : start + steps]
        table = self.table
        if table is None:
            rows[: len(mine)] = np.arange(len(mine))
            padded = np.concatenate([mine, np.zeros(len(rows) - len(mine), mine.dtype)])
            table = tuple(a[padded] for a in self.arrays)
        else:
            rows[: len(mine)] = mine
        rows = rows.reshape(self.chunk, size)
        rule = _Rule(self.probe, self.task.use_dice_loss)
        weights = self.extra.class_weights
        weights = None if weights is None else jnp.asarray(weights, jnp.float32)
        state, loss = _train_steps(rule, weights, state, table, (rows, rates, steps))
        return state, np.asarray(loss)[:steps]

    def evaluate(self, params, stats, split: Split):
        """Predictions, probabilities and scores of a split, in the unit of its labels."""
        size = tuple(split[1].shape[1:3]) if self.probe.spatial else None
        guess, scores = predict(FittedProbe(self.probe, params, stats), split[0], size)
        if "regression" in self.info.task_type:
            guess = guess * self.std + self.mean
        return guess, scores, self.score(guess, split[1], scores)

    def score(self, guess, labels, scores) -> EvalResult:
        return scoring.score(self.task, self.info, guess, labels, scores)

    def bootstrap(self, options: RunOptions, guess, labels, scores) -> dict[str, Any]:
        """Resampled primary metric of a split."""
        ranked, known = self.task.primary_metric in ("auroc", "prauc"), scoring.any_label(labels)

        def primary(rows: np.ndarray) -> float:
            if not known[rows].any():
                return math.nan
            part = scores[rows] if ranked else None
            return self.score(guess[rows], labels[rows], part).primary

        return scoring.bootstrap(primary, len(labels), options.n_bootstrap, options.bootstrap_seed)


def train_probe(
    task: EvalTaskConfig,
    info: DatasetInfo,
    splits: Mapping[str, Split],
    options: RunOptions = DEFAULTS,
    extra: ProbeExtras = ProbeExtras(),
) -> ProbeOutcome:
    """Trains a probe and scores it.

    Args:
      splits: 'train', 'valid' and perhaps 'test', each (embeddings, labels): [N, D] with labels
        [N], or [N, h, w, D] (attnpool: [N, h, w, T, D]) with labels [N, H, W]; class labels are
        integers, -1 = ignored.
      extra: what the reference has not; nothing by default.

    Raises:
      ValueError: empty split, no label in a split, labels out of range, NaN embeddings.
    """
    if info.multilabel:
        raise ValueError("the linear probe does not do multi-label classification; use kNN")
    for name, (x, y) in splits.items():
        check_split(name, x, y, info)
    trainer = _Trainer(task, info, splits["train"], options.seed, extra)
    params, stats = jax.tree.map(
        jnp.asarray, extra.start or probe_heads.init(trainer.probe, options.seed)
    )
    history, traces, best = [], [], None
    interval = min(task.linear_probe_eval_interval, task.epochs)
    for first in range(0, task.epochs, interval):
        last = min(first + interval, task.epochs)
        params, stats, trace = trainer.train(params, stats, range(first, last))
        traces.append(trace)
        result = trainer.evaluate(params, stats, splits["valid"])[2]
        history.append(result)
        if extra.log:
            extra.log(f"epoch {last}: {result.primary_key} {result.primary:.4f}")
        if best is None or result.beats(best[1].primary):
            best = (last, result, params, stats)
        if extra.patience is not None and last - best[0] >= extra.patience:
            break
    assert best is not None  # a task has at least one epoch
    test, resampled = None, {}
    if "test" in splits:
        guess, scores, test = trainer.evaluate(best[2], best[3], splits["test"])
        if options.n_bootstrap:
            resampled = trainer.bootstrap(options, guess, splits["test"][1], scores)
    reported = best[1] if task.select_best_by_primary_metric else history[-1]
    losses_, lrs = (np.concatenate([t[i] for t in traces]) for i in range(2))
    host = jax.tree.map(np.asarray, best[2:])
    return ProbeOutcome(reported, test, resampled, history, best[0], losses_, lrs, host[0], host[1])


def target_scale(labels: np.ndarray) -> tuple[float, float]:
    """Mean and unbiased standard deviation (at least 1e-6) of finite labels; (0, 1) if none."""
    present = labels[np.isfinite(labels)].astype(np.float64)
    if not len(present):
        return 0.0, 1.0
    spread = float(present.std(ddof=1)) if len(present) > 1 else 0.0
    return float(present.mean()), max(spread, 1e-6)
