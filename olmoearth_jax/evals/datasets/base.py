"""What the readers of evaluation data share: locating folders, splits, normalisation."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from olmoearth_jax.evals.tasks import EvalTaskConfig
from olmoearth_jax.evals import normalize
from olmoearth_jax.evals.samples import Sample
from olmoearth_jax.evals.tasks import DatasetInfo, band_stats, modalities_of
from olmoearth_jax.modalities import closest

SPLITS = ("train", "valid", "test")
LOW_LABEL_FRACTIONS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


class DataUnavailable(ValueError):
    """The files of a data set are not there: the variable is unset or the layout is another."""


@dataclasses.dataclass(frozen=True)
class Location:
    """Where a data set is looked for.

    Attributes:
      variable: environment variable naming its folder.
      layout: files expected in that folder, in words.
      published: where the data can be obtained.
    """

    variable: str
    layout: str
    published: str

    def folder(self) -> Path:
        """The folder named by the variable.

        Raises:
          DataUnavailable: unset variable or no such folder.
        """
        value = os.environ.get(self.variable, "").strip()
        if not value:
            raise DataUnavailable(f"set {self.variable} to a folder with {self.describe()}")
        path = Path(value).expanduser()
        if not path.is_dir():
            raise DataUnavailable(
                f"{self.variable}={value} is not a folder; expected {self.describe()}"
            )
        return path

    def describe(self) -> str:
        return f"{self.layout} (data: {self.published})"

    def require(self, path: Path) -> Path:
        """`path` if it exists, else DataUnavailable with the layout expected."""
        if not path.exists():
            raise DataUnavailable(f"{path} is missing; {self.variable} must hold {self.describe()}")
        return path


def canonical_split(split: str) -> str:
    """'train', 'valid' (also 'val') or 'test'."""
    split = "valid" if split == "val" else split
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; {closest(split, SPLITS)}")
    return split


class Reader:
    """One split of a data set; subclasses fill in `__len__` and `__getitem__`.

    Args:
      task: settings of the task.
      info: its data set.
      split: 'train', 'valid' or 'test'.
    """

    location: Location

    def __init__(self, task: EvalTaskConfig, info: DatasetInfo, split: str):
        self.task, self.info = task, info
        self.split = canonical_split(split)
        self.modalities = modalities_of(task, info)

    @classmethod
    def check_available(cls, task: EvalTaskConfig, info: DatasetInfo) -> None:
        """Raises DataUnavailable if the files that every split needs are not there."""
        cls.location.folder()

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> tuple[Sample, np.ndarray]:
        raise NotImplementedError

    def normalized(
        self,
        image: np.ndarray,
        modality: str,
        bands: Sequence[str],
        to_model: Sequence[int],
        stats: normalize.Stats | None = None,
    ) -> np.ndarray:
        """Image [..., disk bands] normalised as the task says and in the model's band order.

        Args:
          bands: names of the bands on disk, as in the statistics.
          to_model: index list from disk order to the model's.
          stats: statistics of the data set, else those of the catalogue.
        """
        to_model = list(to_model)
        if self.task.norm_stats_from_pretrained:
            return normalize.normalize_pretrained(image[..., to_model], modality)
        if stats is None:
            stats = band_stats(self.info.name)[modality]
        out = normalize.normalize_with(image, stats, bands, self.task.norm_method)
        return out[..., to_model]


def low_label_rows(folder: Path, fraction: float, location: Location) -> list:
    """Entries of the partition file of a label fraction.

    Raises:
      ValueError: a fraction without a published partition.
      DataUnavailable: the file is missing.
    """
    path = location.require(folder / f"{partition_name(fraction)}_partition.json")
    return json.loads(path.read_text())


def partition_name(fraction: float) -> str:
    """Name of a label fraction's partition, e.g. '0.01x_train'."""
    if fraction not in LOW_LABEL_FRACTIONS:
        known = ", ".join(str(f) for f in LOW_LABEL_FRACTIONS)
        raise ValueError(f"no partition exists for label_fraction {fraction}; known: {known}")
    return f"{fraction:.2f}x_train"


def check_label_range(labels: np.ndarray, num_classes: int, where: str) -> None:
    """Raises ValueError if a label other than -1 lies outside the classes."""
    known = labels[labels != -1]
    if known.size and (known.min() < 0 or known.max() >= num_classes):
        bad = int(known.min() if known.min() < 0 else known.max())
        raise ValueError(f"{where} holds label {bad}, outside 0...{num_classes - 1}")
