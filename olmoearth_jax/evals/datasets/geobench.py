"""GeoBench, read without its package: v1 (spec/evals.md section 13.2) and v2 (section 13.6).

Of v2 the published tortilla files are unpacked once by `tools.convert_evals geobench2` into one
.npz per sample, with the arrays image, image_s1, image_pan, ... and label.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from olmoearth_jax import modalities as registry
from olmoearth_jax.configlib.tasks import Stats
from olmoearth_jax.data import npy_file
from olmoearth_jax.data.derived import to_decibel
from olmoearth_jax.data.hdf5_file import open_hdf5, open_regular, stored_array
from olmoearth_jax.evals.datasets import archives
from olmoearth_jax.evals.datasets import bands as order
from olmoearth_jax.evals.datasets.base import Location, Raw, Reader, partition_name, read_json

_SO2SAT_SCALE = 10_000.0


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
        with open(open_regular(self.folder / "task_specs.pkl"), "rb") as file:
            specs = archives.loads(file.read(), where)
        infos = getattr(specs, "bands_info", None)
        names = [getattr(b, "name", None) for b in infos] if isinstance(infos, list) else []
        self.bands = [name for name in names if isinstance(name, str)]
        if not names or len(self.bands) != len(names):
            raise ValueError(f"{where} describes no bands; it is no GeoBench task")
        (self.modality,) = self.modalities
        self.scale = _SO2SAT_SCALE if self.info.name == "m-so2sat" else 1.0
        self.names = self.disk[self.modality][0]
        self.picks = _pick_bands(self.bands, self.names, self.info.imputes)
        if not self.task.norm_stats_from_pretrained:
            self.stats = {self.modality: self._stats()}
        full = self.task.label_fraction == 1
        name = "default" if full else partition_name(self.task.label_fraction)
        path = self.location.either(self.folder / f"{name}_partition.json")
        return read_json(path, dict).get(self.split) or []

    def _stats(self) -> Stats:
        """Statistics of the bands on disk and of the copied ones, by name."""
        path = self.location.either(self.folder / "band_stats.json")
        keys = ("mean", "std", "min", "max")
        own = {
            band: {k: float(v[k]) * self.scale for k in keys if k in v}
            for band, v in read_json(path, dict).items()
            if band in self.bands
        }
        return order.impute_stats(own, self.info.imputes, list(dict.fromkeys(self.names)))

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


def _pick_bands(
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


_DATE = (15, 6, 2020)
_S2 = "B01 B02 B03 B04 B05 B06 B07 B08 B8A B09 B11 B12"
_MODEL_ORDER = "B02 B03 B04 B08 B05 B06 B07 B8A B11 B12 B01 B09"


@dataclasses.dataclass(frozen=True)
class Slots:
    """Where the bands of a modality come from."""

    steps: tuple[tuple[str, ...], ...]
    """Per date, the arrays [C, H, W] whose channels are laid side by side; () = zeros."""
    bands: str
    """The model's band of every channel; a band named twice is averaged, channels beyond the names
    are left out."""
    scale: float = 1.0
    """Factor to the value range of the model's sensor."""
    power: bool = False
    """Linear radar power, converted to decibels."""


def _one(names: str, bands: str, scale: float = 1.0) -> Slots:
    return Slots((tuple(names.split()),), bands, scale)


