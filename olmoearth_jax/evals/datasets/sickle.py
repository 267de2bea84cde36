"""SICKLE: paddy or not, from seasons of Sentinel-2, Sentinel-1 and Landsat 8 (published form).

`sickle_dataset_tabular.csv` lists the samples, `images/<sensor>/npy/<id>/*.npz` hold one array per
band and date, `masks/yield_distributed/10m/<id>.tif` the plots (band 1) and crops (band 2).
"""

from __future__ import annotations

import datetime
import re
from pathlib import Path

import numpy as np

from olmoearth_jax.data import npy_file
from olmoearth_jax.evals.datasets.base import Location, Raw, Reader, month_timestamps, read_raster
from olmoearth_jax.evals.datasets.series import read_rows
from olmoearth_jax.modalities import get

SENSORS = {"sentinel2_l2a": "S2", "sentinel1": "S1"}
SIDE = 32
SEASON_DAYS = 183
MAX_ZEROS = 0.25
MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")


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
        month = MONTHS.index(item["STANDARD_SEASON"].strip().lower()[:3]) + 1
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
        sensor = SENSORS[modality]
        found: dict[int, list[np.ndarray]] = {}
        for path in sorted((self.folder / "images" / sensor / "npy" / str(number)).glob("*.npz")):
            day = acquisition(path)
            if not 0 <= (day - start).days < SEASON_DAYS:
                continue
            stored = npy_file.read(path)
            names = [_stored_name(b, list(stored)) for b in get(modality).bands]
            image = np.stack([_nearest(stored[n], SIDE) for n in names], -1)
            if (image[..., 0] == 0).mean() < MAX_ZEROS:
                found.setdefault(day.year * 12 + day.month - 1, []).append(image)
        return {m: np.mean(v, axis=0) for m, v in found.items()}

    def _label(self, number: int) -> np.ndarray:
        path = self.folder / "masks" / "yield_distributed" / "10m" / f"{number}.tif"
        plots, crops = (_nearest(b, SIDE) for b in read_raster(path)[:2])
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
