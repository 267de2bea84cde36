"""Embeddings of samples by a model, their projection and diagnostics (spec/evals.md 4, 10, 9)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np

from olmoearth_jax.configlib.tasks import DatasetInfo, EvalTaskConfig
from olmoearth_jax.evals.models import EmbeddingModel, EncoderModel
from olmoearth_jax.evals.probe_heads import rng
from olmoearth_jax.evals.samples import (
    MASK,
    TIMESTAMPS,
    EvalSample,
    collate,
)
from olmoearth_jax.modalities import closest
from olmoearth_jax.model.config import AttentionPoolerConfig
from olmoearth_jax.model.pooling import Pooling


class Stopped(Exception):
    """The caller asked to give up."""


def _pooler(model: Any) -> AttentionPoolerConfig | None:
    known = isinstance(model, EncoderModel)
    return model.config.encoder_config.attention_pooler_config if known else None


def output_of(task: EvalTaskConfig, model: Any) -> str:
    """What a task embeds of a model: 'tokens', 'locations' or 'student'."""
    grid = _pooler(model) is not None and task.probe_type != "attnpool"
    return task.output or ("locations" if grid else "tokens")


def pooling_of(task: EvalTaskConfig, info: DatasetInfo, model: Any = None) -> Pooling:
    """How a task pools.

    Args:
      model: what makes the embeddings; of an `EncoderModel` with an attention pooler a task takes
        the location grid unless it asks for something else (spec/evals_v1_3.md section 1).

    Raises:
      ValueError: a choice that does not fit the task's type, or that the model does not have.
    """
    pooler, output = _pooler(model), output_of(task, model)
    if output in ("locations", "student") and pooler is None:
        raise ValueError(f"output={output} needs a model with an attention pooler")
    if output == "student" and pooler is not None:
        widest = max(pooler.student_dims or [0])
        if not widest:
            raise ValueError("output=student: this model has no student; take output=locations")
        if (task.output_dim or 0) > widest:
            raise ValueError(f"output_dim={task.output_dim} is more than the student's {widest}")
    if task.use_pooled_tokens:
        raise ValueError(
            "use_pooled_tokens needs an encoder with early attention pooling; this model has none"
        )
    if task.use_center_token and info.spatial:
        raise ValueError(f"use_center_token does not fit a {info.task_type} task")
    place = "centre" if task.use_center_token else "instance"
    if info.spatial:
        place = "spatial_concat" if task.probe_type == "attnpool" else "spatial"
    if output == "tokens":
        return Pooling(task.pooling_type, place)
    grid = "location" if output == "locations" else "student"
    return Pooling(task.pooling_type, grid, reduce=place, channels=task.output_dim)


class Samples(Protocol):
    """One split of a data set."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[EvalSample, np.ndarray]:
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


@dataclasses.dataclass(frozen=True)
class Extraction:
    """How embeddings are made."""

    patch_size: int
    pool: Pooling
    batch_size: int = 128
    workers: int = 2
    """Threads that read samples; 0 reads them in between."""


