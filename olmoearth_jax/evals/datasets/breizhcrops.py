"""BreizhCrops: crop types of single fields from Sentinel-2 series (spec/evals.md section 13.6)."""

from __future__ import annotations

import csv
from pathlib import Path

import h5py
import numpy as np

from olmoearth_jax.evals import bands
from olmoearth_jax.evals.datasets.base import Location, Reader
from olmoearth_jax.evals.samples import Sample, make_sample

REGIONS = {"train": ("frh01", "frh02"), "valid": ("frh03",), "test": ("frh04",)}
YEAR = 2017
DATE_COLUMN = 16
NUM_BANDS = 13


class BreizhCrops(Reader):
    """One split: the fields of its regions, one pixel with up to twelve months each."""

    location = Location(
        "BREIZHCROPS_DIR",
        "2017/L1C/<region>.h5, 2017/L1C/<region>.csv and classmapping.csv as the breizhcrops "
        "package (0.0.4.1) downloads them",
        "https://github.com/dl4sits/BreizhCrops",
    )

    def __init__(self, task, info, split):
        super().__init__(task, info, split)
        if task.label_fraction != 1:
            raise ValueError("breizhcrops knows no label fractions; label_fraction must be 1")
        folder = self.location.folder()
        mapping = self.location.require(folder / "classmapping.csv")
        with open(mapping, newline="") as f:
            classes = {row["code"]: int(row["id"]) for row in csv.DictReader(f)}
        self.items: list[tuple[Path, str, int]] = []
        for region in REGIONS[self.split]:
            base = folder / str(YEAR) / "L1C" / region
            index = self.location.require(base.with_suffix(".csv"))
            store = self.location.require(base.with_suffix(".h5"))
            with open(index, newline="") as f:
                for row in csv.DictReader(f):
                    if row["CODE_CULTU"] in classes and int(row.get("sequencelength") or 1) > 0:
                        self.items.append((store, row["path"], classes[row["CODE_CULTU"]]))

    @classmethod
    def check_available(cls, task, info) -> None:
        cls.location.require(cls.location.folder() / "classmapping.csv")

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Sample, np.ndarray]:
        store, key, label = self.items[index]
        with h5py.File(store) as f:
            series = np.asarray(f[key])
        return self.convert(series, label)

    def convert(self, series: np.ndarray, label: int) -> tuple[Sample, np.ndarray]:
        """Sample of a series [dates, 17]: 13 bands, 3 quality columns, date in ns."""
        values, months = monthly(series)
        image = self.normalized(values[None, None], "sentinel2_l2a", bands.S2_13, bands.FROM_S2_13)
        ones = np.ones_like(months)
        sample = make_sample({"sentinel2_l2a": image}, np.stack([ones, months, ones * YEAR], -1))
        return sample, np.asarray(label, np.int64)


def monthly(series: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean bands [M, 13] and 0-based months [M] of a series sorted by date."""
    dates = series[:, DATE_COLUMN].astype("int64").astype("datetime64[ns]")
    months = dates.astype("datetime64[M]").astype(int) % 12
    # In order of appearance: the series is sorted by date.
    found = months[np.sort(np.unique(months, return_index=True)[1])]
    return np.stack([series[months == m, :NUM_BANDS].mean(0) for m in found]), found
