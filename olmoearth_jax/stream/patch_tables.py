"""Device side: coordinates of stream tokens, drop path, and the tables of projected patches.

A table holds the patches of one device, projected by the online encoder or by the target.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from olmoearth_jax import modalities
from olmoearth_jax.model.patch_embed import band_keep_mask
from olmoearth_jax.model.tokens import Slot, SlotTable, Tokens, days_since_2000
from olmoearth_jax.stream.pack import MicroBatch
from olmoearth_jax.stream.row_maps import RowMaps
from olmoearth_jax.stream.rows import take_rows
from olmoearth_jax.stream.stream_shape import REGISTER_SLOT, Rung, StreamSpec

INPUT_RES_M = 10.0
"""Metres per pixel of what is trained on."""


def stream_tokens(
    spec: StreamSpec,
    table: SlotTable,
    coord: jax.Array,
    row: jax.Array,
    batch: MicroBatch,
) -> Tokens:
    """Coordinates of stream tokens, every field [D, N].

    Args:
      spec: the stream.
      table: the model's slots (its numbering may cover more modalities than are trained).
      coord: uint32 [D, N], see `stream_shape.pack_coordinates`; registers have no slot, hence -1.
      row: int32 [D, N], attention row; the number of rows marks padding.
      batch: the `MicroBatch`.
    """
    slot = (coord >> 24).astype(jnp.int32)
    time = ((coord >> 16) & 0xFF).astype(jnp.int32)
    sample = take_rows(batch.row_sample[..., None], row)[..., 0]
    blank = (row >= batch.row_sample.shape[1]) | (slot == REGISTER_SLOT)
    stamps = batch.timestamps
    steps = stamps.shape[2]
    months, days = stamps[..., 1], days_since_2000(stamps)
    at = sample * steps + time

    def by_time(x):
        flat = x.reshape(x.shape[0], -1, 1)
        return take_rows(flat, at)[..., 0]

    numbers = np.array(table.numbers(spec.slots), np.int32)
    timed = np.array([table.spatial[n] or table.multitemporal[n] for n in numbers])
    lookup = jnp.clip(slot, 0, len(numbers) - 1)
    model_slot = jnp.take(jnp.asarray(numbers), lookup)
    # Static maps have a time axis of size 1 and so carry timestep 0's date; scalars carry none.
    has_date = jnp.take(jnp.asarray(timed), lookup)
    scale = take_rows(batch.patch_size[..., None].astype(jnp.float32), sample)[..., 0]
    return Tokens(
        slot=jnp.where(blank, -1, model_slot),
        time=time,
        month=by_time(months),
        row=((coord >> 8) & 0xFF).astype(jnp.int32),
        col=(coord & 0xFF).astype(jnp.int32),
        gsd=scale * np.float32(INPUT_RES_M / 10.0),
        days=jnp.where(has_date & ~blank, by_time(days), 0.0),
    )


def keep_scales(
    key: jax.Array, rate: float, depth: int, position: jax.Array, view: jax.Array
) -> jax.Array | None:
    """Drop-path factors keyed by (step, view, position): float32 [depth, 2, D, rows].

    A branch is kept with probability 1 - rate and then scaled by 1 / (1 - rate), one draw per
    (layer, branch, sample and view). The rate is the same in every layer (spec section 6).

    Args:
      key: PRNG key of the step.
      rate: drop probability; 0 gives None.
      depth: transformer blocks.
      position, view: int32 [D, rows].
    """
    if rate <= 0.0:
        return None

    def draw(position, view):
        own = jax.random.fold_in(jax.random.fold_in(key, view), position)
        return jax.random.uniform(own, (depth, 2))

    u = jax.vmap(jax.vmap(draw))(position, view)
    return jnp.where(u >= rate, 1.0 / (1.0 - rate), 0.0).transpose(2, 3, 0, 1)


def drop_fn(scales: jax.Array | None, row: jax.Array):
    """Turns `keep_scales` into the per-token factors an encoder asks for.

    Returns:
      None, or a function (layer, branch) -> float32 [D, N, 1].
    """
    if scales is None:
        return None
    per_row = scales

    def scale(layer: int, branch: int) -> jax.Array:
        return take_rows(per_row[layer, branch][..., None], row)

    return scale


@dataclasses.dataclass(frozen=True)
class BandDropout:
    """Band dropout of the online encoder (spec/model.md section 3.3)."""

    rate: float
    """Drop rate, or its upper end when random."""
    random: bool
    """Draw the rate itself uniformly below `rate`."""
    modalities: tuple[str, ...] | None
    """Those it applies to; None means all."""


def _shaped(slot: Slot, rows: jax.Array) -> jax.Array:
    """[D, n, width] -> [D, n, Pf, Pf, C], or [D, n, C] where the modality has no pixels."""
    if not modalities.get(slot.modality).spatial:
        return rows
    side = slot.patch_side
    return rows.reshape(*rows.shape[:2], side, side, len(slot.channels))


def online_table(
    encoder: Any, maps: RowMaps, patches: tuple, dropout: BandDropout | None, key: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Online projections of every patch some view may encode.

    With band dropout the two views see different pixels, so each has its own copy of the table.

    Returns:
      (table [D, T, width], index [D, enc], inverse [D, n, T]) for `rows.permute`.
    """
    spec, rung, batch = maps.spec, maps.rung, maps.batch
    sections = []
    sparse = iter(batch.sparse)
    for i, slot in enumerate(spec.slots):
        rows = patches[i][:, : rung.patches[i]]
        if not slot.encodable:
            rows = take_rows(rows, next(sparse))
        sections.append((i, slot, rows))
    numbers = encoder.slots.numbers(spec.slots)
    if dropout is None or dropout.rate <= 0:
        table = _project(encoder, numbers, sections)
        return table, batch.enc_patch, batch.enc_inverse
    views = []
    for view in range(spec.views):
        kept, start = [], 0
        for i, slot, rows in sections:
            stop = start + rows.shape[1]
            mine = batch.table_sample[:, start:stop]
            position = batch.position.reshape(-1)
            own = dropout_key(key, view, i)
            keep = band_keeps(dropout, slot, position, spec.group_size, own)
            if keep is not None:
                keep = take_rows(keep.reshape(*batch.position.shape, -1), mine)
                shape = (*rows.shape[:2], -1, keep.shape[-1])
                rows = (rows.reshape(shape) * keep[:, :, None, :]).reshape(rows.shape)
            kept.append((i, slot, rows))
            start = stop
        views.append(_project(encoder, numbers, kept))
    size = views[0].shape[1]
    view_of = take_rows(batch.row_view[..., None], batch.enc_row)[..., 0]
    real = batch.enc_patch < size
    index = jnp.where(real, batch.enc_patch + view_of * size, spec.views * size)
    inverse = batch.enc_inverse.reshape(batch.enc_inverse.shape[0], 1, -1)
    return jnp.concatenate(views, axis=1), index, inverse


