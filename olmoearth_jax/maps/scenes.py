"""The images of a map: rasters of a list or folder, by period and by grid."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from olmoearth_jax import modalities
from olmoearth_jax.data.raster_file import RasterFile, same_crs, transform_points
from olmoearth_jax.data.rasters import Raster, Stack, read_folder, read_manifest, spread_bands
from olmoearth_jax.dates import parse_date
from olmoearth_jax.inference.sample import Sample

STEPS = ("month", "date")
_OVERVIEW = 256
"""Pixels per side that the units are judged by."""


@dataclasses.dataclass(frozen=True)
class Period:
    """A span of whole months, both included; None for no bound.

    Attributes:
      name: what files of it are called; '' where there is only one without bounds.
      first, last: (year, month 1..12).
    """

    name: str = ""
    first: tuple[int, int] | None = None
    last: tuple[int, int] | None = None

    def holds(self, text: str) -> bool:
        """Whether a date lies in it.

        Raises:
          ValueError: the text is no date.
        """
        day = parse_date(text)
        month = (day.year, day.month)
        return (self.first or month) <= month <= (self.last or month)


def periods_of(years: Sequence[str] = (), spans: Sequence[str] = ()) -> list[Period]:
    """The periods that --years or --periods name; one without bounds if neither does.

    Args:
      years: such as '2023'.
      spans: such as '2023-04/2024-03', months included.

    Raises:
      ValueError: both are given, or texts of another form.
    """
    if years and spans:
        raise ValueError("give --years or --periods, not both")
    out = []
    for text in years:
        if not re.fullmatch(r"\d{4}", text):
            raise ValueError(f"--years are numbers such as 2023, got {text!r}")
        out.append(Period(text, (int(text), 1), (int(text), 12)))
    for text in spans:
        found = re.fullmatch(r"(\d{4})-(\d\d)/(\d{4})-(\d\d)", text)
        parts = [int(p) for p in found.groups()] if found else []
        if not parts or not (1 <= parts[1] <= 12 and 1 <= parts[3] <= 12):
            raise ValueError(f"--periods are spans such as 2023-04/2024-03, got {text!r}")
        first, last = (parts[0], parts[1]), (parts[2], parts[3])
        if last < first:
            raise ValueError(f"the period {text} ends before it begins")
        out.append(Period(text.replace("/", "_"), first, last))
    names = [p.name for p in out]
    if len(set(names)) < len(names):
        raise ValueError(f"a period is named twice: {', '.join(names)}")
    return out or [Period()]


def list_rasters(
    source: str, name: str | None = None, modality: str | None = None, bands: Sequence[str] = ()
) -> tuple[list[Raster], list[str]]:
    """(the rasters of a manifest, a folder with a name pattern, or one file; notes).

    Raises:
      ValueError: there is no such file, or it cannot be read.
    """
    path, notes = Path(source).expanduser(), []
    if not path.exists():
        raise ValueError(f"there is no file {source}")
    if path.is_dir():
        if not name:
            raise ValueError(
                f"{source} is a folder: say how its rasters are named, for example with "
                "--name='{modality}_{date}_{tile}.tif'"
            )
        found, others = read_folder(path, name)
        if others:
            shown = ", ".join(others[:5]) + (" ..." if len(others) > 5 else "")
            notes = [f"{len(others)} files are not named like {name}: {shown}"]
    elif path.suffix.lower() in (".json", ".csv"):
        found = read_manifest(path)
    else:
        found = [Raster(str(path))]
    for raster in found:
        raster.modality = raster.modality or modality or ""
    if bands:
        spread_bands(found, bands)
    return found, notes


@dataclasses.dataclass
class Scene:
    """The images of one period on one grid.

    Attributes:
      period: its time.
      stack: the open rasters.
      zone: name of the grid among those of the period, '' if there is only one.
    """

    period: Period
    stack: Stack
    zone: str = ""

    def sample(self, row: int, col: int, height: int, width: int) -> Sample | None:
        """The images of a window in raw units; None where there is no value at all."""
        window = self.stack.read(slice(row, row + height), slice(col, col + width))
        return sample_of(self.stack, window)

    def lonlat(self, rows: Sequence[float], cols: Sequence[float]) -> tuple[Any, Any]:
        """Longitude and latitude of places in pixels of the grid."""
        t: Any = self.stack.transform
        xs, ys = ([t.c + t.a * c for c in cols], [t.f + t.e * r for r in rows])
        return transform_points(self.stack.crs, "EPSG:4326", xs, ys)


def sample_of(stack: Stack, window: Any, check: bool = False) -> Sample | None:
    """The sample of a window; with `check`, units are looked at."""
    if not any(v.any() for v in window.valid.values()):
        return None
    return Sample.from_arrays(
        window.arrays, stack.dates or None, bands=window.bands, nan_pixels="mask",
        check_units=check,
    )  # fmt: skip


@contextlib.contextmanager
def open_scenes(
    rasters: Sequence[Raster],
    periods: Sequence[Period],
    step: str = "month",
    any_pixel_size: bool = False,
    check_units: bool = True,
):
    """The scenes of rasters, a context manager that gives (scenes, notes).

    Args:
      rasters: in the order in which overlapping ones count.
      periods: those outside of all are not used.
      step: what is one timestep: 'month' or 'date'.

    Raises:
      ValueError: rasters that cannot be used, a period without any, or too many timesteps.
    """
    notes: list[str] = []
    with contextlib.ExitStack() as files:
        scenes, used = [], 0
        for period in periods:
            mine = [_within(r, period, step) for r in rasters]
            mine = [r for r in mine if r is not None]
            used += len(mine)
            if not mine:
                dates = sorted({d for r in rasters for d in r.dates})
                shown = f"{dates[0]} to {dates[-1]}" if dates else "none"
                raise ValueError(
                    f"no raster lies in the period {period.name}; their dates: {shown}"
                )
            _check_steps(mine, period)
            groups = _grids(mine)
            for group, crs in groups:
                stack = files.enter_context(Stack(group, any_pixel_size))
                notes += [n for n in stack.notes if n not in notes]
                code = crs.to_authority()
                zone = "" if len(groups) == 1 else ("_".join(code or ("grid",))).lower()
                scenes.append(Scene(period, stack, zone))
        left = len(rasters) * len(periods) - used
        if periods[0].first and left and len(periods) == 1:
            notes.append(f"{left} rasters lie outside of the period {periods[0].name}: not used")
        if check_units:
            for scene in scenes:
                height, width = scene.stack.shape
                thinned = scene.stack.read(slice(0, height), slice(0, width), _OVERVIEW)
                sample_of(scene.stack, thinned, check=True)
        yield scenes, notes


def _within(raster: Raster, period: Period, step: str) -> Raster | None:
    """The raster if its dates lie in a period, with the dates of its timesteps."""
    if raster.period:
        if period.name and raster.period != period.name:
            return None
    elif raster.dates:
        inside = [period.holds(d) for d in raster.dates]
        if not any(inside):
            return None
        if not all(inside):
            raise ValueError(
                f"{raster.path} holds dates inside and outside of the period {period.name}: cut "
                "it in two"
            )
    dates = raster.dates
    if step == "month":
        dates = [f"{parse_date(d):%Y-%m}" for d in dates]
        if len(set(dates)) < len(dates):
            raise ValueError(
                f"{raster.path} holds several dates of one month; take --step=date, or one date "
                "a month"
            )
    # The name of the period has done its work: a stack takes rasters of one only.
    return dataclasses.replace(raster, date=dates, period="")


def _check_steps(rasters: Sequence[Raster], period: Period) -> None:
    steps = sorted({d for r in rasters for d in r.dates})
    most = modalities.MAX_TIMESTEPS
    if len(steps) > most:
        when = f" of the period {period.name}" if period.name else ""
        raise ValueError(
            f"the rasters{when} have {len(steps)} timesteps, but the models take at most {most}: "
            f"take --step=month, or a shorter period ({', '.join(steps)})"
        )


def _grids(rasters: Sequence[Raster]) -> list[tuple[list[Raster], Any]]:
    """The rasters by CRS, in the order of their first one."""
    groups: list[tuple[list[Raster], Any]] = []
    for raster in rasters:
        with RasterFile(raster.path) as file:
            crs = file.crs
        if crs is None:
            raise ValueError(f"{raster.path} has no coordinate reference system")
        mine = next((group for group, other in groups if same_crs(crs, other)), None)
        if mine is None:
            groups.append(([raster], crs))
        else:
            mine.append(raster)
    return groups
