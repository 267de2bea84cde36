"""CropHarvest: is a point cropland? Monthly series of single pixels, in the published form.

`features/arrays/<i>_<dataset>.h5` hold `array` [12, 18], `labels.geojson` says what each is, and
`test_features/togo-eval.h5` hold the hand-labelled test points of Togo.
"""

from __future__ import annotations

import json

import h5py
import numpy as np

from olmoearth_jax.evals.datasets.base import Location, Reader
from olmoearth_jax.evals.samples import Sample, make_sample
from olmoearth_jax.modalities import get

COLUMNS = (
    "vv", "vh", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12",
    "temperature", "precipitation", "elevation", "slope", "ndvi",
)  # fmt: skip
"""Order on disk; B01 is not there and is copied from B02."""

TOGO = "togo"
VALID_SHARE = 0.2
SEED = 42
FIRST_MONTH = 1
EXPORT_YEAR = 2020


class CropHarvest(Reader):
    """Cropland in Togo: the survey's points train and validate, the evaluation file tests."""

    location = Location(
        "CROPHARVEST_DIR",
        "labels.geojson, features/arrays/<i>_<dataset>.h5 and test_features/togo-eval.h5",
        "https://zenodo.org/records/10251170",
    )

    def __init__(self, task, info, split):
        super().__init__(task, info, split)
        folder = self.location.folder()
        if self.split == "test":
            path = self.location.require(folder / "test_features" / "togo-eval.h5")
            with h5py.File(path) as f:
                self.series = np.asarray(f["x"])
                self.labels = np.asarray(f["y"]).astype(np.int64)
            self.paths = []
            return
        rows = json.loads(self.location.require(folder / "labels.geojson").read_text())["features"]
        about = [r["properties"] for r in rows]
        mine = [p for p in about if p["dataset"] == TOGO and not p.get("is_test")]
        arrays = folder / "features" / "arrays"
        found = [(arrays / f"{p['index']}_{TOGO}.h5", int(p["is_crop"])) for p in mine]
        found = [f for f in found if f[0].exists()]
        if not found:
            raise ValueError(f"{arrays} holds no sample of {TOGO}")
        order = np.random.RandomState(SEED).permutation(len(found))
        valid = int(len(found) * VALID_SHARE)
        chosen = order[:valid] if self.split == "valid" else order[valid:]
        if self.split == "train" and task.label_fraction < 1:
            chosen = chosen[: max(1, int(len(chosen) * task.label_fraction))]
        self.paths = [found[i][0] for i in sorted(chosen)]
        self.labels = np.array([found[i][1] for i in sorted(chosen)], np.int64)

    @classmethod
    def check_available(cls, task, info) -> None:
        cls.location.require(cls.location.folder() / "labels.geojson")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Sample, np.ndarray]:
        if self.paths:
            with h5py.File(self.paths[index]) as f:
                series = np.asarray(f["array"])
        else:
            series = self.series[index]
        return self.convert(series), np.asarray(self.labels[index])

    def convert(self, series: np.ndarray) -> Sample:
        """Sample of a series [T, 18] whose first month is February of the year before export."""
        if series.ndim != 2 or series.shape[1] != len(COLUMNS):
            raise ValueError(f"a series must be [T, {len(COLUMNS)}], got {series.shape}")
        images = {}
        for name in self.modalities:
            wanted = get(name).bands
            picks = [COLUMNS.index("B02" if b == "B01" else b) for b in wanted]
            images[name] = self.normalized(
                series[None, None][..., picks], name, wanted, range(len(wanted))
            )
        return make_sample(images, _months(len(series)))


def _months(steps: int) -> np.ndarray:
    month = (EXPORT_YEAR - 1) * 12 + FIRST_MONTH + np.arange(steps)
    return np.stack([np.ones(steps, int), month % 12, month // 12], -1)
