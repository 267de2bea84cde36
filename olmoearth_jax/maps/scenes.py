"""The images of a map: rasters of a list or folder, by period and by grid."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
from collections.abc import Sequence
from typing import Any

from olmoearth_jax import modalities
from olmoearth_jax.data.raster_file import RasterFile, same_crs, transform_points
from olmoearth_jax.data.rasters import Raster, Stack
from olmoearth_jax.dates import parse_date
from olmoearth_jax.inference.sample import Sample
from olmoearth_jax.maps import imagery, plan
from olmoearth_jax.maps.plan import Period

_OVERVIEW = 256
"""Pixels per side that the units are judged by."""


def periods_of(years: Sequence[str] = (), spans: Sequence[str] = ()) -> list[Period]:
    """The periods that --years or --periods name; one that holds all dates if neither does.

    Raises:
      ValueError: see `plan.periods_of`.
    """
    if not years and not spans:
        return [Period("", datetime.date.min, datetime.date.max)]
    return plan.periods_of(years, spans)


def list_rasters(
    source: str, name: str | None = None, modality: str | None = None, bands: Sequence[str] = ()
) -> tuple[list[Raster], list[str]]:
    """The rasters and notes of `imagery.list_rasters`; a map keeps the grid of its rasters.

    Raises:
      ValueError: see there; or a raster that asks to be resampled.
    """
    found, notes = imagery.list_rasters(source, name, modality, bands)
    for raster in found:
        if raster.resample != "refuse":
            raise ValueError(
                f"{raster.path}: a map has the grid of its rasters, so none is resampled; warp it "
                "first, for example with gdalwarp"
            )
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

    @property
    def align(self) -> int:
        """Pixels whose multiples windows begin at."""
        return 1

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
        if periods[0].name and left and len(periods) == 1:
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
        inside = [period.holds(parse_date(d)) for d in raster.dates]
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
