"""Data sets prepared as tensors: MADOS, Sen1Floods11, PASTIS-R (spec 13.3 to 13.5), FiftyCities.

FiftyCities (13.6) is land cover of 50 cities, split by tile, city or continent.
Every file may be a torch archive (`.pt`) or what `tools.convert_evals` writes (`.npz`, `.npy`).
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from olmoearth_jax.configlib.texts import name_problem, shown
from olmoearth_jax.data import npy_file
from olmoearth_jax.evals.datasets import bands
from olmoearth_jax.evals.datasets.archives import load_torch
from olmoearth_jax.evals.datasets.base import Location, Raw, Reader, month_timestamps, read_json
from olmoearth_jax.evals.samples import check_label_range
from olmoearth_jax.proposals import known


def _load_either(location: Location, stem: Path) -> Any:
    """Contents of `<stem>.npz`, `<stem>.npy` or `<stem>.pt`, whichever is there."""
    kinds = (".npz", ".npy", ".pt")
    path = location.either(*(stem.with_name(stem.name + kind) for kind in kinds))
    if path.suffix == ".pt":
        return load_torch(path)
    return npy_file.read(path)


def load_table(location: Location, stem: Path, *keys: str) -> list[np.ndarray]:
    """The named arrays of a stored dictionary.

    Raises:
      ValueError: one is missing; the message lists what the file holds.
    """
    table = _load_either(location, stem)
    if not isinstance(table, dict) or not set(keys) <= set(table):
        wanted = " and ".join(repr(k) for k in keys)
        held = ", ".join(map(str, table)) if isinstance(table, dict) else type(table).__name__
        raise ValueError(f"{stem.name} must hold {wanted}; it holds {held}")
    return [_numbers(table[k], f"{k!r} of {stem.name}") for k in keys]


def _load_array(location: Location, stem: Path) -> np.ndarray:
    """The one array of a file.

    Raises:
      ValueError: the file holds something else.
    """
    return _numbers(_load_either(location, stem), stem.name)


def _numbers(found: Any, what: str) -> np.ndarray:
    if isinstance(found, np.ndarray) and found.dtype == ml_dtypes.bfloat16:
        return found.astype(np.float32)
    if not isinstance(found, np.ndarray) or found.dtype.kind not in "biuf":
        raise ValueError(f"{what} must be an array of numbers, not a {type(found).__name__}")
    return found


class Mados(Reader):
    """Marine debris: images [N, 80, 80, 13] with labels [N, 80, 80]."""

    location = Location(
        "MADOS_DIR",
        "MADOS_train.pt, MADOS_val.pt and MADOS_test.pt (or MADOS_<split>.npz), each with images "
        "[N, 80, 80, 13] and labels [N, 80, 80]",
        "https://zenodo.org/records/10664073",
        ("MADOS_train.npz", "MADOS_train.pt"),
    )
    disk = {"sentinel2_l2a": (bands.S2_13, bands.FROM_S2_13)}

    def open(self):
        stem = self.folder / f"MADOS_{'val' if self.split == 'valid' else self.split}"
        self.images, labels = load_table(self.location, stem, "images", "labels")
        shape = self.images.shape
        if len(shape) != 4 or shape[-1] != 13 or labels.shape != shape[:3]:
            raise ValueError(
                f"{stem.name}: images must be [N, H, W, 13] with labels [N, H, W], got "
                f"{shape} and {labels.shape}"
            )
        self.labels = labels.astype(np.int64)
        check_label_range(self.labels, self.info, stem.name)
        return self.low_label(np.arange(len(self.labels)))

    def read(self, item) -> Raw:
        return Raw({"sentinel2_l2a": self.images[item]}, self.labels[item])


class Sen1Floods11(Reader):
    """Water in Sentinel-1; tiles with a value that is not finite do not exist for it."""

    location = Location(
        "FLOODS_DIR",
        "flood_{train|valid|test}_data.pt (or .npz), each with s1 [N, 2, 64, 64] in dB and labels "
        "[N, 1, 64, 64]",
        "https://github.com/cloudtostreet/Sen1Floods11",
        ("flood_train_data.npz", "flood_train_data.pt"),
    )
    disk = {"sentinel1": (bands.S1, bands.FROM_S1)}

    def open(self):
        stem = self.folder / f"flood_{self.split}_data"
        images, labels = load_table(self.location, stem, "s1", "labels")
        shape = images.shape
        if len(shape) != 4 or shape[1] != 2 or labels.shape != (shape[0], 1, *shape[2:]):
            raise ValueError(
                f"{stem.name}: s1 must be [N, 2, H, W] with labels [N, 1, H, W], got "
                f"{shape} and {labels.shape}"
            )
        finite = np.flatnonzero(np.isfinite(images).all((1, 2, 3)))
        self.images, self.labels = np.moveaxis(images, 1, -1), labels[:, 0].astype(np.int64)
        check_label_range(self.labels[finite], self.info, stem.name)
        return self.low_label(finite)

    def read(self, item) -> Raw:
        return Raw({"sentinel1": self.images[item]}, self.labels[item])


_PASTIS_LAYOUT = (
    "pastis_r_{train|valid|test}/ with months.pt, targets.pt, s2_images/<i>.pt and "
    "s1_images/<i>.pt (or the same as .npy)"
)
_PASTIS_PUBLISHED = "https://zenodo.org/records/5735646, prepared by python -m tools.convert_evals"


class Pastis(Reader):
    """Crop types from twelve months of Sentinel-2 and Sentinel-1."""

    location = Location("PASTIS_DIR", _PASTIS_LAYOUT, _PASTIS_PUBLISHED, ("pastis_r_train",))
    location_128 = Location(
        "PASTIS_DIR_ORIG", _PASTIS_LAYOUT, _PASTIS_PUBLISHED, ("pastis_r_train",)
    )
    partitions = Location(
        "PASTIS_DIR_PARTITION", "<fraction>x_train_partition.json files", _PASTIS_PUBLISHED
    )
    disk = {
        "sentinel2_l2a": (bands.S2_13, bands.FROM_S2_13),
        "sentinel1": (bands.S1, bands.FROM_S1),
    }
    parts = {"sentinel2_l2a": "s2_images", "sentinel1": "s1_images"}

    @classmethod
    def find(cls, task, info):
        return (cls.location_128 if "128" in info.name else cls.location).folder(info)

    def open(self):
        self.folder = self.location.either(self.folder / f"pastis_r_{self.split}")
        self.months = _load_array(self.location, self.folder / "months")
        self.targets = _load_array(self.location, self.folder / "targets").astype(np.int64)
        if self.months.ndim != 2 or len(self.targets) != len(self.months):
            raise ValueError(
                f"{self.folder.name}: months must be [N, T] with as many targets, got "
                f"{self.months.shape} and {self.targets.shape}"
            )
        check_label_range(self.targets, self.info, f"{self.folder.name}/targets")
        return self.low_label(np.arange(len(self.months)), self.partitions)

    def read(self, item) -> Raw:
        images = {
            m: _load_array(self.location, self.folder / self.parts[m] / str(item))
            for m in self.modalities
        }
        for name, image in images.items():
            if image.ndim != 4:
                raise ValueError(
                    f"{self.parts[name]}/{item} must be [T, C, H, W], got {image.shape}"
                )
        images = {m: x.transpose(2, 3, 0, 1) for m, x in images.items()}
        year, month = np.divmod(np.asarray(self.months[item], np.int64), 100)
        return Raw(images, self.targets[item], month_timestamps(year * 12 + month - 1))


_CITIES_SEED, _MOST_TILES = 42, 100_000
CONTINENTS = {
    "Africa": "Cairo, Cape Town, Johannesburg, Kampala, Kigali, Kinshasa, Lagos, Marrakesh, "
    "Nairobi",
    "Asia": "Bangkok, Jakarta, Kuala Lumpur, Kyoto, Mecca, Mumbai, Shanghai, Wuhan",
    "Europe": "Athens, Barcelona, Berlin, Istanbul, Lugano, Matterhorn, Oslo, Reykjavik, Rome, "
    "Wolfsburg",
    "North America": "Calgary, Denver, Houston, Kansas City, Los Angeles, Mexico City, New York, "
    "Port-au-Prince, San Francisco, San Jose, Toronto",
    "Oceania": "Auckland, Melbourne, Perth, Suva, Sydney",
    "South America": "Buenos Aires, Caracas, Itaituba, Lima, Montevideo, Rio de Janeiro, Santiago",
}
"""The 50 cities by continent; the Americas are two, Istanbul is European, Mecca Asian."""

_Unit = tuple[str, int]


class FiftyCities(Reader):
    """One split; the data set's key says by what it is split."""

    location = Location(
        "FIFTY_CITIES_DIR",
        "manifest.json and tiles/<city>/<i>.pt (or .npz)",
        "prepared tiles of the OlmoEarth evaluation suite",
        ("manifest.json",),
    )
    disk = {
        "sentinel2_l2a": (bands.S2_12, bands.FROM_S2_12),
        "sentinel1": (("vh", "vv"), (1, 0)),
    }
    parts = {"sentinel2_l2a": "s2", "sentinel1": "s1"}

    def open(self):
        path = self.folder / "manifest.json"
        counts = read_json(path, dict, "counts")["counts"]
        _check_counts(path, counts)
        mode = self.info.name.removeprefix("fifty_cities").removeprefix("_") or "random"
        return self.seeded_subset(split_units(counts, mode)[self.split])

    def read(self, item) -> Raw:
        city, number = item
        stored = _load_either(self.location, self.folder / "tiles" / city / str(number))
        images = {m: np.moveaxis(stored[self.parts[m]], 0, -1) for m in self.modalities}
        return Raw(images, stored["label"])


