"""Embeddings of evaluation samples by a model (spec/evals.md section 4)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from olmoearth_jax.evals.samples import (
    MASK,
    TIMESTAMPS,
    Sample,
    collate,
    modalities_in,
)
from olmoearth_jax.evals.tasks import DatasetInfo, EvalTaskConfig
from olmoearth_jax.masks import MISSING_TOKEN, VISIBLE
from olmoearth_jax.modalities import closest
from olmoearth_jax.model import dense, latent_mim, pooling
from olmoearth_jax.model.config import ModelConfig
from olmoearth_jax.model.encoder import slot_table


@dataclasses.dataclass(frozen=True)
class Pooling:
    """How tokens become embeddings.

    Attributes:
      kind: 'mean' or 'max'.
      spatial: one embedding per patch instead of one per sample.
      centre: only the patch in the middle (classification, scalar regression).
      concat: keep the band sets of all modalities apart (attention-pool probe).
    """

    kind: str = "mean"
    spatial: bool = False
    centre: bool = False
    concat: bool = False


class Stopped(Exception):
    """The caller asked to give up."""


def pooling_of(task: EvalTaskConfig, info: DatasetInfo) -> Pooling:
    """How a task pools.

    Raises:
      ValueError: a choice that does not fit the task's type.
    """
    if task.use_pooled_tokens:
        raise ValueError(
            "use_pooled_tokens needs an encoder with early attention pooling; this model has none"
        )
    if task.use_center_token and info.spatial:
        raise ValueError(f"use_center_token does not fit a {info.task_type} task")
    concat = info.spatial and task.probe_type == "attnpool"
    return Pooling(task.pooling_type, info.spatial, task.use_center_token, concat)


class EmbeddingModel(Protocol):
    """What the evaluator needs of a model."""

    @property
    def modalities(self) -> tuple[str, ...]:
        """Modalities the model takes."""
        ...

    def embed(self, batch: Sample, patch_size: int, pool: Pooling) -> np.ndarray:
        """Embeddings float32 of a batch: [B, D], [B, h, w, D] or, with concat, [B, h, w, S, D]."""
        ...


class EncoderModel:
    """The encoder of a pretrained model, in evaluation mode.

    Args:
      config: model config.
      params: the model's parameters, or only {'encoder': ...}.
      dtype: type of the matrix products.
    """

    def __init__(self, config: ModelConfig, params: Mapping[str, Any], dtype: Any = None):
        self.config = config
        if dtype is None:
            dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
        self.dtype = jnp.dtype(dtype)
        module = latent_mim.abstract(config, self.dtype).encoder
        self.graph = latent_mim.split(module)[0]
        self.params = jax.tree.map(jnp.asarray, params["encoder"])
        self.slots = slot_table(config.encoder_config)

    @property
    def modalities(self) -> tuple[str, ...]:
        return self.slots.names

    @property
    def settings(self) -> dict[str, Any]:
        return {"dtype": self.dtype.name}

    def embed(self, batch: Sample, patch_size: int, pool: Pooling) -> np.ndarray:
        """See `EmbeddingModel`. Missing tokens are left out; without any, none are looked for."""
        data, masks, fast, names = self.inputs(batch, pool)
        out = embed_tokens(
            self.graph, self.slots, patch_size, pool, fast, names,
            self.params, data, masks, batch[TIMESTAMPS].astype(np.int32),
        )  # fmt: skip
        return np.asarray(out)

    def inputs(self, batch: Sample, pool: Pooling):
        """What `embed_tokens` needs of a batch: images, masks, `fast` and `names`.

        Raises:
          ValueError: the model takes none of the modalities, or a sample has no online token.
        """
        there = [n for n in modalities_in(batch) if n in self.slots.names]
        if not there:
            raise ValueError(
                f"the model takes none of the modalities {modalities_in(batch)}; it was trained "
                f"on {', '.join(self.slots.names)}"
            )
        masks = {n: batch[n + MASK] for n in there}
        fast = not any((m == MISSING_TOKEN).any() for m in masks.values())
        seen = [(m == VISIBLE).reshape(len(m), -1).any(1) for m in masks.values()]
        empty = np.flatnonzero(~np.any(seen, axis=0))
        if len(empty):
            raise ValueError(f"samples {empty.tolist()} of the batch have no online token to pool")
        names = (pooling.concat_names if pool.concat else pooling.spatial_names)(masks)
        return {n: batch[n] for n in there}, masks, fast, names


def pool_tokens(tokens: pooling.Arrays, masks: pooling.Arrays, pool: Pooling, names):
    """Applies `pool` to tokens; `names` are the modalities that count where space is kept."""
    kind: Any = pool.kind
    if pool.concat:
        return pooling.pool_spatial_concat(tokens, masks, names)
    if not (pool.spatial or pool.centre):
        return pooling.pool_instance(tokens, masks, kind)
    spatial = pooling.pool_spatial(tokens, masks, kind, names)
    return pooling.centre_token(spatial) if pool.centre else spatial


@functools.partial(
    jax.jit, static_argnames=("graph", "slots", "patch_size", "pool", "fast", "names")
)
def embed_tokens(graph, slots, patch_size, pool, fast, names, params, data, masks, timestamps):
    """Encoder and pooling of one batch, compiled per shape; see `EncoderModel.embed`.

    Args:
      graph, slots: of the encoder.
      fast: no token is missing.
      names: modalities that count where space is kept (see `pool_tokens`).
      params: encoder parameters.
      data, masks: per modality [B, H, W, T, C] and pixel masks of that form.
      timestamps: int32 [B, T, 3].
    """
    encoder = latent_mim.merge(graph, params)
    token_masks = dense.token_masks_from_pixels(slots, masks, patch_size)
    encoded = dense.encode_dense(encoder, data, token_masks, timestamps, patch_size, fast_pass=fast)
    tokens = {n: x.astype(jnp.float32) for n, x in encoded.tokens.items()}
    return pool_tokens(tokens, token_masks, pool, names)


class RawBands:
    """The baseline without a model: a patch's embedding is its pixels.

    Args:
      modalities: what to take from the samples.
    """

    def __init__(self, modalities: Sequence[str]):
        self.modalities = tuple(modalities)
        self.settings: dict[str, Any] = {}

    def embed(self, batch: Sample, patch_size: int, pool: Pooling) -> np.ndarray:
        """Pixels of each patch side by side, averaged over time: [B, h, w, p*p*C], or pooled."""
        if pool.concat:
            raise ValueError("raw bands have no band sets to pool; choose another probe_type")
        parts = []
        for name in modalities_in(batch):
            x = batch[name].mean(axis=3)
            b, h, w, c = x.shape
            h, w = h // patch_size, w // patch_size
            x = x[:, : h * patch_size, : w * patch_size]
            x = x.reshape(b, h, patch_size, w, patch_size, c).transpose(0, 1, 3, 2, 4, 5)
            parts.append(x.reshape(b, h, w, -1))
        out = np.concatenate(parts, -1)
        if pool.centre:
            return out[:, out.shape[1] // 2, out.shape[2] // 2]
        return out if pool.spatial else getattr(out, pool.kind)((1, 2))


class Samples(Protocol):
    """One split of a data set."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Sample, np.ndarray]:
        """Sample and label of one item."""
        ...


