"""Judging what a dataset holds: values in the wrong unit, codes that don't exist, odd dates."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from olmoearth_jax import modalities as registry
from olmoearth_jax.data.stats import StreamingStats
from olmoearth_jax.data.timesteps import DATE_RANGE
from olmoearth_jax.modalities import MAX_TIMESTEPS, MISSING, WORLDCOVER_CODES

OPTICAL = ("sentinel2_l2a", "landsat")
OFFSET = 1000
"""Added to Sentinel-2 counts by processing baselines from 04.00 on; must have been removed."""

_LIMITS = {
    "srtm": (-1000, 9000),
    "worldcereal": (0, 100),
    "openstreetmap_raster": (0, 1),
    "sentinel1": (-101, 60),
    "latlon": (-180, 180),
}
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
      files: number of files.
    """

    dtypes: set[str] = dataclasses.field(default_factory=set)
    lo: np.ndarray | None = None
    hi: np.ndarray | None = None
    mean: list[StreamingStats] = dataclasses.field(default_factory=list)
    darkest: list[float] = dataclasses.field(default_factory=list)
    unknown: set[float] = dataclasses.field(default_factory=set)
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
        for band in range(flat.shape[1]):
            stats = StreamingStats()
            stats.update(flat[:, band])
            out.mean.append(stats)
        if name in OPTICAL:
            positive = flat[flat > 0]
            out.darkest = [float(positive.min())] if len(positive) else []
        if name == "worldcover":
            out.unknown = set(np.unique(flat).tolist()) - {0, *WORLDCOVER_CODES}
        return out

    def merge(self, other: Values) -> None:
        """Adds what was seen of further files."""
        self.dtypes |= other.dtypes
        self.unknown |= other.unknown
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
    out = _optical(name, seen, lo, hi) if name in OPTICAL else []
    if name == "sentinel1" and lo >= 0:
        out.append("looks like linear power; decibels, 10 log10(x), are expected")
    elif name in _LIMITS and not (_LIMITS[name][0] <= lo and hi <= _LIMITS[name][1]):
        low, high = _LIMITS[name]
        out.append(f"values are outside {low} to {high}")
    if name == "era5_10" and seen.hi[0] < 150:
        out.append("temperatures look like degrees Celsius; kelvin are expected")
    if seen.unknown:
        out.append(f"holds codes that do not exist, such as {min(seen.unknown):g}")
    return out


def _optical(name: str, seen: Values, lo: float, hi: float) -> list[str]:
    many = len(seen.darkest) >= _ENOUGH_FILES  # a single dark or bright file is no reason
    if 0 < hi <= 2:
        return ["looks like reflectance 0 to 1; counts (reflectance x 10000) are expected"]
    if many and hi <= 255:
        return ["looks like 8-bit pictures; counts (reflectance x 10000) are expected"]
    if lo < 0:
        return ["has negative counts; was an offset subtracted twice?"]
    if name == "sentinel2_l2a" and many and np.median(seen.darkest) >= OFFSET:
        return [
            f"the darkest pixels of most files lie above {OFFSET}: subtract the offset of "
            f"{OFFSET} that products from 2022 on carry (processing baseline 04.00)"
        ]
    return []


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
