"""Tiles over an axis, and maps put together from overlapping tiles by smooth weights."""

from __future__ import annotations

import numpy as np


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
