"""What all readers of evaluation data share: folders, splits, rasters, normalisation, labels."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from olmoearth_jax import modalities
from olmoearth_jax.configlib.tasks import (
    DatasetInfo,
    EvalTaskConfig,
    Stats,
    band_stats,
    modalities_of,
)
from olmoearth_jax.data.crs import library
from olmoearth_jax.data.raster_file import opening
from olmoearth_jax.evals.datasets import bands as by_band
from olmoearth_jax.evals.samples import (
    EvalSample,
    check_label_range,
    make_sample,
    whole_labels,
)
from olmoearth_jax.files import check_file
from olmoearth_jax.proposals import known

SPLITS = ("train", "valid", "test")
_LOW_LABEL_FRACTIONS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
FRACTION_SEED = 42

_Bands = tuple[Sequence[str], Sequence[int]]
"""Names of bands in their order on disk, and the positions that give the model's order."""


def read_json(path: Path, form: type, *members: str) -> Any:
    """What a JSON file of evaluation data holds.

    Args:
      path: the file.
      form: `dict` or `list`.
      members: keys that a dict must have.

    Raises:
      ValueError: it cannot be read, or holds something else.
    """
    try:
        check_file(path)
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise ValueError(f"{path} cannot be read as JSON: {e}") from e
    if not isinstance(found, form) or any(m not in found for m in members):
        named = " with " + ", ".join(members) if members else ""
        raise ValueError(f"{path} must hold a {form.__name__}{named}")
    return found


@contextlib.contextmanager
def of_another_form(what: str) -> Iterator[None]:
    """Makes a ValueError that names `what` of the errors that data of another layout cause."""
    try:
        yield
    except (LookupError, AttributeError, TypeError, OverflowError) as e:
        told = f"{type(e).__name__}: {e}"
        raise ValueError(f"{what} is not of the form that is expected ({told})") from e


class DataUnavailable(ValueError):
    """The files of a data set are not there: the variable is unset or the layout is another."""


@dataclasses.dataclass(frozen=True)
class Location:
    """Where a data set is looked for.

    Attributes:
      variable: environment variable naming its folder.
      layout: files expected in that folder, in words.
      published: where the data can be obtained.
      markers: files or folders, at least one of which every copy has; with `{name}` for the data
        set's key and `{kind}` for classification or segmentation.
    """

    variable: str
    layout: str
    published: str
    markers: tuple[str, ...] = ()

    def folder(self, info: DatasetInfo | None = None) -> Path:
        """The folder named by the variable; with `info` it must hold that data set's marker.

        Raises:
          DataUnavailable: unset variable, no such folder, or no marker in it.
        """
        value = os.environ.get(self.variable, "").strip()
        if not value:
            raise DataUnavailable(f"set {self.variable} to a folder with {self.describe()}")
        path = Path(value).expanduser()
        if not path.is_dir():
            raise DataUnavailable(
                f"{self.variable}={value} is not a folder; expected {self.describe()}"
            )
        if info is not None and self.markers:
            kind = "segmentation" if info.spatial else "classification"
            self.either(*(path / m.format(name=info.name, kind=kind) for m in self.markers))
        return path

    def describe(self) -> str:
        return f"{self.layout} (data: {self.published})"

    def either(self, *paths: Path) -> Path:
        """The first of `paths` that exists, else DataUnavailable with the layout expected."""
        for path in paths:
            if path.exists():
                return path
        raise DataUnavailable(
            f"{paths[-1]} is missing; {self.variable} must hold {self.describe()}"
        )


def _canonical_split(split: str) -> str:
    """'train', 'valid' (also 'val') or 'test'."""
    return known("split", "valid" if split == "val" else split, SPLITS)


class Raw(NamedTuple):
    """One item as it is on disk.

    Attributes:
      images: per modality [H, W, T, C] or, of one date, [H, W, C]; bands in disk order.
      label: class number, 0/1 vector, raster, or value.
      timestamps: [T, 3] of day, 0-based month, year; None is the default date.
    """

    images: Mapping[str, np.ndarray]
    label: Any
    timestamps: np.ndarray | None = None


