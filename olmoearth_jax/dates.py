"""Dates of a sample: ISO text or datetimes to (day, month 0..11, year)."""

from __future__ import annotations

import datetime
import re
from collections.abc import Sequence
from typing import Any

import numpy as np


def parse_dates(dates: Sequence[Any] | np.ndarray) -> np.ndarray:
    """int32 [..., T, 3] of (day 1..31, month 0..11, year).

    Args:
      dates: texts ('2024-06-15', '20240615', '2024-06-15T10:30:31Z'; '2024-06' is the 15th), dates
        or datetime64, [T] or [B][T]. The time of day is dropped; times with a zone count in UTC.

    Raises:
      ValueError: not dates, or not in ascending order.
    """
    array = np.asarray(dates)
    if array.dtype.kind in "uif" and not _written_as_numbers(array):
        raise ValueError(
            "dates must be ISO texts such as '2024-06-15' or datetime64, not numbers; integer "
            "triples (day, month 0..11, year) go into timestamps="
        )
    if array.ndim not in (1, 2) or not array.size:
        raise ValueError("dates must be a list of T dates, or one such list per sample")
    if np.ma.is_masked(dates):
        raise ValueError("dates must not be masked: every timestep has one")
    if array.dtype.kind == "M" and np.isnat(array).any():
        raise ValueError("dates must not hold NaT, which is no date")
    days = [parse_date(d) for d in array.reshape(-1)]
    parts = [(d.day, d.month - 1, d.year) for d in days]
    return check_timestamps(np.array(parts).reshape(*array.shape, 3))


def _written_as_numbers(array: np.ndarray) -> bool:
    """Whether all numbers are dates such as 20240615."""
    whole = array.dtype.kind in "ui" and array.size > 0
    return whole and bool(((array >= 1900_01_01) & (array <= 2200_12_31)).all())


def parse_date(written: Any) -> datetime.date:
    """The day of a date, or of a text as products and catalogues write it (see `parse_dates`).

    Raises:
      ValueError: it is no date; the message shows it.
    """
    if isinstance(written, datetime.datetime) and written == written:  # NaT of pandas is not
        zoned = written.tzinfo is not None
        return (written.astimezone(datetime.UTC) if zoned else written).date()
    if isinstance(written, datetime.date) and written == written:
        return written
    if isinstance(written, np.datetime64):
        # One of months or years stands for all of it, as its text does.
        whole = np.datetime_data(written)[0] in "YM" and not np.isnat(written)
        return parse_date(str(written) if whole else written.astype("datetime64[s]").item())
    text = str(written).strip()
    if re.fullmatch(r"\d{4}", text):
        raise ValueError(
            f"{text!r} is a year and no date: name the day, or the month as {text}-06, which "
            "stands for its middle"
        )
    check_one_day(text)
    month = re.fullmatch(r"(\d{4})[-/](\d{2})", text)
    if month:
        text = f"{month[1]}-{month[2]}-15"
    text = re.sub(r"^(\d{4})/(\d{2})/(\d{2})", r"\1-\2-\3", text)
    try:
        return parse_date(datetime.datetime.fromisoformat(text))
    except (ValueError, OverflowError):
        raise ValueError(
            f"{str(written)[:60]!r} is no date: dates are ISO texts such as 2024-06-15 or "
            "20240615, or 2024-06 for the middle of a month"
        ) from None


def check_one_day(text: str) -> None:
    """Raises ValueError for texts of periods that would be taken for their first day."""
    if re.fullmatch(r"\d{4}-?W\d{2}", text):
        raise ValueError(f"{text!r} is a week and no date: name the day")
    if re.fullmatch(r"\d{4}-?\d{2}-?\d{2}\D\d{8}", text):
        # Its second day would be a time: 20230715 is 20:23:07 and a bit.
        raise ValueError(f"{text!r} is a period and no date: name one day, such as its middle")


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