def _project(encoder, numbers, sections) -> jax.Array:
    parts = [
        encoder.patch_embeddings.project(numbers[i], _shaped(slot, rows))
        for i, slot, rows in sections
        if rows.shape[1]
    ]
    return _join(parts, encoder.width, sections[0][2])


def _join(parts: list[jax.Array], width: int, like: jax.Array) -> jax.Array:
    """Joins the slots' rows; with none at all (a rung for holes only) an empty table."""
    empty = jnp.zeros((like.shape[0], 0, width), jnp.float32)
    return jnp.concatenate(parts or [empty], axis=1)


def dropout_key(key: jax.Array, view: int, number: int) -> jax.Array:
    """The key of band dropout of one view and slot, from that of the step."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(key, 3), view), number)


def band_keeps(
    dropout: BandDropout, slot: Slot, position: jax.Array, group_size: int, key: jax.Array
) -> jax.Array | None:
    """float32 [n, bands] of 0 and 1 for samples at `position` [n]; None where nothing drops.

    One rate per group and one draw per (sample, band), keyed by position; see `dropout_key`.
    """
    bands = len(slot.channels)
    if bands == 1 or (dropout.modalities is not None and slot.modality not in dropout.modalities):
        return None
    rates, own = jax.random.fold_in(key, 0), jax.random.fold_in(key, 1)

    def draw(position):
        rate = jax.random.uniform(jax.random.fold_in(rates, position // group_size))
        u = jax.random.uniform(jax.random.fold_in(own, position), (bands + 1,))
        own_draws = (u[None, :bands], u[None, bands])
        return band_keep_mask(dropout.rate, dropout.random, rate, *own_draws)[0]

    return jax.vmap(draw)(position)


def target_table(target, spec: StreamSpec, rung: Rung, patches) -> jax.Array:
    """Patch embeddings [D, sum of patches, width] of every needed patch by the target."""
    embeddings = target.patch_embeddings
    numbers = embeddings.slots.numbers(spec.slots)
    parts = [
        embeddings.project(numbers[i], _shaped(slot, patches[i][:, : rung.patches[i]]))
        for i, slot in enumerate(spec.slots)
        if rung.patches[i]
    ]
    first = embeddings.of_slot(numbers[0])
    width = first.proj.bias.shape[-1] if not first.post_proj else first.post_proj[-1].bias.shape[-1]
    return _join(parts, width, patches[0])
