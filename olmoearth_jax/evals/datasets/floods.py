"""Sen1Floods11: water in Sentinel-1 images (spec/evals.md section 13.4)."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from olmoearth_jax.evals import bands
from olmoearth_jax.evals.datasets import archives
from olmoearth_jax.evals.datasets.base import (
    Location,
    Reader,
    check_label_range,
    low_label_rows,
)
from olmoearth_jax.evals.datasets.rasters import read_raster
from olmoearth_jax.evals.samples import Sample, make_sample

TILE, SCENE = 64, 512


class Sen1Floods11(Reader):
    """One split; tiles with a value that is not finite do not exist for it."""

    location = Location(
        "FLOODS_DIR",
        "flood_{train|valid|test}_data.pt (or .npz), each with s1 [N, 2, 64, 64] in dB and labels "
        "[N, 1, 64, 64]",
        "https://github.com/cloudtostreet/Sen1Floods11",
    )

    def __init__(self, task, info, split):
        super().__init__(task, info, split)
        path = _path(self.location, self.split)
        table = dict(np.load(path)) if path.suffix == ".npz" else archives.load_torch(path)
        if not {"s1", "labels"} <= set(table):
            raise ValueError(f"{path.name} must hold 's1' and 'labels'")
        finite = np.flatnonzero(np.isfinite(table["s1"]).all((1, 2, 3)))
        self.images = np.moveaxis(table["s1"], 1, -1)
        self.labels = table["labels"][:, 0].astype(np.int64)
        check_label_range(self.labels[finite], info.num_classes, path.name)
        self.rows = finite
        if task.label_fraction < 1 and self.split == "train":
            rows = low_label_rows(path.parent, task.label_fraction, self.location)
            self.rows = finite[np.asarray(rows)]

    @classmethod
    def check_available(cls, task, info) -> None:
        _path(cls.location, "train")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Sample, np.ndarray]:
        row = self.rows[index]
        image = self.normalized(self.images[row], "sentinel1", bands.S1, bands.FROM_S1)
        return make_sample({"sentinel1": image}), self.labels[row]


def _path(location: Location, split: str) -> Path:
    folder = location.folder()
    prepared = folder / f"flood_{split}_data.npz"
    return prepared if prepared.exists() else location.require(folder / f"flood_{split}_data.pt")


def convert(root: Path, split_csv: Path) -> dict[str, np.ndarray]:
    """Tiles with water of the hand-labelled scenes of a split: s1 [N, 2, 64, 64], labels.

    Args:
      root: folder with LabelHand/ and s1/.
      split_csv: its second column names the label rasters.
    """
    with open(split_csv, newline="") as f:
        names = [row[1].strip() for row in csv.reader(f) if len(row) > 1]
    images, labels = [], []
    for name in names:
        label = read_raster(root / "LabelHand" / name)[0].astype(np.int64)
        image = read_raster(root / "s1" / name.replace("_LabelHand", "_S1Hand"))
        for r in range(0, SCENE, TILE):
            for c in range(0, SCENE, TILE):
                area = (slice(r, r + TILE), slice(c, c + TILE))
                if (label[area] > 0).any():
                    images.append(image[(slice(None), *area)].astype(np.float32))
                    labels.append(label[area][None])
    if not images:
        raise ValueError(f"no scene of {split_csv} has a pixel of water")
    return {"s1": np.stack(images), "labels": np.stack(labels)}
