"""The modality registry: one record per modality, from which every shape and statistic derives.

The records live in ``modalities.json`` beside this file (figures: spec/data.md sections 1-2).
A user adds a sensor by registering one more record of the same form (`register`).
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

from olmoearth_jax.files import check_file
from olmoearth_jax.modality_record import check as check_record
from olmoearth_jax.proposals import closest as closest

ModalityName = Annotated[str, "the name of a modality"]
"""Type of a setting that names a modality; upper case is accepted where one is given."""

BandSets = dict[ModalityName, list[list[str]]]
"""Modality -> the bands of each of its tokens."""

MISSING = -99999.0
"""Fill value of missing pixels, timesteps and modalities; exact in float32, never normalised."""

MAX_TIMESTEPS = 12
"""Timesteps of a sample after padding."""

BASE_RESOLUTION_M = 0.625
IMAGE_TILE_PX = 256
_STD_MULTIPLIER = 2.0
WORLDCOVER_CODES = (10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 100)

DERIVED = {"worldcover_onehot": "worldcover", "ndvi": "sentinel2_l2a"}
"""Modalities that no file holds, and what each is computed from."""

_Kind = Literal["space_time", "space_only", "time_only", "static"]


@dataclasses.dataclass(frozen=True)
class Modality:
    """One modality of the registry.

    Attributes:
      name: field name in samples and H5 files.
      bands: band names in array (channel) order.
      band_sets: per default band set, the channel indices it covers (one token per band set).
      band_set_resolutions: per band set, the GeoTIFF resolution factor (0.625 m * factor).
      tile_resolution_factor: R of spec/data.md section 1 (16 = 10 m, 0 = not a raster).
      image_tile_size_factor: s of spec/data.md; > 1: finer than the tile grid, < 0: coarser.
      multitemporal: whether the arrays have a time axis that varies.
      from_csv: whether the converter parses it from a CSV index.
      in_sample: whether it can be a training modality.
      skip_normalization: categorical one-hot, passed through unchanged.
      source_dtype: dtype upstream, or None where derived.
      computed: (mean, std) per band, or None.
      predefined: (min, max) per band, or None.
    """

    name: str
    bands: tuple[str, ...]
    band_sets: tuple[tuple[int, ...], ...]
    band_set_resolutions: tuple[int, ...]
    tile_resolution_factor: int
    image_tile_size_factor: int
    multitemporal: bool
    from_csv: bool
    in_sample: bool
    skip_normalization: bool
    source_dtype: str | None
    computed: tuple[tuple[float, ...], tuple[float, ...]] | None
    predefined: tuple[tuple[float, ...], tuple[float, ...]] | None

    @property
    def num_bands(self) -> int:
        return len(self.bands)

    @property
    def num_band_sets(self) -> int:
        return len(self.band_sets)

    @property
    def spatial(self) -> bool:
        """True if the loaded tile has more than one pixel per side."""
        s = self.image_tile_size_factor
        side = IMAGE_TILE_PX * s if s > 0 else IMAGE_TILE_PX // -s
        return self.tile_resolution_factor > 0 and side > 1

    @property
    def kind(self) -> _Kind:
        """Which axes vary: 'space_time', 'space_only', 'time_only' or 'static'."""
        if self.spatial:
            return "space_time" if self.multitemporal else "space_only"
        return "time_only" if self.multitemporal else "static"

    def axes(self, side: int, steps: int) -> tuple[int, ...]:
        """Axes of one sample before its channels or band sets.

        (side, side, steps), (side, side, 1), (steps,) or (), where `side` counts tokens or pixels.
        """
        space = (side, side) if self.spatial else ()
        time = (steps,) if self.multitemporal else (1,) if self.spatial else ()
        return (*space, *time)

    @property
    def image_factor(self) -> int:
        """Pixels per base (10 m) pixel and side, f of spec/model.md; 1 for non-spatial ones."""
        return self.image_tile_size_factor if self.spatial else 1

    def norm_range(self, strategy: str = "dataset") -> tuple[np.ndarray, np.ndarray] | None:
        """(lo, hi) float64 [bands] that normalisation maps to 0 and 1, or None for identity.

        Strategies (spec/data.md section 2): 'computed' is mean -/+ 2 std, 'predefined' a fixed
        range, 'dataset' the first of these two that the modality has.

        Raises:
          ValueError: the modality has no such statistics.
        """
        if self.skip_normalization:
            return None
        if strategy not in ("dataset", "computed", "predefined"):
            raise ValueError(
                f"unknown normalisation strategy {strategy!r}; known: dataset, computed, predefined"
            )
        if self.computed is not None and strategy != "predefined":
            mean, std = (np.asarray(v, np.float64) for v in self.computed)
            return mean - _STD_MULTIPLIER * std, mean + _STD_MULTIPLIER * std
        if self.predefined is not None and strategy != "computed":
            lo, hi = (np.asarray(v, np.float64) for v in self.predefined)
            return lo, hi
        which = "" if strategy == "dataset" else f"{strategy} "
        raise ValueError(
            f"modality {self.name!r} has no {which}normalisation statistics, so it cannot be "
            f"trained on"
        )


def _parse(name: str, record: Mapping[str, Any]) -> Modality:
    check_record(name, record)
    bands = tuple(record["bands"])
    sets = tuple(tuple(bands.index(b) for b in bs["bands"]) for bs in record["band_sets"])
    norm = record.get("normalization", {})

    def table(key: str, first: str, second: str) -> Any:
        if key not in norm:
            return None
        return tuple(tuple(float(x) for x in norm[key][f]) for f in (first, second))

    return Modality(
        name=name,
        bands=bands,
        band_sets=sets,
        band_set_resolutions=tuple(int(bs["resolution_factor"]) for bs in record["band_sets"]),
        tile_resolution_factor=int(record["tile_resolution_factor"]),
        image_tile_size_factor=int(record["image_tile_size_factor"]),
        multitemporal=bool(record["multitemporal"]),
        from_csv=bool(record.get("from_csv", True)),
        in_sample=bool(record.get("in_sample", True)),
        skip_normalization=bool(record.get("skip_normalization", False)),
        source_dtype=record.get("source_dtype"),
        computed=table("computed", "mean", "std"),
        predefined=table("predefined", "min", "max"),
    )


_DOC = json.loads((Path(__file__).parent / "modalities.json").read_text())
_REGISTRY: dict[str, Modality] = {n: _parse(n, r) for n, r in _DOC["modalities"].items()}
_USER_RECORDS: dict[str, Mapping[str, Any]] = {}
_SAMPLE_ORDER: list[str] = list(_DOC["sample_order"])
_MASKED_ORDER: list[str] = list(_DOC["masked_sample_order"])
_REGISTRY_ORDER: list[str] = list(_DOC["registry_order"])

OFFICIAL_MODALITIES: tuple[str, ...] = tuple(_DOC["official_training_modalities"])
OFFICIAL_DECODE_ONLY: tuple[str, ...] = tuple(_DOC["official_decode_only"])


def register(name: str, record: Mapping[str, Any]) -> Modality:
    """Adds a modality from a record of the form used in ``modalities.json``.

    Registering the same name with an equal record again is a no-op.

    Raises:
      ValueError: the name is taken by a different record, or the record is malformed.
    """
    modality = _parse(name, record)
    old = _REGISTRY.get(name)
    if old is not None and old == modality:
        return old
    if old is not None:
        raise ValueError(f"modality {name!r} is already registered with another record")
    _REGISTRY[name] = modality
    _USER_RECORDS[name] = dict(record)
    for order in (_SAMPLE_ORDER, _MASKED_ORDER, _REGISTRY_ORDER):
        order.append(name)
    return modality


def register_all(records: Mapping[str, Mapping[str, Any]]) -> None:
    """Registers several records, {name: record}; see `register`."""
    for name, record in records.items():
        register(name, record)


def register_file(path: str | Path) -> tuple[str, ...]:
    """Registers the records of a JSON file {name: record, ...} and returns their names.

    Raises:
      ValueError: no such file, not a JSON object, or a malformed record.
    """
    try:
        check_file(path)
        records = json.loads(Path(path).read_text())
    except (OSError, ValueError, RecursionError) as e:
        raise ValueError(f"modality file {str(path)!r} cannot be read: {e}") from e
    if not isinstance(records, dict) or not all(isinstance(r, dict) for r in records.values()):
        raise ValueError(f"modality file {str(path)!r} must hold an object {{name: record, ...}}")
    register_all(records)
    return tuple(records)


def user_records() -> dict[str, Mapping[str, Any]]:
    """The records added by `register`, to be registered again in other processes."""
    return dict(_USER_RECORDS)


def names() -> tuple[str, ...]:
    """Names of all modalities that can be part of a sample, in sample order."""
    return tuple(n for n in _SAMPLE_ORDER if _REGISTRY[n].in_sample)


def all_names() -> tuple[str, ...]:
    """Names of every record, in registry order (the converter's order)."""
    return tuple(_REGISTRY_ORDER)


def get(name: str) -> Modality:
    """The modality of that name (case-insensitive).

    Raises:
      ValueError: unknown name; the message lists the known ones and the nearest.
    """
    for key in (name, str(name).lower()):
        if key in _REGISTRY:
            return _REGISTRY[key]
    raise ValueError(f"unknown modality {name!r}; {closest(str(name), names())}")


def get_of_samples(name: str) -> Modality:
    """The modality of that name, which a sample can hold.

    Raises:
      ValueError: unknown name, or one that models do not take.
    """
    found = get(name)
    if not found.in_sample:
        raise ValueError(f"models take no {found.name}; {closest(found.name, names())}")
    return found


def resolve(wanted: Sequence[str]) -> tuple[str, ...]:
    """Canonical names of `wanted` (upper case accepted), in the given order.

    Raises:
      ValueError: unknown or repeated names, or a record that cannot be in a sample.
    """
    if isinstance(wanted, str):
        raise ValueError(f"modalities must be a list of names, got the string {wanted!r}")
    out = [get(w).name for w in wanted]
    for name in out:
        if out.count(name) > 1:
            raise ValueError(f"modality {name!r} is listed more than once")
        if not _REGISTRY[name].in_sample:
            raise ValueError(f"modality {name!r} cannot be trained on; {closest(name, names())}")
    return tuple(out)


def in_sample_order(wanted: Iterable[str]) -> tuple[str, ...]:
    """`wanted` sorted into the order of raw samples and token records."""
    chosen = set(wanted)
    return tuple(n for n in _SAMPLE_ORDER if n in chosen)


def in_masked_order(wanted: Iterable[str]) -> tuple[str, ...]:
    """`wanted` sorted into the order of masked samples (latlon right after worldcover_onehot)."""
    chosen = set(wanted)
    return tuple(n for n in _MASKED_ORDER if n in chosen)


@dataclasses.dataclass(frozen=True)
class Tokenization:
    """Which bands make one token; overrides replace a modality's default band sets.

    Attributes:
      overrides: pairs (modality, band groups), each group a tuple of band names.
    """

    overrides: tuple[tuple[str, tuple[tuple[str, ...], ...]], ...] = ()

    @classmethod
    def from_mapping(cls, overrides: Mapping[str, Sequence[Sequence[str]]] | None) -> Tokenization:
        """Builds from {modality: [[band, ...], ...]}; None or {} means the defaults.

        Raises:
          ValueError: unknown modality or band, or an empty group.
        """
        out = []
        for name, groups in (overrides or {}).items():
            modality = get(name)
            for group in groups:
                if not group:
                    raise ValueError(f"tokenization of {name!r} has an empty band group")
                for band in group:
                    if band not in modality.bands:
                        raise ValueError(
                            f"unknown band {band!r} of modality {name!r}; "
                            f"{closest(band, modality.bands)}"
                        )
            out.append((modality.name, tuple(tuple(g) for g in groups)))
        return cls(tuple(sorted(out)))

    def band_sets(self, name: str) -> tuple[tuple[int, ...], ...]:
        """Channel indices of each band set of `name` under this tokenisation."""
        return _band_sets(self, name)

    def num_band_sets(self, name: str) -> int:
        return len(self.band_sets(name))


@functools.lru_cache(maxsize=1024)
def _band_sets(tokenization: Tokenization, name: str) -> tuple[tuple[int, ...], ...]:
    modality = get(name)
    groups = dict(tokenization.overrides).get(modality.name)
    if groups is None:
        return modality.band_sets
    return tuple(tuple(modality.bands.index(b) for b in g) for g in groups)


SINGLE_BAND_SET_OVERRIDES: dict[str, list[list[str]]] = {
    name: [list(_REGISTRY[name].bands)] for name in ("sentinel2_l2a", "landsat")
}
"""Tokenisation of v1.1 and later: all Sentinel-2 bands in one token, all Landsat bands in one."""


def normalization_of(names: list[str] | tuple[str, ...]) -> dict[str, Any]:
    """Per modality its band order and (lo, hi), so that a checkpoint can be used by itself."""
    out = {}
    for name in names:
        m = get(name)
        span = m.norm_range()
        out[name] = {"bands": list(m.bands)}
        if span is not None:
            out[name].update(lo=span[0].tolist(), hi=span[1].tolist())
    return out
