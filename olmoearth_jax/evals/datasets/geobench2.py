"""GeoBench v2: other sensors put into the slots of the model's bands (spec/evals.md section 13.6).

The published tortilla files are unpacked once by `tools.convert_evals geobench2` into one .npz per
sample, with the arrays image, image_s1, image_pan, ... and label.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from olmoearth_jax import modalities as registry
from olmoearth_jax.data import npy_file
from olmoearth_jax.data.derived import to_decibel
from olmoearth_jax.evals.datasets.base import Location, Raw, Reader

DATE = (15, 6, 2020)
_S2 = "B01 B02 B03 B04 B05 B06 B07 B08 B8A B09 B11 B12"
_MODEL_ORDER = "B02 B03 B04 B08 B05 B06 B07 B8A B11 B12 B01 B09"


@dataclasses.dataclass(frozen=True)
class Slots:
    """Where the bands of a modality come from.

    Attributes:
      steps: per date, the arrays [C, H, W] whose channels are laid side by side; () = zeros.
      bands: the model's band of every channel; a band named twice is averaged, channels beyond
        the names are left out.
      scale: factor to the value range of the model's sensor.
      power: linear radar power, converted to decibels.
    """

    steps: tuple[tuple[str, ...], ...]
    bands: str
    scale: float = 1.0
    power: bool = False


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
    """One split of a GeoBench v2 data set; label fractions are not defined for it."""

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
        images = {m: stack(slots[m], registry.get(m).bands, raw) for m in self.modalities}
        steps = next(iter(images.values())).shape[2]
        return Raw(images, label, np.tile(np.array(DATE), (steps, 1)))

    def normalized(self, image: np.ndarray, modality: str) -> np.ndarray:
        """As for all data sets; channels without any data, and absent pixels, are exactly 0."""
        there = image.any((0, 1, 2)) & np.isfinite(image)
        return np.where(there, super().normalized(image, modality), 0)


def stack(slots: Slots, bands: tuple[str, ...], raw: Mapping[str, np.ndarray]) -> np.ndarray:
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
