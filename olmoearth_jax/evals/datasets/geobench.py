"""GeoBench v1, read without its package (spec/evals.md section 13.2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from olmoearth_jax.data.hdf5_file import open_hdf5, stored_array
from olmoearth_jax.evals import bands as order
from olmoearth_jax.evals import normalize
from olmoearth_jax.evals.datasets import archives
from olmoearth_jax.evals.datasets.base import Location, Raw, Reader, partition_name, read_json

SO2SAT_SCALE = 10_000.0


class GeoBench(Reader):
    """One split of a GeoBench v1 data set: one HDF5 file per sample."""

    location = Location(
        "GEOBENCH_DIR",
        "{classification|segmentation}_v1.0/<name>/ with task_specs.pkl, band_stats.json, "
        "default_partition.json and one <id>.hdf5 per sample",
        "https://github.com/ServiceNow/geo-bench",
        ("{kind}_v1.0/{name}/task_specs.pkl",),
    )
    disk = {
        "sentinel2_l2a": (order.S2_13, order.FROM_S2_13),
        "landsat": (order.LANDSAT_NAMES, order.FROM_LANDSAT),
    }

    def open(self):
        kind = "segmentation" if self.info.spatial else "classification"
        self.folder = self.folder / f"{kind}_v1.0" / self.info.name
        where = f"{self.folder.name}/task_specs.pkl"
        specs = archives.loads((self.folder / "task_specs.pkl").read_bytes(), where)
        infos = getattr(specs, "bands_info", None)
        names = [getattr(b, "name", None) for b in infos] if isinstance(infos, list) else []
        self.bands = [name for name in names if isinstance(name, str)]
        if not names or len(self.bands) != len(names):
            raise ValueError(f"{where} describes no bands; it is no GeoBench task")
        (self.modality,) = self.modalities
        self.scale = SO2SAT_SCALE if self.info.name == "m-so2sat" else 1.0
        self.names = self.disk[self.modality][0]
        self.picks = pick_bands(self.bands, self.names, self.info.imputes)
        if not self.task.norm_stats_from_pretrained:
            self.stats = {self.modality: self._stats()}
        full = self.task.label_fraction == 1
        name = "default" if full else partition_name(self.task.label_fraction)
        path = self.location.either(self.folder / f"{name}_partition.json")
        return read_json(path, dict).get(self.split) or []

    def _stats(self) -> normalize.Stats:
        """Statistics of the bands on disk and of the copied ones, by name."""
        path = self.location.either(self.folder / "band_stats.json")
        keys = ("mean", "std", "min", "max")
        own = {
            band: {k: float(v[k]) * self.scale for k in keys if k in v}
            for band, v in read_json(path, dict).items()
            if band in self.bands
        }
        return normalize.impute_stats(own, self.info.imputes, list(dict.fromkeys(self.names)))

    def read(self, item) -> Raw:
        path = self.location.either(self.folder / f"{item}.hdf5")
        image, label = read_sample(path, self.bands, self.info.spatial)
        image = image * self.scale if self.scale != 1 else image
        return Raw({self.modality: image[..., self.picks]}, label)

    def normalized(self, image: np.ndarray, modality: str) -> np.ndarray:
        """As for all data sets, but for Landsat with pretraining statistics.

        There each band on disk keeps the value that the first model position with its name gives
        it, and copies follow their source: both B8 and B3 carry the green band normalised as B8,
        as in the reference.
        """
        scaled = super().normalized(image, modality)
        if modality != "landsat" or not self.task.norm_stats_from_pretrained:
            return scaled
        to_model = list(order.FROM_LANDSAT)
        in_model = [self.names[i] for i in to_model]
        first = scaled[..., [in_model.index(b) for b in self.bands]]
        return first[..., self.picks][..., to_model]


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
    with open_hdf5(path) as f:
        text = f.attrs.get("pickle")
        if text is None:
            raise ValueError(f"{path.name} has no attribute 'pickle'; it is no GeoBench sample")
        meta = archives.loads_literal(text, path.name)
        if not isinstance(meta, dict):
            raise ValueError(f"{path.name} describes nothing; it is no GeoBench sample")
        held = set(f)  # asking h5py for a name would follow links
        listed = meta.get("bands_order", list(f))
        names = [k for k in listed if isinstance(k, str)] if isinstance(listed, list) else []
        stored = {k.split("_")[0]: k for k in names if k in held}
        missing = [b for b in bands if b not in stored]
        if missing:
            raise ValueError(f"{path.name} lacks the band {missing[0]!r}")
        image = np.stack([stored_array(f, stored[b]) for b in bands], -1)
        if spatial and "label" not in held:
            raise ValueError(f"{path.name} lacks its label raster")
        label = stored_array(f, "label") if "label" in held else _label(meta, path.name)
    label = label[..., 0] if label.ndim == 3 else label
    return image, label.astype(np.int64)


def _label(meta: Mapping[str, Any], where: str) -> np.ndarray:
    """The label in a sample's record: a number, an array, or a list of numbers."""
    label = meta.get("label")
    plain = label if isinstance(label, list | tuple) else (label,)
    if isinstance(label, np.ndarray):
        return label
    if not plain or not all(isinstance(n, int | float | np.number | np.bool_) for n in plain):
        raise ValueError(f"{where} has no label of numbers")
    return np.asarray(label)
