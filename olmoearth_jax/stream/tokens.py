"""Device side: coordinates of stream tokens, drop-path scales and band dropout."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from olmoearth_jax.model.tokens import SlotTable, Tokens, days_since_2000
from olmoearth_jax.stream.layout import REGISTER_SLOT
from olmoearth_jax.stream.rows import take_rows
from olmoearth_jax.stream.spec import StreamSpec


def stream_tokens(
    spec: StreamSpec,
    table: SlotTable,
    coord: jax.Array,
    row: jax.Array,
    batch,
    input_res: float = 10.0,
) -> Tokens:
    """Coordinates of stream tokens, every field [D, N].

    Args:
      spec: the stream.
      table: the model's slots (its numbering may cover more modalities than are trained).
      coord: uint32 [D, N], see `spec.pack_coordinates`; registers have no slot, hence -1.
      row: int32 [D, N], attention row; the number of rows marks padding.
      batch: the `MicroBatch`.
      input_res: metres per pixel of the input.
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

    numbers = np.array(_model_slots(spec, table), np.int32)
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
        gsd=scale * np.float32(input_res / 10.0),
        days=jnp.where(has_date & ~blank, by_time(days), 0.0),
    )


def _model_slots(spec: StreamSpec, table: SlotTable) -> list[int]:
    """The model's slot number of each stream slot."""
    out, seen = [], {}
    for slot in spec.slots:
        k = seen.get(slot.modality, 0)
        seen[slot.modality] = k + 1
        out.append(table.of(slot.modality)[k])
    return out


def model_slots(spec: StreamSpec, table: SlotTable) -> list[int]:
    """The model's slot number of each stream slot.

    Raises:
      ValueError: the model tokenises a modality differently from the stream.
    """
    numbers = _model_slots(spec, table)
    for slot, number in zip(spec.slots, numbers, strict=True):
        if table.slots[number].channels != slot.channels:
            raise ValueError(f"model and stream use different band sets for {slot.modality!r}")
    return numbers


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
