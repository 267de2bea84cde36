"""Parameter-free device programs that resize crops and write their patches into fixed buffers.

They are keyed by (grid, patch size) only, small, and compiled when first met. Each call handles
`StreamSpec.chunk` samples and writes their needed patches at a traced offset; the rows behind them
hold repeats of a finite patch that the next call overwrites and nothing ever reads.
"""

from __future__ import annotations

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from olmoearth_jax import modalities
from olmoearth_jax.model.resize import to_patches
from olmoearth_jax.stream.pack import PatchRun
from olmoearth_jax.stream.spec import Slot, StreamSpec


def buffer_rows(spec: StreamSpec, slot: Slot) -> int:
    """Rows of a slot's buffer: the hard bound, and room for the tail of the last call."""
    return slot.max_tokens * (spec.samples + spec.chunk)


@functools.partial(jax.jit, static_argnames=("shapes",))
def _zeros(shapes: tuple[tuple[int, int], ...]) -> tuple[jax.Array, ...]:
    return tuple(jnp.zeros(s, jnp.float32) for s in shapes)


@functools.partial(
    jax.jit, static_argnames=("slots", "patch_size", "base"), donate_argnames=("buffers",)
)
def _fill_chunk(
    buffers: tuple[jax.Array, ...],
    images: dict[str, jax.Array],
    sources: tuple[jax.Array, ...],
    offsets: jax.Array,
    *,
    slots: tuple[Slot, ...],
    patch_size: int,
    base: int,
) -> tuple[jax.Array, ...]:
    """Writes one chunk's patches; `sources` picks and orders the needed ones."""
    cut = {}
    for name, x in images.items():
        m = modalities.get(name)
        if m.spatial:
            x = to_patches(x, patch_size * m.image_factor, base * m.image_factor)
        cut[name] = x
    out = []
    for i, (slot, buffer, source) in enumerate(zip(slots, buffers, sources, strict=True)):
        x = cut[slot.modality][..., np.asarray(slot.channels)]
        rows = jnp.take(x.reshape(-1, slot.width), source, axis=0, mode="clip")
        at = (offsets[i], jnp.zeros((), offsets.dtype))
        out.append(jax.lax.dynamic_update_slice(buffer, rows, at))
    return tuple(out)


def fill_buffers(spec: StreamSpec, runs: list[PatchRun], device: Any):
    """Patch buffers of one device.

    Args:
      spec: the stream.
      runs: the device's samples in buffer order.
      device: where the programs run.

    Returns:
      Per slot, float32 [1, buffer_rows, slot.width] on `device`.
    """
    shapes = tuple((buffer_rows(spec, s), s.width) for s in spec.slots)
    with jax.default_device(device):
        buffers = _zeros(shapes)
        for run in runs:
            for first in range(0, len(run.members), spec.chunk):
                members = run.members[first : first + spec.chunk]
                images, sources = _chunk_inputs(spec, run, members)
                images, sources, offsets = jax.device_put(
                    (images, sources, run.offsets[first].astype(np.int32)), device
                )
                buffers = _fill_chunk(
                    buffers,
                    images,
                    sources,
                    offsets,
                    slots=spec.slots,
                    patch_size=int(run.census.group["patch_size"]),
                    base=spec.max_patch_size,
                )
    return tuple(b[None] for b in buffers)


def _chunk_inputs(spec: StreamSpec, run: PatchRun, members: np.ndarray):
    """Images [chunk, ...] and per slot the rows to keep, padded to fixed shapes."""
    census = run.census
    padded = np.concatenate([members, np.repeat(members[:1], spec.chunk - len(members))])
    images = {name: census.group["data"][name][padded] for name in spec.modalities}
    starts = census.table.starts
    sources = []
    for s in range(len(spec.slots)):
        need = census.need[members, starts[s] : starts[s + 1]]
        keep = np.flatnonzero(need)
        # The pad repeats a needed patch where there is one: it is as finite as the data.
        source = np.full(spec.chunk * need.shape[1], keep[0] if len(keep) else 0, np.int32)
        source[: len(keep)] = keep
        sources.append(source)
    return images, tuple(sources)


def compile_count() -> int:
    """Resize programs compiled so far in this process (not counted as step programs)."""
    return int(cast(Any, _fill_chunk)._cache_size())
