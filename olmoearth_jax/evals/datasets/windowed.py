"""Windowed rasters: the layout of rslearn datasets, and any data put into it (section 13.6).

One folder per window under `windows/<group>/`, with `metadata.json` (its option `eval_split` is
train, val or test) and either `arrays.npz` ([C, T, H, W] per modality, `label`, optional `valid`
and `dates` or `timestamps`) or GeoTIFF layers. The option `dates` of metadata.json lists the dates
of the time steps; without any they are the months that the catalogue's data have. Labels of an
unsigned type may hold its highest number for places to be ignored, which is what -1 becomes in it.
Images may hold -99999 where nothing was measured; those of a user also NaN, or what their GeoTIFFs
declare to be no data.
The files are read directly; the rslearn package is not needed.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from olmoearth_jax import modalities as registry
from olmoearth_jax.configlib.tasks import STATS_FILE
from olmoearth_jax.data import npy_file
from olmoearth_jax.data.derived import is_decibel, to_decibel
from olmoearth_jax.dates import check_timestamps, parse_dates
from olmoearth_jax.evals.datasets.base import (
    DataUnavailable,
    Location,
    Raw,
    Reader,
    month_timestamps,
    read_json,
    read_masked,
    read_raster,
)
from olmoearth_jax.evals.samples import MASK, EvalSample, whole_labels
from olmoearth_jax.masks import MISSING_TOKEN

log = logging.getLogger(__name__)

_FIRST_MONTH = 2022 * 12 + 8
_MAX_STEPS = 13
_LAYERS = {
    "sentinel2_l2a": ("sentinel2_l2a", "sentinel2"),
    "sentinel1": ("sentinel1",),
    "landsat": ("landsat",),
}
"""Names that a modality's layers have; further dates are <layer>.1, <layer>.2, ..."""


