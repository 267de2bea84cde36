"""What a record of a modality must hold, checked member by member."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

_DTYPES = (
    "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64",
    "float16", "float32", "float64",
)  # fmt: skip
"""Types in which a product may come."""

_MAX_FACTOR = 1 << 16
"""Largest resolution factor, of 0.625 m each."""

_MAX_TILE_FACTOR = 256
"""Most pixels per base pixel and side, or base pixels per pixel."""

_NEEDED = (
    "bands", "band_sets", "tile_resolution_factor", "image_tile_size_factor", "multitemporal",
)  # fmt: skip
_FLAGS = ("multitemporal", "from_csv", "in_sample", "skip_normalization")
_STATISTICS = {"computed": ("mean", "std"), "predefined": ("min", "max")}


def check(name: str, record: Mapping[str, Any]) -> None:
    """Checks a record.

    Raises:
      ValueError: the first thing in it that can't be used, with its value.
    """
    for problem in _problems(name, record):
        raise ValueError(f"record of modality {name!r}: {problem}")


def _problems(name: Any, record: Any) -> Iterator[str]:
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]{0,99}", name):
        yield "its name must begin with a letter and have only letters, digits, '_' and '-'"
    if not isinstance(record, Mapping):
        yield f"it must be a mapping, got {record!r}"
    for key in _NEEDED:
        if key not in record:
            yield f"it has no {key}"
    for key in _FLAGS:
        if not isinstance(record.get(key, True), bool):
            yield f"{key} must be true or false, got {record[key]!r}"
    factor = record["tile_resolution_factor"]
    if not _whole(factor) or not 0 <= factor <= _MAX_FACTOR:
        most = f"a whole number from 0 to {_MAX_FACTOR}"
        yield f"tile_resolution_factor must be {most}, got {factor!r}"
    size = record["image_tile_size_factor"]
    if not _whole(size) or not 1 <= abs(size) <= _MAX_TILE_FACTOR:
        yield (
            f"image_tile_size_factor must be a whole number from 1 to {_MAX_TILE_FACTOR}, or its "
            f"negative for coarser images, got {size!r}"
        )
    dtype = record.get("source_dtype")
    if dtype is not None and dtype not in _DTYPES:
        yield f"source_dtype must be null or one of {', '.join(_DTYPES)}, got {dtype!r}"
    yield from _bands(record)
    yield from _normalization(record.get("normalization", {}), len(record["bands"]))


def _bands(record: Mapping[str, Any]) -> Iterator[str]:
    bands, sets = record["bands"], record["band_sets"]
    if not _texts(bands) or len(set(bands)) != len(bands):
        yield f"bands must be a list of different names, got {bands!r}"
    if not isinstance(sets, list | tuple) or not sets:
        yield f"band_sets must be a list of {{bands, resolution_factor}}, got {sets!r}"
    for one in sets:
        if not isinstance(one, Mapping) or not {"bands", "resolution_factor"} <= set(one):
            yield f"band_sets must be a list of {{bands, resolution_factor}}, got {one!r} in it"
        if not _texts(one["bands"]):
            yield f"the bands of a band set must be a list of names, got {one['bands']!r}"
        for band in one["bands"]:
            if band not in bands:
                yield f"band_sets has {band!r}, which is not one of its bands"
        factor = one["resolution_factor"]
        least = 1 if record["tile_resolution_factor"] else 0
        if not _whole(factor) or not least <= factor <= _MAX_FACTOR:
            yield (
                f"resolution_factor of a band set must be a whole number from {least} to "
                f"{_MAX_FACTOR}, got {factor!r}"
            )


def _normalization(norm: Any, bands: int) -> Iterator[str]:
    if not isinstance(norm, Mapping):
        yield f"normalization must be a mapping, got {norm!r}"
    for key, (first, second) in _STATISTICS.items():
        if key not in norm:
            continue
        table = norm[key]
        if not isinstance(table, Mapping) or not {first, second} <= set(table):
            yield f"normalization.{key} must hold {first} and {second}, got {table!r}"
        for part in (first, second):
            values = table[part]
            if not isinstance(values, list | tuple) or len(values) != bands:
                yield f"normalization.{key}.{part} must have {bands} values, one per band"
            for value in values:
                if not _finite(value):
                    yield f"normalization.{key}.{part} must hold finite numbers, got {value!r}"
        for low, high in zip(table[first], table[second], strict=True):
            if key == "computed" and high <= 0:
                yield f"normalization.computed.std must be greater than 0, got {high!r}"
            if key == "predefined" and low >= high:
                yield (
                    f"normalization.predefined.min must be less than max, got {low!r} and {high!r}"
                )


def _texts(values: Any) -> bool:
    return (
        isinstance(values, list | tuple)
        and bool(values)
        and all(isinstance(v, str) and v for v in values)
    )


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _finite(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) <= 1e30 and math.isfinite(value)
