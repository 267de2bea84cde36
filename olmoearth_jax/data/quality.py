"""Judging what a dataset holds: values in the wrong unit, codes that don't exist, odd dates."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from olmoearth_jax import modalities as registry
from olmoearth_jax.data import values
from olmoearth_jax.data.stats import StreamingStats
from olmoearth_jax.data.timesteps import DATE_RANGE
from olmoearth_jax.modalities import MAX_TIMESTEPS, MISSING, WORLDCOVER_CODES

_OPTICAL = ("sentinel2_l2a", "landsat")
_OFFSET = 1000
"""Added to Sentinel-2 counts by processing baselines from 04.00 on; must have been removed."""

_COUNTS = "counts (reflectance x 10000) are expected"
_UNITS = {
    "reflectance": f"looks like reflectance 0 to 1; {_COUNTS}",
    "8-bit": f"looks like 8-bit pictures; {_COUNTS}",
    "percent": f"looks like reflectance in percent; {_COUNTS}",
    "wrapped": "holds negative numbers that were stored without a sign",
    "linear": "looks like linear power; decibels, 10 log10(x), are expected",
    "hundredths": "looks like hundredths of a decibel; decibels are expected",
    "celsius": "temperatures look like degrees Celsius; kelvin are expected",
}
"""What to say of the units that `values.wrong_unit` tells apart."""

_EMPTY = 0.5
"""Share of a file that may hold a fill which single pixels can have, such as -100 dB."""

_SAMPLED = 200_000
_ENOUGH_FILES = 3
_FAR = 1.5
"""Normalised means beyond 0.5 +/- this are reported; measured ones give 0.5."""


@dataclasses.dataclass
class Values:
    """What was seen of a modality: dtypes, range and mean per band, and more for some.

    Attributes:
      dtypes: stored types.
      lo, hi: smallest and largest value per band, float64 [bands]; missing elements aside.
      mean: per band.
      darkest: per file the smallest count above 0 over all bands.
      unknown: codes that the modality does not have.
      units: rules of `values.wrong_unit` that held in a file.
      counts: of values that cannot be.
      files: number of files.
    """

    dtypes: set[str] = dataclasses.field(default_factory=set)
    lo: np.ndarray | None = None
    hi: np.ndarray | None = None
    mean: list[StreamingStats] = dataclasses.field(default_factory=list)
    darkest: list[float] = dataclasses.field(default_factory=list)
    unknown: set[float] = dataclasses.field(default_factory=set)
    units: set[str] = dataclasses.field(default_factory=set)
    counts: values.Tally = dataclasses.field(default_factory=values.Tally)
    files: int = 0

    @classmethod
    def of(cls, name: str, array: np.ndarray) -> Values:
        """The values of one file's array [..., bands]."""
        flat = array.reshape(-1, array.shape[-1])
        if flat.dtype.kind in "fi" and flat.dtype.itemsize > 2:
            flat = flat[~(flat == MISSING).any(axis=1)]
        out = cls({str(array.dtype)}, files=1)
        if not len(flat):
            return out
        out.lo, out.hi = flat.min(0).astype(np.float64), flat.max(0).astype(np.float64)
        out.counts = values.Tally.of(name, flat)
        few = flat[:: values.stride(flat.size // _SAMPLED)].reshape(-1)
        if wrong := values.wrong_unit(name, few, flat.dtype):
            out.units = {wrong[0]}
        for band in range(flat.shape[1]):
            stats = StreamingStats()
            stats.update(flat[:, band])
            out.mean.append(stats)
        if name in _OPTICAL:
            positive = flat[flat > 0]
            out.darkest = [float(positive.min())] if len(positive) else []
        if name == "worldcover":
            out.unknown = set(np.unique(flat).tolist()) - {0, *WORLDCOVER_CODES}
        return out

    def merge(self, other: Values) -> None:
        """Adds what was seen of further files."""
        self.dtypes |= other.dtypes
        self.unknown |= other.unknown
        self.units |= other.units
        self.counts.merge(other.counts)
        self.darkest += other.darkest
        self.files += other.files
        if other.lo is None or other.hi is None:
            return
        if self.lo is None or self.hi is None:
            self.lo, self.hi, self.mean = other.lo, other.hi, other.mean
            return
        self.lo, self.hi = np.minimum(self.lo, other.lo), np.maximum(self.hi, other.hi)
        for mine, its in zip(self.mean, other.mean, strict=True):
            mine.merge(its)

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON can hold it, without loss."""
        plain = dataclasses.asdict(self)
        plain["counts"]["fills"] = list(self.counts.fills.items())  # its keys are numbers
        for name in ("dtypes", "unknown", "units"):
            plain[name] = sorted(plain[name])
        for name in ("lo", "hi"):
            plain[name] = None if plain[name] is None else plain[name].tolist()
        return plain

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Values:
        """What `to_json` gave."""
        out = cls(**plain)
        for name in ("dtypes", "unknown", "units"):
            setattr(out, name, set(plain[name]))
        for name in ("lo", "hi"):
            held = plain[name]
            setattr(out, name, None if held is None else np.array(held, np.float64))
        out.mean = [StreamingStats(**stats) for stats in plain["mean"]]
        out.counts = values.Tally(**{**plain["counts"], "fills": dict(plain["counts"]["fills"])})
        return out

    def normalized_mean(self, name: str) -> np.ndarray | None:
        """Mean per band on the scale of training, or None without statistics."""
        modality = registry.get(name)
        known = modality.computed or modality.predefined
        span = modality.norm_range() if known else None
        if span is None or not self.mean:
            return None
        means = np.array([s.mean for s in self.mean])
        return (means - span[0]) / (span[1] - span[0])


def suspicions(name: str, seen: Values) -> list[str]:
    """Reasons to think that the values of one file, or of many, are not what training expects."""
    if seen.lo is None or seen.hi is None:
        return []
    lo, hi = float(seen.lo.min()), float(seen.hi.max())
    many = len(seen.darkest) >= _ENOUGH_FILES  # a single dark or bright file is no reason
    units = set(seen.units)
    if name in _OPTICAL:
        units |= {"reflectance"} if 0 < hi <= 2 else {"8-bit"} if many and 0 < hi <= 255 else set()
    if name == "sentinel1" and lo >= 0:
        units.add("linear")
    out = [_UNITS[rule] for rule in _UNITS if rule in units]
    if out:
        return out  # in another unit everything else looks odd too
    if name in _OPTICAL and lo < 0:
        out.append("has negative counts; was an offset subtracted twice?")
    if name == "sentinel2_l2a" and many and np.median(seen.darkest) >= _OFFSET:
        out.append(
            f"the darkest pixels of most files lie above {_OFFSET}: subtract the offset of "
            f"{_OFFSET} that products from 2022 on carry (processing baseline 04.00)"
        )
    if seen.unknown:
        out.append(f"holds codes that do not exist, such as {min(seen.unknown):g}")
    return out + _impossible(name, seen)


def _impossible(name: str, seen: Values) -> list[str]:
    counts = seen.counts
    for fill, some in counts.bad_fills(name):
        if counts.share(counts.fills[fill]) > (_EMPTY if some else values.MOST_IMPOSSIBLE):
            return [f"holds many values of {fill:g}, which stands for missing data"]
    if not seen.unknown and counts.share(counts.impossible) > values.MOST_IMPOSSIBLE:
        return [f"values are not {counts.expected}, which is all that is possible"]
    return []


def fills(name: str, seen: Values) -> list[str]:
    """Values that stand for missing data in other products, even if there are few of them."""
    return [
        f"holds {fill:g} in {seen.counts.share(seen.counts.fills[fill]):.2%} of its values, which "
        f"stands for missing data; {MISSING:.0f} is expected there"
        for fill, some in seen.counts.bad_fills(name)
        if not some or seen.counts.share(seen.counts.fills[fill]) > values.MOST_IMPOSSIBLE
    ]


def far_means(name: str, seen: Values) -> list[str]:
    """Bands whose mean is far from the one that training normalises by."""
    means = seen.normalized_mean(name)
    if means is None:
        return []
    bands = registry.get(name).bands
    return [
        f"band {b} averages {m:.2f} after normalisation, 0.5 is usual"
        for b, m in zip(bands, means, strict=True)
        if abs(m - 0.5) > _FAR
    ]


def time_problems(timestamps: np.ndarray, masks: dict[str, np.ndarray], steps: dict[str, int]):
    """What is wrong with a time axis: timestamps [t, 3] (day, month 0-11, year), masks bool [t]
    and the number of stored timesteps per space-time modality."""
    out: list[str] = []
    rows = timestamps.tolist()
    if not 1 <= len(rows) <= MAX_TIMESTEPS:
        out.append(f"has {len(rows)} timesteps, 1 to {MAX_TIMESTEPS} are supported")
    for row in rows:
        if any(not lo <= n <= hi for n, (lo, hi) in zip(row, DATE_RANGE, strict=True)):
            day, month, year = row
            out.append(f"has the impossible date (day {day}, month {month} of 0-11, year {year})")
            break
    order: Sequence = [(y, m, d) for d, m, y in rows]
    if sorted(order) != list(order):
        out.append("its dates are not in order")
    for name, count in steps.items():
        if name in masks and int(masks[name].sum()) != count:
            out.append(
                f"{name} holds {count} timesteps, but its mask has {int(masks[name].sum())}; "
                f"steps would be put on wrong dates"
            )
    return out
