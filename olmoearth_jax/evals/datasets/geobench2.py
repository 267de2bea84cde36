"""GeoBench v2: other sensors put into the slots of the model's bands (spec/evals.md section 13.6).

The published tortilla files need a reader of their own; we take them exported as one .npz per
sample, with the arrays as that reader names them (image, image_s1, image_pan, ..., label).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from olmoearth_jax import modalities as registry
from olmoearth_jax.data.derived import to_decibel
from olmoearth_jax.evals import normalize
from olmoearth_jax.evals.datasets.base import Location, Reader, check_label_range
from olmoearth_jax.evals.samples import Sample, make_sample
from olmoearth_jax.evals.tasks import band_stats

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
        "https://github.com/The-AI-Alliance/GEO-Bench-2",
    )

    def __init__(self, task, info, split):
        super().__init__(task, info, split)
        self.key = info.name.removeprefix("gb2-")
        folder = self.location.require(self.location.folder() / self.key / self.split)
        self.paths = sorted(folder.glob("*.npz"), key=lambda p: (len(p.stem), p.stem))

    @classmethod
    def check_available(cls, task, info) -> None:
        folder = cls.location.folder()
        cls.location.require(folder / info.name.removeprefix("gb2-") / "train")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Sample, np.ndarray]:
        with np.load(self.paths[index]) as stored:
            raw = {k: stored[k] for k in stored.files}
        if "label" not in raw:
            raise ValueError(f"{self.paths[index].name} holds no label")
        return self.convert(raw), self._label(raw["label"])

    def _label(self, label: np.ndarray) -> np.ndarray:
        if "regression" in self.info.task_type:
            mean, std = self.info.target or (0.0, 1.0)
            return ((label - mean) / std).astype(np.float32)
        label = label.astype(np.int64)
        top = 2 if self.info.multilabel else self.info.num_classes
        check_label_range(label, top, self.info.name)
        return label

    def convert(self, raw: Mapping[str, np.ndarray]) -> Sample:
        """Sample of the raw arrays; channels without any data stay exactly 0."""
        images = {}
        for modality in self.modalities:
            x = stack(SLOTS[self.key][modality], registry.get(modality).bands, raw)
            empty = ~x.any((0, 1, 2))
            if self.task.norm_stats_from_pretrained:
                y = normalize.normalize_pretrained(x, modality)
            else:
                stats = band_stats(self.info.name)[modality]
                bands = registry.get(modality).bands
                y = normalize.normalize_with(x, stats, bands, self.task.norm_method)
            images[modality] = np.where(empty, 0, y)
        steps = next(iter(images.values())).shape[2]
        return make_sample(images, np.tile(np.array(DATE), (steps, 1)))


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
