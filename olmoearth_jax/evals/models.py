"""What is evaluated: checkpoints, converted weights, baselines, and embeddings from outside.

Embeddings that another program made (spec/evals_v1_3.md section 5) lie in a folder with
`<dataset>/<split>.npz`, each with `embeddings` and `labels`; or in a single `.npz` file with
`<dataset>/<split>/embeddings` and `<dataset>/<split>/labels`. Splits are train, valid and test.
Embeddings are [N, D], or [N, h, w, D] where space is kept; labels are as those of the task. All
that comes after the embeddings is the same as for a model of ours.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from olmoearth_jax import modalities
from olmoearth_jax.checkpoints import checkpoint, integrity
from olmoearth_jax.configlib.tasks import (
    DatasetInfo,
    EvalTaskConfig,
    check_task,
    dataset_info,
    eval_mode,
)
from olmoearth_jax.data import npy_file
from olmoearth_jax.data.hdf5_file import open_regular
from olmoearth_jax.evals.datasets.base import SPLITS, DataUnavailable
from olmoearth_jax.evals.samples import (
    MASK,
    TIMESTAMPS,
    EvalSample,
    Split,
    check_split,
    modalities_in,
    whole_labels,
)
from olmoearth_jax.interop import checkpoints
from olmoearth_jax.masks import MISSING_TOKEN, VISIBLE
from olmoearth_jax.model import config as model_config
from olmoearth_jax.model import frozen, latent_mim
from olmoearth_jax.model.frozen import FrozenEncoder
from olmoearth_jax.model.pooling import Pooling, centre_token
from olmoearth_jax.proposals import known


class EmbeddingModel(Protocol):
    """What the evaluator needs of a model."""

    @property
    def modalities(self) -> tuple[str, ...]:
        """Modalities the model takes."""
        ...

    def embed(self, batch: EvalSample, patch_size: int, pool: Pooling) -> np.ndarray:
        """Embeddings float32 of a batch, of the form that `Pooling` tells."""
        ...


class EncoderModel(FrozenEncoder):
    """The encoder of a pretrained model, as the evaluator needs it."""

    @property
    def modalities(self) -> tuple[str, ...]:
        return self.slots.names

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the encoder's parameters."""
        return integrity.parameter_digest(self.params)

    @property
    def settings(self) -> dict[str, Any]:
        """The type of the products, and what tells these weights from others of the same name."""
        return {"dtype": self.dtype.name, "weights": self.digest[:16]}

    def embed(self, batch: EvalSample, patch_size: int, pool: Pooling) -> np.ndarray:
        """See `EmbeddingModel`. Missing tokens are left out; without any, none are looked for."""
        call, data, masks, timestamps = self.inputs(batch, patch_size, pool)
        found = np.asarray(embed_tokens(call, self.params, data, masks, timestamps))
        # A patch that shows nothing has no maximum; it is 0 there, as the mean is.
        return np.where(np.isneginf(found), np.float32(0), found) if pool.how == "max" else found

    def inputs(self, batch: EvalSample, patch_size: int, pool: Pooling):
        """What `embed_tokens` needs of a batch: the call, images, masks of pixels, timestamps.

        A patch with a missing pixel is missing as a whole: the encoder looks at its first pixel.

        Raises:
          ValueError: the model takes none of the modalities, or a sample has no online token.
        """
        there = [n for n in modalities_in(batch) if n in self.slots.names]
        if not there:
            raise ValueError(
                f"the model takes none of the modalities {modalities_in(batch)}; it was trained "
                f"on {', '.join(self.slots.names)}"
            )
        masks, data = {n: batch[n + MASK] for n in there}, {n: batch[n] for n in there}
        fast = not any((m == MISSING_TOKEN).any() for m in masks.values())
        if not fast:
            masks = {n: _whole_patches(n, m, patch_size) for n, m in masks.items()}
            # Fill values would reach into neighbours, for patches are cut from a resized image.
            data = {n: np.where(x == modalities.MISSING, 0, x) for n, x in data.items()}
        seen = [(m == VISIBLE).reshape(len(m), -1).any(1) for m in masks.values()]
        empty = np.flatnonzero(~np.any(seen, axis=0))
        if len(empty):
            raise ValueError(f"samples {empty.tolist()} of the batch have no online token to pool")
        call = frozen.Call(self.graph, patch_size, pool.over(masks), fast, slots=self.slots)
        return call, data, masks, batch[TIMESTAMPS].astype(np.int32)


