"""Ten land covers in pairs that look alike: `similar_but_different` (spec/evals_v1_3.md 4)."""

from __future__ import annotations

from typing import Any

import numpy as np

from olmoearth_jax.configlib.tasks import Stats
from olmoearth_jax.evals.datasets import bands
from olmoearth_jax.evals.datasets.base import FRACTION_SEED, Location, Raw, Reader, read_json
from olmoearth_jax.evals.datasets.tensors import load_table
from olmoearth_jax.evals.samples import check_label_range

DATE = (1, 6, 2021)
"""Day, 0-based month and year of every patch."""

SHORT = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12")
"""Names of the bands on disk."""

_FIGURES = ("mean", "std", "min", "max")


class SimilarButDifferent(Reader):
    """Sentinel-2 patches uint16 [N, 32, 32, 12] with one class each."""

    location = Location(
        "SBD_DIR",
        "SBD_train.npz, SBD_val.npz and SBD_test.npz (or .pt), each with images [N, 32, 32, 12] "
        "and labels [N], and norm_stats.json",
        "https://huggingface.co/datasets/calebrob6/similar-but-different",
        ("SBD_train.npz", "SBD_train.pt"),
    )
    disk = {"sentinel2_l2a": (bands.S2_12, bands.FROM_S2_12)}

    def open(self):
        stem = self.folder / f"SBD_{'val' if self.split == 'valid' else self.split}"
        self.images, labels = load_table(self.location, stem, "images", "labels")
        shape = self.images.shape
        if len(shape) != 4 or shape[-1] != len(SHORT) or labels.shape != shape[:1]:
            raise ValueError(
                f"{stem.name}: images must be [N, H, W, {len(SHORT)}] with labels [N], got "
                f"{shape} and {labels.shape}"
            )
        self.labels = labels.astype(np.int64)
        check_label_range(self.labels, self.info, stem.name)
        if not self.task.norm_stats_from_pretrained:
            self.stats = {"sentinel2_l2a": self._statistics()}
        rows = np.arange(len(self.labels))
        if self.task.label_fraction == 1 or self.split != "train":
            return rows
        return rows[stratified(self.labels, self.task.label_fraction)]

    def read(self, item) -> Raw:
        image = self.images[item].astype(np.float64)
        return Raw({"sentinel2_l2a": image}, self.labels[item], np.asarray([DATE]))

    def _statistics(self) -> Stats:
        """The bands' figures, from a table by band or by figure."""
        path = self.location.either(self.folder / "norm_stats.json")
        try:
            table = read_json(path, dict)
            return {name: _figures(table, i) for i, name in enumerate(bands.S2_12)}
        except (ValueError, KeyError, IndexError, TypeError) as e:
            raise ValueError(
                f"{path.name} must hold {', '.join(_FIGURES)} of each of {', '.join(SHORT)}: {e}"
            ) from None


def _figures(table: Any, band: int) -> dict[str, float]:
    if SHORT[band] in table:
        return {k: float(table[SHORT[band]][k]) for k in _FIGURES}
    return {k: float(table[k][band]) for k in _FIGURES}


def stratified(labels: np.ndarray, fraction: float) -> np.ndarray:
    """Rows, ascending, of a seeded share of each class, at least one of each."""
    rng = np.random.Generator(np.random.PCG64(FRACTION_SEED))
    kept = []
    for number in np.unique(labels):
        rows = np.flatnonzero(labels == number)
        kept.append(rng.choice(rows, max(1, round(len(rows) * fraction)), replace=False))
    return np.sort(np.concatenate(kept))
