"""Hand-labelled scenes of Sen1Floods11 -> stacks of tiles (spec/evals.md section 13.4)."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from olmoearth_jax.evals.datasets.base import read_raster

TILE, SCENE = 64, 512


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
