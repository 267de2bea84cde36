"""Encoding of a whole domain in one pass, each query seeing only its own window (v1.3 spec 7).

A cell is one patch position with all its visible tokens. A query of cell (i, j) attends to the
tokens of a W x W box of cells around it, shifted inward at the borders of the domain. Attention
goes tile by tile, so memory grows with the area only.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from olmoearth_jax import modalities
from olmoearth_jax.masks import VISIBLE
from olmoearth_jax.model.layers import precision
from olmoearth_jax.model.pooler import GridSpec
from olmoearth_jax.model.rope import coordinates as rope_coordinates
from olmoearth_jax.model.uniform_batch import (
    Encoded,
    Layout,
    UniformBatch,
    embed_patches,
    encode_batch,
    pool_and_project,
    tokens_from_grid,
)

log = logging.getLogger(__name__)

WINDOW_PX = 16
"""Side of the window of the published model, in pixels of 10 m."""

_SCORE_BYTES = {"cpu": 16 << 20, "gpu": 512 << 20}


def box_starts(cells: int, window: int) -> np.ndarray:
    """int32 [cells]: first cell that each cell of an axis sees."""
    return np.clip(np.arange(cells) - window // 2, 0, cells - window).astype(np.int32)


def _tile(grid: tuple[int, int], window: int, queries: int, keys: int, heads: int) -> int:
    """Columns of a tile (one row of cells), at most a window's."""
    budget = _SCORE_BYTES.get(jax.default_backend(), 512 << 20)
    width = min(window, grid[1])
    while width > 1 and 4 * heads * width * queries * window * (width + window - 1) * keys > budget:
        width -= 1
    return width


