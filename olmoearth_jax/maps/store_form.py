"""Whether the metadata of a store make sense; archives come from others, too."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from olmoearth_jax.inference.quantize import Rule
from olmoearth_jax.maps.lattice import crs_of

ZONES = 60
_FARTHEST = 30e6
"""Metres from E = N = 0 that no place of a UTM zone reaches."""
_MOST_PERIODS = 100_000
_MOST_SHARD_BYTES = 16 << 30
"""What a reader of one shard may be asked to hold."""


def zone_names(names: Any) -> list[str]:
    """The names of groups of UTM zones among those of a store, ascending.

    Raises:
      ValueError: a zone that there is not.
    """
    zones = [str(n) for n in names if re.fullmatch(r"utm[0-9]{2}", str(n))]
    odd = [n for n in zones if not 1 <= int(n[3:]) <= ZONES]
    if odd:
        raise ValueError(f"there is no UTM zone {odd[0]}: they are 1..{ZONES}")
    return sorted(zones)


def dimensions_of(attrs: Mapping[str, Any], path: str) -> tuple[int, tuple[int, ...]]:
    """(D, Matryoshka widths) of the attributes of a store.

    Raises:
      ValueError: they are no numbers of bands.
    """
    given: Any = attrs.get("geoemb:dimensions")
    widths = attrs.get("geoemb:matryoshka_dims", [])
    if not _is_count(given):
        raise _damaged(path, "geoemb:dimensions", given)
    if not isinstance(widths, list) or not all(_is_count(w) and w <= given for w in widths):
        raise _damaged(path, "geoemb:matryoshka_dims", widths)
    return given, tuple(widths)


def periods_of(groups: Mapping[str, Any], path: str) -> list[tuple[str, str]] | list[int]:
    """First and last day of each period, or the years, which all zones share.

    Args:
      groups: of the zones, by name.

    Raises:
      ValueError: zones differ in them, or they are none.
    """
    found: dict[str, Any] = {}
    for name, group in groups.items():
        spans = group.attrs.get("olmoearth:periods")
        if spans is None:
            time = _array(group, f"{path}/{name}", "time")
            if math.prod(time.shape) > _MOST_PERIODS or math.prod(time.chunks) > _MOST_PERIODS:
                raise _damaged(f"{path}/{name}", "times", f"{time.shape} in {time.chunks}")
            found[name] = [int(t) for t in time[:]]
            continue
        good = isinstance(spans, list) and all(
            isinstance(s, list) and len(s) == 2 and all(_is_day(d) for d in s) for s in spans
        )
        if not good:
            raise _damaged(f"{path}/{name}", "olmoearth:periods", spans)
        found[name] = [tuple(s) for s in spans]
    (first, periods), *others = found.items()
    for name, own in others:
        if own != periods:
            raise ValueError(f"{path} is damaged: {first} and {name} hold different periods")
    return periods


def transform_of(attrs: Mapping[str, Any], number: int, where: str) -> list[float]:
    """Affine map a..f of the tokens of a zone.

    Raises:
      ValueError: there is none, it is not north-up with square tokens, or of another CRS.
    """
    code = attrs.get("proj:code", crs_of(number))
    if code != crs_of(number):
        raise ValueError(
            f"{where} is in {code}; archives are read in {crs_of(number)} for zone {number}, with "
            "northings that are negative in the south"
        )
    t: Any = attrs.get("spatial:transform")
    numbers = isinstance(t, list) and len(t) == 6 and all(is_number(v) for v in t)
    if not numbers or t[1] or t[3] or not t[0] > 0 or t[4] != -t[0]:
        raise _damaged(where, "spatial:transform", t)
    if attrs.get("geoemb:gsd", t[0]) != t[0]:
        raise _damaged(where, "geoemb:gsd", f"{attrs['geoemb:gsd']}, but its tokens {t[0]} metres")
    return [float(v) for v in t]


def arrays_of(
    group: Any, where: str, transform: list[float], rule: Rule, dimensions: int, periods: int
) -> tuple[Any, Any, Any]:
    """The arrays (embeddings, coverage, scales) of a zone; no scales without per_pixel_scale.

    Raises:
      ValueError: one is missing, of another form than the others, or larger than anything on the
        earth.
    """
    coverage = _array(group, where, "coverage")
    if len(coverage.shape) != 3 or coverage.dtype != "uint8":
        raise _damaged(where, "coverage", f"{coverage.dtype} {coverage.shape}")
    _, height, width = coverage.shape
    a, _, c, _, e, f = transform
    if max(map(abs, (c, f, c + a * width, f + e * height))) > _FARTHEST:
        raise ValueError(f"{where} is damaged: {height} x {width} tokens reach beyond the earth")
    flat = periods, height, width
    forms = {
        "embeddings": ((periods, dimensions, height, width), rule.dtype),
        "coverage": (flat, "uint8"),
    }
    if rule.method == "per_pixel_scale":
        forms["scales"] = (flat, "float32")
    found = {name: _array(group, where, name) for name in forms}
    for name, array in found.items():
        if (tuple(array.shape), str(array.dtype)) != forms[name]:
            shape, kind = forms[name]
            raise ValueError(
                f"{where} is damaged: {name} is {array.dtype} {tuple(array.shape)}, not {kind} "
                f"{shape}, as its other metadata say"
            )
        part = array.shards or array.chunks
        if math.prod(part) * array.dtype.itemsize > _MOST_SHARD_BYTES:
            raise ValueError(f"{where}: shards of {part} values of {name} are too many to hold")
    return found["embeddings"], coverage, found.get("scales")


def _array(group: Any, where: str, name: str) -> Any:
    try:
        found = group[name]
    except KeyError:
        found = None
    except Exception as e:  # zarr's errors about metadata are of many types
        raise ValueError(f"{where} is damaged: {name} cannot be opened: {e}") from None
    if not hasattr(found, "dtype"):
        raise ValueError(f"{where} holds no array {name!r}")
    return found


def _damaged(where: str, name: str, value: Any) -> ValueError:
    return ValueError(f"{where} is damaged: its {name} are {str(value)[:100]}")


def is_number(value: Any) -> bool:
    """Whether a value of a JSON file is a finite number."""
    kind = isinstance(value, int | float) and not isinstance(value, bool)
    return kind and abs(value) < 1e300  # an integer may be too long for a float


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_day(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", value) is not None
