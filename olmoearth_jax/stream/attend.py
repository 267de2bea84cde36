"""Attention of a token stream: gather into rows, attend within each row, gather back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

from olmoearth_jax.model.attention import row_attention
from olmoearth_jax.stream.rows import RowMap, gather_rows, scatter_rows

BATCH_AXES = ("data", "fsdp")
"""Mesh axes over which samples are split."""

Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


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
