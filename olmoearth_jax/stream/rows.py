"""Gathers between the token stream and fixed-length rows, with gathers as their own transposes.

A row's tokens are contiguous in the stream, so offsets and lengths describe everything. Each
gather is a partial permutation (no element is read twice), hence its transpose is the inverse
gather: no scatter-add, so gradients are deterministic and stay on their device.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array


def take_rows(x: Array, index: Array) -> Array:
    """Batched gather with zeros for out-of-range indices.

    Args:
      x: [D, N, ...].
      index: int32 [D, ...]; values >= N give zeros.

    Returns:
      [D, *index.shape[1:], *x.shape[2:]].
    """
    if x.shape[1] == 0:
        return jnp.zeros((*index.shape, *x.shape[2:]), x.dtype)

    def take(a: Array, i: Array) -> Array:
        return a.at[i].get(mode="fill", fill_value=0, wrap_negative_indices=False)

    return jax.vmap(take)(x, index)


@functools.partial(jax.custom_vjp, nondiff_argnums=())
def permute(x: Array, index: Array, inverse: Array) -> Array:
    """`take_rows(x, index)` whose transpose sums the gathers by each row of `inverse`.

    Args:
      x: [D, N, ...].
      index: int32 [D, K...]; out of range means zeros.
      inverse: int32 [D, V, N], positions in the flattened K axes that read each x row; out of
        range means none. V > 1 when an element may be read once by each of V disjoint parts.
    """
    return take_rows(x, index)


def _permute_fwd(x, index, inverse):
    return take_rows(x, index), (index.shape, inverse)


def _permute_bwd(residuals, g):
    shape, inverse = residuals
    tail = g.shape[len(shape) :]
    flat = g.reshape(shape[0], -1, *tail)
    dx = take_rows(flat, inverse[:, 0])
    for v in range(1, inverse.shape[1]):
        dx = dx + take_rows(flat, inverse[:, v])
    return dx, None, None


permute.defvjp(_permute_fwd, _permute_bwd)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowMap:
    """Index arrays between one stream and its rows, per row class; each token is in one row."""

    to_rows: tuple[Array, ...]
    """Per class, int32 [D, rows, length], stream position (or the stream length)."""
    to_stream: Array
    """int32 [D, N], position in the concatenated rows (or out of range)."""
    lengths: tuple[Array, ...]
    """Per class, int32 [D, rows]."""


def row_map(
    offset: Array,
    length: Array,
    member: Array,
    order: Array,
    rank: Array,
    counts: tuple[int, ...],
    bounds: tuple[int, ...],
) -> RowMap:
    """Builds the index arrays from extents.

    Args:
      offset, length: int32 [D, R], each row's extent in the stream.
      member: int32 [D, N], row of each stream token; R for padding. Tokens outside their row's
        extent (those of other modalities, say) are left out.
      order, rank: int32 [D, R], the plan's class order and its inverse.
      counts: rows of each class, summing to R.
      bounds: row length of each class.
    """
    total = sum(counts)
    offset = jnp.take_along_axis(offset, order, axis=1)
    length = jnp.take_along_axis(length, order, axis=1)
    place = jnp.take_along_axis(rank, jnp.minimum(member, total - 1), axis=1)
    member = jnp.where(member < total, place, total)
    size = member.shape[1]
    token_row = jnp.minimum(member, total - 1)
    position = jnp.arange(size)[None] - jnp.take_along_axis(offset, token_row, axis=1)
    inside = (member < total) & (position >= 0)
    inside &= position < jnp.take_along_axis(length, token_row, axis=1)
    nowhere = sum(n * b for n, b in zip(counts, bounds, strict=True))
    to_stream = jnp.full(member.shape, nowhere, jnp.int32)
    to_rows, lengths = [], []
    first_row = first_slot = 0
    for count, bound in zip(counts, bounds, strict=True):
        rows = slice(first_row, first_row + count)
        lengths.append(length[:, rows])
        steps = jnp.arange(bound)[None, None]
        source = offset[:, rows, None] + steps
        to_rows.append(jnp.where(steps < length[:, rows, None], source, size))
        mine = inside & (member >= first_row) & (member < first_row + count)
        local = (member - first_row) * bound + position
        to_stream = jnp.where(mine, first_slot + local, to_stream)
        first_row += count
        first_slot += count * bound
    return RowMap(tuple(to_rows), to_stream, tuple(lengths))


def gather_rows(x: Array, rows: RowMap) -> list[Array]:
    """Stream [D, N, ...] to one [D, rows, length, ...] per class; zeros beyond a row's length."""
    return list(_gather(x, rows.to_rows, rows.to_stream))


def scatter_rows(parts: list[Array], rows: RowMap) -> Array:
    """Inverse of `gather_rows`: rows per class back to the stream [D, N, ...]."""
    return _scatter(tuple(parts), rows.to_rows, rows.to_stream)


@jax.custom_vjp
def _gather(x: Array, to_rows: tuple[Array, ...], to_stream: Array) -> tuple[Array, ...]:
    return tuple(take_rows(x, index) for index in to_rows)


@jax.custom_vjp
def _scatter(parts: tuple[Array, ...], to_rows: tuple[Array, ...], to_stream: Array) -> Array:
    flat = [p.reshape(p.shape[0], -1, *p.shape[3:]) for p in parts]
    joined = jnp.concatenate(flat, axis=1) if len(flat) > 1 else flat[0]
    return take_rows(joined, to_stream)


# Each is the other's transpose: every element is read once.
_gather.defvjp(
    lambda x, *maps: (_gather(x, *maps), maps),
    lambda maps, g: (_scatter(tuple(g), *maps), None, None),
)
_scatter.defvjp(
    lambda parts, *maps: (_scatter(parts, *maps), maps),
    lambda maps, g: (_gather(g, *maps), None, None),
)