class Reader(abc.ABC):
    """One split of a data set.

    A subclass says where the data is (`location`), how bands lie on disk where that is not the
    model's order (`disk`), and has two methods: `open` lists the split's items, `read` loads one.

    Args:
      task: settings of the task.
      info: its data set.
      split: 'train', 'valid' or 'test'.
    """

    location: Location
    disk: Mapping[str, _Bands] = {}
    stats: Mapping[str, Stats] | None = None
    """Statistics by modality that come with the files; None takes those of the catalogue."""

    def __init__(self, task: EvalTaskConfig, info: DatasetInfo, split: str):
        self.task, self.info = task, info
        self.split = _canonical_split(split)
        self.modalities = modalities_of(task, info)
        self.folder = self.find(task, info)
        self.items: Sequence[Any] = self.open()

    @classmethod
    def find(cls, task: EvalTaskConfig, info: DatasetInfo) -> Path:
        """The data set's folder; DataUnavailable if the files that every copy has are absent."""
        return cls.location.folder(info)

    @abc.abstractmethod
    def open(self) -> Sequence[Any]:
        """The split's items, in a fixed order."""

    def read(self, item: Any) -> Raw:
        """Loads one item; unless a reader makes its samples itself, in `__getitem__`."""
        raise TypeError(f"{type(self).__name__} does not read item {item!r} as raw data")

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[EvalSample, np.ndarray]:
        with of_another_form(f"{self.split} item {index} of {self.info.name!r}"):
            return self.convert(self.read(self.items[index]), f"item {index}")

    def convert(self, raw: Raw, where: str = "the item") -> tuple[EvalSample, np.ndarray]:
        """Normalised sample and checked label (int64 classes, float32 values) of raw data."""
        try:
            images = {m: self.normalized(raw.images[m], m) for m in self.modalities}
        except ValueError as e:
            raise ValueError(f"{self.split} {where}: {e}") from None
        for name, image in images.items():
            with np.errstate(over="ignore"):
                images[name] = image = image.astype(np.float32)
            if not np.isfinite(image).all():
                raise ValueError(f"{self.split} {where} holds pixels of {name} that are not finite")
        label = np.asarray(raw.label)
        if "regression" in self.info.task_type:
            return make_sample(images, raw.timestamps), label.astype(np.float32)
        label = whole_labels(label, f"{self.split} {where}")
        check_label_range(label, self.info, f"{self.split} {where}")
        return make_sample(images, raw.timestamps), label

    def normalized(self, image: np.ndarray, modality: str) -> np.ndarray:
        """Image [..., disk bands] normalised as the task says and in the model's band order."""
        own = modalities.get(modality).bands
        bands, to_model = self.disk.get(modality, (own, range(len(own))))
        to_model = list(to_model)
        if image.shape[-1] != len(bands):
            raise ValueError(
                f"{modality} has {image.shape[-1]} bands instead of these {len(bands)}: "
                f"{', '.join(bands)}"
            )
        if self.task.norm_stats_from_pretrained:
            return by_band.normalize_pretrained(image[..., to_model], modality)
        stats = (band_stats(self.info.name) if self.stats is None else self.stats).get(modality)
        if stats is None:
            raise ValueError(f"the statistics of {self.info.name!r} have no {modality!r}")
        return by_band.normalize_with(image, stats, bands, self.task.norm_method)[..., to_model]

    def low_label(self, rows: np.ndarray, location: Location | None = None) -> np.ndarray:
        """Train rows that the partition file of the task's label fraction keeps."""
        if self.task.label_fraction == 1 or self.split != "train":
            return rows
        location = location or self.location
        name = f"{partition_name(self.task.label_fraction)}_partition.json"
        path = location.either(location.folder() / name)
        kept = read_json(path, list)
        for row in kept:
            if type(row) is not int or not 0 <= row < len(rows):
                raise ValueError(f"{name} names row {str(row)[:40]}, but there are {len(rows)}")
        if len(set(kept)) < len(kept):
            raise ValueError(f"{name} names a row twice")
        return rows[np.asarray(kept, int)]

    def seeded_subset(self, items: Sequence[Any]) -> Sequence[Any]:
        """Train items that a seeded draw of the task's label fraction keeps, in their order."""
        if self.task.label_fraction == 1 or self.split != "train":
            return items
        return label_subset(items, self.task.label_fraction)


def label_subset(items: Sequence[Any], fraction: float) -> list[Any]:
    """A seeded share of the items, at least one, in their order."""
    order = np.random.RandomState(FRACTION_SEED).permutation(len(items))
    return [items[i] for i in sorted(order[: max(1, int(len(items) * fraction))])]


def partition_name(fraction: float) -> str:
    """Name of a label fraction's partition, e.g. '0.01x_train'."""
    if fraction not in _LOW_LABEL_FRACTIONS:
        there = ", ".join(str(f) for f in _LOW_LABEL_FRACTIONS)
        raise ValueError(f"no partition exists for label_fraction {fraction}; known: {there}")
    return f"{fraction:.2f}x_train"


def month_timestamps(months: np.ndarray) -> np.ndarray:
    """Months counted from year 0 (year * 12 + 0-based month) [T] -> int64 [T, 3], first days."""
    months = np.asarray(months, np.int64)
    return np.stack([np.ones_like(months), months % 12, months // 12], -1)


_ROOM, _MOST_PACKED = 1 << 26, 2000
"""Pixels that any file may declare, and how well those of larger ones may be packed per byte."""


def read_raster(path: str | Path) -> np.ndarray:
    """All bands of a raster file, [bands, H, W].

    Raises:
      ValueError: missing or unreadable file, or no rasterio.
    """
    return _raster(path)[0]


def read_masked(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """As `read_raster`, and bool [bands, H, W]: false where the file declares that it has no data.

    Without a declaration all counts.
    """
    values, flags = _raster(path)
    return values, flags > 0


def _raster(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """(values, mask of GDAL: 0 is no data)."""
    rasterio = library()
    try:
        check_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
            with rasterio.open(path, **opening(path)) as source:
                pixels = source.count * source.height * source.width
                if pixels > max(_ROOM, _MOST_PACKED * Path(path).stat().st_size):
                    raise ValueError(f"{path} declares far more pixels than it can hold")
                return source.read(), source.read_masks()
    except (rasterio.errors.RasterioIOError, OSError) as e:
        raise ValueError(f"{path} cannot be read as a raster: {e}") from e
