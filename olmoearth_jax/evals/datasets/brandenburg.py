"""The offline example: land use of a country scene in Brandenburg, 8 classes, packed with us."""

from __future__ import annotations

import h5py
import hdf5plugin  # noqa: F401  (registers the zstd and lz4 filters)
import numpy as np

from olmoearth_jax.data.sample import IGNORE_LABEL, sample_dataset_dir, sample_labels
from olmoearth_jax.evals.datasets.base import DataUnavailable, Location, Reader
from olmoearth_jax.evals.samples import Sample, make_sample

CROP = 64


class Brandenburg(Reader):
    """Crops of 64 pixels with a label raster of 8 classes, -1 where nothing is known."""

    location = Location("", "labels and sample_<i>.h5 files", "part of this package")

    def __init__(self, task, info, split):
        super().__init__(task, info, split)
        self.folder = sample_dataset_dir()
        table = sample_labels()
        self.labels = table.labels
        side = range(0, table.labels.shape[1], CROP)
        numbers = table.split["val" if self.split == "valid" else self.split]
        self.items = [(int(i), r, c) for i in numbers for r in side for c in side]

    @classmethod
    def check_available(cls, task, info) -> None:
        try:
            sample_dataset_dir()
            sample_labels()
        except ValueError as e:
            raise DataUnavailable(str(e)) from e

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Sample, np.ndarray]:
        number, row, column = self.items[index]
        area = (slice(row, row + CROP), slice(column, column + CROP))
        with h5py.File(self.folder / f"sample_{number}.h5") as f:
            image = np.asarray(f["sentinel2_l2a"])[area]
            timestamps = np.asarray(f["timestamps"])[: image.shape[2]]
        bands = [str(i) for i in range(image.shape[-1])]
        image = self.normalized(image, "sentinel2_l2a", bands, range(image.shape[-1]))
        label = self.labels[number][area].astype(np.int64)
        label[label == IGNORE_LABEL] = -1
        return make_sample({"sentinel2_l2a": image}, timestamps), label
