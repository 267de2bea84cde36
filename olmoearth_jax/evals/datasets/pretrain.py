"""Probes on H5 data of the package: the user's own (spec/evals.md 13.7) and the example's.

Where the reference feeds whole tiles although its task records say 32 pixels, we cut the middle 32
pixels out of image and label alike: what the records describe, at a cost that attention can bear.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from olmoearth_jax import modalities as registry
from olmoearth_jax.configlib.tasks import Stats
from olmoearth_jax.data.h5 import open_sample
from olmoearth_jax.data.hdf5_file import open_hdf5, stored_array
from olmoearth_jax.data.index import METADATA_FILE, prepare, read_metadata
from olmoearth_jax.data.sample import IGNORE_LABEL, sample_dataset_dir, sample_labels
from olmoearth_jax.data.subset import Choices, read_sample
from olmoearth_jax.evals.datasets import bands
from olmoearth_jax.evals.datasets.base import (
    FRACTION_SEED,
    SPLITS,
    DataUnavailable,
    Location,
    Raw,
    Reader,
    read_json,
)
from olmoearth_jax.evals.datasets.tensors import load_table
from olmoearth_jax.evals.samples import MASK, TIMESTAMPS, EvalSample, check_label_range
from olmoearth_jax.masks import MISSING_TOKEN
from olmoearth_jax.modalities import MAX_TIMESTEPS, MISSING, WORLDCOVER_CODES
from olmoearth_jax.proposals import known

_DIAGNOSTICS_SEED = 42
_CROP = 32


class PretrainSubset(Reader):
    """One split of a pretraining folder, with a map modality as the label (none: diagnostics)."""

    @classmethod
    def find(cls, task, info):
        if not task.h5py_dir:
            raise DataUnavailable(
                "needs the folder you pretrain on, with sample_<i>.h5 files and "
                "sample_metadata.csv; set the task's h5py_dir (launch.evaluate --h5py_dir=DIR)"
            )
        if not (Path(task.h5py_dir) / METADATA_FILE).exists():
            raise DataUnavailable(f"h5py_dir {task.h5py_dir} holds no sample_metadata.csv")
        return Path(task.h5py_dir)

    def open(self):
        target = self.task.pretrain_target_modality
        known("pretrain_target_modality", target or "worldcover", _LABELS)
        index = prepare(self.folder, self.modalities)
        part = index.parts[0]
        self.names = registry.in_sample_order([*self.modalities] + ([target] if target else []))
        self.side = min(_CROP, part.tile_px)
        if target is None:
            draw = np.random.RandomState(_DIAGNOSTICS_SEED)
            size = min(self.task.pretrain_max_samples, len(part.numbers))
            rows = draw.choice(len(part.numbers), size, replace=False)
        else:
            held = set(prepare_numbers(self.folder, target))
            eligible = np.flatnonzero([n in held for n in part.numbers.tolist()])
            rows = self._split_rows(eligible, index.latlon)
        return [index.locate(int(r))[0] for r in rows]

    def _split_rows(self, eligible: np.ndarray, latlon: np.ndarray | None) -> np.ndarray:
        t = self.task
        train = max(1, int(t.pretrain_train_samples * t.label_fraction))
        sizes = (train, t.pretrain_valid_samples, t.pretrain_test_samples)
        if t.pretrain_split_strategy == "random":
            return random_split(eligible, sizes, t.pretrain_label_seed)[self.split]
        if latlon is None:
            raise ValueError("a geographic split needs latlon_distribution.npy in h5py_dir")
        size = t.pretrain_geographic_bin_size_deg
        return geographic_split(eligible, latlon, sizes, size, t.pretrain_label_seed)[self.split]

    def __getitem__(self, index: int) -> tuple[EvalSample, np.ndarray]:
        target, label = self.task.pretrain_target_modality, np.asarray(0, np.int64)
        with open_sample(self.items[index], self.names) as file:
            read = functools.partial(
                read_sample, file, self.names, self.side, MAX_TIMESTEPS, _middle
            )
            found = read()
            if target is not None:
                label = _LABELS[target](read(normalized=False).arrays[target])
        sample: EvalSample = {TIMESTAMPS: found.timestamps.astype(np.int64)}
        for name in self.modalities:
            sample[name] = found.arrays[name]
            sample[name + MASK] = missing_mask(name, found.arrays[name])
        return sample, label


@functools.lru_cache(maxsize=64)
def state_of(h5py_dir: str) -> str:
    """A digest of the table of the samples, taken once; their pixels have no part in it."""
    path = Path(h5py_dir) / METADATA_FILE
    return hashlib.sha256(path.read_bytes() if path.is_file() else b"").hexdigest()[:16]


def prepare_numbers(folder: Path, target: str) -> list[int]:
    """Sample numbers whose column of `target` in sample_metadata.csv is above 0."""
    header, table = read_metadata(folder)
    if target not in header:
        return []
    return table[table[:, header.index(target)] > 0, header.index("sample_index")].tolist()


def _middle(choices: Choices) -> tuple[int, int, int]:
    return int(choices.starts[0]), choices.rows // 2, choices.cols // 2


def missing_mask(name: str, array: np.ndarray) -> np.ndarray:
    """int8 [..., band sets] of [..., C]: 3 where any band of the set is missing, else 0."""
    sets = registry.get(name).band_sets
    absent = [(array[..., list(s)] == MISSING).any(-1) for s in sets]
    return np.where(np.stack(absent, -1), MISSING_TOKEN, 0).astype(np.int8)


def random_split(
    eligible: np.ndarray, sizes: tuple[int, int, int], seed: int
) -> dict[str, np.ndarray]:
    """Consecutive pieces of a permutation; the later ones shrink if there is too little.

    Raises:
      ValueError: a piece is empty.
    """
    order = eligible[np.random.RandomState(seed).permutation(len(eligible))]
    edges = np.minimum(np.cumsum((0, *sizes)), len(order))
    parts = {s: order[a:b] for s, a, b in zip(SPLITS, edges[:-1], edges[1:], strict=True)}
    return _not_empty(parts, len(eligible))


def geographic_split(
    eligible: np.ndarray,
    latlon: np.ndarray,
    sizes: tuple[int, int, int],
    bin_deg: float,
    seed: int,
) -> dict[str, np.ndarray]:
    """Whole latitude-longitude bins go to one split each: 80 %, 10 % and the rest of the bins.

    Args:
      eligible: rows of `latlon` that may be used.
      latlon: degrees [samples, 2].

    Raises:
      ValueError: a split is empty.
    """
    if not np.isfinite(latlon[eligible]).all():
        raise ValueError("a geographic split needs the place of every sample; some are no numbers")
    cells = np.floor(latlon[eligible] / bin_deg).astype(np.int64)
    bins, member = np.unique(cells, axis=0, return_inverse=True)
    train, valid = int(0.8 * len(bins)), int(0.1 * len(bins))
    edges = (0, train, train + valid, len(bins))
    parts = {}
    for split, a, b, size in zip(SPLITS, edges[:-1], edges[1:], sizes, strict=True):
        # Every split is made on its own, so none depends on the size of another.
        draw = np.random.RandomState(seed)
        order = draw.permutation(len(bins))
        rows = eligible[np.isin(member.reshape(-1), order[a:b])]
        if len(rows) > size:
            rows = rows[draw.permutation(len(rows))[:size]]
        parts[split] = rows
    return _not_empty(parts, len(eligible))


def _not_empty(parts: dict[str, np.ndarray], total: int) -> dict[str, np.ndarray]:
    for split, rows in parts.items():
        if not len(rows):
            raise ValueError(f"the {split} split of {total} samples with labels is empty")
    return parts


def worldcover_label(raw: np.ndarray) -> np.ndarray:
    """Class 0...10 of land-cover codes [H, W, 1, 1], -1 for others."""
    codes = raw[..., 0, 0].astype(np.int64)
    table = np.full(256, -1, np.int64)
    table[list(WORLDCOVER_CODES)] = np.arange(len(WORLDCOVER_CODES))
    return np.where((codes >= 0) & (codes < 256), table[np.clip(codes, 0, 255)], -1)


def osm_label(raw: np.ndarray) -> np.ndarray:
    """First channel with the largest value, -1 where all 30 are zero."""
    values = np.maximum(raw[..., 0, :], 0)
    return np.where(values.any(-1), values.argmax(-1), -1)


def cdl_label(raw: np.ndarray) -> np.ndarray:
    """The crop code; -1 for 0 and for missing values."""
    codes = raw[..., 0, 0].astype(np.int64)
    return np.where(codes > 0, codes, -1)


def worldcereal_label(raw: np.ndarray) -> np.ndarray:
    """1 where channel 0 is above 0, else 0; -1 where all channels are 0 or missing."""
    values = raw[..., 0, :]
    return np.where((values > 0).any(-1), (values[..., 0] > 0).astype(np.int64), -1)


def _height_label(raw: np.ndarray) -> np.ndarray:
    """The value, NaN where missing."""
    values = raw[..., 0, 0].astype(np.float32)
    return np.where(values == MISSING, np.float32(np.nan), values)


_LABELS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "worldcover": worldcover_label,
    "openstreetmap_raster": osm_label,
    "cdl": cdl_label,
    "worldcereal": worldcereal_label,
    "srtm": _height_label,
    "wri_canopy_height_map": _height_label,
}
"""How each map becomes a label; a new one is one more entry."""


_SCENE_CROP = 64


class Brandenburg(Reader):
    """The offline example: land use of a scene in Brandenburg, packed with us.

    Crops of 64 pixels with a label raster of 8 classes, -1 where nothing is known.
    """

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
        starts = range(0, table.labels.shape[1], _SCENE_CROP)
        items = [(int(i), r, c) for i in numbers for r in starts for c in starts]
        return self.seeded_subset(items)

    def read(self, item) -> Raw:
        number, row, column = item
        area = (slice(row, row + _SCENE_CROP), slice(column, column + _SCENE_CROP))
        with open_hdf5(self.folder / f"sample_{number}.h5") as f:
            image = stored_array(f, "sentinel2_l2a")[area]
            timestamps = stored_array(f, "timestamps")[: image.shape[2]]
        label = self.labels[number][area].astype(np.int64)
        label[label == IGNORE_LABEL] = -1
        return Raw({"sentinel2_l2a": image}, label, timestamps)


_DATE = (1, 6, 2021)
"""Day, 0-based month and year of every patch."""

_SHORT = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12")
"""Names of the bands on disk."""

_FIGURES = ("mean", "std", "min", "max")


class SimilarButDifferent(Reader):
    """Sentinel-2 patches uint16 [N, 32, 32, 12] with one class each."""

    location = Location(
        "SBD_DIR",
        "SBD_train.npz, SBD_val.npz and SBD_test.npz (or .pt), each with images [N, 32, 32, 12] "
        "and labels [N], and norm_stats.json",
        "https://huggingface.co/datasets/calebrob6/similar-but-different",
        ("SBD_train.npz", "SBD_train.pt"),
    )
    disk = {"sentinel2_l2a": (bands.S2_12, bands.FROM_S2_12)}

    def open(self):
        stem = self.folder / f"SBD_{'val' if self.split == 'valid' else self.split}"
        self.images, labels = load_table(self.location, stem, "images", "labels")
        shape = self.images.shape
        if len(shape) != 4 or shape[-1] != len(_SHORT) or labels.shape != shape[:1]:
            raise ValueError(
                f"{stem.name}: images must be [N, H, W, {len(_SHORT)}] with labels [N], got "
                f"{shape} and {labels.shape}"
            )
        self.labels = labels.astype(np.int64)
        check_label_range(self.labels, self.info, stem.name)
        if not self.task.norm_stats_from_pretrained:
            self.stats = {"sentinel2_l2a": self._statistics()}
        rows = np.arange(len(self.labels))
        if self.task.label_fraction == 1 or self.split != "train":
            return rows
        return rows[stratified(self.labels, self.task.label_fraction)]

    def read(self, item) -> Raw:
        image = self.images[item].astype(np.float64)
        return Raw({"sentinel2_l2a": image}, self.labels[item], np.asarray([_DATE]))

    def _statistics(self) -> Stats:
        """The bands' figures, from a table by band or by figure."""
        path = self.location.either(self.folder / "norm_stats.json")
        try:
            table = read_json(path, dict)
            return {name: _figures(table, i) for i, name in enumerate(bands.S2_12)}
        except (ValueError, KeyError, IndexError, TypeError) as e:
            raise ValueError(
                f"{path.name} must hold {', '.join(_FIGURES)} of each of {', '.join(_SHORT)}: {e}"
            ) from None


def _figures(table: Any, band: int) -> dict[str, float]:
    if _SHORT[band] in table:
        return {k: float(table[_SHORT[band]][k]) for k in _FIGURES}
    return {k: float(table[k][band]) for k in _FIGURES}


def stratified(labels: np.ndarray, fraction: float) -> np.ndarray:
    """Rows, ascending, of a seeded share of each class, at least one of each."""
    rng = np.random.Generator(np.random.PCG64(FRACTION_SEED))
    kept = []
    for number in np.unique(labels):
        rows = np.flatnonzero(labels == number)
        kept.append(rng.choice(rows, max(1, round(len(rows) * fraction)), replace=False))
    return np.sort(np.concatenate(kept))
