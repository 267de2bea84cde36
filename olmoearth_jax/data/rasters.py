"""Rasters of one area as one stack, read window by window: bands, timesteps and scenes together.

Files may be stored in any direction, hold some of the bands or several timesteps, overlap, or lie
beside each other. They must lie on one grid: nothing is resampled, except that pixels of bands that
a product has at half the resolution are repeated.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from olmoearth_jax import modalities
from olmoearth_jax.data.crs import crs_difference, ground_pixel_size, same_crs
from olmoearth_jax.data.raster_file import RasterFile
from olmoearth_jax.data.raster_layer import Layer
from olmoearth_jax.data.raster_list import Raster, name_pattern, read_folder, read_manifest
from olmoearth_jax.data.series import nearest_to_mid_month
from olmoearth_jax.data.timesteps import DATE_RANGE
from olmoearth_jax.dates import parse_date
from olmoearth_jax.modalities import MAX_TIMESTEPS

__all__ = [
    "Raster",
    "Stack",
    "Window",
    "locate",
    "name_pattern",
    "read_folder",
    "read_manifest",
    "scaled",
    "spread_bands",
]

_OFF = 0.01
"""Pixels by which a corner may miss the grid: noise of tools that write it as text."""
_MOST_EMPTY = 20
"""Times the area of all rasters that their common rectangle may have."""


def scaled(transform: Any, factor: float) -> Any:
    """The affine map of a grid whose pixels are `factor` times as large."""
    t = transform
    return type(t)(t.a * factor, t.b * factor, t.c, t.d * factor, t.e * factor, t.f)


@dataclasses.dataclass(frozen=True)
class Window:
    """A part of a stack.

    Attributes:
      arrays: per modality float32 [H, W, T, C] in the models' unit, T = 1 for maps, NaN where
        missing; a modality of finer pixels has as many more of them.
      bands: per modality the names of its C bands.
      transform, crs: place of its pixels of 10 m, as rasterio has them.
    """

    arrays: dict[str, np.ndarray]
    bands: dict[str, list[str]]
    transform: Any
    crs: Any

    @property
    def valid(self) -> dict[str, np.ndarray]:
        """Per modality bool [H, W, T, C]: there is a value."""
        return {name: ~np.isnan(x) for name, x in self.arrays.items()}


class Stack:
    """Open rasters of one grid; a context manager.

    Attributes:
      names: the modalities.
      dates: the distinct days, ascending, as yyyy-mm-dd.
      shape: (H, W) in pixels of 10 m, of the rectangle around all rasters.
      crs, transform: of that grid, as rasterio has them.
      notes: sentences on what was done with the rasters.
    """

    def __init__(
        self,
        rasters: Sequence[Raster],
        any_pixel_size: bool = False,
        dates: Sequence[str] = (),
        over: str = "refuse",
    ):
        """Opens rasters.

        Args:
          rasters: in the order in which overlapping ones count.
          any_pixel_size: take pixels of another size than 10 m.
          dates: of the rasters without one: one each, or one per timestep of each, or all
            timesteps of all rasters in a row.
          over: what to do with more dates than the models take: 'refuse', 'select' the one of each
            month that is nearest its middle, or 'keep' them all, for `select`.

        Raises:
          ValueError: rasters that cannot be used, or not together.
        """
        if not rasters:
            raise ValueError("there are no rasters to embed")
        self._layers: list[Layer] = []
        try:
            for raster in rasters:
                self._layers.append(Layer(raster))
            _check_periods(rasters)
            self._days, self.notes = _assign_dates(self._layers, dates), []
            if len(self._days) > MAX_TIMESTEPS and over != "keep":
                self._shorten(over)
            self._place(any_pixel_size)
        except BaseException:
            self.close()
            raise
        self.dates = [day.isoformat() for day in self._days]
        self.names = modalities.in_sample_order({x.modality.name for x in self._layers})
        self._bands = {
            name: list(dict.fromkeys(b for x in self._of(name) for b in x.bands))
            for name in self.names
        }
        self.notes += self._notes()

    def __enter__(self) -> Stack:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Closes the files."""
        for layer in self._layers:
            layer.file.close()

    @property
    def files(self) -> list[str]:
        """Every file that is read, those that virtual rasters name too."""
        return [path for layer in self._layers for path in layer.file.files]

    def dates_of(self, name: str) -> list[str]:
        """The distinct days of a modality's images, ascending, as yyyy-mm-dd."""
        days = {day for x in self._of(name) for _, day in x.planes()}
        return sorted(day.isoformat() for day in days if day)

    def bands_of(self, name: str) -> list[str]:
        """The bands of a modality that any of its rasters holds."""
        return list(self._bands[name])

    def files_of(self, name: str) -> list[tuple[str, list[tuple[str, str]], Any]]:
        """Of each raster of a modality: path, (band, day) of what it holds with '' for no day, and
        the type of its values if they are read as they are stored, else None."""
        return [
            (x.path, [(b, day.isoformat() if day else "") for b, day in x.planes()], x.dtype)
            for x in self._of(name)
        ]

    def _of(self, name: str) -> list[Layer]:
        return [x for x in self._layers if x.modality.name == name]

    def _shorten(self, over: str) -> None:
        """Keeps one date a month, chosen among those of the modality that has most of them."""
        every = len(self._days)
        if over != "select":
            shown = ", ".join(map(str, self._days[:15])) + (" ..." if every > 15 else "")
            raise ValueError(
                f"the rasters have {every} dates, but the models take at most {MAX_TIMESTEPS}: "
                f"leave some out, or pass --over=select for one a month ({shown})"
            )
        of: dict[str, set[datetime.date]] = {}
        for layer in self._layers:
            of.setdefault(layer.modality.name, set()).update(layer.dates)
        lead = sorted(max(of.values(), key=len))
        kept = nearest_to_mid_month([(d.day, d.month - 1, d.year) for d in lead])
        self._days = [lead[k] for k in kept]
        for name, days in of.items():
            if days and not days & set(self._days):
                raise ValueError(
                    f"no date of {name} is among the {len(self._days)} that --over=select keeps: "
                    "give all images of a month one date, such as 2023-06"
                )
        if len(self._days) > MAX_TIMESTEPS:
            raise ValueError(
                f"the rasters are of {len(self._days)} months, but the models take at most "
                f"{MAX_TIMESTEPS} dates: leave some out"
            )
        self.notes = [f"{len(self._days)} of {every} dates kept, the nearest to mid-month each"]
        self._drop(dict.fromkeys(of, self._days))

    def select(self, days: Mapping[str, Sequence[str]]) -> None:
        """Keeps these days (yyyy-mm-dd) of each modality whose images have days."""
        kept = {n: [datetime.date.fromisoformat(day) for day in own] for n, own in days.items()}
        self._drop(kept)
        self._days = sorted({day for own in kept.values() for day in own})
        self.dates = [day.isoformat() for day in self._days]

    def _drop(self, days: Mapping[str, Sequence[datetime.date]]) -> None:
        """Closes and forgets what was taken on other days than these, per modality."""
        for layer in list(self._layers):
            layer.keep(days.get(layer.modality.name, ()))
            if not layer.planes():
                layer.file.close()
                self._layers.remove(layer)

    def _place(self, any_pixel_size: bool) -> None:
        first = self._layers[0]
        for layer in self._layers:
            file = layer.file
            if file.crs is None:
                raise ValueError(f"{layer.path} has no coordinate reference system")
            if not file.placed:
                raise ValueError(f"{layer.path} says nothing of its place on the ground")
            if not same_crs(first.file.crs, file.crs):
                what = crs_difference(file.crs, first.file.crs)
                raise _other_grid(layer, first, what)
        self.crs = first.file.crs
        # The finest pixels are those of the grid.
        sizes = [
            (x.file.transform.a * x.modality.image_factor,
             -x.file.transform.e * x.modality.image_factor) for x in self._layers
        ]  # fmt: skip
        width, height = (min(size) for size in zip(*sizes, strict=True))
        anchor = self._layers[sizes.index(min(sizes))]
        t = anchor.file.transform
        boxes = [locate(x, anchor, (t.c, t.f), (width, height)) for x in self._layers]
        corner = (min(int(np.floor(b[k])) for b in boxes) for k in (0, 1))
        self.transform = type(t)(width, 0.0, t.c, 0.0, -height, t.f)
        self._crop(*corner, *(max(int(np.ceil(b[k])) for b in boxes) for k in (2, 3)))
        self._check_repeats()
        if not any_pixel_size:
            self._check_pixel_size(anchor)
        area = sum((b[2] - b[0]) * (b[3] - b[1]) for b in boxes)
        if self.shape[0] * self.shape[1] > _MOST_EMPTY * area:
            raise ValueError(
                f"the rasters lie far apart: the rectangle around them has {self.shape[0]} x "
                f"{self.shape[1]} pixels, nearly all of them empty. Embed them one by one"
            )

    def _check_repeats(self) -> None:
        """Coarse pixels are repeated beside fine ones of the same image only."""
        for layer in self._layers:
            if layer.repeat == (1, 1):
                continue
            beside = [
                x for x in self._of(layer.modality.name)
                if x.repeat == (1, 1) and (not x.dates or set(x.dates) & set(layer.dates))
            ]  # fmt: skip
            down, across = layer.repeat
            if not beside:
                fine = next(x for x in self._layers if x.repeat == (1, 1))
                pixels = f"its pixels are {down} x {across} times as large"
                raise _other_grid(layer, fine, pixels)
            ours = set(layer.planes())
            for other in beside:
                both = ours & set(other.planes())
                if both:
                    raise ValueError(
                        f"{layer.path} and {other.path} both hold {min(b for b, _ in both)}, with "
                        "pixels of different sizes: leave one of them out"
                    )

    def _check_pixel_size(self, anchor: Layer) -> None:
        try:
            width, height = ground_pixel_size(self.crs, self.transform, *self.shape)
        except Exception as e:  # PROJ's own errors have no public class
            raise ValueError(
                f"the size of the pixels of {anchor.path} on the ground is not known ({e}); pass "
                "--any_pixel_size if it is 10 m"
            ) from None
        if all(9.5 <= size <= 10.5 for size in (width, height)):
            return
        size = f"{width:.3g} m"
        if abs(width - height) > 0.01 * width:
            size = f"{width:.3g} m x {height:.3g} m"
        unit = self.crs.linear_units_factor[1] if self.crs.is_projected else 0
        on_map = self.transform.a * unit
        size += " on the ground" if abs(on_map - width) > 0.02 * width else ""
        raise ValueError(
            f"the pixels of {anchor.path} have {size}, but the models were trained on 10 m: warp "
            "it to a UTM grid of 10 m, or pass --any_pixel_size"
        )

    def _crop(self, top: int, left: int, bottom: int, right: int) -> None:
        """Makes a rectangle of the grid's pixels the grid; it may reach beyond the rasters."""
        t: Any = self.transform
        self.shape = bottom - top, right - left
        self.transform = type(t)(t.a, 0.0, t.c + left * t.a, 0.0, t.e, t.f + top * t.e)
        for layer in self._layers:
            layer.top -= top * layer.modality.image_factor
            layer.left -= left * layer.modality.image_factor

    def _notes(self) -> list[str]:
        out, held = [], {}
        turned = [x for x in self._layers if x.file.turned]
        if turned:
            words = ", ".join(f"{x.path} ({x.file.turned})" for x in turned[:5])
            out.append(f"turned to north-up: {len(turned)} of {len(self._layers)} rasters: {words}")
        coarse = [x for x in self._layers if x.repeat != (1, 1)]
        if coarse:
            words = sorted({b for x in coarse for b in x.bands})
            out.append(f"pixels repeated to the finer grid: bands {', '.join(words)}")
        for layer in self._layers:
            for key in set(layer.planes()):
                held.setdefault((layer.modality.name, *key), []).append(layer)
        several: dict[Any, int] = {}
        for (name, _, day), layers in held.items():
            if len(layers) > 1:
                several[name, day] = max(len(layers), several.get((name, day), 0))
        for (name, day), count in several.items():
            when = f" of {day}" if day else ""
            out.append(f"{name}{when}: {count} rasters put together, the first valid value counts")
        return out

    def read(self, rows: slice, cols: slice, overview: int | None = None) -> Window:
        """The window of these pixels of 10 m.

        With `overview` it is read thinned out to at most so many pixels per side.

        Raises:
          ValueError: a file is damaged.
        """
        height, width = rows.stop - rows.start, cols.stop - cols.start
        shape = (min(height, overview), min(width, overview)) if overview else (height, width)
        arrays = {}
        for name in self.names:
            f = modalities.get(name).image_factor
            steps = len(self._days) if modalities.get(name).multitemporal else 1
            bands = self._bands[name]
            out = np.full((shape[0] * f, shape[1] * f, steps * len(bands)), np.nan, np.float32)
            span = (slice(rows.start * f, rows.stop * f), slice(cols.start * f, cols.stop * f))
            filled = np.zeros(out.shape[-1], bool)
            for layer in self._of(name):
                planes = [
                    (self._days.index(day) if day else 0) * len(bands) + bands.index(b)
                    for b, day in layer.planes()
                ]
                _paint(layer, span, out, planes, filled)
            arrays[name] = out.reshape(*out.shape[:2], steps, len(bands))
        t: Any = self.transform
        corner = t.c + cols.start * t.a, t.f + rows.start * t.e
        place = type(t)(
            t.a * width / shape[1], 0.0, corner[0], 0.0, t.e * height / shape[0], corner[1]
        )
        return Window(arrays, self._bands, place, self.crs)


