"""FiftyCities: land cover of 50 cities, split by tile, city or continent (section 13.6)."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from olmoearth_jax.evals import bands
from olmoearth_jax.evals.datasets.base import Location, Raw, Reader, read_json
from olmoearth_jax.evals.datasets.tensors import load_either
from olmoearth_jax.evals.tasks import known

SEED = 42
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

Unit = tuple[str, int]


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
        counts = read_json(self.folder / "manifest.json", dict, "counts")["counts"]
        mode = self.info.name.removeprefix("fifty_cities").removeprefix("_") or "random"
        return self.seeded_subset(split_units(counts, mode)[self.split])

    def read(self, item) -> Raw:
        city, number = item
        stored = load_either(self.location, self.folder / "tiles" / city / str(number))
        images = {m: np.moveaxis(stored[self.parts[m]], 0, -1) for m in self.modalities}
        return Raw(images, stored["label"])


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
    known("split mode", mode, ("random", "by_city", "by_continent"))
    tiles = {city: [(city, i) for i in range(n)] for city, n in sorted(counts.items())}
    unit = _by_continent(tiles) if mode == "by_continent" else {city: city for city in tiles}
    keys: list[Any] = sorted(set(unit.values()))
    if mode == "random":
        keys = sorted(t for ts in tiles.values() for t in ts)
    random.Random(SEED).shuffle(keys)
    train, valid = cut_counts(len(keys))
    parts = {"train": keys[:train], "valid": keys[train : train + valid]}
    parts["test"] = keys[train + valid :]
    if mode == "random":
        return parts
    return {
        split: [t for city in tiles if unit[city] in chosen for t in tiles[city]]
        for split, chosen in parts.items()
    }
