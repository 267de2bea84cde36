"""The arrays of one zone of an archive, and which of its shards may hold something."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from olmoearth_jax.maps.lattice import crs_of

_STRIPE = 64 << 20
"""Bytes of values, as float32, that are looked at together."""


@dataclasses.dataclass(frozen=True)
class Zone:
    """The arrays of one zone.

    Attributes:
      number: of the zone.
      transform: a..f of the tokens.
      embeddings, coverage, scales: Zarr arrays; `scales` is None without per_pixel_scale.
      planned: row and column of the shards that may hold something; None if that is not known.
    """

    number: int
    transform: list[float]
    embeddings: Any
    coverage: Any
    scales: Any
    planned: list[tuple[int, int]] | None = None

    @property
    def crs(self) -> str:
        return crs_of(self.number)

    @property
    def shape(self) -> tuple[int, int]:
        return self.coverage.shape[1:]

    @property
    def side(self) -> int:
        """Tokens per side of a shard."""
        return (self.coverage.shards or self.coverage.chunks)[-1]

    def shards(self) -> Iterator[tuple[slice, slice]]:
        """Rows and columns of the shards that may hold something, by rows."""
        side, (height, width) = self.side, self.shape
        every = ((r, c) for r in range(-(-height // side)) for c in range(-(-width // side)))
        for row, col in every if self.planned is None else self.planned:
            top, left = row * side, col * side
            yield slice(top, top + side), slice(left, left + side)

    def stripes(self, rows: slice, cols: slice) -> Iterator[tuple[slice, slice]]:
        """A window in whole rows of chunks, few enough for their values to fit into memory."""
        chunk, width = self.coverage.chunks[-1], cols.stop - cols.start
        row = 4 * self.embeddings.shape[1] * width
        height = max(_STRIPE // max(row, 1) // chunk, 1) * chunk
        for top in range(rows.start, rows.stop, height):
            yield slice(top, min(top + height, rows.stop)), cols

    def parts(self) -> Iterator[tuple[slice, slice]]:
        """The stripes of all `shards`."""
        for rows, cols in self.shards():
            yield from self.stripes(rows, cols)

    @property
    def span(self) -> tuple[slice, slice]:
        """Rows and columns around these: arrays may span a whole zone."""
        if not self.planned:
            return slice(0, self.shape[0]), slice(0, self.shape[1])
        places = np.array(self.planned)
        (top, left), (bottom, right) = places.min(0) * self.side, (places.max(0) + 1) * self.side
        rows, cols = slice(int(top), int(bottom)), slice(int(left), int(right))
        return rows, cols

    def with_plan(self, plan: dict[int, set[tuple[int, int]]] | None) -> Zone:
        """This zone with what is `planned`, of `read_plan`."""
        if plan is None:
            return self
        a, _, c, _, _, f = self.transform
        top, left = round(-f / a) // self.side, round(c / a) // self.side
        rows, cols = (size // self.side for size in self.shape)
        places = ((r - top, c - left) for r, c in plan.get(self.number, ()))
        inside = sorted((r, c) for r, c in places if 0 <= r < rows and 0 <= c < cols)
        return dataclasses.replace(self, planned=inside)

    def place(self, rows: slice, cols: slice) -> list[float]:
        """Affine map a..f of a window."""
        a, b, c, d, e, f = self.transform
        return [a, b, c + cols.start * a, d, e, f + rows.start * e]


def read_plan(path: Path) -> dict[int, set[tuple[int, int]]] | None:
    """Zone -> (R, C) on the lattice of the shards of a plan.jsonl; None if it cannot be read."""
    from olmoearth_jax.maps.plan import shard_of

    out: dict[int, set[tuple[int, int]]] = {}
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                shard = shard_of(json.loads(line)["id"])
                out.setdefault(shard.zone, set()).add((shard.row, shard.col))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return out
