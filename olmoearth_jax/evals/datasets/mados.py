"""MADOS: the prepared archives, and making them from the published scenes (section 13.3)."""

from __future__ import annotations

import functools
import re
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
from olmoearth_jax.evals.datasets.rasters import read_raster, resize_bilinear
from olmoearth_jax.evals.samples import Sample, make_sample

FILES = {"train": "train", "valid": "val", "test": "test"}
TILE, SCENE = 80, 240
BANDS_ON_DISK = (
    ("60", ("442", "443")), ("10", ("492",)), ("10", ("559", "560")), ("10", ("665",)),
    ("20", ("704",)), ("20", ("780", "783")), ("10", ("833",)), ("20", ("864", "865")),
    ("20", ("1610", "1614")), ("20", ("2186", "2202")),
)  # fmt: skip
"""Resolution folder and possible wavelengths of B1 B2 B3 B4 B5 B7 B8 B8A B11 B12."""


class Mados(Reader):
    """One split of MADOS."""

    location = Location(
        "MADOS_DIR",
        "MADOS_train.pt, MADOS_val.pt and MADOS_test.pt (or MADOS_<split>.npz), each with images "
        "[N, 80, 80, 13] and labels [N, 80, 80]",
        "https://zenodo.org/records/10664073",
    )

    def __init__(self, task, info, split):
        super().__init__(task, info, split)
        self.images, self.labels = load_split(self.location, FILES[self.split])
        check_label_range(self.labels, info.num_classes, f"MADOS_{FILES[self.split]}")
        self.rows = np.arange(len(self.images))
        if task.label_fraction < 1 and self.split == "train":
            folder = self.location.folder()
            self.rows = np.asarray(low_label_rows(folder, task.label_fraction, self.location))

    @classmethod
    def check_available(cls, task, info) -> None:
        folder = cls.location.folder()
        if not (folder / "MADOS_train.npz").exists():
            cls.location.require(folder / "MADOS_train.pt")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Sample, np.ndarray]:
        row = self.rows[index]
        image = self.normalized(self.images[row], "sentinel2_l2a", bands.S2_13, bands.FROM_S2_13)
        return make_sample({"sentinel2_l2a": image}), self.labels[row]


def load_split(location: Location, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Images [N, H, W, 13] and int64 labels [N, H, W] of `MADOS_<name>.npz` or `.pt`."""
    folder = location.folder()
    path = folder / f"MADOS_{name}.npz"
    if path.exists():
        with np.load(path) as stored:
            table = {k: stored[k] for k in stored.files}
    else:
        path = location.require(folder / f"MADOS_{name}.pt")
        table = archives.load_torch(path)
    if not {"images", "labels"} <= set(table):
        raise ValueError(f"{path.name} must hold 'images' and 'labels'")
    images, labels = table["images"], table["labels"]
    if images.ndim != 4 or images.shape[-1] != 13 or labels.shape != images.shape[:3]:
        raise ValueError(
            f"{path.name}: images must be [N, H, W, 13] with labels [N, H, W], got "
            f"{images.shape} and {labels.shape}"
        )
    return images, labels.astype(np.int64)


@functools.cache
def _scene_name(text: str) -> tuple[str, str]:
    match = re.fullmatch(r"Scene_(\w+)_(\d+)", text)
    if match is None:
        raise ValueError(f"{text!r} is not a scene of the form Scene_<number>_<part>")
    return match.group(1), match.group(2)


def convert_scene(root: Path, scene: str) -> tuple[np.ndarray, np.ndarray]:
    """Tiles of one published scene that hold a label: images [N, 80, 80, 13], labels [N, 80, 80].

    Labels are shifted by one, so that unannotated pixels become -1 and classes start at 0.
    """
    number, part = _scene_name(scene)
    folder = root / f"Scene_{number}"
    found = []
    for resolution, wavelengths in BANDS_ON_DISK:
        paths = [
            folder / resolution / f"Scene_{number}_L2R_rhorc_{w}_{part}.tif" for w in wavelengths
        ]
        path = next((p for p in paths if p.exists()), None)
        if path is None:
            raise ValueError(f"{folder} lacks {paths[0].name}")
        found.append(resize_bilinear(read_raster(path)[0].astype(np.float32), SCENE, SCENE))
    b1, b2, b3, b4, b5, b7, b8, b8a, b11, b12 = found
    image = np.stack(
        [b1, b2, b3, b4, b5, (b5 + b7) / 2, b7, b8, b8a, b8a, (b8a + b11) / 2, b11, b12], -1
    )
    label = read_raster(folder / "10" / f"Scene_{number}_L2R_cl_{part}.tif")[0].astype(np.int64)
    tiles = [
        (slice(r, r + TILE), slice(c, c + TILE))
        for r in range(0, SCENE, TILE)
        for c in range(0, SCENE, TILE)
    ]
    kept = [t for t in tiles if (label[t] > 0).any()]
    images = np.array([image[t] for t in kept], np.float32).reshape(-1, TILE, TILE, 13)
    return images, np.array([label[t] - 1 for t in kept], np.int64).reshape(-1, TILE, TILE)


def convert(root: Path, split_file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of all scenes listed in a published split file, one name per line."""
    scenes = [s.strip() for s in split_file.read_text().splitlines() if s.strip()]
    if not scenes:
        raise ValueError(f"{split_file} lists no scenes")
    parts = [convert_scene(root, scene) for scene in scenes]
    return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])
