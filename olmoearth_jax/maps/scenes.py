"""The images of a map: rasters of a list or folder, by period and by grid."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
from collections.abc import Iterator, Sequence
from typing import Any

from olmoearth_jax.data.crs import same_crs, transform_points
from olmoearth_jax.data.raster_lattice import LatticeStack
from olmoearth_jax.data.raster_layer import Layer
from olmoearth_jax.data.raster_units import fills
from olmoearth_jax.data.rasters import Raster, Stack
from olmoearth_jax.dates import parse_date
from olmoearth_jax.inference.sample import Sample
from olmoearth_jax.maps import imagery, plan
from olmoearth_jax.maps.imagery import Imagery
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


def with_images(rasters: Sequence[Raster], periods: Sequence[Period], step: str) -> list[Period]:
    """The periods that hold images which vary in time.

    Raises:
      ValueError: there are none.
    """
    moving = [r for r in rasters if _look(r)[1]]
    names = {name for r in moving for name in imagery.in_periods(r, True, periods, step)}
    if not names:
        raise imagery.no_raster_in(periods[0], rasters)
    return [p for p in periods if p.name in names]


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

    Rasters of one CRS keep their grid. If they are of several, or one asks to be resampled, each
    UTM zone is a scene on the lattice of 10 m.

    Args:
      rasters: in the order in which overlapping ones count.
      periods: those outside of all are not used.
      step: what is one timestep: 'month' or 'date'.

    Raises:
      ValueError: rasters that cannot be used, a period without any, or too many timesteps.
    """
    looked = [_look(r) for r in rasters]
    alike = all(same_crs(looked[0][0], crs) for crs, _ in looked[1:])
    with contextlib.ExitStack() as files:
        if alike and all(r.resample == "refuse" for r in rasters):
            moving = [x for _, x in looked]
            scenes, notes = _one_grid(files, rasters, moving, periods, step, any_pixel_size)
            if check_units:
                notes += dict.fromkeys(n for s in scenes for n in _check_units(s.stack))
        else:
            images = Imagery(rasters, periods, step)
            if check_units:
                images.check_units()
            scenes = list(_zones(files, images))
            notes = list(
                dict.fromkeys([*images.notes, *(n for s in scenes for n in s.stack.notes)])
            )
        yield scenes, notes


def _look(raster: Raster) -> tuple[Any, bool]:
    """(CRS, whether it varies in time) of a raster."""
    layer = Layer(raster)
    with layer.file as file:
        if file.crs is None:
            raise ValueError(f"{raster.path} has no coordinate reference system")
        return file.crs, layer.modality.multitemporal


def _one_grid(
    files: contextlib.ExitStack, rasters: Sequence[Raster], moving: Sequence[bool],
    periods: Sequence[Period], step: str, any_pixel_size: bool,
) -> tuple[list[Scene], list[str]]:  # fmt: skip
    """The scenes of rasters of one CRS, on their grid; and notes."""
    placed = [
        imagery.in_periods(r, so, periods, step) for r, so in zip(rasters, moving, strict=True)
    ]
    scenes, notes = [], []
    for period in periods:
        mine = [names[period.name] for names in placed if period.name in names]
        if not mine:
            raise imagery.no_raster_in(period, rasters)
        imagery.check_steps(period.name, (d for r in mine for d in r.dates), step)
        stack = files.enter_context(Stack(mine, any_pixel_size))
        imagery.check_bands(
            (path, name, (b for b, _ in planes), sorted({day for _, day in planes if day}))
            for name in stack.names for path, planes, _ in stack.files_of(name)
        )  # fmt: skip
        notes += [n for n in stack.notes if n not in notes]
        scenes.append(Scene(period, stack))
    unused = sum(not names for names in placed)
    if unused:
        notes.append(f"{unused} of {len(rasters)} rasters lie outside of every period: not used")
    return scenes, notes


def _check_units(stack: Stack) -> list[str]:
    """Notes on the values of a stack; raises ValueError for those in another unit."""
    height, width = stack.shape
    thinned = stack.read(slice(0, height), slice(0, width), _OVERVIEW)
    sample_of(stack, thinned, check=True)
    return fills(thinned)


def _zones(files: contextlib.ExitStack, images: Imagery) -> Iterator[Scene]:
    """A scene for each period and zone."""
    boxes = {p.name: images.boxes(p.name) for p in images.periods}
    several = len({zone for held in boxes.values() for zone in held}) > 1
    for period in images.periods:
        days = [parse_date(text) for text in images.steps[period.name]]
        for zone, box in boxes[period.name].items():
            rasters = images.touching(zone, period.name, box)
            stack = LatticeStack(rasters, zone, images.bands, days)
            files.enter_context(stack)
            stack.crop(box)
            yield Scene(period, stack, f"utm{zone:02d}" if several else "")
