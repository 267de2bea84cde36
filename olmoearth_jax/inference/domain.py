"""Embedding of areas of any size: overlapping crops, each encoded in one pass (v1.3 spec 7.4)."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np

from olmoearth_jax import modalities
from olmoearth_jax.inference.prepare import ModelInput
from olmoearth_jax.model import searchlight
from olmoearth_jax.model.uniform_batch import UniformBatch
from olmoearth_jax.proposals import known

OUTPUTS = ("student", "location")


@dataclasses.dataclass(frozen=True)
class Crop:
    """One crop of an axis, in pixels: encode start..stop, keep first..last of the domain."""

    start: int
    stop: int
    first: int
    last: int

    def kept(self, size: int) -> slice:
        """What it keeps, in a grid of the domain of `size` pixels per entry."""
        return slice(self.first // size, self.last // size)

    def inner(self, size: int) -> slice:
        """What it keeps, in its own grid."""
        return slice((self.first - self.start) // size, (self.last - self.start) // size)


def safe_halo(config: Any, patch_size: int, window_px: int) -> int:
    """Pixels around a crop that make its inside exactly what one pass over the domain gives."""
    window = window_px // patch_size
    pooler = config.attention_pooler_config
    attentions = config.depth + (0 if pooler is None else 1 + pooler.pooler_depth)
    cells = window - 1 + (attentions - 1) * (window // 2)
    border = 0 if patch_size == config.max_patch_size else -(-2 // patch_size) * patch_size
    return cells * patch_size + border


def crops_of(side: int, crop: int, overlap: int, patch_size: int, window_px: int) -> list[Crop]:
    """Crops of one axis of the domain.

    Raises:
      ValueError: sizes that do not fit the patches or the window.
    """
    halo, core = overlap // 2, crop - overlap
    if overlap % 2 or halo % patch_size or core < 1 or core % patch_size:
        raise ValueError(
            f"crops of {crop} pixels with an overlap of {overlap}: half the overlap and what "
            f"remains of the crop must be whole patches of {patch_size}"
        )
    if side % patch_size:
        raise ValueError(f"a domain side of {side} pixels is not divisible by {patch_size}")
    out = [
        Crop(max(at - halo, 0), min(at + core + halo, side), at, min(at + core, side))
        for at in range(0, side, core)
    ]
    small = min(c.stop - c.start for c in out)
    if small < window_px:
        raise ValueError(
            f"a crop would be {small} pixels wide, less than the window of {window_px}; use "
            f"another crop size, or an overlap of at least {2 * (window_px - patch_size)}"
        )
    return out


def tiles_of(side: int, tile: int, overlap: int, step: int) -> list[Crop]:
    """Equal tiles over an axis: those at the end are shifted inward, so one shape serves them all.

    Args:
      side: length of the axis in pixels, whole steps.
      tile: side of a tile; what it keeps lies at least half the overlap from its cut edges.
      overlap: pixels that neighbours share.
      step: pixels per token.

    Raises:
      ValueError: half the overlap or the tile are not whole tokens.
    """
    halo, core = overlap // 2, tile - overlap
    if overlap < 0 or overlap % 2 or halo % step or core < step or core % step:
        raise ValueError(
            f"tiles of {tile} pixels with an overlap of {overlap}: half the overlap and what "
            f"remains of the tile must be whole patches of {step}"
        )
    if side <= tile:
        return [Crop(0, side, 0, side)]
    out, at = [], 0
    while at < side:
        start = min(max(at - halo, 0), side - tile)
        stop = start + tile
        last = side if stop == side else stop - halo
        out.append(Crop(start, stop, at, last))
        at = last
    return out


def _cut(arrays: Any, rows: Crop, cols: Crop, step: int = 1) -> dict[str, np.ndarray]:
    """The crop of {modality: [1, H, W, ...]}; `step` is the pixels per entry (patches of masks)."""
    out = {}
    for name, x in arrays.items():
        factor = modalities.get(name).image_factor if step == 1 else 1
        y, z = (slice(c.start * factor // step, c.stop * factor // step) for c in (rows, cols))
        out[name] = x[:, y, z]
    return out


@dataclasses.dataclass(frozen=True)
class DomainPlan:
    """How a domain is cut and what is kept of it; sizes in pixels."""

    patch_size: int
    crop_px: int
    """Side of a crop, its halos included."""
    overlap_px: int
    """Of neighbouring crops; exact from twice `safe_halo` on."""
    window_px: int = searchlight.WINDOW_PX
    location_size: int | None = None
    """Side of a location; the patch by default."""
    output: str = "student"
    """'student' or 'location'."""
    input_res: float = 10.0
    """Metres per pixel."""


def embed_domain(encoder: Any, domain: ModelInput, plan: DomainPlan) -> np.ndarray:
    """Grid of embeddings of a whole domain by an encoder with an attention pooler.

    Args:
      encoder: an `Encoder`.
      domain: one sample of any size.

    Returns:
      float32 [H / location size, W / location size, width].

    Raises:
      ValueError: sizes that do not fit, or an encoder without what is asked for.
    """
    output, patch_size, data = plan.output, plan.patch_size, domain.data
    known("output", output, OUTPUTS)
    pooler = encoder.attention_pooler
    if pooler is None:
        raise ValueError("embed_domain needs an encoder with an attention pooler (v1.3)")
    if output == "student" and pooler.student is None:
        raise ValueError("this model has no student embeddings; use output='location'")
    name = next(iter(data))
    factor = modalities.get(name).image_factor
    height, width = (side // factor for side in data[name].shape[1:3])
    cuts = plan.crop_px, plan.overlap_px, patch_size, plan.window_px
    rows, cols = (crops_of(n, *cuts) for n in (height, width))
    size, out = plan.location_size or patch_size, None
    for row, col in itertools.product(rows, cols):
        batch = UniformBatch(
            _cut(data, row, col), _cut(domain.masks, row, col, patch_size), domain.timestamps,
            patch_size, plan.input_res, plan.location_size,
        )  # fmt: skip
        grid: Any = searchlight.encode_searchlight(encoder, batch, plan.window_px).locations
        found = np.asarray((grid.student if output == "student" else grid.tokens)[0], np.float32)
        if out is None:
            out = np.empty((height // size, width // size, found.shape[-1]), np.float32)
        out[row.kept(size), col.kept(size)] = found[row.inner(size), col.inner(size)]
    assert out is not None
    return out
