"""Cosine k-nearest-neighbour classifiers in blocks of bounded memory (spec/evals.md section 6)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from olmoearth_jax.evals.metrics import (
    EvalResult,
    average_precision,
    bootstrap,
    classification_metrics,
    make_result,
    multilabel_metrics,
)

DEFAULT_K = 20
TEMPERATURE = 0.07
QUERY_BLOCK = 2048
TRAIN_BLOCK = 8192


def _unit_rows(x: jax.Array) -> jax.Array:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-8)


@functools.partial(jax.jit, static_argnames=("k",))
def _block_neighbours(train: jax.Array, query: jax.Array, count: jax.Array, k: int):
    """Similarities and numbers [Q, k] of the k nearest rows of train [blocks, block, D].

    Rows from `count` on are padding. Only one block of similarities exists at a time.
    """
    query = _unit_rows(query)
    block = train.shape[1]

    def merge(best, item):
        number, rows = item
        sims = jnp.matmul(query, _unit_rows(rows).T, precision="highest")
        index = number * block + jnp.arange(block)
        values, column = jax.lax.top_k(jnp.where(index < count, sims, -jnp.inf), min(k, block))
        values = jnp.concatenate([best[0], values], 1)
        index = jnp.concatenate([best[1], column + number * block], 1)
        values, column = jax.lax.top_k(values, k)
        return (values, jnp.take_along_axis(index, column, 1)), None

    start = (jnp.full((len(query), k), -jnp.inf), jnp.zeros((len(query), k), jnp.int32))
    return jax.lax.scan(merge, start, (jnp.arange(len(train)), train))[0]


def neighbours(
    train: np.ndarray, query: np.ndarray, k: int, skip_nearest: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Cosine similarities float32 and row numbers int32 [Q, k] of the nearest rows of `train`.

    Args:
      train, query: float [N, D] and [Q, D].
      skip_nearest: take k + 1 and drop the nearest (queries that are in `train`).

    Raises:
      ValueError: fewer train rows than neighbours wanted, or non-finite values.
    """
    wanted = k + int(skip_nearest)
    if wanted > len(train):
        raise ValueError(f"kNN needs at least {wanted} train samples for k={k}, got {len(train)}")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    for name, x in (("train", train), ("query", query)):
        if not np.isfinite(x).all():
            raise ValueError(f"the {name} embeddings hold NaN or infinite values")
    block = min(TRAIN_BLOCK, len(train))
    blocks = -(-len(train) // block)
    padded = np.zeros((blocks * block, train.shape[1]), np.float32)
    padded[: len(train)] = train
    table = jnp.asarray(padded.reshape(blocks, block, -1))
    step = min(QUERY_BLOCK, len(query))
    values, index = [], []
    for start in range(0, len(query), step):
        part = np.zeros((step, query.shape[1]), np.float32)
        rows = query[start : start + step]
        part[: len(rows)] = rows
        v, i = _block_neighbours(table, jnp.asarray(part), jnp.asarray(len(train)), wanted)
        values.append(np.asarray(v)[: len(rows), int(skip_nearest) :])
        index.append(np.asarray(i)[: len(rows), int(skip_nearest) :])
    return np.concatenate(values), np.concatenate(index)


def knn_scores(
    train: np.ndarray,
    labels: np.ndarray,
    query: np.ndarray,
    num_classes: int,
    k: int = DEFAULT_K,
    skip_nearest: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Class scores float32 [Q, C] and predictions int64 ([Q] or, multi-label, [Q, C]).

    Args:
      train, query: embeddings float [N, D] and [Q, D].
      labels: class numbers int [N], or 0/1 [N, C] for several labels per sample.

    Raises:
      ValueError: see `neighbours`; or a label outside 0 ... C-1.
    """
    check_labels(labels, num_classes)
    sims, index = neighbours(train, query, k, skip_nearest)
    weights = np.exp(sims.astype(np.float64) / TEMPERATURE)
    total = np.maximum(weights.sum(1, keepdims=True), 1e-8)
    if labels.ndim == 2:
        positive = np.einsum("qk,qkc->qc", weights, labels[index].astype(np.float64))
        hard = positive > weights.sum(1, keepdims=True) - positive
        return (positive / total).astype(np.float32), hard.astype(np.int64)
    votes = np.zeros((len(query), num_classes))
    np.add.at(votes, (np.arange(len(query))[:, None], labels[index]), weights)
    scores = (votes / total).astype(np.float32)
    return scores, scores.argmax(1).astype(np.int64)


def check_labels(labels: np.ndarray, num_classes: int) -> None:
    """Raises ValueError for empty label arrays and for class numbers out of range."""
    if not len(labels):
        raise ValueError("the split holds no labels")
    top = 1 if labels.ndim == 2 else num_classes - 1
    if labels.min() < 0 or labels.max() > top:
        bad = int(labels.min() if labels.min() < 0 else labels.max())
        raise ValueError(f"label {bad} lies outside 0...{top}")


def run_knn(
    train: tuple[np.ndarray, np.ndarray],
    query: tuple[np.ndarray, np.ndarray],
    num_classes: int,
    *,
    k: int = DEFAULT_K,
    skip_nearest: bool = False,
    primary_metric: str | None = None,
    primary_class: int | None = None,
    n_bootstrap: int = 0,
    bootstrap_seed: int = 42,
) -> tuple[EvalResult, dict]:
    """kNN of a query split (embeddings, labels) against a train split.

    Returns the result and, with n_bootstrap, the resampled accuracy (multi-label: micro mAP).
    """
    check_labels(query[1], num_classes)
    scores, hard = knn_scores(*train, query[0], num_classes, k, skip_nearest)
    truth = query[1]
    multilabel = truth.ndim == 2
    metrics = (multilabel_metrics if multilabel else classification_metrics)(hard, truth, scores)
    kind = "multilabel" if multilabel else "classification"
    result = make_result(metrics, kind, primary_metric, primary_class)
    if not n_bootstrap:
        return result, {}

    def resample(rows: np.ndarray) -> float:
        if multilabel:
            return average_precision(truth[rows].astype(bool).ravel(), scores[rows].ravel())
        return float(np.mean(hard[rows] == truth[rows]))

    return result, bootstrap(resample, len(truth), n_bootstrap, bootstrap_seed)