def extract(
    model: EmbeddingModel,
    split: Samples,
    modalities: Sequence[str],
    how: Extraction,
    stop: Callable[[], bool] = lambda: False,
) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings and labels of a whole split, on the host.

    The last short batch is filled up with copies of its last sample, so that one program serves
    all batches.

    Raises:
      ValueError: an empty split, a modality the model doesn't take, NaN embeddings.
      Stopped: `stop()` became true.
    """
    if not len(split):
        raise ValueError("the split is empty")
    for name in modalities:
        if name not in model.modalities:
            raise ValueError(f"the model does not take {name!r}; {closest(name, model.modalities)}")
    order = np.arange(len(split))
    batch_size = min(how.batch_size, len(order))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    found, labels = [], []
    for items in _read_ahead(split, batches, how.workers):
        if stop():
            raise Stopped
        samples = [item[0] for item in items]
        samples += [samples[-1]] * (batch_size - len(samples))
        keep = {k for m in modalities for k in (m, m + MASK)} | {TIMESTAMPS}
        batch = collate([{k: v for k, v in s.items() if k in keep} for s in samples])
        out = model.embed(batch, how.patch_size, how.pool)[: len(items)]
        if not np.isfinite(out).all():
            raise ValueError(
                "the model gives NaN or infinite embeddings; was it saved from a diverged run?"
            )
        found.append(out)
        labels.append(np.stack([item[1] for item in items]))
    return np.concatenate(found), np.concatenate(labels)


@dataclasses.dataclass(frozen=True)
class PCA:
    """Principal components of train embeddings, centred and not whitened."""

    mean: np.ndarray
    """[D]"""
    components: np.ndarray
    """[k, D]"""
    variance_retained: float
    """Share of the variance that is kept."""

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """[..., D] -> float32 [..., k]."""
        return ((x - self.mean) @ self.components.T).astype(np.float32)


def fit_pca(x: np.ndarray, dim: int) -> PCA:
    """PCA of embeddings [..., D] to `dim` dimensions; all leading axes are samples.

    The sign of a component makes its entry of largest magnitude positive.

    Raises:
      ValueError: more dimensions than the data has.
    """
    flat = x.reshape(-1, x.shape[-1]).astype(np.float64)
    if not 1 <= dim <= min(flat.shape):
        raise ValueError(f"embedding_dim {dim} must lie in 1...{min(flat.shape)}")
    mean = flat.mean(0)
    flat = flat - mean
    variance, vectors = np.linalg.eigh(flat.T @ flat)
    components = vectors[:, ::-1][:, :dim].T
    largest = np.take_along_axis(components, np.abs(components).argmax(1)[:, None], 1)
    variance = np.maximum(variance[::-1], 0)
    share = float(variance[:dim].sum() / max(variance.sum(), 1e-30))
    return PCA(mean, components * np.sign(largest), share)


_RANK_ROWS = 4096
_PAIR_ROWS = 2048
_INTRA_SAMPLES = 256


def _subset(x: np.ndarray, rows: int, seed: int) -> np.ndarray:
    return x if len(x) <= rows else x[rng(seed, 2, rows).permutation(len(x))[:rows]]


def _std(x: np.ndarray, axis: int | None = None) -> np.ndarray:
    return np.std(x, axis=axis, ddof=1)


def effective_rank(x: np.ndarray) -> float:
    """exp of the entropy of the singular values of x [N, D] (not centred); 0 if all are 0."""
    values = np.linalg.svd(x.astype(np.float64), compute_uv=False)
    # Round-off of null directions is no singular value: the float32 data carry no more digits.
    values = values[values > values.max(initial=0) * max(x.shape) * 1e-16]
    if not len(values):
        return 0.0
    p = values / values.sum()
    return float(np.exp(-np.sum(p * np.log(p))))


def _pairs(z: np.ndarray) -> np.ndarray:
    """Cosine similarities of all pairs i < j of the rows of z."""
    norm = np.linalg.norm(z, axis=-1, keepdims=True)
    z = z / np.maximum(norm, 1e-12)
    return (z @ z.T)[np.triu_indices(len(z), 1)]


def flat_diagnostics(x: np.ndarray, seed: int = 0) -> dict[str, float]:
    """Metrics of embeddings [N, D]; empty for fewer than two.

    Raises:
      ValueError: not two-dimensional.
    """
    if x.ndim != 2:
        raise ValueError(f"diagnostics of flat embeddings need [N, D], got shape {x.shape}")
    if len(x) < 2:
        return {}
    x = x.astype(np.float64)
    norms = np.linalg.norm(x, axis=1)
    out = {
        "effective_rank": effective_rank(_subset(x, _RANK_ROWS, seed)),
        "embedding_dim": float(x.shape[1]),
        "num_samples": float(len(x)),
        "norm_mean": float(norms.mean()),
        "norm_std": float(_std(norms)),
        "norm_min": float(norms.min()),
        "norm_max": float(norms.max()),
    }
    if len(x) >= 4:
        cosine = _pairs(_subset(x, _PAIR_ROWS, seed))
        out |= {
            # Unit rows: the squared distance is 2 - 2 cos.
            "uniformity": float(np.log(np.mean(np.exp(-2 * (2 - 2 * cosine))))),
            "cosine_sim_mean": float(cosine.mean()),
            "cosine_sim_std": float(_std(cosine)),
            "cosine_sim_min": float(cosine.min()),
            "cosine_sim_max": float(cosine.max()),
        }
    return out


def spatial_diagnostics(x: np.ndarray, seed: int = 0) -> dict[str, float]:
    """Metrics of embeddings [N, ..., D]: over all patches, of the means, and within samples."""
    patches = x.reshape(len(x), -1, x.shape[-1]).astype(np.float64)
    everything = _subset(patches.reshape(-1, x.shape[-1]), _RANK_ROWS, seed)
    out = {f"global_{k}": v for k, v in flat_diagnostics(everything, seed).items()}
    out |= {f"inter_{k}": v for k, v in flat_diagnostics(patches.mean(1), seed).items()}
    if patches.shape[1] < 2:
        return out
    chosen = _subset(patches, _INTRA_SAMPLES, seed)
    cosines = [_pairs(sample) for sample in chosen]
    spreads = [float(_std(c)) if len(c) > 1 else 0.0 for c in cosines]
    norms = np.linalg.norm(chosen, axis=-1)
    return out | {
        "intra_cosine_sim_mean": float(np.mean([c.mean() for c in cosines])),
        "intra_cosine_sim_std": float(np.mean(spreads)),
        "intra_norm_std": float(np.mean(_std(norms, axis=1))),
        "intra_num_patches": float(patches.shape[1]),
        "intra_num_images_sampled": float(len(chosen)),
    }


def diagnostics(x: np.ndarray, seed: int = 0) -> dict[str, float]:
    """Flat metrics for [N, D], spatial ones for more axes."""
    return flat_diagnostics(x, seed) if x.ndim == 2 else spatial_diagnostics(x, seed)
