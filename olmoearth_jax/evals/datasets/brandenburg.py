"""The offline example: land use of a country scene in Brandenburg, 8 classes, packed with us."""

from __future__ import annotations

import os
from pathlib import Path

import h5py
import hdf5plugin  # noqa: F401  (registers the zstd and lz4 filters)
import numpy as np

import olmoearth_jax
from olmoearth_jax.evals.datasets.base import DataUnavailable, Location, Reader
from olmoearth_jax.evals.samples import Sample, make_sample

UNLABELLED = 255
CROP = 64
LOCATION = Location(
    "BRANDENBURG_DIR",
    "labels/labels.npz and sample_<i>.h5 files",
    "part of this package under olmoearth_jax/sample_data",
)


def folder() -> Path:
    """The folder of BRANDENBURG_DIR, else the sample data inside the package.

    Raises:
      DataUnavailable: neither holds the labels.
    """
    if os.environ.get(LOCATION.variable):
        return LOCATION.folder()
    base = Path(olmoearth_jax.__file__).parent / "sample_data"
    found = sorted(base.rglob("labels.npz"))
    if not found:
        raise DataUnavailable(
            f"the package holds no sample data; set {LOCATION.variable} to a folder with "
            + LOCATION.describe()
        )
    return found[0].parent.parent if found[0].parent.name == "labels" else found[0].parent


class Brandenburg(Reader):
    """Crops of 64 pixels with a label raster of 8 classes, -1 where nothing is known."""

    location = LOCATION

    def __init__(self, task, info, split):
        super().__init__(task, info, split)
        root = folder()
        path = next(iter(sorted(root.rglob("labels.npz"))), None)
        if path is None:
            raise DataUnavailable(f"{root} holds no labels.npz; expected {LOCATION.describe()}")
        files = {int(p.stem.rsplit("_", 1)[1]): p for p in root.rglob("sample_*.h5")}
        with np.load(path) as table:
            labels, numbers = table["labels"], table["sample_index"]
            member = table["split"] == ("train", "valid", "test").index(self.split)
        self.labels = {int(i): x for i, x, m in zip(numbers, labels, member, strict=True) if m}
        missing = sorted(set(self.labels) - set(files))
        if missing:
            raise DataUnavailable(f"{root} lacks sample_{missing[0]}.h5 ({len(missing)} in all)")
        side = labels.shape[1]
        corners = [(r, c) for r in range(0, side, CROP) for c in range(0, side, CROP)]
        self.items = [(files[i], i, r, c) for i in sorted(self.labels) for r, c in corners]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Sample, np.ndarray]:
        path, number, row, column = self.items[index]
        area = (slice(row, row + CROP), slice(column, column + CROP))
        with h5py.File(path) as f:
            image = f["sentinel2_l2a"][area]
            timestamps = f["timestamps"][: image.shape[2]]
        bands = [str(i) for i in range(image.shape[-1])]
        image = self.normalized(image, "sentinel2_l2a", bands, range(image.shape[-1]))
        label = self.labels[number][area].astype(np.int64)
        label[label == UNLABELLED] = -1
        return make_sample({"sentinel2_l2a": image}, timestamps), label
