"""Crops by series of images: BreizhCrops (spec 13.6), CropHarvest and SICKLE (as published).

Of SICKLE `sickle_dataset_tabular.csv` lists the samples, `images/<sensor>/npy/<id>/*.npz` hold an
array per band and date, `masks/yield_distributed/10m/<id>.tif` plots (band 1) and crops (band 2).
"""

from __future__ import annotations

import csv
import datetime
import re
from pathlib import Path

import numpy as np

from olmoearth_jax.data import npy_file
from olmoearth_jax.data.hdf5_file import open_hdf5, stored_array
from olmoearth_jax.evals.datasets import bands
from olmoearth_jax.evals.datasets.base import (
    Location,
    Raw,
    Reader,
    month_timestamps,
    read_json,
    read_raster,
)
from olmoearth_jax.files import check_file
from olmoearth_jax.modalities import get


def read_rows(path) -> list[dict[str, str]]:
    """Rows of a CSV file with a header.

    Raises:
      ValueError: it cannot be read.
    """
    try:
        check_file(path)
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
        rows = read_json(self.folder / "labels.geojson", dict, "features")["features"]
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


_SENSORS = {"sentinel2_l2a": "S2", "sentinel1": "S1"}
_SIDE = 32
_SEASON_DAYS = 183
_MAX_ZEROS = 0.25
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")


class Sickle(Reader):
    """One split: tiles of 32 pixels, labels 0 paddy, 1 other crop, -1 no plot of this split."""

    location = Location(
        "SICKLE_DIR",
        "sickle_dataset_tabular.csv, images/{S2|S1}/npy/<id>/*.npz and "
        "masks/yield_distributed/10m/<id>.tif",
        "https://github.com/Depanshu-Sani/SICKLE",
        ("sickle_dataset_tabular.csv",),
    )

    def open(self):
        tag = "val" if self.split == "valid" else self.split
        table = read_rows(self.folder / "sickle_dataset_tabular.csv")
        rows = [r for r in table if r["SPLIT"].strip().lower() == tag]
        self.plots = {int(float(r["PLOT_ID"])) for r in rows}
        return self.seeded_subset(rows)

    def read(self, item) -> Raw:
        number = int(float(item["UNIQUE_ID"]))
        month = _MONTHS.index(item["STANDARD_SEASON"].strip().lower()[:3]) + 1
        start = datetime.date(int(float(item["YEAR"])), month, 1)
        series = {m: self._monthly(number, m, start) for m in self.modalities}
        # All modalities of a sample share their dates: months that every sensor has.
        months = sorted(set.intersection(*(set(s) for s in series.values())))
        if not months:
            raise ValueError(f"SICKLE sample {number} has no month with data of every sensor")
        images = {n: np.stack([s[m] for m in months], axis=2) for n, s in series.items()}
        return Raw(images, self._label(number), month_timestamps(np.array(months)))

    def _monthly(self, number: int, modality: str, start: datetime.date) -> dict[int, np.ndarray]:
        """Mean image [H, W, C] of every month (year * 12 + 0-based month) of the season."""
        sensor = _SENSORS[modality]
        found: dict[int, list[np.ndarray]] = {}
        for path in sorted((self.folder / "images" / sensor / "npy" / str(number)).glob("*.npz")):
            day = acquisition(path)
            if not 0 <= (day - start).days < _SEASON_DAYS:
                continue
            stored = npy_file.read(path)
            names = [_stored_name(b, list(stored)) for b in get(modality).bands]
            image = np.stack([_nearest(stored[n], _SIDE) for n in names], -1)
            if (image[..., 0] == 0).mean() < _MAX_ZEROS:
                found.setdefault(day.year * 12 + day.month - 1, []).append(image)
        return {m: np.mean(v, axis=0) for m, v in found.items()}

    def _label(self, number: int) -> np.ndarray:
        path = self.folder / "masks" / "yield_distributed" / "10m" / f"{number}.tif"
        plots, crops = (_nearest(b, _SIDE) for b in read_raster(path)[:2])
        label = np.where(crops > 0, np.minimum(crops - 1, 1), -1).astype(np.int64)
        label[~np.isin(plots, list(self.plots))] = -1
        return label


def acquisition(path: Path) -> datetime.date:
    """Date in a file name: its first run of eight digits that is a date.

    Raises:
      ValueError: there is none.
    """
    for text in re.findall(r"(?<!\d)(20\d{6})", path.name):
        try:
            return datetime.date(int(text[:4]), int(text[4:6]), int(text[6:]))
        except ValueError:
            continue
    raise ValueError(f"{path.name} names no date")


def _stored_name(band: str, stored: list[str]) -> str:
    """The archive's name of one of our bands: B2 for B02, VV for vv."""
    for name in (band, band.upper(), band.replace("B0", "B")):
        if name in stored:
            return name
    raise ValueError(f"band {band!r} is missing; the file holds {', '.join(stored)}")


def _nearest(band: np.ndarray, side: int) -> np.ndarray:
    rows = np.minimum((np.arange(side) + 0.5) * band.shape[0] / side, band.shape[0] - 1).astype(int)
    columns = np.minimum((np.arange(side) + 0.5) * band.shape[1] / side, band.shape[1] - 1)
    return band[rows][:, columns.astype(int)]
