"""Cosine k-nearest-neighbour classifiers in blocks of bounded memory (spec/evals.md section 6)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from olmoearth_jax.configlib.tasks import DatasetInfo, EvalTaskConfig, RunOptions
from olmoearth_jax.evals.samples import IGNORE, Split, check_split
from olmoearth_jax.evals.scoring import (
    EvalResult,
    average_precision,
    bootstrap,
    labelled_rows,
    score,
)

_TEMPERATURE = 0.07
QUERY_BLOCK = 2048
TRAIN_BLOCK = 8192
"""Most rows of either kind at a time."""
_GROUP = 32
"""Columns that the search for the largest looks at as one; a divisor of TRAIN_BLOCK."""


def _unit_rows(x: jax.Array) -> jax.Array:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-8)


def _largest(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """`jax.lax.top_k` of [Q, N], faster: the k largest lie in the k groups of largest maximum.

    Equal values are taken from the left, as there: so are groups, which stay in their order.
    """
    rows, columns = x.shape
    if columns % _GROUP or columns < 2 * k * _GROUP:
        return jax.lax.top_k(x, min(k, columns))
    groups = x.reshape(rows, columns // _GROUP, _GROUP)
    which = jnp.sort(jax.lax.top_k(groups.max(-1), k)[1], axis=-1)
    some = jnp.take_along_axis(groups, which[..., None], 1).reshape(rows, k * _GROUP)
    values, place = jax.lax.top_k(some, k)
    index = jnp.take_along_axis(which, place // _GROUP, 1) * _GROUP + place % _GROUP
    return values, index


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
        values, column = _largest(jnp.where(index < count, sims, -jnp.inf), k)
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
    blocks = -(-len(train) // TRAIN_BLOCK)
    block = _share(len(train), blocks, _GROUP)
    padded = np.zeros((blocks * block, train.shape[1]), np.float32)
    padded[: len(train)] = train
    table = jnp.asarray(padded.reshape(blocks, block, -1))
    step = _share(len(query), -(-len(query) // QUERY_BLOCK) or 1, 1)
    values, index = [], []
    for start in range(0, len(query), step):
        part = np.zeros((step, query.shape[1]), np.float32)
        rows = query[start : start + step]
        part[: len(rows)] = rows
        v, i = _block_neighbours(table, jnp.asarray(part), jnp.asarray(len(train)), wanted)
        values.append(np.asarray(v)[: len(rows), int(skip_nearest) :])
        index.append(np.asarray(i)[: len(rows), int(skip_nearest) :])
    return np.concatenate(values), np.concatenate(index)


def _share(rows: int, parts: int, multiple: int) -> int:
    """Rows of each of several equal parts."""
    return max(-(-rows // (parts * multiple)), 1) * multiple


def knn_scores(
    train: Split,
    query: np.ndarray,
    num_classes: int,
    k: int = 20,
    skip_nearest: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Class scores float32 [Q, C] and predictions int64 ([Q] or, multi-label, [Q, C]).

    Args:
      train: embeddings float [N, D], and class numbers int [N], or 0/1 [N, C] for several labels
        per sample.
      query: embeddings float [Q, D].

    Raises:
      ValueError: see `neighbours`.
    """
    labels = train[1]
    sims, index = neighbours(train[0], query, k, skip_nearest)
    if labels.ndim == 2:
        weights = np.exp(sims.astype(np.float64) / _TEMPERATURE)
        total = np.maximum(weights.sum(1, keepdims=True), 1e-8)
        positive = np.einsum("qk,qkc->qc", weights, labels[index].astype(np.float64))
        hard = positive > weights.sum(1, keepdims=True) - positive
        return (positive / total).astype(np.float32), hard.astype(np.int64)
    scores = vote(sims, labels[index], num_classes)
    return scores, scores.argmax(1).astype(np.int64)


def vote(sims: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Scores float32 [Q, C] from similarities and classes [Q, k] of the nearest neighbours."""
    weights = np.exp(sims.astype(np.float64) / _TEMPERATURE)
    votes = np.zeros((len(sims), num_classes))
    np.add.at(votes, (np.arange(len(sims))[:, None], labels), weights)
    return (votes / np.maximum(weights.sum(1, keepdims=True), 1e-8)).astype(np.float32)


def run_knn(
    task: EvalTaskConfig, info: DatasetInfo, train: Split, query: Split, options: RunOptions
) -> tuple[EvalResult, dict]:
    """kNN of a query split (embeddings, labels) against a train split.

    Samples without a label neither vote nor count. For segmentation a patch takes, for all its
    pixels, the class of similar train patches, which count with their most frequent class; it is
    scored per pixel, as a probe is.

    Returns:
      The result, and what `options` ask to resample (accuracy or, of several labels per sample,
      micro mAP) or {}.
    """
    for name, (x, y) in (("train", train), ("query", query)):
        check_split(name, x, y, info)
    x, y = train
    if info.spatial:
        y = _patch_labels(y, x.shape[1], x.shape[2], info.num_classes)
    rows = labelled_rows(y) if info.multilabel else y != IGNORE
    flat = query[0].reshape(-1, query[0].shape[-1])
    scores, guess = knn_scores(
        (x[rows], y[rows]), flat, info.num_classes, options.k, options.skip_nearest
    )
    if info.spatial:
        guess, scores = _to_pixels(guess.reshape(query[0].shape[:3]), query[1].shape), None
    truth = query[1]
    result = score(task, info, guess, truth, scores)
    if not options.n_bootstrap or scores is None:
        return result, {}
    rows = labelled_rows(truth)
    truth, guess, scores = truth[rows], guess[rows], scores[rows]

    def resampled(rows: np.ndarray) -> float:
        if info.multilabel:
            return average_precision(truth[rows].astype(bool).ravel(), scores[rows].ravel())
        return float(np.mean(guess[rows] == truth[rows]))

    return result, bootstrap(resampled, len(truth), options.n_bootstrap, options.bootstrap_seed)


def _patch_labels(labels: np.ndarray, height: int, width: int, num_classes: int) -> np.ndarray:
    """Most frequent class of every patch, IGNORE where none is labelled: [N, H, W] -> [N, h, w]."""
    n, rows, columns = labels.shape
    if rows % height or columns % width:
        raise ValueError(
            f"labels of {rows} x {columns} pixels are no whole number for each of {height} x "
            f"{width} embeddings"
        )
    tiles = labels.reshape(n, height, rows // height, width, columns // width)
    counts = np.stack([(tiles == c).sum((2, 4)) for c in range(num_classes)], -1)
    return np.where(counts.sum(-1) > 0, counts.argmax(-1), IGNORE)


def _to_pixels(patches: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """[N, h, w] repeated to [N, H, W]."""
    down, across = shape[1] // patches.shape[1], shape[2] // patches.shape[2]
    return np.repeat(np.repeat(patches, down, 1), across, 2)
