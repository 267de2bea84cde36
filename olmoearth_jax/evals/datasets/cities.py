"""FiftyCities: land cover of 50 cities, split by tile, city or continent (section 13.6)."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from typing import Any

import numpy as np

from olmoearth_jax.evals import bands
from olmoearth_jax.evals.bands import S2_13
from olmoearth_jax.evals.datasets import archives
from olmoearth_jax.evals.datasets.base import Location, Reader, check_label_range
from olmoearth_jax.evals.samples import Sample, make_sample
from olmoearth_jax.modalities import closest

S2_12 = tuple(b for b in S2_13 if not b.startswith("10 "))
S1_ON_DISK = ("vh", "vv")
SEED = 42
CONTINENTS = {
    "Africa": "Abidjan Accra Addis_Ababa Algiers Cairo Cape_Town Casablanca Dar_es_Salaam Dakar "
    "Johannesburg Kinshasa Lagos Luanda Nairobi Tunis",
    "Asia": "Bangkok Beijing Delhi Dhaka Hanoi Jakarta Karachi Kyoto Manila Mecca Mumbai Osaka "
    "Riyadh Seoul Shanghai Singapore Tehran Tokyo Wuhan",
    "Europe": "Amsterdam Athens Barcelona Berlin Istanbul Kyiv Lisbon London Madrid Moscow "
    "Paris Rome Stockholm Vienna Warsaw",
    "North America": "Chicago Denver Havana Houston Los_Angeles Mexico_City Miami Montreal "
    "New_York Toronto Vancouver",
    "South America": "Bogota Buenos_Aires Lima Manaus Quito Rio_de_Janeiro Santiago Sao_Paulo",
    "Oceania": "Auckland Melbourne Perth Suva Sydney",
}
"""Continent of each city; the Americas are two, Istanbul is European, Mecca Asian."""

Unit = tuple[str, int]


class FiftyCities(Reader):
    """One split; the data set's key says by what it is split."""

    location = Location(
        "FIFTY_CITIES_DIR", "manifest.json and tiles/<city>/<i>.pt (or .npz)",
        "prepared tiles of the OlmoEarth evaluation suite",
    )  # fmt: skip

    def __init__(self, task, info, split):
        super().__init__(task, info, split)
        self.folder = self.location.folder()
        path = self.location.require(self.folder / "manifest.json")
        mode = info.name.removeprefix("fifty_cities").removeprefix("_") or "random"
        self.units = split_units(json.loads(path.read_text())["counts"], mode)[self.split]
        if task.label_fraction < 1 and self.split == "train":
            self.units = label_subset(self.units, task.label_fraction)

    @classmethod
    def check_available(cls, task, info) -> None:
        cls.location.require(cls.location.folder() / "manifest.json")

    def __len__(self) -> int:
        return len(self.units)

    def __getitem__(self, index: int) -> tuple[Sample, np.ndarray]:
        return self.tile(*self.units[index])

    def tile(self, city: str, number: int) -> tuple[Sample, np.ndarray]:
        """Sample and label of one tile."""
        base = self.folder / "tiles" / city
        path = base / f"{number}.npz"
        if path.exists():
            stored = dict(np.load(path))
        else:
            stored = archives.load_torch(self.location.require(base / f"{number}.pt"))
        images = {}
        if "sentinel2_l2a" in self.modalities:
            x = stored["s2"].transpose(1, 2, 0)
            images["sentinel2_l2a"] = self.normalized(x, "sentinel2_l2a", S2_12, bands.FROM_S2_12)
        if "sentinel1" in self.modalities:
            x = stored["s1"].transpose(1, 2, 0)
            images["sentinel1"] = self.normalized(x, "sentinel1", S1_ON_DISK, (1, 0))
        label = stored["label"].astype(np.int64)
        check_label_range(label, self.info.num_classes, f"{city}/{number}")
        return make_sample(images), label


def continent(city: str) -> str:
    """Continent of a city.

    Raises:
      ValueError: a city that is not in the table.
    """
    for name, cities in CONTINENTS.items():
        if city in cities.split():
            return name
    known = [c for cities in CONTINENTS.values() for c in cities.split()]
    raise ValueError(f"no continent is known for city {city!r}; {closest(city, known)}")


def cut_counts(n: int) -> tuple[int, int]:
    """Sizes of train and valid of n units: 70 % and 15 %, leaving something for each of three."""
    train, valid = round(0.7 * n), round(0.15 * n)
    if n >= 3:
        train = min(train, n - 2)
        valid = min(max(valid, 1), n - train - 1)
    return train, valid


def split_units(counts: Mapping[str, int], mode: str) -> dict[str, list[Unit]]:
    """(city, tile) pairs of every split, in reading order.

    Args:
      counts: tiles per city.
      mode: 'random' (tiles are dealt), 'by_city' or 'by_continent' (whole ones are).
    """
    tiles = {city: [(city, i) for i in range(n)] for city, n in sorted(counts.items())}
    if mode == "random":
        keys = sorted(t for ts in tiles.values() for t in ts)
    elif mode == "by_city":
        keys = list(tiles)
    elif mode == "by_continent":
        keys = sorted({continent(c) for c in tiles})
    else:
        raise ValueError(
            f"unknown split mode {mode!r}; {closest(mode, ('random', 'by_city', 'by_continent'))}"
        )
    keys: list[Any] = list(keys)
    random.Random(SEED).shuffle(keys)
    train, valid = cut_counts(len(keys))
    parts = {"train": keys[:train], "valid": keys[train : train + valid]}
    parts["test"] = keys[train + valid :]
    if mode == "random":
        return parts
    unit = continent if mode == "by_continent" else str
    return {
        split: [t for city in tiles if unit(city) in chosen for t in tiles[city]]
        for split, chosen in parts.items()
    }


def label_subset(units: list[Unit], fraction: float) -> list[Unit]:
    """The part of the units that a label fraction keeps, in their order."""
    keep = max(1, int(len(units) * fraction))
    chosen = np.random.RandomState(SEED).permutation(len(units))[:keep]
    return [units[i] for i in sorted(chosen)]
