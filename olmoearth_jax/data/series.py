"""Choosing the timesteps of a long series."""

from __future__ import annotations

import calendar
from collections.abc import Collection, Sequence

Date = tuple[int, int, int]
"""(day, month 0-11, year)."""


def nearest_to_mid_month(dates: Sequence[Date], avoid: Collection[int] = ()) -> list[int]:
    """One timestep per calendar month: that nearest its middle, the first among equals.

    Args:
      dates: of the timesteps, in any order.
      avoid: timesteps that are taken only where their month has no other.

    Returns:
      Indices into `dates`, ascending.
    """
    best: dict[tuple[int, int], tuple[bool, float, int]] = {}
    for index, (day, month, year) in enumerate(dates):
        middle = (calendar.monthrange(year, month + 1)[1] + 1) / 2
        rank = (index in avoid, abs(day - middle), index)
        best[year, month] = min(best.get((year, month), rank), rank)
    return sorted(index for _, _, index in best.values())
