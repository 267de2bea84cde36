"""Resizing crops and writing their patches into fixed buffers, without parameters.

On a GPU small programs do it, keyed by (grid, patch size) only and compiled when first met. On a
CPU, NumPy does: it is as fast and needs no compilation. Either handles `StreamSpec.chunk` samples
at a time and writes their needed patches at an offset. Rows behind the last are zero or repeats of
a finite patch; nothing reads them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
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
def _zeros(shapes: tuple[tuple[int, ...], ...]) -> tuple[jax.Array, ...]:
    return tuple(jnp.zeros(s, jnp.float32) for s in shapes)


_Layout = tuple[tuple[str, tuple[int, ...]], ...]
"""(modality, shape of its images in a chunk) of arrays that lie one behind another."""

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


@functools.partial(
    jax.jit, static_argnames=("layout", "slots", "cutting"), donate_argnames=("buffers",)
)
def _fill_chunk(
    buffers: tuple[jax.Array, ...],
    pixels: jax.Array,
    numbers: jax.Array,
    *,
    layout: _Layout,
    slots: tuple[StreamSlot, ...],
    cutting: _Cutting,
) -> tuple[jax.Array, ...]:
    """Writes one chunk's patches, from `_chunk_inputs`."""
    patches, at = {}, 0
    for name, shape in layout:
        size = math.prod(shape)
        patches[name] = cutting(pixels[at : at + size].reshape(shape), name, jnp)
        at += size
    offsets, zero = numbers[-len(slots) :], jnp.zeros((), numbers.dtype)
    out, at = [], 0
    for i, (slot, buffer) in enumerate(zip(slots, buffers, strict=True)):
        x = patches[slot.modality][..., np.asarray(slot.channels)].reshape(-1, slot.width)
        rows = jnp.take(x, numbers[at : at + len(x)], axis=0, mode="clip")
        at += len(x)
        out.append(jax.lax.dynamic_update_slice(buffer, rows[None], (zero, offsets[i], zero)))
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
        return tuple(jax.device_put([b[None] for b in fill_on_host(spec, runs, cut)], device))
    return fill_on_device(spec, runs, device, cut)


def fill_on_device(spec: StreamSpec, runs: list[PatchRun], device: Any, cut: Cut):
    """Per slot [1, buffer_rows, slot.width], resized and written by compiled programs."""
    shapes = tuple((1, _buffer_rows(spec, s), s.width) for s in spec.slots)
    with jax.default_device(device):
        buffers = _zeros(shapes)
        for run, members, offsets in _chunks(spec, runs):
            *inputs, layout = _chunk_inputs(spec, run, members, offsets)
            inputs = jax.device_put(inputs, device)
            own = {"layout": layout, "slots": spec.slots, "cutting": _Cutting.of(spec, run, cut)}
            buffers = _fill_chunk(buffers, *inputs, **own)
    return buffers


_ALIGNED = 64
"""Bytes. JAX takes over memory that begins at a multiple of it, and copies any other."""


def aligned_zeros(rows: int, width: int) -> np.ndarray:
    """float32 [rows, width] that `jax.device_put` does not copy on a CPU.

    So nobody may write to it afterwards.
    """
    spare = _ALIGNED // 4
    whole = np.zeros(rows * width + spare, np.float32)
    first = -whole.ctypes.data % _ALIGNED // 4
    return whole[first : first + rows * width].reshape(rows, width)


def fill_on_host(spec: StreamSpec, runs: list[PatchRun], cut: Cut) -> list[np.ndarray]:
    """Per slot [buffer_rows, slot.width], resized and written by NumPy."""
    buffers = [aligned_zeros(_buffer_rows(spec, s), s.width) for s in spec.slots]
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


def _chunk_inputs(
    spec: StreamSpec, run: PatchRun, members: np.ndarray, offsets: np.ndarray
) -> tuple[np.ndarray, np.ndarray, _Layout]:
    """What `_fill_chunk` takes, as two arrays: small transfers cost what their number costs.

    Returns:
      (float32 images [chunk, ...] one behind another; int32 rows to keep of every slot, padded to
      fixed lengths, and then the slots' `offsets`; what the images are).
    """
    padded = np.concatenate([members, np.repeat(members[:1], spec.chunk - len(members))])
    data = run.counts.group["data"]
    layout = tuple((name, (spec.chunk, *data[name].shape[1:])) for name in spec.modalities)
    pixels, at = np.empty(sum(math.prod(shape) for _, shape in layout), np.float32), 0
    for name, shape in layout:
        size = math.prod(shape)
        np.take(data[name], padded, axis=0, out=pixels[at : at + size].reshape(shape), mode="clip")
        at += size
    starts, need = run.counts.table.starts, run.counts.need[members]
    numbers = np.empty(spec.chunk * need.shape[1] + len(spec.slots), np.int32)
    for first, stop in zip(starts[:-1], starts[1:], strict=True):
        keep = np.flatnonzero(need[:, first:stop])
        source = numbers[spec.chunk * first : spec.chunk * stop]
        source[: len(keep)] = keep
        # The pad repeats a needed patch where there is one: it is as finite as the data.
        source[len(keep) :] = keep[0] if len(keep) else 0
    numbers[-len(spec.slots) :] = offsets
    return pixels, numbers, layout
