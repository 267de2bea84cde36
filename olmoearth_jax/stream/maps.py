"""Row maps of each purpose, from the extents that a micro-batch carries."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from olmoearth_jax.stream.layout import TARGET, registers_of
from olmoearth_jax.stream.pack import MicroBatch
from olmoearth_jax.stream.rows import RowMap, row_map
from olmoearth_jax.stream.spec import CROSS, SAMPLE, SELF, Rung, StreamSpec


@dataclasses.dataclass(frozen=True)
class Maps:
    """Builds row maps of one micro-batch.

    Attributes:
      spec: the stream.
      rung: capacities the batch was packed for.
      batch: index arrays.
    """

    spec: StreamSpec
    rung: Rung
    batch: MicroBatch

    def _map(self, name: str, offset, length, member, keys: bool = False) -> RowMap:
        p = self.spec.plan(name)
        classes = self.rung.rows[p]
        bounds = tuple(c.keys if keys else c.queries for c in classes)
        counts = tuple(c.rows for c in classes)
        order, rank = self.batch.order[:, p], self.batch.rank[:, p]
        return row_map(offset, length, member, order, rank, counts, bounds)

    def encoder(self) -> RowMap:
        """Self-attention: visible tokens behind the registers of their row."""
        b = self.batch
        return self._map(SELF, b.enc_offset, b.enc_length, b.enc_row)

    def context(self) -> RowMap:
        """Keys of the decoder: visible tokens without registers."""
        b, extra = self.batch, registers_of(self.spec)
        length = b.enc_length - extra if extra else b.enc_length
        offset = b.enc_offset + extra
        # Unused rows have no registers either.
        return self._map(CROSS, offset, length.clip(0), b.enc_row, keys=True)

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
        return jnp.where((row < total) & (place < registers_of(self.spec)), place, -1)
