"""Which shards an archive is made of: periods, footprints, and the order of the work."""

from __future__ import annotations

import calendar
import dataclasses
import datetime
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from olmoearth_jax.maps.area import shapely_library
from olmoearth_jax.maps.lattice import Grid, Lattice, grid_around, whole_zone
from olmoearth_jax.modalities import MAX_TIMESTEPS

MOST_SHARD_BYTES = 512 << 20
LARGEST_SIDE, SMALLEST_SIDE = 2048, 64
EXTENTS = ("region", "zone")


@dataclasses.dataclass(frozen=True)
class Period:
    """A span of whole months, one entry of the time axis.

    Attributes:
      name: such as '2024', or '2023-04_2024-03'; part of ids.
      first, last: its days, both included.
    """

    name: str
    first: datetime.date
    last: datetime.date

    def holds(self, day: datetime.date) -> bool:
        """Whether a day lies in it."""
        return self.first <= day <= self.last

    @property
    def is_year(self) -> bool:
        return self.name.isdigit()

    @property
    def days(self) -> list[str]:
        """[first, last] as ISO texts."""
        return [self.first.isoformat(), self.last.isoformat()]


def periods_of(years: Sequence[str] = (), spans: Sequence[str] = ()) -> list[Period]:
    """The periods that --years or --periods name, ascending.

    Args:
      years: such as '2023'.
      spans: such as '2023-04/2024-03', months included.

    Raises:
      ValueError: both or none are given, texts of another form, or periods that overlap.
    """
    if bool(years) == bool(spans):
        raise ValueError("give --years=2023,2024 or --periods=2023-04/2024-03,... (one of them)")
    out = []
    for text in map(str, years):
        if not re.fullmatch(r"\d{4}", text):
            raise ValueError(f"--years: {text!r} is no year")
        out.append(Period(text, datetime.date(int(text), 1, 1), datetime.date(int(text), 12, 31)))
    for text in spans:
        found = re.fullmatch(r"(\d{4})-(\d\d)[/_](\d{4})-(\d\d)", text)
        if not found or not (1 <= int(found[2]) <= 12 and 1 <= int(found[4]) <= 12):
            raise ValueError(f"--periods: {text!r} is not of the form 2023-04/2024-03")
        y0, m0, y1, m1 = map(int, found.groups())
        last = datetime.date(y1, m1, calendar.monthrange(y1, m1)[1])
        first = datetime.date(y0, m0, 1)
        if first > last:
            raise ValueError(f"--periods: {text!r} ends before it begins")
        out.append(Period(text.replace("/", "_"), first, last))
    out.sort(key=lambda p: p.first)
    for one, other in zip(out, out[1:], strict=False):
        if other.first <= one.last:
            raise ValueError(f"the periods {one.name} and {other.name} overlap")
    return out


def months_of(text: str) -> tuple[int, int]:
    """The window of months that --months names: '-6:6' is six before and six from a label's on.

    Raises:
      ValueError: it is none, or of more months than the models take.
    """
    found = re.fullmatch(r"(-?\d+):(-?\d+)", text.strip())
    first, last = map(int, found.groups()) if found else (0, 0)
    if not first < last <= first + MAX_TIMESTEPS:
        raise ValueError(
            f"--months is a window of at most {MAX_TIMESTEPS} months around a label's own, such as "
            f"-6:6 (six before, and six from it on), got {text!r}"
        )
    return first, last


def around(day: datetime.date, months: tuple[int, int]) -> Period:
    """The window of months (`months_of`) around a day."""
    first, last = (12 * day.year + day.month - 1 + k for k in (months[0], months[1] - 1))
    y0, m0, y1, m1 = first // 12, first % 12 + 1, last // 12, last % 12 + 1
    end = datetime.date(y1, m1, calendar.monthrange(y1, m1)[1])
    return Period(f"{y0}-{m0:02d}_{y1}-{m1:02d}", datetime.date(y0, m0, 1), end)


@dataclasses.dataclass(frozen=True)
class Shard:
    """One unit of the work: S x S tokens of one zone and one period.

    Attributes:
      zone: number.
      period: name.
      row, col: R and C on the lattice.
    """

    zone: int
    period: str
    row: int
    col: int

    @property
    def id(self) -> str:
        return f"utm{self.zone:02d}/{self.period}/{self.row}_{self.col}"