def _check_counts(path: Path, counts: Any) -> None:
    """Raises ValueError unless it is {city: tiles}, of names of folders and possible numbers."""
    if not isinstance(counts, dict):
        raise ValueError(f"the counts of {path} must be an object {{city: number of tiles}}")
    for city, number in counts.items():
        if type(number) is not int or not 0 <= number <= _MOST_TILES:
            raise ValueError(f"{path} counts {str(number)[:40]} tiles of {city!r}")
        if problem := name_problem(city):
            raise ValueError(f"{path}: the city {shown(city)} {problem}")


def continent(city: str) -> str:
    """Continent of a city.

    Raises:
      ValueError: a city that is not in the table.
    """
    homes = {_plain(c): name for name, cs in CONTINENTS.items() for c in cs.split(", ")}
    if _plain(city) not in homes:
        raise ValueError(f"the continent of the city {city!r} is not known")
    return homes[_plain(city)]


def _plain(city: str) -> str:
    """A name as folders may write it: 'Cape_Town' is 'Cape Town'."""
    return re.sub(r"[\s_\-]+", " ", city).lower()


def _by_continent(cities: Iterable[str]) -> dict[str, str]:
    """Continent of each city; all that are unknown are named at once."""
    out, unknown = {}, []
    for city in cities:
        try:
            out[city] = continent(city)
        except ValueError:
            unknown.append(city)
    if unknown:
        raise ValueError(
            f"the split by continent knows no continent of {', '.join(sorted(unknown))}; the "
            "splits 'random' and 'by_city' take any city"
        )
    return out


