"""GeoBench v1, read without its package (spec/evals.md section 13.2)."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np

from olmoearth_jax.evals import bands as order
from olmoearth_jax.evals import normalize
from olmoearth_jax.evals.datasets import archives
from olmoearth_jax.evals.datasets.base import (
    Location,
    Reader,
    check_label_range,
    partition_name,
)
from olmoearth_jax.evals.samples import Sample, make_sample

SO2SAT_SCALE = 10_000.0


class GeoBench(Reader):
    """One split of a GeoBench v1 data set: one HDF5 file per sample."""

    location = Location(
        "GEOBENCH_DIR",
        "{classification|segmentation}_v1.0/<name>/ with task_specs.pkl, band_stats.json, "
        "default_partition.json and one <id>.hdf5 per sample",
        "https://github.com/ServiceNow/geo-bench",
    )

    def __init__(self, task, info, split):
        super().__init__(task, info, split)
        self.folder = _folder(self.location, info)
        partition = self._partition()
        self.ids: list[str] = partition.get(self.split) or []
        specs = archives.loads(
            self.location.require(self.folder / "task_specs.pkl").read_bytes(),
            f"{self.folder.name}/task_specs.pkl",
        )
        self.bands = [str(b.name) for b in specs.bands_info]
        self.landsat = "landsat" in self.modalities
        self.scale = SO2SAT_SCALE if info.name == "m-so2sat" else 1.0
        self.names = order.LANDSAT_NAMES if self.landsat else order.S2_13
        self.picks = pick_bands(self.bands, self.names, info.imputes)

    @classmethod
    def check_available(cls, task, info) -> None:
        cls.location.require(_folder(cls.location, info) / "task_specs.pkl")

    def _partition(self) -> dict[str, list[str]]:
        name = "default"
        if self.task.label_fraction < 1:
            name = partition_name(self.task.label_fraction)
        path = self.location.require(self.folder / f"{name}_partition.json")
        return json.loads(path.read_text())

    @functools.cached_property
    def stats(self) -> normalize.Stats:
        """Statistics of the bands on disk and of the copied ones, by name."""
        path = self.location.require(self.folder / "band_stats.json")
        keys = ("mean", "std", "min", "max")
        own = {
            band: {k: float(v[k]) * self.scale for k in keys if k in v}
            for band, v in json.loads(path.read_text()).items()
            if band in self.bands
        }
        return dict(normalize.impute_stats(own, self.info.imputes, list(dict.fromkeys(self.names))))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[Sample, np.ndarray]:
        name = f"{self.ids[index]}.hdf5"
        path = self.location.require(self.folder / name)
        image, label = read_sample(path, self.bands, self.info.spatial)
        check_label_range(label, 2 if self.info.multilabel else self.info.num_classes, name)
        image = image * self.scale if self.scale != 1 else image
        if self.landsat:
            return make_sample({"landsat": self._landsat(image)}), label
        image = image[..., self.picks]
        image = self.normalized(image, "sentinel2_l2a", self.names, order.FROM_S2_13, self.stats)
        return make_sample({"sentinel2_l2a": image}), label

    def _landsat(self, image: np.ndarray) -> np.ndarray:
        """Landsat bands in the model's order, normalised.

        With pretraining statistics each band on disk keeps the value that the first model
        position with its name gives it, and copies follow their source: both B8 and B3 carry the
        green band normalised as B8, as in the reference.
        """
        to_model = list(order.FROM_LANDSAT)
        stack = image[..., self.picks]
        if not self.task.norm_stats_from_pretrained:
            return self.normalized(stack, "landsat", self.names, to_model, self.stats)
        scaled = normalize.normalize_pretrained(stack[..., to_model], "landsat")
        in_model = [self.names[i] for i in to_model]
        first = scaled[..., [in_model.index(b) for b in self.bands]]
        return first[..., self.picks][..., to_model]


def _folder(location: Location, info) -> Path:
    kind = "segmentation" if info.spatial else "classification"
    return location.require(location.folder() / f"{kind}_v1.0" / info.name)


def pick_bands(
    available: Sequence[str], wanted: Sequence[str], imputes: Sequence[tuple[str, str]]
) -> list[int]:
    """For every wanted band the position of it, or of the band it is copied from, on disk.

    Raises:
      ValueError: a band is absent and nothing is copied to it.
    """
    sources: dict[str, str] = {}
    for source, target in imputes:
        sources.setdefault(target, source)
    out = []
    for name in wanted:
        found = name if name in available else sources.get(name, name)
        if found not in available:
            raise ValueError(f"band {name!r} is absent; the files hold {', '.join(available)}")
        out.append(list(available).index(found))
    return out


def read_sample(path: Path, bands: Sequence[str], spatial: bool) -> tuple[np.ndarray, np.ndarray]:
    """Image [H, W, bands] and label (int64 scalar, vector or raster) of one sample file.

    Raises:
      ValueError: a band or the label is missing.
    """
    with h5py.File(path) as f:
        text = f.attrs.get("pickle")
        if text is None:
            raise ValueError(f"{path.name} has no attribute 'pickle'; it is no GeoBench sample")
        meta = archives.loads_literal(text, path.name)
        stored = {str(k).split("_")[0]: k for k in meta.get("bands_order", f) if k in f}
        missing = [b for b in bands if b not in stored]
        if missing:
            raise ValueError(f"{path.name} lacks the band {missing[0]!r}")
        image = np.stack([np.asarray(f[stored[b]]) for b in bands], -1)
        if spatial and "label" not in f:
            raise ValueError(f"{path.name} lacks its label raster")
        label = np.asarray(f["label"]) if "label" in f else np.asarray(meta["label"])
    label = label[..., 0] if label.ndim == 3 else label
    return image, label.astype(np.int64)