def shard_of(text: str) -> Shard:
    """The shard of an id.

    Raises:
      ValueError: it is none.
    """
    found = re.fullmatch(r"utm([0-9]{2})/([\w-]+)/(-?[0-9]{1,9})_(-?[0-9]{1,9})", text)
    if found is None or not 1 <= int(found[1]) <= 60:
        raise ValueError(f"{text!r} is no id of a shard")
    return Shard(int(found[1]), found[2], int(found[3]), int(found[4]))


def touched(shape: Any, lattice: Lattice) -> list[tuple[int, int]]:
    """(R, C) of the shards that a shape in a zone's CRS overlaps with positive area, ascending."""
    shapely = shapely_library()
    if shape.is_empty:
        return []
    west, south, east, north = shape.bounds
    (top, left), (bottom, right) = lattice.shard_at(west, north), lattice.shard_at(east, south)
    shapely.prepare(shape)
    out = []
    for row in range(top, bottom + 1):
        for col in range(left, right + 1):
            square = shapely.box(*lattice.box(row, col))
            if not shape.intersects(square):
                continue
            if shape.contains(square) or shape.intersection(square).area > 0:
                out.append((row, col))
    return out


def make(
    zones: dict[int, Any],
    lattice: Lattice,
    periods: Sequence[Period],
    seen: Callable[[int, Period, tuple[float, float, float, float]], bool] | None = None,
) -> list[Shard]:
    """The shards of an area in plan order.

    Args:
      zones: zone -> the area in its CRS (`area.by_zone`).
      lattice: of the archive.
      periods: ascending.
      seen: whether any raster of a zone and period touches a box; None: everywhere.
    """
    out = []
    for zone in sorted(zones):
        places = touched(zones[zone], lattice)
        for period in periods:
            out += [
                Shard(zone, period.name, row, col)
                for row, col in places
                if seen is None or seen(zone, period, lattice.box(row, col))
            ]
    return out


def grids_of(shards: Iterable[Shard], lattice: Lattice, extent: str = "region") -> dict[int, Grid]:
    """Zone -> the grid of its arrays.

    Args:
      shards: the plan.
      lattice: of the archive.
      extent: 'region' spans what is planned, 'zone' the whole zone.

    Raises:
      ValueError: a shard lies outside of its whole zone.
    """
    places: dict[int, list[tuple[int, int]]] = {}
    for shard in shards:
        places.setdefault(shard.zone, []).append((shard.row, shard.col))
    if extent == "zone":
        found = {zone: whole_zone(zone, lattice) for zone in sorted(places)}
        for zone, grid in found.items():
            rows = [row for row, _ in places[zone]]
            if not grid.top <= min(rows) <= max(rows) < grid.top + grid.rows:
                raise ValueError(
                    f"the area reaches beyond 80 S or 84 N in zone {zone}, where --extent=zone "
                    "ends: take --extent=region"
                )
        return found
    return {zone: grid_around(zone, lattice, places[zone]) for zone in sorted(places)}


def side_of(dimensions: int, itemsize: int) -> int:
    """The default S: the largest power of two whose raw shard has at most 512 MiB."""
    side = LARGEST_SIDE
    while side > SMALLEST_SIDE and dimensions * side * side * itemsize > MOST_SHARD_BYTES:
        side //= 2
    return side


def check_sides(side: int, chunk: int, core: int) -> None:
    """Checks that chunks and the cores of tiles divide a shard.

    Args:
      side: S in tokens.
      chunk: side of a chunk in tokens.
      core: what a tile keeps, in tokens.

    Raises:
      ValueError: they do not; the nearest side that fits is named.
    """
    for what, part in (("chunk", chunk), ("tile's core", core)):
        if part < 1 or side < part or side % part:
            near = max(part, round(side / part) * part) if part > 0 else side
            raise ValueError(
                f"a shard of {side} tokens per side is no multiple of the {what} of {part}: take "
                f"--shard_side={near} or another {'--chunk' if what == 'chunk' else '--tile'}"
            )
