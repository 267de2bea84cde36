"""Embedding the shards of an archive: reading, encoding, quantising and writing side by side.

Tiles lie on the lattice, so a value depends neither on the shard's size nor on who computes it.
All calls of the encoder have one shape: at most two programs, with and without missing tokens.
"""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import threading
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from olmoearth_jax import modalities
from olmoearth_jax.inference import quantize
from olmoearth_jax.inference.model import PretrainedModel
from olmoearth_jax.inference.prepare import ModelInput
from olmoearth_jax.inference.sample import Sample
from olmoearth_jax.maps import area, store
from olmoearth_jax.maps.embed_job import PIXEL, Job
from olmoearth_jax.maps.plan import Shard, shard_of
from olmoearth_jax.maps.readers import Readers
from olmoearth_jax.masks import MISSING_TOKEN, VISIBLE
from olmoearth_jax.model import pooling

_AHEAD = 2
"""Batches of tiles that are read and prepared before they are needed."""


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Prepared tiles of one shard.

    Attributes:
      places: int [B, 2], first row and column in tokens of what each keeps.
      ready: what the model takes.
      counts: uint8 [B, h, w] of the kept tokens: timesteps with data.
      values: float32 [B, h, w, D] of the kept tokens, if they were computed already.
    """

    places: np.ndarray
    ready: ModelInput
    counts: np.ndarray
    values: np.ndarray | None = None


class ShardWorker:
    """Computes and writes shards; what `WorkList.run` calls. A context that ends its readers."""

    def __init__(self, job: Job, model: PretrainedModel, form: store.Form):
        self._job, self._model, self._form = job, model, form
        self._writer = store.Writer(job.store, form, job.grids)
        self._core = job.layout.core // job.options.pixels
        self._halo = job.layout.halo // job.options.pixels
        self._readers = Readers(job.options.readers)

    def __enter__(self) -> ShardWorker:
        return self

    def __exit__(self, *_: object) -> None:
        self._readers.__exit__()

    def __call__(self, unit: str) -> tuple[dict[str, Any], list[str]]:
        """Writes a shard; (members of its marker, keys of its objects).

        Raises:
          ValueError: a raster that cannot be read, or a model that gives no numbers.
        """
        shard = shard_of(unit)
        self._writer.clear(shard)
        made = _Arrays(self._form)
        inside = self._inside(shard)
        with (
            ThreadPoolExecutor(1) as pool,
            contextlib.closing(self._batches(shard, inside)) as batches,
        ):
            waiting: Future | None = None
            for tiles in batches:
                got = self._encode(tiles.ready) if tiles.values is None else tiles.values
                if waiting is not None:
                    waiting.result()
                waiting = pool.submit(made.put, tiles, got, inside, self._core)
            if waiting is not None:
                waiting.result()
        keys = self._writer.write(shard, made.values, made.scales, made.coverage)
        valid = int((made.coverage > 0).sum())
        record = {
            "valid": valid, "nodata": made.coverage.size - valid, "clipped": made.clipped,
            "largest": made.largest, "software": self._form.attrs["geoemb:build_version"],
        }  # fmt: skip
        return record, keys

    def _inside(self, shard: Shard) -> np.ndarray:
        """bool [S, S]: tokens that the area touches."""
        shape, lattice = self._job.zones[shard.zone], self._job.layout.lattice
        return area.tokens_in(shape, lattice, shard.row, shard.col)

    def _batches(self, shard: Shard, inside: np.ndarray) -> Generator[Tiles, None, None]:
        """Groups of `batch_size` tiles that one program takes, prepared in another thread."""
        held: dict[Any, list[Tiles]] = {}
        size = self._job.options.batch_size
        if self._job.options.searchlight:
            yield from _ahead(self._tiles(shard, inside), _AHEAD)
            return
        for tiles in _ahead(self._tiles(shard, inside), _AHEAD):
            for key, rows in _groups(tiles.ready):
                group = held.setdefault(key, [])
                group.append(_rows(tiles, rows))
                if sum(len(t.places) for t in group) >= size:
                    whole = _joined(group)
                    group[:] = [_rows(whole, np.arange(size, len(whole.places)))]
                    yield _rows(whole, np.arange(size))
        for key in sorted(held, key=str):
            rest = _joined(held[key])
            if len(rest.places):
                yield rest

    def _tiles(self, shard: Shard, inside: np.ndarray) -> Generator[Tiles, None, None]:
        """The tiles of a shard that hold data, in the order of its blocks."""
        job, o, side = self._job, self._job.options, self._job.layout.lattice.side
        west, south, east, north = job.layout.lattice.box(shard.row, shard.col)
        margin = job.layout.halo * PIXEL
        box = (west - margin, south - margin, east + margin, north + margin)
        top, left = round(-north / PIXEL), round(west / PIXEL)
        block = max(self._core, min(o.block, side) // self._core * self._core)
        corners = [(r, c) for r in range(0, side, block) for c in range(0, side, block)]
        held = [(r, c, self._places(inside, r, c, block)) for r, c in corners]
        held = [one for one in held if one[-1]]

        def span(at: int, start: int) -> slice:
            return _span(at, min(at + block, side), self._halo, o.pixels, start)

        part = job.imagery.part(shard.zone, shard.period, box)
        dates = [day.isoformat() for day in job.imagery.days(shard.period)]
        cut = self._lit if o.searchlight else self._cut
        windows = self._readers.windows(part, [(span(r, top), span(c, left)) for r, c, _ in held])
        for (row, col, places), window in zip(held, windows, strict=True):
            yield from cut(window, dates, places, row, col)

    def _places(self, inside: np.ndarray, row: int, col: int, block: int) -> list[tuple[int, int]]:
        """First tokens of the tiles of a block that the area touches."""
        core, side = self._core, len(inside)
        return [
            (r, c)
            for r in range(row, min(row + block, side), core)
            for c in range(col, min(col + block, side), core)
            if inside[r : r + core, c : c + core].any()
        ]

    def _cut(
        self, window: Any, dates: Sequence[str], places: list[tuple[int, int]], row: int, col: int
    ) -> Iterator[Tiles]:
        o, extent = self._job.options, self._core + 2 * self._halo
        for start in range(0, len(places), o.batch_size):
            samples, kept = [], []
            for r, c in places[start : start + o.batch_size]:
                at = [(v * o.pixels, (v + extent) * o.pixels) for v in (r - row, c - col)]
                arrays = {}
                for name, x in window.arrays.items():
                    f = modalities.get(name).image_factor
                    (y0, y1), (x0, x1) = at
                    arrays[name] = x[y0 * f : y1 * f, x0 * f : x1 * f]
                if not any(np.isfinite(x).any() for x in arrays.values()):
                    continue
                samples.append(
                    Sample.from_arrays(arrays, dates, bands=window.bands, nan_pixels="mask",
                                       check_units=False)
                )  # fmt: skip
                kept.append((r, c))
            if not samples:
                continue
            ready = self._model.prepare(samples, o.patch_size)
            counts = self._counts(ready)
            seen = np.flatnonzero(ready.visible.any((1, 2)) & counts.any((1, 2)))
            if len(seen):
                yield Tiles(np.array(kept)[seen], ready.rows(seen), counts[seen])

    def _lit(
        self, window: Any, dates: Sequence[str], places: list[tuple[int, int]], row: int, col: int
    ) -> Iterator[Tiles]:
        """Tiles for the searchlight, one by one, each of what the images cover of it.

        Raises:
          ValueError: a timestep that is there has gaps.
        """
        o, extent = self._job.options, self._core + 2 * self._halo
        for r, c in places:
            at = [(v * o.pixels, (v + extent) * o.pixels) for v in (r - row, c - col)]
            parts = _covered(window.arrays, at, o.patch_size)
            if parts is None:
                continue
            arrays, top, left = parts
            _refuse_gaps(arrays, dates)
            sample = Sample.from_arrays(arrays, dates, bands=window.bands, nan_pixels="mask",
                                        check_units=False)  # fmt: skip
            ready = self._model.prepare([sample], o.patch_size)
            got = self._model.embed_domain(ready, o.patch_size, o.location_size, o.pooling)
            counts = np.zeros((extent, extent), np.uint8)
            values = np.zeros((extent, extent, got.shape[-1]), np.float32)
            y = slice(top // o.pixels, top // o.pixels + got.shape[0])
            x = slice(left // o.pixels, left // o.pixels + got.shape[1])
            counts[y, x], values[y, x] = self._seen(ready)[0], got
            kept = slice(self._halo, self._halo + self._core)
            if counts[kept, kept].any():
                yield Tiles(np.array([(r, c)]), ready, counts[None, kept, kept],
                            values[None, kept, kept])  # fmt: skip

    def _counts(self, ready: ModelInput) -> np.ndarray:
        """uint8 [B, core, core]: timesteps with data of the tokens that tiles keep."""
        kept = slice(self._halo, self._halo + self._core)
        return self._seen(ready)[:, kept, kept]

    def _seen(self, ready: ModelInput) -> np.ndarray:
        """uint8 [B, h, w]: timesteps with data of tokens."""
        moving, still = [], []
        for name, mask in ready.masks.items():
            if modalities.get(name).spatial:
                seen = (mask == VISIBLE).any(-1)
                (moving if modalities.get(name).multitemporal else still).append(seen)
        count = np.zeros(ready.visible.shape, np.int64)
        if moving:
            count = np.logical_or.reduce(moving).sum(-1)
        for seen in still:
            count = np.maximum(count, seen.any(-1))
        factor = self._job.options.patch_size // self._job.options.pixels
        count = count.repeat(factor, 1).repeat(factor, 2)
        return np.minimum(count, store.MOST_COVERAGE).astype(np.uint8)

    def _encode(self, ready: ModelInput) -> np.ndarray:
        """Embeddings float32 [B, core, core, D] of the tokens that tiles keep."""
        o, count = self._job.options, len(ready.timestamps)
        # Always as many rows: one program, whatever is left of a shard.
        rows = np.minimum(np.arange(o.batch_size), count - 1)
        got = self._model.embed(
            ready.rows(rows), o.patch_size, o.pooling, o.pooling_type,
            location_size=o.location_size,
        )  # fmt: skip
        kept = slice(self._halo, self._halo + self._core)
        return got[:count, kept, kept]


class _Arrays:
    """What is stored of a shard, filled tile by tile."""

    def __init__(self, form: store.Form):
        side, self._rule = form.side, form.rule
        fill = np.array(form.rule.fill, form.rule.dtype)
        self.values = np.full((form.dimensions, side, side), fill, form.rule.dtype)
        self.coverage = np.zeros((side, side), np.uint8)
        self.scales = None
        if form.rule.method == "per_pixel_scale":
            self.scales = np.full((side, side), np.inf, np.float32)
        self.clipped, self.largest = 0, 0.0

    def put(self, tiles: Tiles, got: np.ndarray, inside: np.ndarray, core: int) -> None:
        """Quantises what tiles keep."""
        for (row, col), x, count in zip(tiles.places, got, tiles.counts, strict=True):
            at = slice(row, row + core), slice(col, col + core)
            valid = (count > 0) & inside[at]
            q, scales, clipped = quantize.quantize(x, valid, self._rule)
            self.values[(slice(None), *at)] = np.moveaxis(q, -1, 0)
            self.coverage[at] = np.where(valid, count, 0)
            if self.scales is not None and scales is not None:
                self.scales[at] = scales
            self.clipped += clipped
            if valid.any():
                self.largest = max(self.largest, float(np.abs(x[valid]).max()))


def _covered(
    arrays: dict[str, np.ndarray], at: Sequence[tuple[int, int]], patch: int
) -> tuple[dict[str, np.ndarray], int, int] | None:
    """(the part of a tile that images cover, its first row and column in the tile's pixels).

    Args:
      arrays: of a window, [H, W, T, C] with NaN.
      at: first and last row, and column, of the tile in the window.
      patch: pixels that the part is whole multiples of.

    Returns:
      None if it is less than a patch.
    """
    tile, seen = {}, None
    for name, x in arrays.items():
        f = modalities.get(name).image_factor
        (y0, y1), (x0, x1) = at
        tile[name] = x[y0 * f : y1 * f, x0 * f : x1 * f]
        there: Any = np.isfinite(tile[name]).any((2, 3))
        there = there.reshape(y1 - y0, f, x1 - x0, f).any((1, 3))
        seen = there if seen is None else seen | there
    if seen is None or not seen.any():
        return None
    ends = []
    for axis in (1, 0):
        found = np.flatnonzero(seen.any(axis))
        first, last = -(-found[0] // patch) * patch, (found[-1] + 1) // patch * patch
        if first >= last:
            return None
        ends.append((int(first), int(last)))
    (y0, y1), (x0, x1) = ends
    for name in tile:
        f = modalities.get(name).image_factor
        tile[name] = tile[name][y0 * f : y1 * f, x0 * f : x1 * f]
    return tile, y0, x0


def _refuse_gaps(arrays: dict[str, np.ndarray], dates: Sequence[str]) -> None:
    """Raises ValueError if a timestep [H, W, T, C] is there at some pixels only."""
    for name, x in arrays.items():
        there: Any = np.isfinite(x).any(-1).reshape(-1, x.shape[2])
        for step in np.flatnonzero(there.any(0) & ~there.all(0)):
            when = f" of {dates[int(step)]}" if modalities.get(name).multitemporal else ""
            raise ValueError(
                f"{name}{when} has gaps, and --searchlight takes whole timesteps: fill them, leave "
                "the timestep out, or embed without it"
            )


def _span(first: int, last: int, halo: int, pixels: int, start: int) -> slice:
    """Pixels on the lattice of the tokens first..last of a shard and the halo around them."""
    return slice(start + (first - halo) * pixels, start + (last + halo) * pixels)


def _rows(tiles: Tiles, rows: np.ndarray) -> Tiles:
    return Tiles(tiles.places[rows], tiles.ready.rows(rows), tiles.counts[rows])


def _joined(parts: Sequence[Tiles]) -> Tiles:
    if len(parts) == 1:
        return parts[0]
    first = parts[0].ready
    data, masks = (
        {
            n: np.concatenate([getattr(p.ready, what)[n] for p in parts])
            for n in getattr(first, what)
        }
        for what in ("data", "masks")
    )
    stamps = np.concatenate([p.ready.timestamps for p in parts])
    places = np.concatenate([p.places for p in parts])
    counts = np.concatenate([p.counts for p in parts])
    return Tiles(places, ModelInput(data, masks, stamps), counts)


def _groups(ready: ModelInput) -> Iterator[tuple[Any, np.ndarray]]:
    """Tiles that one program takes together without seeing each other.

    Pooling and the fast pass are chosen for a whole call; tiles for which they would be chosen
    differently are kept apart, so that values do not depend on neighbours in a batch.
    """
    keys: dict[Any, list[int]] = {}
    for i in range(len(ready.timestamps)):
        masks = {n: m[i : i + 1] for n, m in ready.masks.items()}
        fast = not any((m == MISSING_TOKEN).any() for m in masks.values())
        keys.setdefault((tuple(pooling.spatial_names(masks)), fast), []).append(i)
    for key, rows in keys.items():
        yield key, np.array(rows)


def _ahead(items: Generator[Any, None, None], most: int) -> Iterator[Any]:
    """The items, made in another thread, at most so many before they are asked for."""
    ready: queue.Queue = queue.Queue(most)
    stop = threading.Event()

    def put(item: Any) -> bool:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def make() -> None:
        try:
            with contextlib.closing(items):
                for item in items:
                    if not put((item, None)):
                        return
            put((None, None))
        except BaseException as e:
            put((None, e))

    thread = threading.Thread(target=make, daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            if item is None:
                return
            yield item
    finally:
        stop.set()
        thread.join()
