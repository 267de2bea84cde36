"""From images to probabilities or values per pixel: overlapping tiles, blended."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from olmoearth_jax.inference.sample import Sample
from olmoearth_jax.maps.scenes import Scene
from olmoearth_jax.maps.token_head import TokenHead
from olmoearth_jax.maps.tokens import TokenEncoder


def starts(side: int, tile: int, overlap: int) -> list[int]:
    """First pixels of the tiles over an axis; the last tile ends where the axis does.

    Args:
      side, tile, overlap: in pixels. An axis shorter than a tile has one, at 0.

    Raises:
      ValueError: no side, or an overlap that leaves nothing of a tile.
    """
    if side < 1 or tile < 1:
        raise ValueError(f"tiles of {tile} pixels do not cover an axis of {side}")
    if not 0 <= overlap < tile:
        raise ValueError(f"an overlap of {overlap} pixels leaves nothing of tiles of {tile}")
    if side <= tile:
        return [0]
    last = side - tile
    return [*range(0, last, tile - overlap), last]


def weights(tile: int) -> np.ndarray:
    """Weight of each pixel of an axis of a tile, float64 [tile]; never 0."""
    return np.sin(np.pi * (np.arange(tile) + 0.5) / tile) ** 2


class Blend:
    """Weighted means of tiles over a part of a map, added up in float64.

    The result of a pixel depends only on the tiles that touch it, and, with tiles added in one
    order, not on the part.
    """

    def __init__(self, rows: slice, cols: slice, channels: int, size: tuple[int, int]):
        """Starts with nothing.

        Args:
          rows, cols: the part, in pixels of the map.
          channels: values per pixel.
          size: (height, width) of the tiles in pixels.
        """
        self.rows, self.cols = rows, cols
        shape = rows.stop - rows.start, cols.stop - cols.start
        self.sum = np.zeros((*shape, channels))
        self.weight = np.zeros(shape)
        self._weights = np.outer(weights(size[0]), weights(size[1]))

    def add(self, row: int, col: int, values: np.ndarray, valid: np.ndarray | None = None) -> None:
        """Adds a tile float [T, T, K] whose corner is this pixel of the map.

        Args:
          valid: bool [T, T], the pixels that count; all by default.
        """
        (low, high), (left, right) = (
            (max(at, part.start), min(at + size, part.stop))
            for at, part, size in zip(
                (row, col), (self.rows, self.cols), values.shape, strict=False
            )
        )
        if low >= high or left >= right:
            return
        inside = np.s_[low - row : high - row, left - col : right - col]
        here = np.s_[
            low - self.rows.start : high - self.rows.start,
            left - self.cols.start : right - self.cols.start,
        ]
        weight, part = self._weights[inside], values[inside].astype(np.float64)
        if valid is not None:
            weight = weight * valid[inside]
            part = np.where(valid[inside][..., None], part, 0.0)
        self.sum[here] += weight[..., None] * part
        self.weight[here] += weight

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """(float32 [H, W, K], bool [H, W] where any tile counted); 0 elsewhere."""
        there = self.weight > 0
        mean = self.sum / np.where(there, self.weight, 1.0)[..., None]
        return mean.astype(np.float32), there


class PixelModel(Protocol):
    """What makes a map of a window."""

    @property
    def batch(self) -> int:
        """Windows per call."""
        ...

    @property
    def channels(self) -> int:
        """Values per pixel."""
        ...

    @property
    def patch(self) -> int:
        """Pixels that the sides of windows must be whole multiples of."""
        ...

    @property
    def modalities(self) -> Sequence[str]:
        """What it sees of images; all else in them is left out."""
        ...

    def __call__(self, samples: Sequence[Sample]) -> tuple[np.ndarray, np.ndarray]:
        """float32 [B, H, W, K] and bool [B, H, W], where something is seen."""
        ...


@dataclasses.dataclass(frozen=True)
class ProbedPixels:
    """A frozen encoder and a head on its tokens; a token's values are those of its pixels."""

    encoder: TokenEncoder
    head: TokenHead
    channels: int

    @property
    def batch(self) -> int:
        return self.encoder.batch

    @property
    def patch(self) -> int:
        return self.encoder.settings.patch_size

    @property
    def modalities(self) -> Sequence[str]:
        return self.encoder.model.modalities

    def __call__(self, samples: Sequence[Sample]) -> tuple[np.ndarray, np.ndarray]:
        x, seen = self.encoder(samples)
        step = self.encoder.settings.step
        out = np.zeros((*seen.shape, self.channels), np.float32)
        if x.shape[-1]:
            out = self.head(x.reshape(-1, x.shape[-1])).reshape(*seen.shape, -1)
        return (a.repeat(step, 1).repeat(step, 2) for a in (out, seen))  # pyright: ignore


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Where the tiles of a scene begin.

    Attributes:
      size: (height, width) of a tile in pixels.
      rows, cols: their first pixels.
    """

    size: tuple[int, int]
    rows: list[int]
    cols: list[int]

    def touching(self, rows: slice, cols: slice) -> Iterator[tuple[int, int]]:
        """The tiles that overlap a part of the map, row by row."""
        for row in self.rows:
            if row >= rows.stop or row + self.size[0] <= rows.start:
                continue
            for col in self.cols:
                if col < cols.stop and col + self.size[1] > cols.start:
                    yield row, col


def check_overlap(window: int, overlap: int) -> None:
    """Raises ValueError if tiles of a window's side cannot share so many pixels."""
    if not 0 <= overlap < window:
        raise ValueError(
            f"an --overlap of {overlap} pixels leaves nothing of windows of {window}: take less, "
            f"such as {window // 4}"
        )


