"""PASTIS-R as published -> the prepared form of the reader (spec/evals.md section 13.5)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

_MONTHS = 12
FIRST_MONTH, LAST_MONTH = (2018, 9), (2019, 10)
VOID = 19
FOLDS = {"train": (1, 2, 3), "valid": (4,), "test": (5,)}
_EXPAND_S2 = (0, 0, 1, 2, 3, 4, 5, 6, 7, 7, 8, 8, 9)
"""Which of the 10 published bands stands for each of 13: B1 <- B2, B9 <- B8A, B10 <- B11."""


def _monthly_means(images: np.ndarray, dates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
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
    s2 = np.load(root / "DATA_S2" / f"S2_{patch}.npy")[:, list(_EXPAND_S2)]
    s1 = np.load(root / "DATA_S1A" / f"S1A_{patch}.npy")[:, :2]
    target = np.load(root / "ANNOTATIONS" / f"TARGET_{patch}.npy")[0].astype(np.int64)
    s2, months = _monthly_means(s2, dates)
    s1, s1_months = _monthly_means(s1, dates)
    if len(months) < _MONTHS or len(s1_months) < _MONTHS:
        return None
    target[target == VOID] = -1
    return s2[:_MONTHS], s1[:_MONTHS], months[:_MONTHS], target


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
    for part in ("s2_images", "s1_images"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for table in ("months.npy", "targets.npy"):  # without them no reader takes half of the images
        (folder / table).unlink(missing_ok=True)
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
        raise ValueError(f"no patch of the {split} folds in {root} has {_MONTHS} months of data")
    np.save(folder / "months.npy", np.stack(all_months))
    np.save(folder / "targets.npy", np.stack(all_targets))
    return len(all_months)
