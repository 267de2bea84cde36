"""What the values of a modality can be, in the unit that the models take.

The table is `value_ranges.json`: possible and usual ranges, and the fill values that products use
without saying so. People's own arrays and rasters are judged here before anything is computed; the
training reader is not.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from olmoearth_jax import modalities
from olmoearth_jax.modalities import MISSING

_OFFSET_SINCE = 20220125
"""First day of the processing baseline that adds 1000 to Sentinel-2 counts."""

MOST_IMPOSSIBLE = 0.001
"""Share of values outside of the possible range that is still taken for noise."""

FLAG_TO_SETTLE = "pass --nocheck_units if the values are right as they are"
HOW_TO_SETTLE = "pass check_units=False if the values are right as they are"
_GIVE_MISSING = f"give NaN or {MISSING:.0f} there"
_SAMPLED = 200_000
_PER_TIMESTEP = 20_000
_SOME_FILLS = {"sentinel1": (-100.0,)}
"""Fills that single pixels may hold: -100 dB is what conversion makes of a power of zero."""


def for_rasters(text: str) -> str:
    """A message of this module in the words of commands that read rasters."""
    text = text.replace(HOW_TO_SETTLE, FLAG_TO_SETTLE)
    return text.replace(_GIVE_MISSING, "declare it as the nodata value of the file")


@functools.cache
def _table() -> dict[str, dict[str, Any]]:
    path = Path(__file__).with_name("value_ranges.json")
    known = json.loads(path.read_text(encoding="utf-8"))
    return {name: record for name, record in known.items() if isinstance(record, dict)}


def possible(name: str) -> list[tuple[float, float]] | None:
    """(lowest, highest) possible value of each band of a modality; None where nothing is known."""
    found = _table().get(name, {}).get("possible")
    bands = modalities.get(name).bands
    if isinstance(found, Mapping):
        return [tuple(found[b]) for b in bands] if all(b in found for b in bands) else None
    return None if found is None else [tuple(found)] * len(bands)


def check_values(
    values: np.ndarray,
    name: str,
    newest: int | None = None,
    normalized: bool = False,
    dtype: Any = None,
    settle: str = HOW_TO_SETTLE,
    each_timestep: bool = True,
) -> None:
    """Looks at raw values of a modality; says at most one thing about what is merely unusual.

    Args:
      values: raw values [..., bands] with all bands in the models' order; NaN and -99999, which
        mean missing, are not judged. Arrays of one axis are taken for values of any band.
      name: modality.
      newest: date of the newest image as yyyymmdd, where known.
      normalized: they are said to be normalised.
      dtype: type in which the values came.
      settle: how a user says that the values are right, for messages.
      each_timestep: hold every timestep of [..., T, bands] to the unit by itself.

    Raises:
      ValueError: values in another unit, impossible ones, or fill values that were not declared.
    """
    x = _table_of(values, name)
    # Most arrays lack nothing, which their ends tell without a table of what is there.
    whole = bool(x.size and np.isfinite(x.max()) and x.min() > MISSING)
    real = None if whole else np.isfinite(x) & (x != np.float32(MISSING))
    few = _thinned(values, modalities.get(name).num_bands)
    flat = few.reshape(-1) if whole else few[np.isfinite(few) & (few != np.float32(MISSING))]
    if not flat.size:
        return
    off = f"; {settle}"
    if normalized:
        _normalized(name, flat, off)
        return
    wrong = wrong_unit(name, flat, dtype) or odd_band(name, few)
    if wrong is None and each_timestep:
        wrong = _odd_timestep(values, name, dtype)
    if wrong:
        raise ValueError(f"{name} {wrong[1]}{off}")
    counts = Tally.of(name, x, real)
    if told := counts.problem(name):
        raise ValueError(f"{name} {told}{off}")
    _unusual(name, few, flat, counts, newest)


def _odd_timestep(values: np.ndarray, name: str, dtype: Any) -> tuple[str, str] | None:
    """`wrong_unit` of the first timestep of [..., T, bands] that is in another unit than the rest,
    which has no weight among all values."""
    modality = modalities.get(name)
    if not modality.multitemporal or values.ndim < 3 or values.shape[-1] != modality.num_bands:
        return None
    for step in range(values.shape[-2] if values.shape[-2] > 1 else 0):
        few = _thinned(values[..., step, :], modality.num_bands, _PER_TIMESTEP)
        flat = few[np.isfinite(few) & (few != np.float32(MISSING))]
        if flat.size and (wrong := wrong_unit(name, flat, dtype) or odd_band(name, few)):
            return wrong[0], f"{wrong[1]} (in timestep {step + 1} of {values.shape[-2]})"
    return None


def _table_of(values: np.ndarray, name: str) -> np.ndarray:
    """The values [n, bands]; [n, 1] of any band where all bands are judged alike, uncopied."""
    bands, limits = modalities.get(name).num_bands, possible(name) or ()
    if values.shape[-1:] == (bands,) and (values.flags.c_contiguous or len(set(limits)) > 1):
        return values.reshape(-1, bands)
    return values.ravel(order="K").reshape(-1, 1)


def _thinned(values: np.ndarray, bands: int, most: int = _SAMPLED) -> np.ndarray:
    """Some rows of the table [n, bands] of values, or of that [n, 1] where bands are not told."""
    step = stride(values.size // most)
    if bands == 1 or values.shape[-1:] != (bands,):
        return values.ravel(order="K")[::step, None]
    lead = values.shape[:-1]
    if not lead:
        return values.reshape(1, bands)
    index = np.unravel_index(np.arange(0, math.prod(lead), step), lead)
    # In the order of memory, which is not that of the axes in views of rasters.
    at = sum(i * s for i, s in zip(index, values.strides, strict=False))
    order = np.argsort(at, kind="stable")
    return values[tuple(i[order] for i in index)]


def stride(least: int) -> int:
    """A step that visits all timesteps, rows and columns of arrays of usual sizes."""
    step = max(1, least)
    while math.gcd(step, 2 * 3 * 5 * 7 * 11) > 1:
        step += 1
    return step


def _normalized(name: str, flat: np.ndarray, off: str) -> None:
    if np.abs(flat).max() > 50:
        raise ValueError(
            f"{name} is said to be normalised (about 0..1), but its values reach "
            f"{np.abs(flat).max():.3g}; leave out normalized=True for raw units{off}"
        )


def wrong_unit(name: str, flat: np.ndarray, dtype: Any = None) -> tuple[str, str] | None:
    """Another unit that values look like.

    Args:
      name: modality.
      flat: values [n] of any bands, without missing ones; n > 0.
      dtype: type in which they came.

    Returns:
      (rule that holds, what to say of it), or None.
    """
    if name == "sentinel1":
        return _radar(flat)
    if name in ("sentinel2_l2a", "landsat"):
        return _optical(name, flat, dtype)
    if name == "era5_10" and 0 < np.abs(flat).max() < 150:
        return "celsius", "must be in K, Pa, m/s and m, but nothing is above 150"
    return None


def odd_band(name: str, x: np.ndarray) -> tuple[str, str] | None:
    """`wrong_unit` of a band of radar values [..., bands] that is power where others are decibel;
    among all values it may have no weight."""
    if name != "sentinel1" or x.shape[-1] < 2:
        return None
    for number, column in enumerate(np.moveaxis(x, -1, 0), 1):
        real = column[np.isfinite(column) & (column != np.float32(MISSING))]
        if real.size and np.percentile(real, 1) >= 0:
            wrong = _radar(real)
            return wrong and (wrong[0], f"{wrong[1]} (in band {number} of {x.shape[-1]} alone)")
    return None


def _radar(flat: np.ndarray) -> tuple[str, str] | None:
    low, middle = (float(v) for v in np.percentile(flat, (1, 50)))
    # Noise removal leaves slightly negative power.
    if low >= 0 or (0 <= middle <= 1.5 and float((flat < -1).mean()) < 0.1):
        return "linear", (
            "must be backscatter in decibel (about -30 to 0), but its values are like linear "
            f"power (median {middle:.3g}): take 10 * log10(x)"
        )
    if low < -500:
        return "hundredths", (
            "must be backscatter in decibel (about -30 to 0), but its values reach "
            f"{low:.0f}, like hundredths of a decibel: divide them by 100"
        )
    return None


def _optical(name: str, flat: np.ndarray, dtype: Any) -> tuple[str, str] | None:
    high = float(np.percentile(flat, 99))
    top, sentinel2 = float(flat.max()), name == "sentinel2_l2a"
    counts = "must be digital numbers (up to about 10000), but its values"
    if 0 < high <= 2.0:
        fix = "multiply by 10000" if sentinel2 else "give the digital numbers"
        like = f"like reflectance in 0..1: {fix}"
        return "reflectance", f"{counts} reach only {high:.3g}, {like}"
    whole = dtype is None or np.dtype(dtype).kind in "iu" or not (flat % 1).any()
    picture = high <= 255 and top == 255 and whole and float((flat > 16).mean()) > 0.5
    if dtype == np.uint8 or picture:
        return "8-bit", (
            f"{counts} are those of an 8-bit picture (0..255): use the original product, not a "
            "rendering"
        )
    if sentinel2 and 2 < high <= 100 and (flat % 1).any():
        return "percent", (
            f"{counts} reach only {high:.3g} and are no whole numbers, like percent: multiply by "
            "100"
        )
    wrapped = float(((flat >= 64000) & (flat < 65535)).mean())
    if sentinel2 and wrapped > MOST_IMPOSSIBLE:
        return "wrapped", (
            f"holds values from 64000 to 65534 ({wrapped:.1%}), like negative numbers that were "
            "stored without a sign: convert them before the offset is removed"
        )
    return None


@dataclasses.dataclass
class Tally:
    """Counts of values that cannot be measurements.

    Attributes:
      total: values that are not missing.
      fills: of each value that products use for 'nothing'; of zeros too.
      impossible: outside of the possible range, or codes that do not exist.
      example: one of these.
      expected: what is possible in its band.
    """

    total: int = 0
    fills: dict[float, int] = dataclasses.field(default_factory=dict)
    impossible: int = 0
    example: float = 0.0
    expected: str = ""

    @classmethod
    def of(cls, name: str, x: np.ndarray, real: np.ndarray | None = None) -> Tally:
        """Counts in values [n, bands], or [n, 1] of any band, where `real` (everywhere if None)."""
        chosen: Any = True if real is None or real.all() else real
        out = cls(x.size if real is None else int(real.sum()))
        if not out.total:
            return out
        ends = (np.inf, -np.inf) if x.dtype.kind == "f" else _ends(x.dtype)
        lo = np.min(x, where=chosen, initial=ends[0])
        hi = np.max(x, where=chosen, initial=ends[1])
        for fill in {0, *_table().get(name, {}).get("fills", ())}:
            if lo <= fill <= hi:
                out.fills[fill] = int(((x == fill) & chosen).sum())
        codes, limits = _table().get(name, {}).get("codes"), possible(name)
        if codes is not None:
            # 0 is what maps hold where they have no class.
            wrong = chosen & ~np.isin(x, (0, *codes))
            out.expected = f"one of {', '.join(map(str, codes))}"
        elif limits is not None:
            if x.shape[1] != len(limits):
                limits = [(min(a for a, _ in limits), max(b for _, b in limits))]
            low, high = np.array(limits).T
            if lo >= low.max() and hi <= high.min():
                return out
            wrong = chosen & ((x < low) | (x > high))
            band = int(wrong.sum(0).argmax())
            out.expected = f"in {low[band]:g}..{high[band]:g}"
        else:
            return out
        out.impossible = int(wrong.sum())
        out.example = float(x[wrong][0]) if out.impossible else 0.0
        return out

    def merge(self, other: Tally) -> None:
        """Adds the counts of other values of the modality."""
        for fill, count in other.fills.items():
            self.fills[fill] = self.fills.get(fill, 0) + count
        if other.impossible and not self.impossible:
            self.example, self.expected = other.example, other.expected
        self.total, self.impossible = self.total + other.total, self.impossible + other.impossible

    def share(self, count: int) -> float:
        return count / max(self.total, 1)

    def bad_fills(self, name: str) -> list[tuple[float, bool]]:
        """(value, whether a few pixels may hold it) of the fills that are no measurements."""
        limits = possible(name)
        lowest = min(lo for lo, _ in limits) if limits else -np.inf
        highest = max(hi for _, hi in limits) if limits else np.inf
        out = []
        for fill, count in sorted(self.fills.items()):
            if not count or (fill == 0 and name != "sentinel1"):
                continue  # 0 may be a measurement: many of them are told as a warning
            outside = not lowest <= fill <= highest or name == "worldcereal"
            out.append((fill, fill in _SOME_FILLS.get(name, ()) or not outside))
        return out

    def problem(self, name: str) -> str | None:
        """What cannot be, with its share, or None."""
        for fill, some in self.bad_fills(name):
            share = self.share(self.fills[fill])
            if share > (MOST_IMPOSSIBLE if some else 0.0):
                return (
                    f"holds {fill:g} in {share:.2%} of its values, which stands for missing "
                    f"data: {_GIVE_MISSING}"
                )
        share = self.share(self.impossible)
        if share > MOST_IMPOSSIBLE:
            unit = _table()[name].get("unit", "raw units")
            return (
                f"must be {self.expected} ({unit}), but {share:.2%} of its values are not, such "
                f"as {self.example:g}"
            )
        return None


def _ends(dtype: np.dtype) -> tuple[Any, Any]:
    if dtype.kind == "b":
        return True, False
    return np.iinfo(dtype).max, np.iinfo(dtype).min


def _unusual(
    name: str, thin: np.ndarray, flat: np.ndarray, counts: Tally, newest: int | None
) -> None:
    """Warns of what is odd about values; `thin` and `flat` are a part of them."""
    record = _table().get(name, {})
    if name == "sentinel2_l2a" and newest is not None:
        columns = [c[np.isfinite(c) & (c != np.float32(MISSING))] for c in thin.T]
        lows = [float(np.percentile(c, 1)) for c in columns if c.size]
        if lows and min(lows) >= 1000:
            # Older ones do if they were made again with today's processor.
            again = newest < _OFFSET_SINCE
            which = "products made again since 2022" if again else "products since January 2022"
            _warn(
                f"{name}: nearly all values of every band are above 1000 (1st percentile "
                f"{min(lows):.0f}); {which} hold an offset of 1000 that must be subtracted (values "
                "below 0 set to 0). If that was done and the scene is bright, ignore this"
            )
            return
    zeros = counts.share(counts.fills.get(0, 0))
    if zeros > record.get("share_of_zeros_warned", 1.0):
        _warn(
            f"{name}: {zeros:.0%} of the values are 0. If that stands for missing data, "
            f"{_GIVE_MISSING}"
        )
        return
    if "typical" in record:
        low, high = record["typical"]
        outside = float(((flat < low) | (flat > high)).mean())
        if outside > 0.5:
            _warn(f"{name}: {outside:.0%} of the values are outside the usual {low:g}..{high:g}")


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=5)


def warnings_of(values: np.ndarray, name: str, **how: Any) -> Sequence[str]:
    """Runs `check_values` and returns its warnings as texts instead of giving them."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        check_values(values, name, **how)
    return [str(w.message) for w in said]
