"""Dates of a sample: ISO text or datetimes to (day, month 0..11, year)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def parse_dates(dates: Sequence[Any] | np.ndarray) -> np.ndarray:
    """int32 [..., T, 3] of (day 1..31, month 0..11, year).

    Args:
      dates: ISO texts ('2024-06-15'; '2024-06' is the 15th), dates or datetime64, [T] or [B][T].

    Raises:
      ValueError: not dates, or not in ascending order.
    """
    array = np.asarray(dates)
    if array.dtype.kind in "iuf":
        raise ValueError(
            "dates must be ISO texts such as '2024-06-15' or datetime64, not numbers; integer "
            "triples (day, month 0..11, year) go into timestamps="
        )
    if array.dtype.kind != "M":
        texts = [f"{t}-15" if len(t) == 7 else t for t in (str(d) for d in array.reshape(-1))]
        try:
            array = np.array(texts, "datetime64[D]").reshape(array.shape)
        except ValueError as e:
            raise ValueError(f"dates must be ISO texts such as '2024-06-15': {e}") from None
    if array.ndim not in (1, 2) or not array.size or np.isnat(array).any():
        raise ValueError("dates must be a list of T dates, or one such list per sample")
    days = array.astype("datetime64[D]")
    months = days.astype("datetime64[M]")
    years = days.astype("datetime64[Y]")
    parts = (
        (days - months.astype("datetime64[D]")).astype(int) + 1,
        (months - years.astype("datetime64[M]")).astype(int),
        years.astype(int) + 1970,
    )
    return check_timestamps(np.stack(parts, axis=-1))


def check_timestamps(timestamps: Any) -> np.ndarray:
    """int32 [..., T, 3] of triples (day 1..31, month 0..11, year), checked.

    Raises:
      ValueError: another shape, values out of range, or not in ascending order.
    """
    stamps = np.asarray(timestamps)
    if stamps.ndim not in (2, 3) or stamps.shape[-1] != 3 or stamps.dtype.kind not in "iu":
        raise ValueError(
            "timestamps must be integers [T, 3] or [B, T, 3] of (day, month 0..11, year), got "
            f"{stamps.dtype} {list(stamps.shape)}; ISO texts go into dates="
        )
    day, month, year = (stamps[..., i] for i in range(3))
    if (month > 11).any() or (month < 0).any():
        bad = int(month[(month > 11) | (month < 0)][0])
        raise ValueError(
            f"month {bad} is outside 0..11: months count from 0 (January is 0). Did you pass "
            "1-based months? Subtract 1, or give ISO texts as dates="
        )
    if (day < 1).any() or (day > 31).any() or (year < 1900).any() or (year > 2200).any():
        raise ValueError(
            "timestamps must be (day 1..31, month 0..11, year such as 2024), in this order"
        )
    order = year * 10000 + month * 100 + day
    if (np.diff(order, axis=-1) < 0).any():
        raise ValueError(
            "the dates are not in ascending order; sort them and the time axis alike: "
            "order = np.argsort(dates); dates, array = dates[order], array[:, :, order]"
        )
    return stamps.astype(np.int32)


def newest(stamps: np.ndarray) -> int:
    """The last date as the number yyyymmdd."""
    day, month, year = (stamps[..., i].astype(int) for i in range(3))
    return int((year * 10000 + (month + 1) * 100 + day).max())