def _paint(
    layer: Layer, span: tuple[slice, slice], out: np.ndarray, planes: list[int], filled: np.ndarray
) -> None:
    """Puts a layer's part of a window into the planes that hold nothing there yet.

    Args:
      span: the window, in pixels of the modality.
      out: float32 [h, w, planes], thinned out if h and w are fewer than the window's pixels.
      filled: bool [planes], which planes were written before.
    """
    places, reads, trims = [], [], []
    file = layer.file
    for window, start, side, k, size in zip(
        span, (layer.top, layer.left), (file.height, file.width), layer.repeat, out.shape[:2],
        strict=True,
    ):  # fmt: skip
        low, high = max(window.start, start), min(window.stop, start + side * k)
        if low >= high:
            return
        step = (window.stop - window.start) / size
        if step == 1:
            place = slice(low - window.start, high - window.start)
        else:
            place = slice(int(np.ceil((low - window.start) / step)),
                          int(np.ceil((high - window.start) / step)))  # fmt: skip
            if place.start >= place.stop:
                return
        first, last = (low - start) // k, -((start - high) // k)
        places.append(place)
        reads.append(slice(first, last))
        trims.append(slice(low - start - first * k, high - start - first * k))
    target = (places[0].stop - places[0].start, places[1].stop - places[1].start)
    thinned = out.shape[:2] != tuple(w.stop - w.start for w in span)
    x = layer.read(reads[0], reads[1], target if thinned else None)
    if not thinned and layer.repeat != (1, 1):
        down, across = layer.repeat
        x = x.repeat(down, 1).repeat(across, 2)[:, trims[0], trims[1]]
    x, part = np.moveaxis(x, 0, -1), out[places[0], places[1]]
    if filled[planes].any():
        part[..., planes] = np.where(np.isnan(part[..., planes]), x, part[..., planes])
    elif planes == list(range(planes[0], planes[0] + len(planes))):
        part[..., planes[0] : planes[0] + len(planes)] = x
    else:
        part[..., planes] = x
    filled[planes] = True


