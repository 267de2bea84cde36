"""Resizing crops and writing their patches into fixed buffers, without parameters.

On a GPU small programs do it, keyed by (grid, patch size) only and compiled when first met. On a
CPU, NumPy does: it is as fast and needs no compilation. Either handles `StreamSpec.chunk` samples
at a time and writes their needed patches at an offset. Rows behind the last are zero or repeats of
a finite patch; nothing reads them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from olmoearth_jax import modalities
from olmoearth_jax.model.patch_embed import to_patches
from olmoearth_jax.stream.pack import PatchRun
from olmoearth_jax.stream.stream_shape import StreamSlot, StreamSpec


def _buffer_rows(spec: StreamSpec, slot: StreamSlot) -> int:
    """Rows of a slot's buffer: the hard bound, and room for the tail of the last call."""
    return slot.max_tokens * (spec.samples + spec.chunk)


@functools.partial(jax.jit, static_argnames=("shapes",))
def _zeros(shapes: tuple[tuple[int, int], ...]) -> tuple[jax.Array, ...]:
    return tuple(jnp.zeros(s, jnp.float32) for s in shapes)


Cut = Callable[..., Any]
"""(image [B, H, W, T, C], modality, patch size, base, xp) -> patches [B, h, w, T, px, px, C]."""


def embedded_patches(x: Any, name: str, patch_size: int, base: int, xp: ModuleType) -> Any:
    """Patches as the embedding takes them: resized to `base` pixels a side."""
    m = modalities.get(name)
    return to_patches(x, patch_size * m.image_factor, base * m.image_factor, xp)


@dataclasses.dataclass(frozen=True)
class _Cutting:
    """How the images of a group become patches; a static argument of programs."""

    cut: Cut
    patch_size: int
    base: int

    @classmethod
    def of(cls, spec: StreamSpec, run: PatchRun, cut: Cut) -> _Cutting:
        return cls(cut, int(run.counts.group["patch_size"]), spec.max_patch_size)

    def __call__(self, x: Any, name: str, xp: ModuleType) -> Any:
        if not modalities.get(name).spatial:
            return x
        return self.cut(x, name, self.patch_size, self.base, xp)


@functools.partial(jax.jit, static_argnames=("slots", "cutting"), donate_argnames=("buffers",))
def _fill_chunk(
    buffers: tuple[jax.Array, ...],
    inputs: tuple[dict[str, jax.Array], tuple[jax.Array, ...]],
    offsets: jax.Array,
    *,
    slots: tuple[StreamSlot, ...],
    cutting: _Cutting,
) -> tuple[jax.Array, ...]:
    """Writes one chunk's patches, from `_padded_inputs`."""
    images, sources = inputs
    patches = {n: cutting(x, n, jnp) for n, x in images.items()}
    out = []
    for i, (slot, buffer, source) in enumerate(zip(slots, buffers, sources, strict=True)):
        x = patches[slot.modality][..., np.asarray(slot.channels)]
        rows = jnp.take(x.reshape(-1, slot.width), source, axis=0, mode="clip")
        at = (offsets[i], jnp.zeros((), offsets.dtype))
        out.append(jax.lax.dynamic_update_slice(buffer, rows, at))
    return tuple(out)


def fill_buffers(spec: StreamSpec, runs: list[PatchRun], device: Any, cut: Cut = embedded_patches):
    """Patch buffers of one device.

    Args:
      spec: the stream.
      runs: the device's samples in buffer order.
      device: where the buffers are needed.
      cut: what is written of images with an extent.

    Returns:
      Per slot, float32 [1, buffer_rows, slot.width] on `device`.
    """
    if device.platform == "cpu":
        buffers = jax.device_put(fill_on_host(spec, runs, cut), device)
    else:
        buffers = fill_on_device(spec, runs, device, cut)
    return tuple(b[None] for b in buffers)


def fill_on_device(spec: StreamSpec, runs: list[PatchRun], device: Any, cut: Cut):
    """Per slot [buffer_rows, slot.width], resized and written by compiled programs."""
    shapes = tuple((_buffer_rows(spec, s), s.width) for s in spec.slots)
    with jax.default_device(device):
        buffers = _zeros(shapes)
        for run, members, offsets in _chunks(spec, runs):
            inputs = _padded_inputs(spec, run, members)
            inputs = jax.device_put((inputs, offsets.astype(np.int32)), device)
            cutting = _Cutting.of(spec, run, cut)
            buffers = _fill_chunk(buffers, *inputs, slots=spec.slots, cutting=cutting)
    return buffers


def fill_on_host(spec: StreamSpec, runs: list[PatchRun], cut: Cut) -> list[np.ndarray]:
    """Per slot [buffer_rows, slot.width], resized and written by NumPy."""
    buffers = [np.zeros((_buffer_rows(spec, s), s.width), np.float32) for s in spec.slots]
    for run, members, offsets in _chunks(spec, runs):
        cutting, patches = _Cutting.of(spec, run, cut), {}
        for name in spec.modalities:
            images = run.counts.group["data"][name][members]
            cut_up = cutting(images, name, np)
            pixels = cut_up.shape[-3:] if modalities.get(name).spatial else cut_up.shape[-1:]
            patches[name] = np.ascontiguousarray(cut_up).reshape(-1, *pixels)
        for i, slot in enumerate(spec.slots):
            keep = np.flatnonzero(_needed(run, members, i))
            rows = patches[slot.modality][keep][..., np.asarray(slot.channels)]
            buffers[i][offsets[i] : offsets[i] + len(keep)] = rows.reshape(len(keep), slot.width)
    return buffers


def _chunks(spec: StreamSpec, runs: list[PatchRun]) -> Iterator[tuple[PatchRun, Any, Any]]:
    """(run, members, offsets) of every `spec.chunk` samples."""
    for run in runs:
        for first in range(0, len(run.members), spec.chunk):
            yield run, run.members[first : first + spec.chunk], run.offsets[first]


def _needed(run: PatchRun, members: np.ndarray, slot: int) -> np.ndarray:
    """Which patches of a slot are needed: bool [members, tokens]."""
    starts = run.counts.table.starts
    return run.counts.need[members, starts[slot] : starts[slot + 1]]


def _padded_inputs(spec: StreamSpec, run: PatchRun, members: np.ndarray):
    """Images [chunk, ...] and per slot the rows to keep, padded to fixed shapes."""
    padded = np.concatenate([members, np.repeat(members[:1], spec.chunk - len(members))])
    images = {name: run.counts.group["data"][name][padded] for name in spec.modalities}
    sources = []
    for s in range(len(spec.slots)):
        need = _needed(run, members, s)
        keep = np.flatnonzero(need)
        # The pad repeats a needed patch where there is one: it is as finite as the data.
        source = np.full(spec.chunk * need.shape[1], keep[0] if len(keep) else 0, np.int32)
        source[: len(keep)] = keep
        sources.append(source)
    return images, tuple(sources)
