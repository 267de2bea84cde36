"""Row maps of each purpose, from the extents of a micro-batch, and attention through them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from olmoearth_jax.mesh import BATCH_AXES
from olmoearth_jax.model.attention import row_attention, takes_parts
from olmoearth_jax.model.blocks import Attend
from olmoearth_jax.stream.pack import MicroBatch
from olmoearth_jax.stream.rows import RowMap, gather_rows, row_map, scatter_rows
from olmoearth_jax.stream.stream_shape import (
    CROSS,
    SAMPLE,
    SELF,
    TARGET,
    RowClass,
    Rung,
    StreamSpec,
)


def _joined(classes: tuple[RowClass, ...]) -> tuple[RowClass, ...]:
    """One class of all rows, where attention computes no more of a row than it holds."""
    rows = sum(c.rows for c in classes)
    most = max(c.queries for c in classes), max(c.keys for c in classes)
    return (RowClass(rows, *most),) if takes_parts(rows, *most) else classes


@dataclasses.dataclass(frozen=True)
class RowMaps:
    """The row maps of one micro-batch."""

    spec: StreamSpec
    rung: Rung
    """Capacities the batch was packed for."""
    batch: MicroBatch

    def _map(self, name: str, offset, length, member, keys: bool = False) -> RowMap:
        p = self.spec.plan(name)
        classes = self.rung.rows[p]
        if name in (SELF, CROSS, TARGET):
            classes = _joined(classes)
        bounds = tuple(c.keys if keys else c.queries for c in classes)
        counts = tuple(c.rows for c in classes)
        order, rank = self.batch.order[:, p], self.batch.rank[:, p]
        return row_map(offset, length, member, order, rank, counts, bounds)

    def encoder(self) -> RowMap:
        """Self-attention: visible tokens behind the registers of their row."""
        b = self.batch
        return self._map(SELF, b.enc_offset, b.enc_length, b.enc_row)

    def context(self, name: str = CROSS) -> RowMap:
        """Keys of the decoder, or of the pooler (READ): visible tokens without registers."""
        b, extra = self.batch, self.spec.registers
        length = b.enc_length - extra if extra else b.enc_length
        offset = b.enc_offset + extra
        # Unused rows have no registers either.
        return self._map(name, offset, length.clip(0), b.enc_row, keys=True)

    def locations(self, name: str) -> RowMap:
        """Locations: queries of the pooler (READ, GRID) or keys of the decoder (CROSS)."""
        at = self.batch.locations
        assert at is not None
        return self._map(name, at.offset, at.length, at.row, keys=name == CROSS)

    def decoder(self, name: str = CROSS) -> RowMap:
        """Decoded tokens, as queries (CROSS) or rows of a loss over whole samples (SAMPLE)."""
        b = self.batch
        return self._map(name, b.dec_offset, b.dec_length, b.dec_row)

    def whole(self) -> dict[str, tuple[str, RowMap]]:
        """{'': (plan, rows)} of losses over whole samples."""
        return {"": (SAMPLE, self.decoder(SAMPLE))}

    def modalities(self) -> dict[str, tuple[str, RowMap]]:
        """{modality: (plan, rows)} of losses within a modality."""
        out, b = {}, self.batch
        for plan in self.spec.plans:
            if plan.name in self.spec.modalities:
                m = self.spec.modalities.index(plan.name)
                rows = self._map(plan.name, b.mod_offset[..., m], b.mod_length[..., m], b.dec_row)
                out[plan.name] = (plan.name, rows)
        return out

    def target(self) -> RowMap:
        """Self-attention of the target encoder."""
        t = self.batch.target
        assert t is not None
        return self._map(TARGET, t.offset, t.length, t.row)

    def register_number(self) -> jax.Array:
        """int32 [D, enc]: number of a register within its row, -1 for other tokens."""
        return self._register(self.batch.enc_row, self.batch.enc_offset)

    def target_register_number(self) -> jax.Array:
        """The same for the target's stream."""
        assert self.batch.target is not None
        return self._register(self.batch.target.row, self.batch.target.offset)

    def _register(self, row: jax.Array, offset: jax.Array) -> jax.Array:
        total = self.spec.rows
        first = jnp.take_along_axis(offset, jnp.minimum(row, total - 1), axis=1)
        place = jnp.arange(row.shape[1])[None] - first
        return jnp.where((row < total) & (place < self.spec.registers), place, -1)


def stream_attention(
    queries: RowMap, keys: RowMap, mesh: Mesh | None, implementation: Any = "auto"
) -> Attend:
    """An attention callable for the model's blocks, on streams [D, N, heads, head_dim].

    Args:
      queries: rows of the query stream.
      keys: rows of the key stream, same classes.
      mesh: devices the leading axis is split over; None or one device needs no shard_map.
      implementation: see `row_attention`.
    """

    def rows(q, k, v, q_lengths, k_lengths):
        # Local shards: the leading axis is this device's alone and merges into the rows.
        def merge(x):
            return x.reshape(-1, *x.shape[2:])

        out = row_attention(
            merge(q),
            merge(k),
            merge(v),
            kv_lengths=merge(k_lengths),
            q_lengths=merge(q_lengths),
            implementation=implementation,
        )
        return out.reshape(q.shape)

    call = rows
    if mesh is not None and mesh.size > 1:
        spec = PartitionSpec(BATCH_AXES)
        call = jax.shard_map(rows, mesh=mesh, in_specs=(spec,) * 5, out_specs=spec, check_vma=False)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        parts = []
        gathered = (gather_rows(q, queries), gather_rows(k, keys), gather_rows(v, keys))
        for qc, kc, vc, nq, nk in zip(*gathered, queries.lengths, keys.lengths, strict=True):
            # A class without rows costs nothing but must keep its (empty) place.
            parts.append(call(qc, kc, vc, nq, nk) if qc.shape[1] else qc)
        return scatter_rows(parts, queries)

    return attend