SLOTS: dict[str, dict[str, Slots]] = {
    "benv2": {"sentinel1": _one("image_s1", "vv vh"), "sentinel2_l2a": _one("image_s2", _S2)},
    "biomassters": {
        "sentinel1": _one("image_s1", "vv vh vv vh"),
        "sentinel2_l2a": _one("image_s2", "B02 B03 B04 B05 B06 B07 B08 B8A B11 B12"),
    },
    "burn_scars": {"sentinel2_l2a": _one("image", "B02 B03 B04 B8A B11 B12", 1e4)},
    "caffe": {"sentinel1": _one("image", "vv")},
    "cloudsen12": {"sentinel2_l2a": _one("image", _S2)},
    "flair2": {"sentinel2_l2a": _one("image", "B02 B03 B04 B08 B05", 1e4 / 255)},
    "fotw": {"sentinel2_l2a": _one("image", "B04 B03 B02 B08")},
    "kuro_siwo": {
        "sentinel1": Slots(
            (("image_pre_1",), ("image_pre_2",), ("image_post",)), "vv vh", power=True
        ),
        "srtm": Slots((("image_dem",), (), ()), "srtm"),
    },
    "spacenet2": {
        "sentinel2_l2a": _one("image_pan image_worldview", "B02 B03 B04 B08 B05 B06 B07 B8A B11")
    },
    "spacenet7": {"sentinel2_l2a": _one("image", "B04 B03 B02 B08", 1e4 / 255)},
    "treesatai": {"sentinel2_l2a": _one("image_s2", _MODEL_ORDER)},
}


class GeoBench2(Reader):
    """One split of a GeoBench v2 data set; label fractions are not defined for it.

    Other sensors are put into the slots of the model's bands.
    """

    location = Location(
        "GEOBENCH2_DIR",
        "<name>/{train|valid|test}/<i>.npz with the images [C, H, W] and 'label'",
        "https://github.com/The-AI-Alliance/GEO-Bench-2, unpacked by python -m tools.convert_evals",
    )

    @classmethod
    def find(cls, task, info):
        folder = cls.location.folder() / info.name.removeprefix("gb2-")
        return cls.location.either(folder / "train").parent

    def open(self):
        folder = self.location.either(self.folder / self.split)
        return sorted(folder.glob("*.npz"), key=lambda p: (len(p.stem), p.stem))

    def read(self, item) -> Raw:
        raw = npy_file.read(item)
        if "label" not in raw:
            raise ValueError(f"{item.name} holds no label; it holds {', '.join(raw)}")
        label = raw["label"]
        if self.info.target is not None:
            label = (label - self.info.target[0]) / self.info.target[1]
        return self.slotted(raw, label)

    def slotted(self, raw: Mapping[str, np.ndarray], label: np.ndarray) -> Raw:
        """The stored arrays in the slots of the model's bands, at the middle of June 2020."""
        slots = SLOTS[self.info.name.removeprefix("gb2-")]
        images = {m: _stack(slots[m], registry.get(m).bands, raw) for m in self.modalities}
        steps = next(iter(images.values())).shape[2]
        return Raw(images, label, np.tile(np.array(_DATE), (steps, 1)))

    def normalized(self, image: np.ndarray, modality: str) -> np.ndarray:
        """As for all data sets; channels without any data, and absent pixels, are exactly 0."""
        there = image.any((0, 1, 2)) & np.isfinite(image)
        return np.where(there, super().normalized(image, modality), 0)


def _stack(slots: Slots, bands: tuple[str, ...], raw: Mapping[str, np.ndarray]) -> np.ndarray:
    """[H, W, T, len(bands)] float64 with zeros where no channel belongs.

    Raises:
      ValueError: an array is missing.
    """
    names = slots.bands.split()
    wanted = [k for step in slots.steps for k in step]
    for key in wanted:
        if key not in raw:
            raise ValueError(f"the sample lacks {key!r}; it holds {', '.join(raw)}")
    height, width = raw[wanted[0]].shape[1:]
    out = np.zeros((height, width, len(slots.steps), len(bands)))
    for t, keys in enumerate(slots.steps):
        if not keys:
            continue
        channels = np.concatenate([raw[k] for k in keys]).astype(np.float64)[: len(names)]
        channels = to_decibel(channels) if slots.power else channels * slots.scale
        for i, band in enumerate(bands):
            mine = [c for c, n in zip(channels, names, strict=False) if n == band]
            if mine:
                out[:, :, t, i] = np.mean(mine, axis=0)
    return out
