"""PASTIS-R: crop types from monthly Sentinel-2 and Sentinel-1 (spec/evals.md section 13.5)."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from olmoearth_jax.evals import bands
from olmoearth_jax.evals.datasets import archives
from olmoearth_jax.evals.datasets.base import (
    DataUnavailable,
    Location,
    Reader,
    check_label_range,
    low_label_rows,
)
from olmoearth_jax.evals.samples import Sample, make_sample

MONTHS = 12
FIRST_MONTH, LAST_MONTH = (2018, 9), (2019, 10)
VOID = 19
FOLDS = {"train": (1, 2, 3), "valid": (4,), "test": (5,)}
EXPAND_S2 = (0, 0, 1, 2, 3, 4, 5, 6, 7, 7, 8, 8, 9)
"""Which of the 10 published bands stands for each of 13: B1 <- B2, B9 <- B8A, B10 <- B11."""

_PARTS = {"s2": "s2_images", "s1": "s1_images"}


class Pastis(Reader):
    """One split in its prepared form."""

    layout = (
        "pastis_r_{train|valid|test}/ with months.pt, targets.pt, s2_images/<i>.pt and "
        "s1_images/<i>.pt (or the same as .npy)"
    )
    published = "https://zenodo.org/records/5735646, prepared by python -m tools.convert_evals"
    location = Location("PASTIS_DIR", layout, published)
    location_128 = Location("PASTIS_DIR_ORIG", layout, published)
    partitions = Location(
        "PASTIS_DIR_PARTITION", "<fraction>x_train_partition.json files", published
    )

    def __init__(self, task, info, split):
        super().__init__(task, info, split)
        where = _location(info)
        self.folder = where.require(where.folder() / f"pastis_r_{self.split}")
        self.months = _load(self.folder / "months")
        self.targets = _load(self.folder / "targets").astype(np.int64)
        check_label_range(self.targets, info.num_classes, f"{self.folder.name}/targets")
        self.rows = np.arange(len(self.months))
        if task.label_fraction < 1 and self.split == "train":
            folder = self.partitions.folder()
            self.rows = np.asarray(low_label_rows(folder, task.label_fraction, self.partitions))

    @classmethod
    def check_available(cls, task, info) -> None:
        where = _location(info)
        where.require(where.folder() / "pastis_r_train")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Sample, np.ndarray]:
        row = int(self.rows[index])
        images = {}
        if "sentinel2_l2a" in self.modalities:
            x = self._image("s2_images", row)
            images["sentinel2_l2a"] = self.normalized(
                x, "sentinel2_l2a", bands.S2_13, bands.FROM_S2_13
            )
        if "sentinel1" in self.modalities:
            x = self._image("s1_images", row)
            images["sentinel1"] = self.normalized(x, "sentinel1", bands.S1, bands.FROM_S1)
        return make_sample(images, month_timestamps(self.months[row])), self.targets[row]

    def _image(self, part: str, row: int) -> np.ndarray:
        """[12, C, H, W] on disk -> [H, W, 12, C]."""
        return _load(self.folder / part / str(row)).transpose(2, 3, 0, 1)


def _location(info) -> Location:
    return Pastis.location_128 if "128" in info.name else Pastis.location


def _load(stem: Path) -> np.ndarray:
    prepared = stem.with_name(stem.name + ".npy")
    if prepared.exists():
        return np.load(prepared)
    path = stem.with_name(stem.name + ".pt")
    if not path.exists():
        raise DataUnavailable(f"{path} is missing; expected {Pastis.layout}")
    return archives.load_torch(path)


def month_timestamps(months: np.ndarray) -> np.ndarray:
    """YYYYMM [T] -> int64 [T, 3] of (1, 0-based month, year)."""
    months = np.asarray(months, np.int64)
    return np.stack([np.ones_like(months), months % 100 - 1, months // 100], -1)


def monthly_means(images: np.ndarray, dates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean image of every calendar month of the season that has dates.

    Args:
      images: [T, C, H, W]; steps beyond the dates are left out.
      dates: YYYYMMDD [>= T or fewer].

    Returns:
      float32 [M, C, H, W] and YYYYMM [M].
    """
    months = np.asarray(dates[: len(images)]) // 100
    season, (year, month) = [], FIRST_MONTH
    while (year, month) <= LAST_MONTH:
        season.append(year * 100 + month)
        year, month = (year, month + 1) if month < 12 else (year + 1, 1)
    found = [m for m in season if (months == m).any()]
    means = [images[: len(months)][months == m].astype(np.float32).mean(0) for m in found]
    empty = np.empty((0, *images.shape[1:]), np.float32)
    return (np.stack(means) if means else empty), np.array(found)