def _other_grid(layer: Layer, other: Layer, what: str) -> ValueError:
    return ValueError(
        f"{layer.path} and {other.path} lie on different grids ({what}): warp them to one, for "
        "example with gdalwarp"
    )


def locate(
    layer: Layer, anchor: Layer, corner: tuple[float, float], size: tuple[float, float]
) -> tuple[float, float, float, float]:
    """Sets a layer's place on the grid; (top, left, bottom, right) in pixels of 10 m.

    Args:
      anchor: the layer that the grid is of, for messages.
      corner: x and y of the grid's first pixel.
      size: width and height of its pixels.
    """
    f, t, file = layer.modality.image_factor, layer.file.transform, layer.file
    width, height = size[0] / f, size[1] / f
    across, down = (t.a / width, -t.e / height)
    repeat = max(1, round(down)), max(1, round(across))
    left, top = (t.c - corner[0]) / width, (corner[1] - t.f) / height
    right, bottom = left + file.width * across, top + file.height * down
    layer.top, layer.left, layer.repeat = round(top), round(left), repeat
    ends = layer.top + file.height * repeat[0], layer.left + file.width * repeat[1]
    off = max(abs(a - b) for a, b in zip((top, left, bottom, right),
                                         (layer.top, layer.left, *ends), strict=True))  # fmt: skip
    if off > _OFF:
        own = f"pixels of {t.a:.10g} x {-t.e:.10g} from {t.c:.10g}, {t.f:.10g}"
        a = anchor.file.transform
        raise _other_grid(
            layer, anchor, f"{own} against {a.a:.10g} x {-a.e:.10g} from {a.c:.10g}, {a.f:.10g}"
        )
    return layer.top / f, layer.left / f, ends[0] / f, ends[1] / f


