"""The small real dataset that comes with the package (see sample_data/brandenburg/README.md)."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np

_ROOT = Path(__file__).resolve().parents[1] / "sample_data" / "brandenburg"

IGNORE_LABEL = 255
"""Label of pixels of unknown class."""


@dataclasses.dataclass(frozen=True)
class SampleLabels:
    """Land-use labels of the sample dataset.

    Attributes:
      labels: uint8 [68, 128, 128], row = sample number; IGNORE_LABEL where unknown.
      split: per part ('train', 'val', 'test') its sample numbers, int64.
      classes: class names by label.
    """

    labels: np.ndarray
    split: dict[str, np.ndarray]
    classes: tuple[str, ...]


def sample_dataset_dir() -> Path:
    """Folder of the sample dataset's H5 files.

    Raises:
      ValueError: the package was installed without its sample data.
    """
    found = sorted(_ROOT.glob("h5py_data*/*/*/sample_metadata.csv"))
    if not found:
        raise ValueError(f"the sample dataset is missing from this installation: {_ROOT}")
    return found[0].parent


def sample_labels() -> SampleLabels:
    """The labels of the sample dataset.

    Raises:
      ValueError: the package was installed without its sample data.
    """
    folder = _ROOT / "labels"
    if not folder.is_dir():
        raise ValueError(f"the sample labels are missing from this installation: {folder}")
    with np.load(folder / "labels.npz") as stored:
        labels, index = stored["labels"], stored["sample_index"]
    by_number = np.full_like(labels, IGNORE_LABEL)
    by_number[index] = labels
    split = json.loads((folder / "split.json").read_text())
    classes = json.loads((folder / "classes.json").read_text())["classes"]
    return SampleLabels(
        by_number,
        {part: np.asarray(split[part], np.int64) for part in ("train", "val", "test")},
        tuple(c["name"] for c in sorted(classes, key=lambda c: c["index"])),
    )


def sample_places() -> list[tuple[int, int]]:
    """The first (row, column) of each sample in the scene that they were cut from, in pixels.

    Raises:
      ValueError: the package was installed without its sample data.
    """
    path = _ROOT / "labels" / "samples.json"
    if not path.is_file():
        raise ValueError(f"the sample labels are missing from this installation: {path.parent}")
    held = sorted(json.loads(path.read_text()), key=lambda s: s["sample"])
    return [(s["pixel_row"], s["pixel_col"]) for s in held]