class Windowed(Reader):
    """One split of a windowed data set."""

    _said: frozenset[str] = frozenset()

    layout = (
        "windows/<group>/<window>/ with metadata.json (option eval_split) and arrays.npz or "
        "GeoTIFF layers (layers/<layer>/<bands>/geotiff.tif, layers/label/...)"
    )
    location = Location("EVAL_DATASETS_DIR", f"<dataset>/{layout}", "the owner of the data")
    own = {
        "nandi_crop_map": Location("NANDI_DIR", layout, "the owner of the data"),
        "awf_lulc_map": Location("AWF_DIR", layout, "the owner of the data"),
    }

    @classmethod
    def find(cls, task, info):
        if info.folder:
            if not (Path(info.folder) / "windows").is_dir():
                raise DataUnavailable(f"{info.folder} has no {cls.layout}")
            return Path(info.folder)
        shared, own = cls.location, cls.own.get(info.name)
        if own is None or (os.environ.get(shared.variable) and not os.environ.get(own.variable)):
            return shared.either(shared.folder() / info.name / "windows").parent
        return own.either(own.folder() / "windows").parent

    def open(self):
        tag = "val" if self.split == "valid" else self.split
        metas = sorted((self.folder / "windows").glob("*/*/metadata.json"))
        items = [p.parent for p in metas if _options(p.parent).get("eval_split") == tag]
        if not items:
            raise ValueError(
                f"no window of {self.folder} has eval_split={tag} ({len(metas)} windows in all)"
            )
        if not self.task.norm_stats_from_pretrained:
            path = self.folder / STATS_FILE
            if not path.exists():
                raise DataUnavailable(
                    f"{path} is missing: own statistics ({{modality: {{band: {{mean, std}}}}}}) "
                    "are needed unless norm_stats_from_pretrained is true"
                )
            self.stats = read_json(path, dict)
        items = self.seeded_subset(items)
        if self.info.stored is None:
            return items
        return [(item, corner) for item in items for corner in self._corners()]

    def _corners(self) -> list[tuple[int, int]]:
        """Upper left corners of the samples that are cut out of each window."""
        stored, side = self.info.stored or 0, self.info.height_width or 0
        if not self.info.spatial:
            start = stored // 2 - side // 2
            return [(start, start)]
        return [(y, x) for y in range(0, stored, side) for x in range(0, stored, side)]

    def read(self, item) -> Raw:
        folder, corner = item if isinstance(item, tuple) else (item, None)
        arrays = read_window(folder, self.modalities, bool(self.info.folder))
        try:
            raw = self.arranged(arrays if corner is None else self._cut(arrays, corner))
            self._check_size(raw)
            if not any(_seen(image).any() for image in raw.images.values()):
                raise ValueError("its images hold no data at all; leave the window out")
            return raw
        except ValueError as e:
            raise ValueError(f"window {folder.name}: {e}") from None

    def convert(self, raw: Raw, where: str = "the item") -> tuple[EvalSample, np.ndarray]:
        """As for all data sets; pixels that lack a band are missing."""
        images, gone = dict(raw.images), {}
        for name, image in images.items():
            empty = ~_seen(image) if self.info.folder else image == registry.MISSING
            if empty.any():
                gone[name] = empty.any(-1)
                images[name] = np.where(empty, np.float32(registry.MISSING), image)
        sample, label = super().convert(raw._replace(images=images), where)
        for name, empty in gone.items():
            sample[name][empty] = registry.MISSING
            sample[name + MASK][empty] = MISSING_TOKEN
        return sample, label

    def _check_size(self, raw: Raw) -> None:
        """Raises ValueError if a window of a user is not as large as its data set says.

        Nothing else would tell: predictions are brought to the size of the labels.
        """
        side = self.info.height_width
        if side is None or not self.info.folder:
            return
        shapes = {name: image.shape[:2] for name, image in raw.images.items()}
        if self.info.spatial:
            shapes["label"] = raw.label.shape[:2]
        for name, shape in shapes.items():
            if shape != (side, side):
                raise ValueError(
                    f"{name} is {shape[0]} x {shape[1]} pixels in size; height_width of "
                    f"{self.info.name!r} is {side}"
                )

    def _cut(
        self, arrays: Mapping[str, np.ndarray], corner: tuple[int, int]
    ) -> dict[str, np.ndarray]:
        """The part of a window that is a sample; its label is that of its middle pixel, or all."""
        stored, side = self.info.stored, self.info.height_width or 0
        (y, x), out = corner, dict(arrays)
        for name in (*self.modalities, "label", "valid"):
            if name not in arrays or arrays[name].ndim < 2:
                continue
            if arrays[name].shape[-2:] != (stored, stored):
                raise ValueError(
                    f"{name} is {arrays[name].shape[-2]} x {arrays[name].shape[-1]} pixels in "
                    f"size; windows of {self.info.name!r} have {stored} per side"
                )
            part = arrays[name][..., y : y + side, x : x + side]
            if not self.info.spatial and name in ("label", "valid"):
                part = part[..., side // 2, side // 2]
            out[name] = part
        return out

    def arranged(self, arrays: dict[str, np.ndarray]) -> Raw:
        """Raw item of [C, T, H, W] arrays, `label` and `valid`; Sentinel-1 is linear power."""
        images = {m: _image(m, arrays[m]) for m in self.modalities}
        if "sentinel1" in images:
            images["sentinel1"] = self._decibel(images["sentinel1"])
        _check_numbers("label", arrays["label"])
        label = self._marked(arrays["label"])
        if self.info.multilabel:
            label = self._several(label, arrays.get("valid"))
        else:
            label = window_label(self.info.task_type, label, arrays.get("valid"))
        return Raw(images, label, _timestamps(arrays, _steps_of(images)))

    def _several(self, label: np.ndarray, valid: np.ndarray | None) -> np.ndarray:
        """The 0/1 vector of a window that may show several classes; -1 where nothing is known."""
        label = label.reshape(-1)
        if len(label) != self.info.num_classes:
            raise ValueError(
                f"its label has {len(label)} values; of several classes per window it needs a 0 "
                f"or 1 for each of the {self.info.num_classes}"
            )
        known = np.isfinite(label) & (label >= 0)
        if not known.all() or (valid is not None and not (np.asarray(valid) > 0).all()):
            return np.full(len(label), -1, np.int64)
        return whole_labels(label, "it")

    def _decibel(self, power: np.ndarray) -> np.ndarray:
        """Backscatter in decibel: linear power, as the catalogue's data have it, or as it is."""
        real = power[np.isfinite(power) & (power != registry.MISSING)]
        if not is_decibel(real):
            return np.where(power == registry.MISSING, power, to_decibel(power))
        self._say_once(f"Sentinel-1 of {self.folder} is decibel already and is taken as it is")
        return power

    def _marked(self, label: np.ndarray) -> np.ndarray:
        """Class labels whose highest unsigned number, where it is no class, became -1."""
        if label.dtype.kind != "u" or "regression" in self.info.task_type:
            return label
        top = np.iinfo(label.dtype).max
        gone = label == top
        if top < self.info.num_classes or not gone.any():
            return label
        self._say_once(f"the label {top} of {self.folder} is no class and is ignored")
        return np.where(gone, -1, label.astype(np.int64))

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said |= {text}
            log.warning("%s", text)


@functools.lru_cache(maxsize=64)
def state_of(folder: str) -> str:
    """A digest of names, sizes and times of the files of a user's windows, and of their statistics
    if there are any, taken once."""
    digest = hashlib.sha256()

    def add(place: str, name: str) -> None:
        about = os.stat(os.path.join(place, name))
        told = os.path.relpath(place, folder), name, about.st_size, about.st_mtime_ns
        digest.update(repr(told).encode())

    windows = Path(folder) / "windows"
    for place, folders, files in os.walk(windows):
        folders.sort()
        for name in sorted(files):
            add(place, name)
    # Groups and windows may be links to folders elsewhere, which the walk does not enter.
    for link in sorted(p for p in (*windows.glob("*"), *windows.glob("*/*")) if p.is_symlink()):
        for path in sorted(p for p in link.rglob("*") if p.is_file()):
            add(str(path.parent), path.name)
    if (Path(folder) / STATS_FILE).is_file():
        add(folder, STATS_FILE)
    return digest.hexdigest()[:16]


def _seen(image: np.ndarray) -> np.ndarray:
    """Where an image holds values."""
    return (image != registry.MISSING) & ~np.isnan(image)


def _image(name: str, array: np.ndarray) -> np.ndarray:
    """The array [C, T, H, W] of a modality as [H, W, T, C]."""
    _check_numbers(name, array)
    if array.ndim != 4:
        raise ValueError(f"{name} must be [bands, dates, rows, columns], got {list(array.shape)}")
    return array.transpose(2, 3, 1, 0)


def _check_numbers(name: str, array: np.ndarray) -> None:
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{name} must hold numbers, got {array.dtype}")


def _steps_of(images: Mapping[str, np.ndarray]) -> int:
    """Time steps of images [H, W, T, C]; maps, which do not vary in time, have one."""
    steps = {m: x.shape[2] for m, x in images.items() if registry.get(m).multitemporal}
    if len(set(steps.values())) > 1:
        raise ValueError(
            f"its modalities have different numbers of dates, {steps}: fill what one of them lacks "
            f"with NaN or {registry.MISSING:.0f}"
        )
    count = max(steps.values(), default=1)
    if count > _MAX_STEPS:
        raise ValueError(f"windowed data may have at most {_MAX_STEPS} time steps, got {count}")
    return count


def _timestamps(arrays: Mapping[str, np.ndarray], steps: int) -> np.ndarray:
    """The window's own dates; without any always the same months, as the reference reads them."""
    if "timestamps" in arrays:
        stamps = check_timestamps(arrays["timestamps"].reshape(-1, 3))
    elif "dates" in arrays:
        stamps = parse_dates(arrays["dates"].reshape(-1).tolist())
    else:
        return month_timestamps(_FIRST_MONTH + np.arange(steps))
    if len(stamps) != steps:
        raise ValueError(f"{len(stamps)} dates were given for {steps} time steps")
    return stamps.astype(np.int64)


def _options(folder: Path) -> dict:
    path = folder / "metadata.json"
    options = read_json(path, dict).get("options", {})
    if not isinstance(options, dict):
        raise ValueError(f"the options in {path} must be an object, such as {{'eval_split': ...}}")
    return options


def window_label(task_type: str, label: np.ndarray, valid: np.ndarray | None) -> np.ndarray:
    """Label with invalid places marked: -1 for classes, NaN for values.

    Args:
      label, valid: rasters [1, 1, H, W] (or [H, W]), or scalars for whole-window tasks.
    """
    valid = np.ones(label.shape) if valid is None else valid
    if task_type in ("segmentation", "regression"):
        if label.ndim < 2 or label.size != math.prod(label.shape[-2:]):
            raise ValueError(f"its label must be [1, 1, rows, columns], got {list(label.shape)}")
        label, valid = label.reshape(label.shape[-2:]), valid.reshape(valid.shape[-2:])
    else:
        label, valid = label.reshape(()), valid.reshape(())
    # Wide types first: an unsigned one has no room for the mark of what is invalid.
    if "regression" in task_type:
        there = (valid > 0) & (label != registry.MISSING)
        return np.where(there, label.astype(np.float32), np.float32(np.nan))
    known = (valid > 0) & np.isfinite(label)
    return np.where(known, whole_labels(np.where(known, label, 0), "it"), -1)


def read_window(
    folder: Path, modalities: tuple[str, ...], declared: bool = False
) -> dict[str, np.ndarray]:
    """Arrays of a window: [C, T, H, W] per modality in the model's band order, `label`, `valid`.

    With `declared` images are -99999 where their GeoTIFFs say that they have no data; the reference
    takes such pixels of the catalogue's data as they are.

    Raises:
      ValueError: a modality, band or the label is missing.
    """
    path = folder / "arrays.npz"
    if path.exists():
        arrays = npy_file.read(path)
    else:
        arrays = {m: _read_layers(folder, m, declared) for m in modalities}
        found = sorted((folder / "layers" / "label").glob("*/geotiff.tif"))
        if found:
            label, valid = read_masked(found[0])
            arrays |= {"label": label[:1, None], "valid": valid[:1, None]}
        else:
            options = _options(folder)
            if "label" not in options:
                raise ValueError(
                    f"window {folder.name} has neither a label layer nor an option 'label'"
                )
            arrays["label"] = np.asarray(options["label"])
    options = _options(folder)
    if "dates" in options:
        arrays["dates"] = np.asarray(options["dates"])
    for key in (*modalities, "label"):
        if key not in arrays:
            raise ValueError(f"window {folder.name} lacks {key!r}; it holds {', '.join(arrays)}")
    return arrays


def _read_layers(folder: Path, modality: str, declared: bool) -> np.ndarray:
    """The dates of a modality from GeoTIFF layers; the folder of a file names its bands."""
    dates: list[tuple[int, Path]] = []
    known = _LAYERS.get(modality, (modality,))
    for path in (folder / "layers").glob("*"):
        match = re.fullmatch(r"([a-z0-9_]+?)(?:\.(\d+)|_mo(\d+))?", path.name)
        if match and match.group(1) in known:
            dates.append((int(match.group(2) or match.group(3) or 0), path))
    if not dates:
        raise ValueError(f"window {folder.name} has no layer of {modality}; known: {known}")
    if len({number for number, _ in dates}) < len(dates):
        raise ValueError(f"window {folder.name} has two layers of {modality} for one date")
    wanted = registry.get(modality).bands
    steps = []
    for _, layer in sorted(dates):
        found: dict[str, np.ndarray] = {}
        for path in sorted(layer.glob("*/geotiff.tif")):
            image = _marked_gaps(path) if declared else read_raster(path)
            names = path.parent.name.split("_")
            if len(names) != len(image):
                told = f"has {len(image)} bands, but its folder names {len(names)}"
                raise ValueError(f"{path} {told}")
            found |= dict(zip(names, image, strict=True))
        missing = [b for b in wanted if b not in found]
        if missing:
            raise ValueError(f"{layer} lacks the band {missing[0]!r}; it holds {', '.join(found)}")
        side = max(found[b].shape[0] for b in wanted)
        steps.append(np.stack([_repeat(found[b], side) for b in wanted]))
    return np.stack(steps, axis=1)


def _marked_gaps(path: Path) -> np.ndarray:
    """An image with MISSING where its file declares that it has no data."""
    image, valid = read_masked(path)
    if valid.all():
        return image
    return np.where(valid, image.astype(np.float32), np.float32(registry.MISSING))


def _repeat(band: np.ndarray, side: int) -> np.ndarray:
    """A coarser band at the finest resolution of its window, pixels repeated."""
    k = side // band.shape[0]
    if band.shape[0] * k != side:
        raise ValueError(f"a band of {band.shape[0]} rows does not fit one of {side} rows")
    return np.repeat(np.repeat(band, k, 0), k, 1)
