"""What becomes of one tile: cleaning, filtering, time axis, pieces (spec/data.md 4.2-4.4)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from olmoearth_jax import modalities as registry
from olmoearth_jax.data.convert.rasters import load_modality
from olmoearth_jax.data.convert.tree import Date, TileJob
from olmoearth_jax.data.derived import to_decibel
from olmoearth_jax.modalities import IMAGE_TILE_PX, MAX_TIMESTEPS

SENTINEL1_NODATA = -32768
ERA5L_NODATA = -9999.0


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
    if values.dtype.kind == "f" and np.isnan(values).any():
        return "holds NaN"
    if name in ("era5_10", "openstreetmap_raster") and not values.any():
        return "is all zero"
    if name == "era5l_day_10" and (values == ERA5L_NODATA).any():
        return f"holds the fill value {ERA5L_NODATA}"
    if name == "sentinel1" and (values == SENTINEL1_NODATA).any():
        return f"holds the fill value {SENTINEL1_NODATA}"
    return None


def clean(tree: Path, job: TileJob) -> dict[str, str]:
    """Reads every modality of a tile; the unusable ones with their reasons.

    Raises:
      ReadError: a raster cannot be read.
    """
    found = ((n, fault(n, load_modality(tree, job, n))) for n in job.dates)
    return {name: reason for name, reason in found if reason is not None}


def longest(dates: Mapping[str, Sequence[Date]], names: Sequence[str]) -> str | None:
    """The space-time modality of most timesteps, the first in registry order among equals."""
    series = [n for n in registry.all_names() if n in names and _kind(n) == "space_time"]
    return max(series, key=lambda n: len(dates[n]), default=None)


def plan_time(
    dates: Mapping[str, Sequence[Date]], names: Sequence[str], keep_unmatched: bool = False
) -> TimePlan:
    """Aligns the series of a tile by date.

    `names` are kept; at least one is a space-time modality. Timesteps on dates that the longest
    series lacks are left out, and weather that lacks one of its dates is removed. With
    `keep_unmatched` both are stored as they come, as the reference does, and readers misplace what
    follows them.
    """
    lead = longest(dates, names)
    assert lead is not None
    axis = list(dates[lead])
    masks, steps, removed = {}, {}, {}
    for name in names:
        own = list(dates[name])
        kind = _kind(name)
        if kind == "space_time":
            masks[name] = np.array([d in own for d in axis])
            first = sorted({own.index(d) for d in axis if d in own})
            kept = range(len(own)) if keep_unmatched or name == lead else first
            steps[name] = np.array(kept, int)
        elif kind == "time_only":
            places = [own.index(d) for d in axis if d in own]
            if keep_unmatched:
                steps[name] = np.arange(len(own))
            elif len(places) == len(axis):
                steps[name] = np.array(places)
            else:
                removed[name] = f"lacks {len(axis) - len(places)} of the tile's dates"
        if name in masks and not masks[name].any() and not keep_unmatched:
            removed[name] = "has none of the tile's dates"
            del masks[name], steps[name]
    unmatched = {n: len(dates[n]) - len(kept) for n, kept in steps.items()}
    return TimePlan(
        np.array(axis, np.int32), masks, steps, removed, {n: c for n, c in unmatched.items() if c}
    )


def drop_reason(
    job: TileJob, names: Sequence[str], required: Sequence[str], keep_unmatched: bool
) -> str | None:
    """Why a tile with the usable modalities `names` makes no sample, or None."""
    absent = [n for n in required if n not in names]
    if absent:
        return f"lacks the required {', '.join(absent)}"
    lead = longest(job.dates, names)
    if lead is None:
        return "has no usable space-time modality"
    count = len(job.dates[lead])
    if count < MAX_TIMESTEPS:
        return f"has at most {count} timesteps ({lead}), {MAX_TIMESTEPS} are needed"
    if count > MAX_TIMESTEPS:
        return f"has {count} timesteps ({lead}), at most {MAX_TIMESTEPS} are supported"
    if not keep_unmatched and len(set(job.dates[lead])) < count:
        return f"has two timesteps of {lead} on the same date"
    return None


def pieces(
    tree: Path, job: TileJob, names: Sequence[str], plan: TimePlan, tile_px: int
) -> Iterator[dict[str, np.ndarray]]:
    """The arrays of each piece of a tile, row by row; series hold only the stored timesteps.

    Raises:
      ReadError: a raster cannot be read.
    """
    whole = {}
    for name in names:
        values = load_modality(tree, job, name)
        if name in plan.steps:
            values = values[..., plan.steps[name], :]
        whole[name] = to_decibel(values) if name == "sentinel1" else values
    per_side = IMAGE_TILE_PX // tile_px
    for i in range(per_side):
        for j in range(per_side):
            yield {n: _cut(v, i, j, per_side) if v.ndim == 4 else v for n, v in whole.items()}


def _cut(values: np.ndarray, i: int, j: int, per_side: int) -> np.ndarray:
    side = values.shape[0] // per_side
    return values[i * side : (i + 1) * side, j * side : (j + 1) * side]


def _kind(name: str) -> str:
    return registry.get(name).kind