def _whole_patches(name: str, mask: np.ndarray, patch_size: int) -> np.ndarray:
    """A mask [B, H, W, T, S] in which the patches with a missing pixel are missing."""
    modality = modalities.get(name)
    side = patch_size * modality.image_factor
    if not modality.spatial or mask.shape[1] % side or mask.shape[2] % side:
        return mask  # refused where the image is cut
    batch, height, width, *rest = mask.shape
    cut = (batch, height // side, side, width // side, side, *rest)
    gone = (mask == MISSING_TOKEN).reshape(cut).any((2, 4)).repeat(side, 1).repeat(side, 2)
    return np.where(gone, np.int8(MISSING_TOKEN), mask)


embed_tokens = jax.jit(frozen.embed, static_argnames="call")
"""Encoder and pooling of one batch, compiled per shape; see `EncoderModel.inputs`."""


class RawBands:
    """The baseline without a model: a patch's embedding is its pixels.

    Args:
      modalities: what to take from the samples.
    """

    def __init__(self, modalities: Sequence[str]):
        self.modalities = tuple(modalities)
        self.settings: dict[str, Any] = {}

    def embed(self, batch: EvalSample, patch_size: int, pool: Pooling) -> np.ndarray:
        """Pixels of each patch side by side, averaged over time: [B, h, w, p*p*C], or pooled.

        Missing values do not count; what is missing at every date is 0.
        """
        if pool.place == "spatial_concat":
            raise ValueError("raw bands have no band sets to pool; choose another probe_type")
        parts = []
        for name in modalities_in(batch):
            x = batch[name]
            seen = _visible_bands(name, batch[name + MASK], x.shape[-1])
            x = np.where(seen, x, 0).sum(3) / np.maximum(seen.sum(3), 1)
            b, h, w, c = x.shape
            h, w = h // patch_size, w // patch_size
            x = x[:, : h * patch_size, : w * patch_size]
            x = x.reshape(b, h, patch_size, w, patch_size, c).transpose(0, 1, 3, 2, 4, 5)
            parts.append(x.reshape(b, h, w, -1))
        out = np.concatenate(parts, -1)
        if pool.place == "instance":
            return getattr(out, pool.how)((1, 2))
        return out if pool.place == "spatial" else centre_token(out)


def _visible_bands(name: str, mask: np.ndarray, bands: int) -> np.ndarray:
    """bool [..., bands] of a mask with one channel per band or per band set."""
    if mask.shape[-1] == bands:
        return mask == VISIBLE
    member = np.zeros(bands, int)
    for number, band_set in enumerate(modalities.get(name).band_sets):
        member[list(band_set)] = number
    return mask[..., member] == VISIBLE


_PARTS = ("embeddings", "labels")


class Precomputed:
    """Embeddings by data set and split.

    Args:
      path: folder or archive.

    Raises:
      ValueError: neither.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path).expanduser()
        self.modalities: tuple[str, ...] = ()
        self.archive: Mapping[str, np.ndarray] | None = None
        if self.path.is_dir():
            return
        if not self.path.is_file():
            raise ValueError(f"there is no folder or archive of embeddings {self.path}")
        held = npy_file.read(self.path)
        if not isinstance(held, dict):
            raise ValueError(f"{self.path} must be an .npz file with <dataset>/<split>/embeddings")
        self.archive = held

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """What tells these embeddings from others of the same name: a digest of their files."""
        digest = hashlib.sha256()
        paths = [self.path]
        if self.archive is None:
            names = [f"{split}.npz" for split in SPLITS]
            paths = sorted(p for p in self.path.glob("*/*.npz") if p.name in names)
        for path in paths:
            digest.update(path.relative_to(self.path).as_posix().encode() + b"\0")
            with open(open_regular(path), "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return {"embeddings": self.path.name, "embeddings_digest": digest.hexdigest()[:16]}

    def embed(self, batch: Any, patch_size: int, pool: Any) -> np.ndarray:
        """Embeddings are there already; images can't be given.

        Raises:
          ValueError: always.
        """
        raise ValueError("precomputed embeddings can't be fine-tuned or made of images")

    def has(self, dataset: str, split: str) -> bool:
        """Whether there are embeddings of a split."""
        if self.archive is not None:
            return f"{dataset}/{split}/{_PARTS[0]}" in self.archive
        return (self.path / dataset / f"{split}.npz").is_file()

    def split(self, task: EvalTaskConfig, info: DatasetInfo, split: str) -> Split:
        """Embeddings float32 and labels of a split, pooled as the task wants.

        Samples whose embedding has no number anywhere lie where the product has no data; they are
        left out.

        Raises:
          DataUnavailable: there are none of that split.
          ValueError: arrays that do not fit each other or the task.
        """
        where = f"{info.name}/{split}"
        if task.label_fraction != 1:
            raise ValueError(
                "label_fraction chooses among images, and embeddings are taken as they are; "
                "max_train_samples takes fewer of them"
            )
        if not self.has(info.name, split):
            raise DataUnavailable(f"{self.path} holds no embeddings of {where}")
        held = self._table(info.name, split)
        if missing := [p for p in _PARTS if p not in held]:
            raise ValueError(f"{where} in {self.path} has no {missing[0]}")
        x, y = np.asarray(held["embeddings"], np.float32), np.asarray(held["labels"])
        if x.ndim not in (2, 4) or (info.spatial and x.ndim != 4):
            wanted = "[N, h, w, D]" if info.spatial else "[N, D] or [N, h, w, D]"
            raise ValueError(f"embeddings of {where} must be {wanted}, got {list(x.shape)}")
        if len(x) != len(y):
            raise ValueError(f"{where} has {len(x)} embeddings but {len(y)} labels")
        x, y = _covered(x, y)
        if not info.spatial and x.ndim == 4:
            x, y = _covered(_pooled(x, task), y)  # the middle cell may lack what others have
        y = y.astype(np.float32) if "regression" in info.task_type else whole_labels(y, where)
        check_split(split, x, y, info)
        return x, y

    def _table(self, dataset: str, split: str) -> Mapping[str, np.ndarray]:
        if self.archive is None:
            held = npy_file.read(self.path / dataset / f"{split}.npz")
            return held if isinstance(held, dict) else {}
        prefix = f"{dataset}/{split}/"
        return {k.removeprefix(prefix): v for k, v in self.archive.items() if k.startswith(prefix)}

    def able(
        self, tasks: Mapping[str, EvalTaskConfig], run_on_test: bool = True
    ) -> tuple[dict[str, EvalTaskConfig], dict[str, str]]:
        """Tasks that there are embeddings for, and for the others the reason why not.

        Tasks that differ only by what a model is shown are one task here, and the first stays.
        """
        found: dict[str, EvalTaskConfig] = {}
        skipped: dict[str, str] = {}
        seen: dict[str, str] = {}
        for name, task in tasks.items():
            info = check_task(name, task)
            mode = eval_mode(task, info)
            wanted = SPLITS if run_on_test else SPLITS[:2]
            missing = [s for s in wanted if not self.has(info.name, s)]
            if mode == "finetune":
                skipped[name] = "precomputed embeddings can't be fine-tuned"
            elif missing:
                skipped[name] = f"{self.path} has no {missing[0]} embeddings of {info.name}"
            elif (key := repr(as_shown(task))) in seen:
                skipped[name] = f"for precomputed embeddings it is the same as {seen[key]}"
            else:
                seen[key] = name
                found[name] = as_shown(task)
        return found, skipped


def as_shown(task: EvalTaskConfig) -> EvalTaskConfig:
    """The task without what only concerns images, and without a second round trip to int8."""
    pooled = not dataset_info(task.dataset).spatial
    return dataclasses.replace(
        task, input_modalities=[], patch_size=1, norm_stats_from_pretrained=True,
        pooling_type=task.pooling_type if pooled else EvalTaskConfig.pooling_type,
        quantize_embeddings=False, quantize_bits=None, quantile_config_path=None,
        output=None, output_dim=None, embedding_batch_size=EvalTaskConfig.embedding_batch_size,
        num_workers=EvalTaskConfig.num_workers,
    )  # fmt: skip


def _covered(x: np.ndarray, y: np.ndarray) -> Split:
    """The samples of embeddings [N, ...] that hold a number anywhere."""
    there = ~np.isnan(x).all(tuple(range(1, x.ndim)))
    return x[there], y[there]


def _pooled(x: np.ndarray, task: EvalTaskConfig) -> np.ndarray:
    """One embedding per sample [N, D] of grids [N, h, w, D]; cells without numbers don't count."""
    if task.use_center_token:
        return x[:, x.shape[1] // 2, x.shape[2] // 2]
    return np.nanmax(x, (1, 2)) if task.pooling_type == "max" else np.nanmean(x, (1, 2))


def with_int8(tasks: Mapping[str, EvalTaskConfig]) -> dict[str, EvalTaskConfig]:
    """Every task twice: as it is, and as `<name>_int8` on embeddings stored as int8."""
    out: dict[str, EvalTaskConfig] = {}
    for name, task in tasks.items():
        out[name] = task
        if not task.quantize_embeddings and task.eval_mode != "finetune":
            out[f"{name}_int8"] = dataclasses.replace(task, quantize_embeddings=True)
    return out


BASELINES = ("raw_bands", "random_init")


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model with what is to be said of it.

    Attributes:
      model: gives the embeddings.
      name: for tables and records.
      step: training step of the checkpoint, 0 for baselines.
      config: config of the run that made it, or {}.
    """

    model: EmbeddingModel
    name: str
    step: int
    config: Mapping[str, Any]


def load_checkpoint(path: str | Path, name: str | None = None, dtype: Any = None) -> Loaded:
    """The online encoder of a checkpoint; only its parameters are read.

    Args:
      path: run folder, checkpoints folder or step folder.
      name: for the records; the run folder's name by default.
      dtype: type of the matrix products.

    Raises:
      ValueError: no complete checkpoint there, damaged, or of a model that does not fit its config.
    """
    folder, meta = checkpoint.open_whole(path)
    loaded = checkpoints.read_opened(folder, meta, with_target=False)
    run = folder.parent.parent if folder.parent.name == "checkpoints" else folder.parent
    model = EncoderModel(loaded.config, loaded.params, dtype)
    return Loaded(model, name or run.name, int(meta["step"]), meta["config"])


def baseline(
    kind: str, size: str = "nano", version: str = "v1", seed: int = 0, dtype: Any = None
) -> Loaded:
    """A model without pretraining: 'raw_bands' (the pixels) or 'random_init' (an encoder).

    Raises:
      ValueError: another kind, or a size and version that were never defined.
    """
    known("baseline", kind, BASELINES)
    if kind == "raw_bands":
        names = ("sentinel2_l2a", "sentinel1", "landsat")
        return Loaded(RawBands(names), "raw_bands", 0, {})
    config = model_config.official_model(size, version)
    params = latent_mim.initial_params(config, seed)
    return Loaded(EncoderModel(config, params, dtype), f"random_init_{size}_{version}", 0, {})
