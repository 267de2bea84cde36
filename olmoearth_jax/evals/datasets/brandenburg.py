"""The offline example: land use of a country scene in Brandenburg, 8 classes, packed with us."""

from __future__ import annotations

import numpy as np

from olmoearth_jax.data.hdf5_file import open_hdf5, stored_array
from olmoearth_jax.data.sample import IGNORE_LABEL, sample_dataset_dir, sample_labels
from olmoearth_jax.evals.datasets.base import DataUnavailable, Raw, Reader

CROP = 64


class Brandenburg(Reader):
    """Crops of 64 pixels with a label raster of 8 classes, -1 where nothing is known."""

    @classmethod
    def find(cls, task, info):
        try:
            sample_labels()
            return sample_dataset_dir()
        except ValueError as e:
            raise DataUnavailable(str(e)) from e

    def open(self):
        table = sample_labels()
        self.labels = table.labels
        numbers = table.split["val" if self.split == "valid" else self.split]
        starts = range(0, table.labels.shape[1], CROP)
        items = [(int(i), r, c) for i in numbers for r in starts for c in starts]
        return self.seeded_subset(items)

    def read(self, item) -> Raw:
        number, row, column = item
        area = (slice(row, row + CROP), slice(column, column + CROP))
        with open_hdf5(self.folder / f"sample_{number}.h5") as f:
            image = stored_array(f, "sentinel2_l2a")[area]
            timestamps = stored_array(f, "timestamps")[: image.shape[2]]
        label = self.labels[number][area].astype(np.int64)
        label[label == IGNORE_LABEL] = -1
        return Raw({"sentinel2_l2a": image}, label, timestamps)