def spread_bands(rasters: Sequence[Raster], bands: Sequence[str]) -> None:
    """Gives names of bands to the rasters without some: all to each, or in turn to one-band files.

    Raises:
      ValueError: a raster cannot be read.
    """
    unnamed = [r for r in rasters if not r.bands]
    counts = []
    for raster in unnamed:
        with RasterFile(raster.path) as file:
            counts.append(file.count)
    in_turn = len(unnamed) > 1 and sum(counts) == len(bands)
    rest = list(bands)
    for raster, count in zip(unnamed, counts, strict=True):
        raster.bands = rest[:count] if in_turn else list(bands)
        rest = rest[count:]


def _check_periods(rasters: Sequence[Raster]) -> None:
    periods = list(dict.fromkeys(r.period for r in rasters if r.period))
    if len(periods) > 1:
        raise ValueError(
            f"the rasters are of the periods {', '.join(periods)}, but one map shows one period"
        )


def _assign_dates(layers: Sequence[Layer], dates: Sequence[str]) -> list[datetime.date]:
    """Sets the dates of all layers; the distinct ones, ascending."""
    texts = {id(x): x.raster.dates for x in layers}
    undated = [x for x in layers if x.modality.multitemporal and not texts[id(x)]]
    rest = [str(d).strip() for d in dates]
    held = sum(x.num_steps for x in undated)
    if len(rest) == len(layers) and max(x.num_steps for x in layers) == 1:  # one each
        texts |= {id(x): [d] for x, d in zip(layers, rest, strict=True) if x in undated}
    elif rest and all(x.num_steps == len(rest) for x in undated):
        texts |= {id(x): rest for x in undated}
    elif rest and held == len(rest):
        for layer in undated:
            texts[id(layer)], rest = rest[: layer.num_steps], rest[layer.num_steps :]
    elif rest and held > len(undated):
        texts |= {id(x): rest for x in undated}  # refused below, where it is told why
    elif rest:
        raise ValueError(f"{len(rest)} dates were given for {len(layers)} rasters")
    for layer in layers:
        if not layer.modality.multitemporal:
            continue
        own = texts[id(layer)]
        if not own:
            raise ValueError(
                f"{layer.path} has no date: give --dates=YYYY-MM-DD, one per raster, or a 'date' "
                "in the manifest"
            )
        if len(own) != layer.num_steps:
            raise ValueError(
                f"{layer.path} has {layer.file.count} bands, of which "
                f"{layer.file.count // layer.num_steps} are named: that makes "
                f"{layer.num_steps} timesteps, but {len(own)} dates were given. Name all bands, or "
                "give the date of every timestep"
            )
        try:
            layer.dates = [parse_date(text) for text in own]
        except ValueError as e:
            raise ValueError(f"{layer.path}: {e}") from None
        first, last = DATE_RANGE[2]
        for day in layer.dates:
            if not first <= day.year <= last:
                raise ValueError(f"{layer.path}: no image is of {day}: years are {first}..{last}")
        if len(set(layer.dates)) < len(layer.dates):
            raise ValueError(f"{layer.path} holds a date twice: {', '.join(own)}")
    return sorted({day for x in layers for day in x.dates})