def _read_ahead(split: Samples, batches: list[np.ndarray], workers: int) -> Iterator[list]:
    """The items of each batch, read by a few threads while the model works on earlier ones."""
    if workers < 1:
        for rows in batches:
            yield [split[int(i)] for i in rows]
        return
    with ThreadPoolExecutor(workers) as pool:
        ahead = [pool.map(split.__getitem__, rows.tolist()) for rows in batches[:2]]
        for number in range(len(batches)):
            items = list(ahead.pop(0))
            if number + 2 < len(batches):
                ahead.append(pool.map(split.__getitem__, batches[number + 2].tolist()))
            yield items


def extract(
    model: EmbeddingModel,
    split: Samples,
    modalities: Sequence[str],
    *,
    patch_size: int,
    pool: Pooling,
    batch_size: int = 128,
    order: np.ndarray | None = None,
    workers: int = 2,
    stop: Callable[[], bool] = lambda: False,
) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings and labels of a whole split, on the host.

    The last short batch is filled up with copies of its last sample, so that one program serves
    all batches.

    Args:
      order: sample order; the split's own by default.

    Raises:
      ValueError: an empty split, a modality the model doesn't take, NaN embeddings.
      Stopped: `stop()` became true.
    """
    if not len(split):
        raise ValueError("the split is empty")
    for name in modalities:
        if name not in model.modalities:
            raise ValueError(f"the model does not take {name!r}; {closest(name, model.modalities)}")
    order = np.arange(len(split)) if order is None else order
    batch_size = min(batch_size, len(order))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    found, labels = [], []
    for items in _read_ahead(split, batches, workers):
        if stop():
            raise Stopped
        samples = [item[0] for item in items]
        samples += [samples[-1]] * (batch_size - len(samples))
        keep = {k for m in modalities for k in (m, m + MASK)} | {TIMESTAMPS}
        batch = collate([{k: v for k, v in s.items() if k in keep} for s in samples])
        out = model.embed(batch, patch_size, pool)[: len(items)]
        if not np.isfinite(out).all():
            raise ValueError(
                "the model gives NaN or infinite embeddings; was it saved from a diverged run?"
            )
        found.append(out)
        labels.append(np.stack([item[1] for item in items]))
    return np.concatenate(found), np.concatenate(labels)
