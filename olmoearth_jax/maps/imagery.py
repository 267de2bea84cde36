"""The images that an archive is made from: by zone, period and timestep."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from olmoearth_jax import modalities
from olmoearth_jax.data import values
from olmoearth_jax.data.crs import bounds_in
from olmoearth_jax.data.raster_lattice import PIXEL, LatticeStack, Placed, look_at
from olmoearth_jax.data.raster_list import Raster, read_folder, read_manifest
from olmoearth_jax.data.raster_units import check_files, fills
from olmoearth_jax.data.rasters import spread_bands
from olmoearth_jax.data.remote import AnyPath, location
from olmoearth_jax.dates import parse_date
from olmoearth_jax.inference.sample import Sample
from olmoearth_jax.maps import area, stac
from olmoearth_jax.maps.lattice import LONLAT, crs_of, zone_bounds, zone_of
from olmoearth_jax.maps.plan import Period

STEPS = ("month", "date")
_OVERVIEW = 256
"""Pixels per side that the units are judged by."""
_LOOKED_AT = 8
"""Rasters per modality that the units are judged by."""

_NOTHING_SAID = stac.Options()

Box = tuple[float, float, float, float]
Part = tuple[list[Raster], int, dict[str, list[str]], list[datetime.date]]


def list_rasters(
    source: str,
    name: str | None = None,
    modality: str | None = None,
    bands: Sequence[str] = (),
    items: stac.Options = _NOTHING_SAID,
) -> tuple[list[Raster], list[str]]:
    """(the rasters of a manifest, STAC items, a folder with a name pattern, or one file; notes).

    Args:
      source: a path, or the URL of a manifest, of items, or of one raster.
      items: what is said of STAC items.

    Raises:
      ValueError: there is no such file, or it cannot be read.
    """
    path = location(source)
    path = path.expanduser() if isinstance(path, Path) else path
    found, notes = _listed(path, source, name, items)
    for raster in found:
        raster.modality = raster.modality or modality or ""
        if "://" in raster.path:
            # What a web server or bucket does not give at once may come later.
            os.environ.setdefault("GDAL_HTTP_MAX_RETRY", "3")
            os.environ.setdefault("GDAL_HTTP_RETRY_DELAY", "1")
    if bands:
        spread_bands(found, bands)
    return found, notes


def _listed(
    path: AnyPath, source: str, name: str | None, items: stac.Options
) -> tuple[list[Raster], list[str]]:
    if isinstance(path, Path) and not path.exists():
        raise ValueError(f"there is no file {source}")
    suffix = Path(path.name.partition("?")[0]).suffix.lower()
    folder = path if isinstance(path, Path) and path.is_dir() else None
    if name and folder is None:
        raise ValueError(f"--name is for a folder of rasters, which {source} is not")
    if folder is not None and name:
        found, others = read_folder(folder, name)
        shown = ", ".join(others[:5]) + (" ..." if len(others) > 5 else "")
        notes = [f"{len(others)} files are not named like {name}: {shown}"] if others else []
        return found, notes
    if folder is not None and not any(folder.glob("*.json")):
        raise ValueError(
            f"{source} is a folder without STAC items: say how its rasters are named, for example "
            "with --name='{modality}_{date}_{tile}.tif'"
        )
    if folder is not None or suffix in (".parquet", ".geoparquet"):
        return stac.read(path, items)
    if suffix in (".json", ".geojson"):
        held = None
        with contextlib.suppress(ValueError):  # the manifest's reader says what is wrong
            held = stac.load(path)
        if stac.leads_to_items(held):
            return stac.read(path, items, held)
    if items.assets or items.s2_offset is not None:
        raise ValueError(f"--assets and --s2_offset are for STAC items; {source} holds none")
    if suffix in (".json", ".geojson", ".csv"):
        return read_manifest(path, resample=True), []
    return [Raster(str(path))], []


def in_periods(
    raster: Raster, multitemporal: bool, periods: Sequence[Period], step: str
) -> dict[str, Raster]:
    """Name of each period that a raster belongs to -> the raster with the day of each timestep.

    What does not vary in time belongs to all, unless its own period is named.

    Args:
      step: what is one timestep: 'month', whose day is the 15th, or 'date'.

    Raises:
      ValueError: dates that are none, of several periods, or several of one month.
    """
    names = [p.name for p in periods]
    if raster.period and names != [""]:
        names = [n for n in names if n == raster.period.replace("/", "_")]
    # The name of the period has done its work: a stack takes rasters of one only.
    used = dataclasses.replace(raster, period="")
    if not multitemporal:
        return dict.fromkeys(names, used)
    try:
        dates = [parse_date(text) for text in raster.dates]
    except ValueError as e:
        raise ValueError(f"{raster.path}: {e}") from None
    if dates and not (raster.period and periods[0].name):
        some = [p for p in periods if any(map(p.holds, dates))]
        mixed = [p.name for p in some if not all(map(p.holds, dates))]
        if mixed:
            raise ValueError(
                f"{raster.path} holds dates inside and outside of the period {mixed[0]}: cut it "
                "in two, or name its period in the manifest"
            )
        names = [p.name for p in some]
    if step == "month":
        dates = [d.replace(day=15) for d in dates]
        if len(set(dates)) < len(dates) and names:
            raise ValueError(
                f"{raster.path} holds several dates of one month; take --step=date, or one date "
                "a month"
            )
    used.date = [d.isoformat() for d in dates]
    return dict.fromkeys(names, used)


def no_raster_in(period: Period, rasters: Sequence[Raster]) -> ValueError:
    """The error of a period without rasters."""
    dates = sorted({d for r in rasters for d in r.dates})
    shown = f"their dates are {dates[0]} to {dates[-1]}" if dates else "they have no dates"
    return ValueError(f"no raster lies in the period {period.name}: {shown}")


@dataclasses.dataclass(frozen=True)
class Source:
    """A raster of one period.

    Attributes:
      placed: what is known of it; its raster has the day of each timestep.
      days: of its timesteps; none where nothing varies in time.
      lonlat: bounds in degrees, as `bounds_in` has them.
      asks: whether it may be resampled to other zones than that on whose lattice it lies.
    """

    placed: Placed
    days: tuple[datetime.date, ...]
    lonlat: Box

    @property
    def asks(self) -> bool:
        return self.placed.raster.resample != "refuse"


class Imagery:
    """Rasters by period, looked at once and opened where they are needed.

    Attributes:
      periods: ascending.
      bands: modality -> bands of every window, in sample order.
      steps: period -> the texts of its timesteps, ascending.
      notes: sentences on what was done with the rasters.
    """

    def __init__(self, rasters: Sequence[Raster], periods: Sequence[Period], step: str = "month"):
        """Looks at all rasters.

        Args:
          rasters: in the order in which overlapping ones count.
          periods: those outside of all are counted and not used.
          step: what is one timestep: 'month' or 'date'.

        Raises:
          ValueError: rasters that cannot be used, or not together; too many timesteps.
        """
        self.periods, self.notes = list(periods), []
        self._of: dict[str, list[Source]] = {p.name: [] for p in periods}
        self._cached: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = {}
        days: dict[str, set[datetime.date]] = {p.name: set() for p in periods}
        bands: dict[str, list[str]] = {}
        unused = 0
        for raster in rasters:
            placed = look_at(raster)
            sources = self._sources(placed, step)
            unused += not sources
            for period, source in sources.items():
                self._of[period].append(source)
                days[period].update(source.days)
            if sources:
                held = bands.setdefault(placed.modality, [])
                held += [b for b in placed.bands if b not in held]
        if unused:
            self.notes.append(f"{unused} of {len(rasters)} rasters lie outside of every period: "
                              "not used")  # fmt: skip
        for period in periods:
            if not self._of[period.name]:
                raise no_raster_in(period, rasters)
        for name, found in self._of.items():
            check_bands((s.placed.raster.path, s.placed.modality, s.placed.bands, s.days)
                        for s in found)  # fmt: skip
            _check_repeats(found)
            check_steps(name, days[name], step)
        self.bands = {n: bands[n] for n in modalities.in_sample_order(bands)}
        self._days = {name: sorted(found) for name, found in days.items()}
        form = "%Y-%m" if step == "month" else "%Y-%m-%d"
        self.steps = {n: [d.strftime(form) for d in ds] for n, ds in self._days.items()}

    def _sources(self, placed: Placed, step: str) -> dict[str, Source]:
        """Period -> the raster as it is used there."""
        bounds = bounds_in(placed.crs, placed.box)
        if placed.multitemporal and not placed.raster.dates:
            raise ValueError(f"{placed.raster.path} has no date: give one in the manifest")
        used = in_periods(placed.raster, placed.multitemporal, self.periods, step)
        out = {}
        for name, raster in used.items():
            days = [parse_date(d) for d in raster.dates] if placed.multitemporal else []
            out[name] = Source(dataclasses.replace(placed, raster=raster), tuple(days), bounds)
        return out

    def keep(self, names: Sequence[str]) -> None:
        """Uses only these modalities.

        Raises:
          ValueError: there are none of them.
        """
        left = [n for n in self.bands if n not in names]
        if len(left) == len(self.bands):
            raise ValueError(
                f"the rasters show {', '.join(left)}, but the model takes {', '.join(names)}"
            )
        if left:
            self.notes.append(f"left out {', '.join(left)}: the model was not trained to see them")
        self.bands = {n: b for n, b in self.bands.items() if n in names}
        for name, found in self._of.items():
            self._of[name] = [s for s in found if s.placed.modality in names]
        self._cached = {}

    def days(self, period: str) -> list[datetime.date]:
        """One day per timestep of a window, as many in every period.

        Shorter periods repeat their last day, for which there is no raster.
        """
        # So that the windows of all periods have one shape.
        most = max(len(d) for d in self._days.values()) or 1
        own = self._days[period] or [next(p.first for p in self.periods if p.name == period)]
        return own + own[-1:] * (most - len(own))

    def sources(self, period: str) -> list[Source]:
        """The rasters of a period in manifest order."""
        return self._of[period]

    def touching(self, zone: int, period: str, box: Box) -> list[Raster]:
        """The rasters of a period that overlap a box of a zone, in manifest order."""
        return [self._of[period][k].placed.raster for k in self.places(zone, period, box)]

    def places(self, zone: int, period: str, box: Box) -> np.ndarray:
        """Numbers among `sources` of those of `touching`."""
        own, wide, zones, asks = self._boxes(period)
        hit = (zones == zone) & _overlaps(own, box)
        others = (zones != zone) & asks
        if others.any():
            west, south, east, north = bounds_in(crs_of(zone), box)
            for turn in (-360, 0, 360):
                hit |= others & _overlaps(wide, (west + turn, south, east + turn, north))
        return np.flatnonzero(hit)

    def _boxes(self, period: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(boxes [N, 4] in the CRS of their zones, in degrees, zones [N] with 0 for none, whether
        they may be resampled [N])."""
        if period not in self._cached:
            found = self._of[period]
            own, wide = ([s.placed.box for s in found], [s.lonlat for s in found])
            zones = np.array([s.placed.zone or 0 for s in found])
            asks = np.array([s.asks for s in found])
            self._cached[period] = np.array(own), np.array(wide), zones, asks
        return self._cached[period]

    def part(self, zone: int, period: str, box: Box) -> Part:
        """What `LatticeStack` takes, of the rasters that touch a box of a zone."""
        return self.touching(zone, period, box), zone, self.bands, self.days(period)

    def boxes(self, period: str) -> dict[int, Box]:
        """Zone -> the box in its CRS around what the rasters of a period show of it, ascending."""
        found: dict[int, list[Box]] = {}
        for source in self._of[period]:
            placed = source.placed
            if placed.zone is not None:
                found.setdefault(placed.zone, []).append(placed.box)
                continue
            for zone, shape in area.by_zone(area.of_box(source.lonlat)).items():
                found.setdefault(zone, []).append(shape.bounds)
        out = {}
        for zone in sorted(found):
            west, south, east, north = zip(*found[zone], strict=True)
            out[zone] = min(west), min(south), max(east), max(north)
        return out

    def area(self) -> dict[int, Any]:
        """Zone -> what the rasters cover of its 6 degrees, in its CRS."""
        shapely = area.shapely_library()
        boxes: dict[int, list[Any]] = {}
        alone: dict[int, list[Any]] = {}
        for source in {id(s): s for found in self._of.values() for s in found}.values():
            placed = source.placed
            if placed.zone is not None:
                of = boxes if source.asks else alone
                of.setdefault(placed.zone, []).append(shapely.box(*placed.box))
            if source.asks:
                for zone, shape in area.by_zone(area.of_box(source.lonlat)).items():
                    boxes.setdefault(zone, []).append(shape)
        found = {}
        for zone in sorted({*boxes, *alone}):
            refusing = shapely.union_all(alone.get(zone, []))
            whole = shapely.union_all([refusing, *boxes.get(zone, [])])
            strip = _strip(zone, whole)
            kept = refusing.intersection(strip).area
            if kept < 0.999 * refusing.area:
                part = 100 * (1 - kept / refusing.area)
                self.notes.append(
                    f"{part:.0f} % of what the rasters of zone {zone} cover lies in its neighbours "
                    "and is not used; resample 'nearest' in the manifest brings it to their lattice"
                )
            cut = whole.intersection(strip)
            if cut.area > 0:
                found[zone] = cut
        return found

    def check_units(self) -> None:
        """Looks at the values of some rasters of each modality, thinned out; adds to `notes`.

        Raises:
          ValueError: values in another unit than the model's.
        """
        for name in self.bands:
            of = [s for found in self._of.values() for s in found if s.placed.modality == name]
            for source in of[:: max(1, -(-len(of) // _LOOKED_AT))]:
                placed = source.placed
                zone = placed.zone or zone_of(sum(source.lonlat[::2]) / 2)
                days = list(source.days) or [datetime.date(2000, 1, 1)]
                bands = {name: list(placed.bands)}
                with LatticeStack([placed.raster], zone, bands, days) as stack:
                    box = placed.box
                    if not placed.zone:
                        box = bounds_in(LONLAT, source.lonlat, crs_of(zone))
                    west, south, east, north = box
                    window = stack.read(
                        slice(int(-north // PIXEL), int(-south // PIXEL)),
                        slice(int(west // PIXEL), int(east // PIXEL)), _OVERVIEW,
                    )  # fmt: skip
                    check_files(stack, window)
                    self.notes += [n for n in fills(window) if n not in self.notes]
                    try:
                        if window.valid[name].any():
                            Sample.from_arrays(window.arrays, stack.dates, bands=window.bands,
                                               nan_pixels="mask")  # fmt: skip
                    except ValueError as e:
                        told = values.for_rasters(str(e))
                        raise ValueError(f"{placed.raster.path}: {told}") from None

    def changed_since(self, when: float) -> list[str]:
        """Files of this machine that were written after a time in seconds; paths, each once."""
        paths = dict.fromkeys(s.placed.raster.path for found in self._of.values() for s in found)
        return [p for p in paths if Path(p).is_file() and Path(p).stat().st_mtime > when]

    def rows(self) -> list[dict[str, Any]]:
        """What is said of each raster, and its size, without its path: for the job's digest."""
        out = []
        for period, found in self._of.items():
            for s in found:
                r = s.placed.raster
                path = Path(r.path)
                out.append({
                    "period": period, "modality": s.placed.modality, "bands": list(s.placed.bands),
                    "dates": [d.isoformat() for d in s.days], "offset": r.offset,
                    "scale": r.scale, "nodata": None if r.nodata is None else str(r.nodata),
                    "resample": r.resample, "box": list(s.placed.box), "zone": s.placed.zone,
                    "bytes": path.stat().st_size if path.is_file() else None,
                })  # fmt: skip
        return out


def _overlaps(boxes: np.ndarray, box: Box) -> np.ndarray:
    """bool [N]: which boxes [N, 4] share an area with one."""
    west, south, east, north = boxes.T
    return (west < box[2]) & (box[0] < east) & (south < box[3]) & (box[1] < north)


def _strip(zone: int, shape: Any) -> Any:
    """The 6 degrees of a zone around a shape of its CRS."""
    shapely, (west, east) = area.shapely_library(), zone_bounds(zone)
    _, south, _, north = bounds_in(crs_of(zone), shape.bounds)
    south, north = max(south - 0.1, -89.0), min(north + 0.1, 89.0)
    box = shapely.segmentize(shapely.box(west, south, east, north), area.DENSE)
    return area.project(box, LONLAT, crs_of(zone))


def check_bands(rasters: Iterable[tuple[str, str, Iterable[str], Iterable[Any]]]) -> None:
    """Checks that rasters of one modality and timestep hold the same bands, or share none.

    Args:
      rasters: path, modality, bands, and the days of the timesteps of each; no day where nothing
        varies in time.

    Raises:
      ValueError: two do not; both are named.
    """
    held: dict[Any, list[tuple[str, frozenset[str]]]] = {}
    for own, modality, bands, days in rasters:
        mine = frozenset(bands)
        for day in list(days) or [""]:
            others = held.setdefault((modality, day), [])
            for path, there in others:
                if there != mine and there & mine:
                    when = f" of {str(day)[:7]}" if day else ""
                    raise ValueError(
                        f"{path} and {own} are both {modality}{when}, but hold different bands "
                        f"({', '.join(sorted(there ^ mine))} only in one)"
                    )
            if all(there != mine for _, there in others):
                others.append((own, mine))


def _check_repeats(sources: Sequence[Source]) -> None:
    """Coarse pixels are repeated only beside fine ones of the same modality."""
    fine = {s.placed.modality for s in sources if s.placed.repeat == 1}
    for source in sources:
        placed = source.placed
        asked = placed.raster.resample != "refuse"
        if placed.repeat > 1 and placed.modality not in fine and not asked:
            raise ValueError(
                f"{placed.raster.path} has pixels of {PIXEL * placed.repeat:g} m, but the models "
                "were trained on 10 m: warp it to 10 m, or give resample 'nearest' in the manifest"
            )


def check_steps(period: str, days: Iterable[Any], step: str) -> None:
    """Raises ValueError if a period has more timesteps than the models take."""
    shown = sorted(str(day)[: 7 if step == "month" else 10] for day in set(days))
    if len(shown) > modalities.MAX_TIMESTEPS:
        when = f" of the period {period}" if period else ""
        raise ValueError(
            f"the rasters{when} have {len(shown)} timesteps, but the models take at most "
            f"{modalities.MAX_TIMESTEPS}: take --step=month, or a shorter period "
            f"({', '.join(shown)})"
        )
