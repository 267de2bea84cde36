"""What becomes of one tile: cleaning, filtering, time axis, pieces (spec/data.md 4.2-4.4)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from olmoearth_jax import modalities as registry
from olmoearth_jax.data.convert import check
from olmoearth_jax.data.convert.rasters import Loaded
from olmoearth_jax.data.convert.sources import Source
from olmoearth_jax.data.convert.tree import TileJob
from olmoearth_jax.data.derived import is_decibel, to_decibel
from olmoearth_jax.data.series import Date, nearest_to_mid_month
from olmoearth_jax.modalities import MAX_TIMESTEPS, MISSING

_SENTINEL1_NODATA = -32768
_ERA5L_NODATA = -9999.0
_MOST_MISSING = 0.5
"""Share of missing values from which a timestep is left out."""

_DECIBEL_LOWEST = -500.0
"""No backscatter is lower: such values are hundredths of a decibel, or fills."""


@dataclasses.dataclass(frozen=True)
class TimePlan:
    """The time axis of a tile.

    Attributes:
      timestamps: int32 [T, 3] (day, month 0-11, year) of the longest series.
      masks: per space-time modality bool [T], true where it has that date.
      steps: per multitemporal modality the timesteps that are stored.
      removed: modalities left without any timestep, with the reason.
      unmatched: per modality, how many timesteps are left out for their dates.
    """

    timestamps: np.ndarray
    masks: dict[str, np.ndarray]
    steps: dict[str, np.ndarray]
    removed: dict[str, str]
    unmatched: dict[str, int]


def fault(name: str, values: np.ndarray) -> str | None:
    """Why a modality of a tile is unusable as a whole, or None."""
    if values.dtype.kind == "f":
        if np.isnan(values).any():
            return "holds NaN"
        if np.abs(values).max(initial=0) > np.finfo(np.float32).max:
            return "holds infinite values, or numbers too large for float32"
    if name in ("era5_10", "openstreetmap_raster") and not values.any():
        return "is all zero"
    if name == "era5l_day_10" and (values == _ERA5L_NODATA).any():
        return f"holds the fill value {_ERA5L_NODATA}"
    if name == "sentinel1":
        if (values == _SENTINEL1_NODATA).any():
            return f"holds the fill value {_SENTINEL1_NODATA}"
        if is_decibel(values) and values.min() < _DECIBEL_LOWEST:
            return f"is no linear power and holds {values.min():g}, which is no decibel either"
    return None


@dataclasses.dataclass(frozen=True)
class Findings:
    """What a tile's rasters hold.

    Attributes:
      faults: unusable modalities, with the reason.
      notes: what is done with others that is worth knowing.
      empty: per series the timesteps that are at least half missing.
      unusual: what is odd about the values of modalities that are taken all the same.
      checked: whether values were judged at all.
    """

    faults: dict[str, str]
    notes: dict[str, str]
    empty: dict[str, list[int]]
    unusual: dict[str, str]
    checked: bool


def inspect(source: Source, job: TileJob, check_units: bool = True) -> Findings:
    """Reads every modality of a tile; with `check_units`, values are held to what is possible.

    Raises:
      ReadError: a raster cannot be read, does not belong to the tile, or holds values that cannot
        be.
    """
    found = Findings({}, {}, {}, {}, check_units)
    for name in job.dates:
        loaded = source.load(job, name)
        gone = loaded.missing
        present = loaded.values if gone is None else loaded.values[~gone]
        reason = fault(name, present) if present.size else "holds nothing but missing values"
        said = [f"was turned ({loaded.turned})"] if loaded.turned else []
        if reason is None and name == "sentinel1" and is_decibel(present):
            said.append("is decibel already and taken as it is")
        if reason is None and gone is not None:
            steps = _empty_steps(name, gone)
            if len(steps) == gone.shape[-2]:
                reason = "misses at least half of its values on every date"
            elif steps:
                found.empty[name] = steps
                dates = ", ".join(_iso(job.dates[name][k]) for k in steps)
                said.append(f"misses at least half of its values on {dates}, which is left out")
            rest = int(np.delete(gone, steps, axis=-2).sum())
            if rest:
                said.append(f"has {rest} missing values, stored as {MISSING:.0f}")
        if reason is not None:
            found.faults[name] = reason
            continue
        if said:
            found.notes[name] = "; ".join(said)
        if check_units and (odd := check.unusual(source, job, name, loaded)):
            found.unusual[name] = odd
    return found


def _empty_steps(name: str, gone: np.ndarray) -> list[int]:
    """Timesteps [..., T, C] of a series that are at least half missing; others have no mask."""
    if _kind(name) != "space_time":
        return []
    shares = gone.mean(axis=tuple(k for k in range(gone.ndim) if k != gone.ndim - 2))
    return [int(k) for k in np.flatnonzero(shares >= _MOST_MISSING)]


def _iso(date: Date) -> str:
    day, month, year = date
    return f"{year:04d}-{month + 1:02d}-{day:02d}"


def longest(dates: Mapping[str, Sequence[Date]], names: Sequence[str]) -> str | None:
    """The space-time modality of most timesteps, the first in registry order among equals."""
    series = [n for n in registry.all_names() if n in names and _kind(n) == "space_time"]
    return max(series, key=lambda n: len(dates[n]), default=None)


@dataclasses.dataclass(frozen=True)
class Length:
    """How many timesteps a tile needs, and what becomes of more than the models take.

    Attributes:
      least: fewest timesteps of the longest series.
      select: a longer series keeps one timestep per calendar month; otherwise its tile is dropped.
    """

    least: int = MAX_TIMESTEPS
    select: bool = False


def _axis_steps(
    dates: Mapping[str, Sequence[Date]], lead: str, select: bool, empty: Sequence[int] = ()
) -> list[int]:
    """The timesteps of the longest series, `lead`, that make the time axis of its tile."""
    if select and len(dates[lead]) > MAX_TIMESTEPS:
        return nearest_to_mid_month(dates[lead], empty)
    return list(range(len(dates[lead])))


def plan_time(
    dates: Mapping[str, Sequence[Date]],
    names: Sequence[str],
    keep_unmatched: bool = False,
    empty: Mapping[str, Sequence[int]] | None = None,
    select: bool = False,
) -> TimePlan:
    """Aligns the series of a tile by date.

    `names` are kept; at least one is a space-time modality. The axis is in order of time. Timesteps
    on dates that the longest series lacks are left out, and weather that lacks one of its dates is
    removed. With `keep_unmatched` all are stored as they come, as the reference does, and readers
    misplace what follows them. The `empty` timesteps of a series keep their date, but are not
    stored. `select`: see `Length`.
    """
    lead = longest(dates, names)
    assert lead is not None
    empty = empty or {}
    chosen = _axis_steps(dates, lead, select, empty.get(lead, ()))
    axis = [dates[lead][k] for k in chosen]
    if not keep_unmatched:
        axis.sort(key=lambda date: date[::-1])
    masks, steps, removed, unmatched = {}, {}, {}, {}
    for name in names:
        own = list(dates[name])
        kind = _kind(name)
        if kind == "space_time":
            gone = set(empty.get(name, ()))
            live = [k for k in range(len(own)) if k not in gone]
            there = {own[k]: k for k in reversed(live)}  # of several on a date the first
            masks[name] = np.array([d in there for d in axis])
            used = [there[d] for d in axis if d in there]  # in the order of the mask
            if keep_unmatched:
                used = live
            elif name != lead:
                left_out = {k for k in gone if own[k] in axis}
                unmatched[name] = len(own) - len(left_out.union(used))
            steps[name] = np.array(used, int)
        elif kind == "time_only":
            places = [own.index(d) for d in axis if d in own]
            if keep_unmatched:
                steps[name] = np.arange(len(own))
            elif len(places) == len(axis):
                steps[name] = np.array(places)
                unmatched[name] = len(own) - len(places)
            else:
                removed[name] = f"lacks {len(axis) - len(places)} of the tile's dates"
        if name in masks and not masks[name].any() and not keep_unmatched:
            removed[name] = "has none of the tile's dates"
            del masks[name], steps[name]
            unmatched.pop(name, None)
    unmatched = {n: count for n, count in unmatched.items() if count}
    return TimePlan(np.array(axis, np.int32), masks, steps, removed, unmatched)


def drop_reason(
    job: TileJob,
    names: Sequence[str],
    required: Sequence[str],
    keep_unmatched: bool,
    length: Length | None = None,
    empty: Mapping[str, Sequence[int]] | None = None,
) -> str | None:
    """Why a tile with the usable modalities `names` makes no sample, or None."""
    absent = [n for n in required if n not in names]
    if absent:
        return f"lacks the required {', '.join(absent)}"
    lead = longest(job.dates, names)
    if lead is None:
        return "has no usable space-time modality"
    length = length or Length()
    chosen = _axis_steps(job.dates, lead, length.select, (empty or {}).get(lead, ()))
    count, dates = len(chosen), {job.dates[lead][k] for k in chosen}
    if count < length.least:
        return (
            f"has at most {count} timesteps ({lead}), {length.least} are needed "
            f"(--min_timesteps={max(count, 1)} would take it)"
        )
    if count > MAX_TIMESTEPS:
        unit = "calendar months" if length.select else "timesteps"
        hint = "" if length.select else " (--over=select would keep one per month)"
        return f"has {count} {unit} ({lead}), at most {MAX_TIMESTEPS} are supported{hint}"
    if not keep_unmatched and len(dates) < count:
        return f"has two timesteps of {lead} on the same date"
    return None


def pieces(
    source: Source, job: TileJob, names: Sequence[str], plan: TimePlan, count: int
) -> Iterator[dict[str, np.ndarray]]:
    """The arrays of each of `count` pieces of a tile, row by row; of series the stored timesteps.

    Raises:
      ReadError: a raster cannot be read.
    """
    whole = {}
    for name in names:
        loaded = source.load(job, name)
        if name == "sentinel1":
            loaded.values = _backscatter(loaded)
        whole[name] = loaded.filled(plan.steps.get(name, slice(None)))
    per_side = math.isqrt(count)
    for i in range(per_side):
        for j in range(per_side):
            yield {n: _cut(v, i, j, per_side) if v.ndim == 4 else v for n, v in whole.items()}


def _backscatter(loaded: Loaded) -> np.ndarray:
    """Decibel float32 of all timesteps; what is missing has no say in the unit."""
    values, gone = loaded.values, loaded.missing
    if is_decibel(values if gone is None else values[~gone]):
        return values.astype(np.float32)
    return to_decibel(values)


def _cut(values: np.ndarray, i: int, j: int, per_side: int) -> np.ndarray:
    side = values.shape[0] // per_side
    return values[i * side : (i + 1) * side, j * side : (j + 1) * side]


def _kind(name: str) -> str:
    return registry.get(name).kind