def window_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, grid: tuple[int, int], window: int
) -> jax.Array:
    """Softmax attention of each cell's queries to the keys of the cells in its box.

    Args:
      q: [1, h * w * Kq, heads, head_dim], cells row-major, the queries of a cell together.
      k: [1, h * w * Kk, heads, head_dim], likewise.
      v: like k.
      grid: (h, w), both at least `window`.
      window: side of the box in cells.

    Returns:
      Like q, in its dtype.
    """
    height, width = grid
    heads, dim = q.shape[-2:]
    q, k, v = (x.reshape(height, width, -1, heads, dim) for x in (q, k, v))
    per_q, per_k = q.shape[2], k.shape[2]
    cols = _tile(grid, window, per_q, per_k, heads)
    span = min(cols + window - 1, width)
    starts = np.minimum(np.arange(-(-width // cols)) * cols, width - cols)
    row_box, col_box = (jnp.asarray(box_starts(n, window)) for n in grid)
    scale = jnp.asarray(dim**-0.5, q.dtype)
    exact = precision(q.dtype)

    def tile(place: jax.Array) -> jax.Array:
        row, col = place[0], place[1]
        queries = jax.lax.dynamic_slice(
            q, (row, col, 0, 0, 0), (1, cols, per_q, heads, dim)
        ).reshape(cols, per_q, heads, dim)
        first = jnp.minimum(col_box[col], width - span)
        at = (row_box[row], first, 0, 0, 0)
        keys, values = (
            jax.lax.dynamic_slice(x, at, (window, span, per_k, heads, dim)) for x in (k, v)
        )
        scores = jnp.einsum("cqhd,yxkhd->hcqyxk", queries * scale, keys, precision=exact,
                            preferred_element_type=jnp.float32)  # fmt: skip
        box = jax.lax.dynamic_slice(col_box, (col,), (cols,))
        here = first + jnp.arange(span)
        seen = (here >= box[:, None]) & (here < box[:, None] + window)
        scores = jnp.where(seen[None, :, None, None, :, None], scores, -jnp.inf)
        weights = jax.nn.softmax(scores.reshape(heads, cols, per_q, -1), axis=-1)
        values = values.reshape(-1, heads, dim)
        out = jnp.einsum("hcqn,nhd->cqhd", weights.astype(v.dtype), values, precision=exact,
                         preferred_element_type=jnp.float32)  # fmt: skip
        return out.astype(q.dtype)

    rows, firsts = np.meshgrid(np.arange(height), starts, indexing="ij")
    places = jnp.asarray(np.stack([rows, firsts], -1).reshape(-1, 2), jnp.int32)
    out = jax.lax.map(tile, places).reshape(height, len(starts), cols, per_q, heads, dim)
    # The last tile of a row overlaps the one before: only its own cells count.
    body = out[:, :-1].reshape(height, -1, per_q, heads, dim)
    tail = out[:, -1, cols - (width - body.shape[1]) :]
    return jnp.concatenate([body, tail], axis=1).reshape(1, -1, heads, dim)


@dataclasses.dataclass(frozen=True)
class _Cells:
    """Visible tokens by cell, K in each."""

    index: np.ndarray
    """int32 [h * w * K] into the flattened tokens, cells row-major"""
    grid: tuple[int, int]
    """(h, w)"""


def _cells_of(layout: Layout, masks: Mapping[str, Any]) -> _Cells:
    """The visible tokens of a domain by cell; masks must be concrete, of one sample.

    Raises:
      ValueError: a batch, modalities without a grid or of different grids, or cells with
        different numbers of visible tokens.
    """
    flat = [name for name in layout.shapes if not modalities.get(name).spatial]
    if flat:
        raise ValueError(f"searchlight takes modalities with a pixel grid only, not {flat}")
    grids = {name: shape[:2] for name, shape in layout.shapes.items()}
    if len(set(grids.values())) > 1:
        raise ValueError(f"searchlight needs one token grid for all modalities, got {grids}")
    height, width = next(iter(grids.values()))
    index, seen = [], []
    for name, shape in layout.shapes.items():
        mask = np.asarray(masks[name])
        if mask.shape[0] != 1:
            raise ValueError(f"searchlight takes one sample at a time, got {mask.shape[0]}")
        start = layout.slices[name].start
        numbers = np.arange(start, layout.slices[name].stop)
        index.append(numbers.reshape(height * width, -1))
        seen.append((mask == VISIBLE).reshape(height * width, int(np.prod(shape[2:]))))
    numbers, visible = np.concatenate(index, axis=1), np.concatenate(seen, axis=1)
    counts = visible.sum(axis=1)
    if counts.min() != counts.max() or not counts.min():
        raise ValueError(
            "searchlight needs the same number (at least 1) of visible tokens in every cell, got "
            f"{counts.min()} to {counts.max()}: leave out whole timesteps or modalities, not "
            "single pixels"
        )
    return _Cells(numbers[visible].astype(np.int32), (height, width))


def _window_cells(window_px: int, patch_size: int, grid: tuple[int, int]) -> int:
    if window_px < patch_size or window_px % patch_size:
        raise ValueError(
            f"a window of {window_px} pixels is not a whole number of patches of {patch_size}"
        )
    window = window_px // patch_size
    if min(grid) < window:
        raise ValueError(
            f"a domain of {grid[0]} x {grid[1]} patches is smaller than the window of {window}; "
            "use the ordinary forward pass"
        )
    return window


def encode_searchlight(encoder: Any, batch: UniformBatch, window_px: int = WINDOW_PX) -> Encoded:
    """The encoder on a whole domain; for inference, masks must be concrete arrays.

    Args:
      batch: one sample; tokens whose mask is not 0 are left out.
      window_px: side of the window in pixels.

    Returns:
      As `uniform_batch.encode_batch`. An encoder without rotary encodings runs the ordinary
      forward pass, with a warning.

    Raises:
      ValueError: what the method cannot do, see the messages.
    """
    if encoder.rope is None:
        log.warning("searchlight needs rotary encodings; this encoder runs the ordinary forward")
        return encode_batch(encoder, batch)
    if encoder.register_tokens is not None:
        raise ValueError("searchlight does not go with register tokens")
    data, layout = batch.layout(encoder.slots)
    masks = {name: np.asarray(batch.masks[name]) for name in layout.shapes}
    cells = _cells_of(layout, masks)
    window = _window_cells(window_px, batch.patch_size, cells.grid)
    graph, state = nnx.split(encoder)
    sizes = (batch.patch_size, batch.input_res, batch.location_size)
    arrays = (data, jnp.asarray(batch.timestamps), cells.index)
    static = _Static(layout, cells.grid, window, sizes)
    tokens, pooled, locations, coordinates = _encode(graph, static, state, arrays)
    kept = {name: jnp.asarray(mask) for name, mask in masks.items()}
    return Encoded(layout.cut(tokens), kept, pooled, coordinates, layout, locations)


@dataclasses.dataclass(frozen=True, eq=False)
class _Static:
    """What a program of `_encode` depends on; layouts are equal if their shapes are."""

    layout: Layout
    grid: tuple[int, int]
    window: int
    sizes: tuple[int, float, int | None]
    """Patch size, metres per pixel, location size."""

    @property
    def _key(self) -> tuple:
        return (*self.layout.shapes.items(), self.grid, self.window, self.sizes)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Static) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _encode(graph, static: _Static, state, arrays: tuple):
    (patch_size, input_res, location_size), (data, stamps, index) = static.sizes, arrays
    encoder, layout = nnx.merge(graph, state), static.layout
    coordinates = tokens_from_grid(encoder.slots, layout, stamps, patch_size, input_res)
    x0 = layout.join(embed_patches(encoder.patch_embeddings, data, patch_size))[:, index]
    here = coordinates.map(lambda field: field[:, index])
    attend = functools.partial(window_attention, grid=static.grid, window=static.window)
    x = encoder.encode(x0, here, attend)
    locations = None
    if encoder.attention_pooler is not None:
        spec = GridSpec.of(layout, patch_size, input_res, location_size)
        places = rope_coordinates(encoder.rope, here)[..., -2:]
        order = _by_cell(spec)
        locations = encoder.attention_pooler.pool(x, places, spec, attend, attend, order)
    elif location_size is not None:
        raise ValueError("location_size is for encoders with an attention pooler (v1.3)")
    x = encoder.project_output(x)
    pooled = pool_and_project(encoder, x, jnp.ones(x.shape[:2], bool), locations)
    whole = jnp.zeros((1, layout.total, x.shape[-1]), x.dtype).at[:, index].set(x)
    return whole, pooled, locations, coordinates


def _by_cell(spec: GridSpec) -> np.ndarray:
    """int32 [Q]: row-major locations in the order of the cells they lie in."""
    rows, cols = spec.shape
    side = spec.per_patch
    numbers = np.arange(rows * cols).reshape(spec.rows, side, spec.cols, side)
    return numbers.transpose(0, 2, 1, 3).reshape(-1).astype(np.int32)