def _cut_counts(n: int) -> tuple[int, int]:
    """Sizes of train and valid of n units: 70 % and 15 %, leaving something for each of three."""
    train, valid = round(0.7 * n), round(0.15 * n)
    if n >= 3:
        train = min(train, n - 2)
        valid = min(max(valid, 1), n - train - 1)
    return train, valid


def split_units(counts: Mapping[str, int], mode: str) -> dict[str, list[_Unit]]:
    """(city, tile) pairs of every split, in reading order.

    Args:
      counts: tiles per city.
      mode: 'random' (tiles are dealt), 'by_city' or 'by_continent' (whole ones are).
    """
    known("split mode", mode, ("random", "by_city", "by_continent"))
    tiles = {city: [(city, i) for i in range(n)] for city, n in sorted(counts.items())}
    unit = _by_continent(tiles) if mode == "by_continent" else {city: city for city in tiles}
    keys: list[Any] = sorted(set(unit.values()))
    if mode == "random":
        keys = sorted(t for ts in tiles.values() for t in ts)
    random.Random(_CITIES_SEED).shuffle(keys)
    train, valid = _cut_counts(len(keys))
    parts = {"train": keys[:train], "valid": keys[train : train + valid]}
    parts["test"] = keys[train + valid :]
    if mode == "random":
        return parts
    return {
        split: [t for city in tiles if unit[city] in chosen for t in tiles[city]]
        for split, chosen in parts.items()
    }
