"""Series of single pixels: BreizhCrops (spec 13.6) and CropHarvest (its published form)."""

from __future__ import annotations

import csv
import json

import numpy as np

from olmoearth_jax.data.hdf5_file import open_hdf5, stored_array
from olmoearth_jax.evals import bands
from olmoearth_jax.evals.datasets.base import Location, Raw, Reader, month_timestamps
from olmoearth_jax.modalities import get


def read_rows(path) -> list[dict[str, str]]:
    """Rows of a CSV file with a header.

    Raises:
      ValueError: it cannot be read.
    """
    try:
        with open(path, newline="") as f:
            return list(csv.DictReader(f))
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise ValueError(f"cannot read {path} as a table: {e}") from e


class BreizhCrops(Reader):
    """Crop types of fields in Brittany: the fields of a split's regions, up to twelve months."""

    location = Location(
        "BREIZHCROPS_DIR",
        "2017/L1C/<region>.h5, 2017/L1C/<region>.csv and classmapping.csv as the breizhcrops "
        "package (0.0.4.1) downloads them",
        "https://github.com/dl4sits/BreizhCrops",
        ("classmapping.csv",),
    )
    disk = {"sentinel2_l2a": (bands.S2_13, bands.FROM_S2_13)}
    regions = {"train": ("frh01", "frh02"), "valid": ("frh03",), "test": ("frh04",)}
    year, date_column, num_bands = 2017, 16, 13

    def open(self):
        if self.task.label_fraction != 1:
            raise ValueError("breizhcrops knows no label fractions; label_fraction must be 1")
        mapping = read_rows(self.folder / "classmapping.csv")
        classes = {row["code"]: int(row["id"]) for row in mapping}
        items = []
        for region in self.regions[self.split]:
            base = self.folder / str(self.year) / "L1C" / region
            store = self.location.either(base.with_suffix(".h5"))
            for row in read_rows(self.location.either(base.with_suffix(".csv"))):
                if row["CODE_CULTU"] in classes and int(row.get("sequencelength") or 1) > 0:
                    items.append((store, row["path"], classes[row["CODE_CULTU"]]))
        return items

    def read(self, item) -> Raw:
        store, key, label = item
        with open_hdf5(store) as f:
            return self.monthly(stored_array(f, key), label)

    def monthly(self, series: np.ndarray, label: int) -> Raw:
        """Means per month of a series [dates, 17] sorted by date: 13 bands, 3 flags, date in ns."""
        dates = series[:, self.date_column].astype("int64").astype("datetime64[ns]")
        months = dates.astype("datetime64[M]").astype(int) % 12
        # In order of appearance: the series is sorted by date.
        found = months[np.sort(np.unique(months, return_index=True)[1])]
        image = np.stack([series[months == m, : self.num_bands].mean(0) for m in found])
        stamps = month_timestamps(self.year * 12 + found)
        return Raw({"sentinel2_l2a": image[None, None]}, label, stamps)


class CropHarvest(Reader):
    """Cropland in Togo: the survey's points train and validate, the evaluation file tests."""

    location = Location(
        "CROPHARVEST_DIR",
        "labels.geojson, features/arrays/<i>_<dataset>.h5 and test_features/togo-eval.h5",
        "https://zenodo.org/records/10251170",
        ("labels.geojson",),
    )
    columns = (
        "vv", "vh", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12",
        "temperature", "precipitation", "elevation", "slope", "ndvi",
    )  # fmt: skip
    """Order on disk; B01 is not there and is copied from B02."""
    area, valid_share, seed = "togo", 0.2, 42
    first_month = 2019 * 12 + 1
    """Series begin in February of the year before their export in 2020."""

    def open(self):
        if self.split == "test":
            path = self.location.either(self.folder / "test_features" / f"{self.area}-eval.h5")
            with open_hdf5(path) as f:
                return list(zip(stored_array(f, "x"), stored_array(f, "y"), strict=True))
        rows = json.loads((self.folder / "labels.geojson").read_text())["features"]
        about = [r["properties"] for r in rows]
        mine = [p for p in about if p["dataset"] == self.area and not p.get("is_test")]
        arrays = self.folder / "features" / "arrays"
        found = [(arrays / f"{p['index']}_{self.area}.h5", p["is_crop"]) for p in mine]
        found = [f for f in found if f[0].exists()]
        if not found:
            raise ValueError(f"{arrays} holds no sample of {self.area}")
        order = np.random.RandomState(self.seed).permutation(len(found))
        cut = int(len(found) * self.valid_share)
        chosen = order[:cut] if self.split == "valid" else order[cut:]
        return self.seeded_subset([found[i] for i in sorted(chosen)])

    def read(self, item) -> Raw:
        series, label = item
        if not isinstance(series, np.ndarray):
            with open_hdf5(series) as f:
                series = stored_array(f, "array")
        if series.ndim != 2 or series.shape[1] != len(self.columns):
            raise ValueError(f"a series must be [T, {len(self.columns)}], got {series.shape}")
        images = {}
        for name in self.modalities:
            names = ["B02" if b == "B01" else b for b in get(name).bands]
            images[name] = series[None, None][..., [self.columns.index(b) for b in names]]
        return Raw(images, label, month_timestamps(self.first_month + np.arange(len(series))))
