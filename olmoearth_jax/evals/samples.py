"""Evaluation samples and batches (spec/evals.md sections 1 and 4).

A sample is a plain dict: `<modality>` float32 [H, W, T, C] in the model's band order,
`<modality>_mask` int8 of the same leading shape (0 = online, 3 = missing; as many channels as
bands, or as band sets for pretraining data), and `timestamps` int64 [T, 3] of day, 0-based month,
year. A batch holds the same with a leading batch axis.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from olmoearth_jax.configlib.tasks import DatasetInfo
from olmoearth_jax.masks import MISSING_TOKEN

MASK = "_mask"
TIMESTAMPS = "timestamps"
_DEFAULT_DATE = (1, 6, 2020)
"""1 July 2020: the date of samples that carry none."""

EvalSample = dict[str, np.ndarray]
Split = tuple[np.ndarray, np.ndarray]
"""Embeddings [N, ...] and labels [N, ...] of one split."""

IGNORE = -1
"""Label of samples and pixels that are neither learnt from nor scored."""


def make_sample(
    images: Mapping[str, np.ndarray], timestamps: np.ndarray | None = None
) -> EvalSample:
    """A fully online sample from normalised images [H, W, T, C] (or [H, W, C], one date)."""
    sample: EvalSample = {}
    steps = 1
    for name, image in images.items():
        image = image[:, :, None] if image.ndim == 3 else image
        sample[name] = np.ascontiguousarray(image, np.float32)
        sample[name + MASK] = np.zeros(image.shape, np.int8)
        steps = image.shape[2]
    if timestamps is None:
        timestamps = np.tile(np.array(_DEFAULT_DATE), (steps, 1))
    sample[TIMESTAMPS] = np.asarray(timestamps, np.int64)
    return sample


def modalities_in(batch: Mapping[str, np.ndarray]) -> list[str]:
    """Names of the modalities of a sample or batch, in its order."""
    return [k for k in batch if k != TIMESTAMPS and not k.endswith(MASK)]


def collate(samples: Sequence[EvalSample]) -> EvalSample:
    """Stacks samples into a batch, padding shorter time series (data 0, masks 3).

    Raises:
      ValueError: no samples, other modalities, or other image sizes within the batch.
    """
    if not samples:
        raise ValueError("cannot make a batch of no samples")
    keys = list(samples[0])
    for sample in samples:
        if set(sample) != set(keys):
            raise ValueError(
                "all samples of a batch need the same modalities, got "
                f"{modalities_in(samples[0])} and {modalities_in(sample)}"
            )
    steps = max(len(s[TIMESTAMPS]) for s in samples)
    out = {}
    for key in keys:
        parts = [_pad_time(key, s[key], steps) for s in samples]
        if len({p.shape for p in parts}) > 1:
            raise ValueError(f"{key} has several shapes in a batch: {[p.shape for p in parts]}")
        out[key] = np.stack(parts)
    return out


def _pad_time(key: str, array: np.ndarray, steps: int) -> np.ndarray:
    axis = 0 if key == TIMESTAMPS else 2
    if key != TIMESTAMPS and array.ndim != 4:
        return array
    room = steps - array.shape[axis]
    if room == 0:
        return array
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, room)
    return np.pad(array, widths, constant_values=MISSING_TOKEN if key.endswith(MASK) else 0)


def check_split(name: str, x: np.ndarray, y: np.ndarray, info: DatasetInfo) -> None:
    """Checks embeddings x and labels y of a split.

    Raises:
      ValueError: empty split, lengths or axes that do not fit, NaN embeddings, labels that are all
        ignored or out of range.
      TypeError: class labels that are not integers.
    """
    if not len(x):
        raise ValueError(f"the {name} split is empty")
    if len(x) != len(y):
        raise ValueError(f"the {name} split has {len(x)} embeddings but {len(y)} labels")
    rows = "[N, H, W]" if info.spatial else f"[N, {info.num_classes}]" if info.multilabel else "[N]"
    if y.ndim != rows.count(",") + 1 or (info.multilabel and y.shape[1] != info.num_classes):
        raise ValueError(f"labels of the {name} split must be {rows}, got {list(y.shape)}")
    if not np.isfinite(x).all():
        raise ValueError(f"the {name} embeddings hold NaN or infinite values")
    if "regression" in info.task_type:
        if not np.isfinite(y).any():
            raise ValueError(f"the {name} split has no finite regression label")
        return
    if not np.issubdtype(y.dtype, np.integer):
        raise TypeError(f"{info.task_type} labels must be integers, got {y.dtype}")
    if not (y != IGNORE).any():
        raise ValueError(f"every label of the {name} split is the ignore value {IGNORE}")
    check_label_range(y, info, f"the {name} split")


def whole_labels(labels: np.ndarray, where: str) -> np.ndarray:
    """Class labels of any type as int64; raises ValueError if one is no whole number."""
    labels = np.asarray(labels)
    if labels.dtype.kind == "f" and (odd := labels[labels != np.rint(labels)]).size:
        raise ValueError(f"{where} holds label {odd.flat[0]:g}, which is no whole number")
    if labels.dtype.kind == "f":
        labels = labels.clip(-(2.0**53), 2.0**53)  # far from any class, and within int64
    return labels.astype(np.int64)


def check_label_range(labels: np.ndarray, info: DatasetInfo, where: str) -> None:
    """Raises ValueError if a label other than -1 lies outside the data set's classes."""
    top = 1 if info.multilabel else info.num_classes - 1
    present = labels[labels != IGNORE]
    if present.size and (present.min() < 0 or present.max() > top):
        bad = int(present.min() if present.min() < 0 else present.max())
        raise ValueError(f"{where} holds label {bad}, outside 0...{top}")
