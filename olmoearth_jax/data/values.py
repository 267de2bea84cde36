"""What the values of a modality can be, in the unit that the models take.

The table is `value_ranges.json`: possible and usual ranges, and the fill values that products use
without saying so. People's own arrays and rasters are judged here before anything is computed; the
training reader is not.
"""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from olmoearth_jax import modalities
from olmoearth_jax.modalities import MISSING

OFFSET_SINCE = 20220125
"""First day of the processing baseline that adds 1000 to Sentinel-2 counts."""

MOST_IMPOSSIBLE = 0.001
"""Share of values outside of the possible range that is still taken for noise."""

HOW_TO_SETTLE = "pass check_units=False if the values are right as they are"
_SAMPLED = 200_000
_SOME_FILLS = {"sentinel1": (-100.0,)}
"""Fills that single pixels may hold: -100 dB is what conversion makes of a power of zero."""


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

    Raises:
      ValueError: values in another unit, impossible ones, or fill values that were not declared.
    """
    bands = modalities.get(name).num_bands
    x = values.reshape(-1, bands) if values.shape[-1:] == (bands,) else values.reshape(-1, 1)
    real = np.isfinite(x) & (x != np.float32(MISSING))
    flat = x[:: max(1, len(x) // _SAMPLED)]
    flat = flat[real[:: max(1, len(x) // _SAMPLED)]]
    if not flat.size:
        return
    off = f"; {settle}"
    if normalized:
        _normalized(name, flat, off)
        return
    _unit(name, flat, dtype, off)
    _fills(name, x, real, off)
    _impossible(name, x, real, off)
    _unusual(name, x, real, newest)


def _normalized(name: str, flat: np.ndarray, off: str) -> None:
    if np.abs(flat).max() > 50:
        raise ValueError(
            f"{name} is said to be normalised (about 0..1), but its values reach "
            f"{np.abs(flat).max():.3g}; leave out normalized=True for raw units{off}"
        )


def _unit(name: str, flat: np.ndarray, dtype: Any, off: str) -> None:
    if name == "sentinel1":
        _radar(flat, off)
    elif name in ("sentinel2_l2a", "landsat"):
        _optical(name, flat, dtype, off)
    elif name == "era5_10" and 0 < np.abs(flat).max() < 150:
        raise ValueError(f"era5_10 must be in K, Pa, m/s and m, but nothing is above 150{off}")


def _radar(flat: np.ndarray, off: str) -> None:
    low, middle = (float(v) for v in np.percentile(flat, (1, 50)))
    # Noise removal leaves slightly negative power.
    linear = 0 <= middle <= 1.5 and float((flat < -1).mean()) < 0.1
    if linear or low >= 0:
        raise ValueError(
            f"sentinel1 must be backscatter in decibel (about -30 to 0), but its values are "
            f"like linear power (median {middle:.3g}): take 10 * log10(x){off}"
        )
    if low < -500:
        raise ValueError(
            f"sentinel1 must be backscatter in decibel (about -30 to 0), but its values reach "
            f"{low:.0f}, like hundredths of a decibel: divide them by 100{off}"
        )


def _optical(name: str, flat: np.ndarray, dtype: Any, off: str) -> None:
    high = float(np.percentile(flat, 99))
    top, sentinel2 = float(flat.max()), name == "sentinel2_l2a"
    if 0 < high <= 2.0:
        fix = "multiply by 10000" if sentinel2 else "give the digital numbers"
        raise ValueError(
            f"{name} must be digital numbers (up to about 10000), but its values reach only "
            f"{high:.3g}, like reflectance in 0..1: {fix}{off}"
        )
    whole = dtype is None or np.dtype(dtype).kind in "iu" or not (flat % 1).any()
    picture = high <= 255 and top == 255 and whole and float((flat > 16).mean()) > 0.5
    if dtype == np.uint8 or picture:
        raise ValueError(
            f"{name} must be digital numbers (up to about 10000), but its values are those of "
            f"an 8-bit picture (0..255): use the original product, not a rendering{off}"
        )
    if sentinel2 and 2 < high <= 100 and (flat % 1).any():
        raise ValueError(
            f"{name} must be digital numbers (up to about 10000), but its values reach only "
            f"{high:.3g} and are no whole numbers, like percent: multiply by 100{off}"
        )
    wrapped = float(((flat >= 64000) & (flat < 65535)).mean())
    if sentinel2 and wrapped > MOST_IMPOSSIBLE:
        raise ValueError(
            f"{name} holds values from 64000 to 65534 ({wrapped:.1%}), like negative numbers "
            f"that were stored without a sign: convert them before the offset is removed{off}"
        )


def _fills(name: str, x: np.ndarray, real: np.ndarray, off: str) -> None:
    """Refuses constants that products use for 'nothing', where they cannot be measurements."""
    limits = possible(name)
    lowest = min(lo for lo, _ in limits) if limits else -np.inf
    highest = max(hi for _, hi in limits) if limits else np.inf
    for fill in _table().get(name, {}).get("fills", ()):
        share = float((x == fill).sum()) / max(int(real.sum()), 1)
        outside = not lowest <= fill <= highest or name == "worldcereal"
        some = fill in _SOME_FILLS.get(name, ()) or not outside
        allowed = MOST_IMPOSSIBLE if some else 0.0
        if fill == 0 and name != "sentinel1":
            continue  # may be a measurement: many of them are told as a warning
        if share > allowed:
            raise ValueError(
                f"{name} holds {fill:g} in {share:.2%} of its values, which stands for missing "
                f"data: give NaN or {MISSING:.0f} there{off}"
            )


def _impossible(name: str, x: np.ndarray, real: np.ndarray, off: str) -> None:
    codes = _table().get(name, {}).get("codes")
    if codes is not None:
        # 0 is what maps hold where they have no class.
        wrong = real & ~np.isin(x, (0, *codes))
        expected = f"one of {', '.join(map(str, codes))}"
    else:
        limits = possible(name)
        if limits is None:
            return
        if x.shape[1] != len(limits):
            limits = [(min(lo for lo, _ in limits), max(hi for _, hi in limits))]
        low, high = np.array(limits).T
        wrong = real & ((x < low) | (x > high))
        band = int(wrong.sum(0).argmax())
        expected = f"in {low[band]:g}..{high[band]:g}"
    share = float(wrong.sum()) / max(int(real.sum()), 1)
    if share > MOST_IMPOSSIBLE:
        example = float(x[wrong][0])
        raise ValueError(
            f"{name} must be {expected} ({_table()[name].get('unit', 'raw units')}), but "
            f"{share:.2%} of its values are not, such as {example:g}{off}"
        )


def _unusual(name: str, x: np.ndarray, real: np.ndarray, newest: int | None) -> None:
    record = _table().get(name, {})
    if name == "sentinel2_l2a" and (newest or 0) >= OFFSET_SINCE:
        thin = slice(None, None, max(1, len(x) // _SAMPLED))
        columns = zip(x[thin].T, real[thin].T, strict=True)
        lows = [float(np.percentile(c[r], 1)) for c, r in columns if r.any()]
        if lows and min(lows) >= 1000:
            _warn(
                f"{name}: nearly all values of every band are above 1000 (1st percentile "
                f"{min(lows):.0f}); products since January 2022 hold an offset of 1000 that must "
                "be subtracted (values below 0 set to 0). If that was done and the scene is "
                "bright, ignore this"
            )
            return
    count = max(int(real.sum()), 1)
    zeros = float(((x == 0) & real).sum()) / count
    if zeros > record.get("share_of_zeros_warned", 1.0):
        _warn(
            f"{name}: {zeros:.0%} of the values are 0. If that stands for missing data, give NaN "
            f"or {MISSING:.0f} there"
        )
        return
    if "typical" in record:
        low, high = record["typical"]
        outside = float((real & ((x < low) | (x > high))).sum()) / count
        if outside > 0.5:
            _warn(f"{name}: {outside:.0%} of the values are outside the usual {low:g}..{high:g}")


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=6)


def warnings_of(values: np.ndarray, name: str, **how: Any) -> Sequence[str]:
    """Runs `check_values` and returns its warnings as texts instead of giving them."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        check_values(values, name, **how)
    return [str(w.message) for w in said]