def convert_patch(
    root: Path, patch: int, dates: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None:
    """One published patch: s2 [12, 13, H, W], s1 [12, 2, H, W], months [12], target [H, W].

    None if a sensor has fewer than 12 months. The dates of Sentinel-2 serve Sentinel-1 too, as in
    the files that the reference published.
    """
    s2 = np.load(root / "DATA_S2" / f"S2_{patch}.npy")[:, list(EXPAND_S2)]
    s1 = np.load(root / "DATA_S1A" / f"S1A_{patch}.npy")[:, :2]
    target = np.load(root / "ANNOTATIONS" / f"TARGET_{patch}.npy")[0].astype(np.int64)
    s2, months = monthly_means(s2, dates)
    s1, s1_months = monthly_means(s1, dates)
    if len(months) < MONTHS or len(s1_months) < MONTHS:
        return None
    target[target == VOID] = -1
    return s2[:MONTHS], s1[:MONTHS], months[:MONTHS], target


def quadrants(array: np.ndarray) -> list[np.ndarray]:
    """The four quarters of [..., H, W]: top left, bottom left, top right, bottom right."""
    h, w = array.shape[-2] // 2, array.shape[-1] // 2
    return [array[..., r : r + h, c : c + w] for c in (0, w) for r in (0, h)]


def patches(root: Path, split: str) -> Iterator[tuple[int, np.ndarray]]:
    """Patch numbers and dates (YYYYMMDD) of a split, from the published metadata."""
    features = json.loads((root / "metadata.geojson").read_text())["features"]
    for feature in features:
        about = feature["properties"]
        if about["Fold"] in FOLDS[split]:
            table = about["dates-S2"]
            table = json.loads(table) if isinstance(table, str) else table
            yield int(about["ID_PATCH"]), np.array([table[k] for k in sorted(table, key=int)])


def convert(root: Path, target: Path, split: str, cut: bool = True) -> int:
    """Prepares a split of the published data under `target/pastis_r_<split>`; returns its size.

    Args:
      root: folder with metadata.geojson, DATA_S2, DATA_S1A and ANNOTATIONS.
      cut: quarters of 64 pixels (PASTIS_DIR) instead of whole patches (PASTIS_DIR_ORIG).
    """
    folder = target / f"pastis_r_{split}"
    for part in _PARTS.values():
        os.makedirs(folder / part, exist_ok=True)
    all_months, all_targets = [], []
    for patch, dates in patches(root, split):
        found = convert_patch(root, patch, dates)
        if found is None:
            continue
        s2, s1, months, label = found
        parts = [quadrants(a) if cut else [a] for a in (s2, s1, label)]
        for a, b, c in zip(*parts, strict=True):
            np.save(folder / "s2_images" / f"{len(all_months)}.npy", a)
            np.save(folder / "s1_images" / f"{len(all_months)}.npy", b)
            all_months.append(months)
            all_targets.append(c)
    if not all_months:
        raise ValueError(f"no patch of the {split} folds in {root} has {MONTHS} months of data")
    np.save(folder / "months.npy", np.stack(all_months))
    np.save(folder / "targets.npy", np.stack(all_targets))
    return len(all_months)
