"""MADOS scenes as published -> stacks of tiles (spec/evals.md section 13.3)."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from olmoearth_jax.evals.datasets.base import read_raster

TILE, SCENE = 80, 240
_BANDS_ON_DISK = (
    ("60", ("442", "443")), ("10", ("492",)), ("10", ("559", "560")), ("10", ("665",)),
    ("20", ("704",)), ("20", ("780", "783")), ("10", ("833",)), ("20", ("864", "865")),
    ("20", ("1610", "1614")), ("20", ("2186", "2202")),
)  # fmt: skip
"""Resolution folder and possible wavelengths of B1 B2 B3 B4 B5 B7 B8 B8A B11 B12."""


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
    for resolution, wavelengths in _BANDS_ON_DISK:
        paths = [
            folder / resolution / f"Scene_{number}_L2R_rhorc_{w}_{part}.tif" for w in wavelengths
        ]
        path = next((p for p in paths if p.exists()), None)
        if path is None:
            raise ValueError(f"{folder} lacks {paths[0].name}")
        found.append(_resize_bilinear(read_raster(path)[0].astype(np.float32), SCENE, SCENE))
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


def _resize_bilinear(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """[H, W] -> float32 [height, width], bilinear between pixel centres (corners not aligned)."""

    def weights(size: int, out: int) -> np.ndarray:
        place = np.maximum((np.arange(out) + 0.5) * size / out - 0.5, 0)
        low = np.minimum(np.floor(place).astype(int), size - 1)
        part = place - low
        table = np.zeros((out, size), np.float32)
        table[np.arange(out), low] += (1 - part).astype(np.float32)
        table[np.arange(out), np.minimum(low + 1, size - 1)] += part.astype(np.float32)
        return table

    if image.shape == (height, width):
        return image.astype(np.float32)
    rows, columns = weights(image.shape[0], height), weights(image.shape[1], width)
    return rows @ image.astype(np.float32) @ columns.T