def tiling_of(shape: tuple[int, int], window: int, overlap: int, patch: int) -> Tiling:
    """The tiles of a scene.

    Args:
      shape: of the scene in pixels.
      window, overlap: of tiles, in pixels.
      patch: pixels per side of a patch; a tile is whole ones.

    Raises:
      ValueError: sizes that do not fit.
    """
    size: Any = tuple(min(window, n // patch * patch) for n in shape)
    if not all(size):
        raise ValueError(f"images of {shape[0]} x {shape[1]} pixels are smaller than a patch")
    first = [starts(n, side, min(overlap, side - 1)) for n, side in zip(shape, size, strict=True)]
    return Tiling(size, *first)


def run_tiles(
    model: PixelModel, scene: Scene, tiling: Tiling, places: Sequence[tuple[int, int]]
) -> Iterator[tuple[int, int, np.ndarray, np.ndarray]]:
    """(row, col, values [H, W, K], valid [H, W]) of tiles, in their order; empty ones are left out.

    Raises:
      ValueError: values that are not finite.
    """
    waiting: list[tuple[int, int, Sample]] = []

    def flush():
        values, valid = model([s for _, _, s in waiting])
        for (row, col, _), x, seen in zip(waiting, values, valid, strict=True):
            if not np.isfinite(x[seen]).all():
                raise ValueError("the model gives values that are not finite")
            yield row, col, x, seen
        waiting.clear()

    for row, col in places:
        sample = scene.sample(row, col, *tiling.size)
        if sample is not None:
            waiting.append((row, col, sample))
        if len(waiting) == model.batch:
            yield from flush()
    if waiting:
        yield from flush()


def map_block(
    model: PixelModel, scene: Scene, tiling: Tiling, rows: slice, cols: slice
) -> tuple[np.ndarray, np.ndarray]:
    """float32 [H, W, K] and bool [H, W] of a part of the map, from every tile that touches it."""
    part = Blend(rows, cols, model.channels, tiling.size)
    for row, col, x, seen in run_tiles(model, scene, tiling, list(tiling.touching(rows, cols))):
        part.add(row, col, x, seen)
    return part.result()


def map_pixels(
    model: PixelModel, scene: Scene, tiling: Tiling, rows: np.ndarray, cols: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """float32 [N, K] and bool [N]: what the map shows at some pixels."""
    height, width = tiling.size
    by_row = {r: np.flatnonzero((rows >= r) & (rows < r + height)) for r in tiling.rows}
    mine = {}
    for row, there in by_row.items():
        for col in tiling.cols:
            some = there[(cols[there] >= col) & (cols[there] < col + width)]
            if len(some):
                mine[row, col] = some
    sums, total = np.zeros((len(rows), model.channels)), np.zeros(len(rows))
    across = weights(height), weights(width)
    for row, col, x, seen in run_tiles(model, scene, tiling, list(mine)):
        some = mine[row, col]
        at = rows[some] - row, cols[some] - col
        weight = across[0][at[0]] * across[1][at[1]] * seen[at]
        values = np.where(seen[at][:, None], x[at].astype(np.float64), 0.0)
        sums[some] += weight[:, None] * values
        total[some] += weight
    there = total > 0
    return (sums / np.where(there, total, 1.0)[:, None]).astype(np.float32), there
