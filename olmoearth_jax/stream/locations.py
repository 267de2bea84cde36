"""The pooler's location grids on the stream, and the maps that they have to draw.

A location is a token of its own stream: the rows of all grids of a micro-batch one behind another,
each row-major and as long as its grid is.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from olmoearth_jax import modalities
from olmoearth_jax.modalities import MISSING
from olmoearth_jax.model.blocks import PLAIN, Running
from olmoearth_jax.model.config import ModelConfig
from olmoearth_jax.model.rope import coordinates
from olmoearth_jax.model.tokens import Tokens
from olmoearth_jax.stream.loss_terms import own_pixels
from olmoearth_jax.stream.pack import PatchRun
from olmoearth_jax.stream.patch_tables import INPUT_RES_M
from olmoearth_jax.stream.patches import aligned_zeros
from olmoearth_jax.stream.row_maps import RowMaps, stream_attention
from olmoearth_jax.stream.rows import take_rows
from olmoearth_jax.stream.stream_shape import GRID, READ, Rung, StreamSpec


class Located(NamedTuple):
    """What the pooler gives on the stream."""

    tokens: jax.Array
    """float32 [D, loc, pooler_dim]"""
    positions: jax.Array
    """float32 [D, loc, 2] (row, col)"""
    student: jax.Array | None
    """float32 [D, loc, largest student width], or None"""


class Cells(NamedTuple):
    """Whose the locations of a micro-batch are, each int32 or bool [D, loc]."""

    sample: jax.Array
    """Sample on its device; 0 for padding."""
    group: jax.Array
    """Group within the micro-step; 0 for padding."""
    number: jax.Array
    """Place within the grid, row-major."""
    size: jax.Array
    """Pixels (10 m) per side."""
    first: jax.Array
    """bool: a location of the first view, neither of another one nor padding."""


def cells_of(maps: RowMaps) -> Cells:
    """The cells of a micro-batch."""
    batch, loc = maps.batch, maps.batch.locations
    assert loc is not None

    def of_row(x: jax.Array) -> jax.Array:
        return take_rows(x[..., None], loc.row)[..., 0]

    def of_sample(x: jax.Array) -> jax.Array:
        return take_rows(x[..., None], sample)[..., 0]

    sample = of_row(batch.row_sample)
    number = jnp.arange(loc.row.shape[1])[None] - of_row(loc.offset)
    first = (loc.row < maps.spec.rows) & (of_row(batch.row_view) == 0)
    size = of_sample(batch.patch_size) // of_sample(loc.per_patch)
    return Cells(sample, of_sample(batch.segment), number, size, first)


def _positions(maps: RowMaps, scale: float) -> jax.Array:
    """float32 [D, loc, 2]: where the locations lie; see `pooler.GridSpec.positions`."""
    loc, sample = maps.batch.locations, cells_of(maps).sample
    assert loc is not None
    per_patch = take_rows(loc.per_patch[..., None], sample)[..., 0].astype(jnp.float32)
    side = take_rows(maps.batch.patch_size[..., None], sample)[..., 0].astype(jnp.float32)
    unit = side * np.float32(INPUT_RES_M / 10.0) * np.float32(scale)
    axes = [(loc.coord >> 8) & 0xFF, loc.coord & 0xFF]
    at = [((x.astype(jnp.float32) + 0.5) / per_patch - 0.5) * unit for x in axes]
    return jnp.stack(at, axis=-1)


def locate(
    encoder: Any,
    maps: RowMaps,
    latent: jax.Array,
    tokens: Tokens,
    mesh: Mesh | None,
    running: Running = PLAIN,
) -> Located:
    """The location grids of all rows.

    Args:
      encoder: has an attention pooler.
      maps: of the batch.
      latent: float32 [D, enc, width], the encoder's normed tokens.
      tokens: their coordinates.
      mesh: devices of the leading axis.
      running: how the blocks of the pooler run, and their attention.
    """
    pooler = encoder.attention_pooler
    places = coordinates(pooler.encoder_rope, tokens)[..., -2:]
    at = _positions(maps, pooler.coordinate_scale)
    rows = maps.locations(GRID)
    read = stream_attention(maps.locations(READ), maps.context(READ), mesh, running.attention)
    mix = stream_attention(rows, rows, mesh, running.attention)
    found = pooler.locate(latent, places, at, read, mix, running)
    return Located(found, at, pooler.student_of(found))


def map_room(spec: StreamSpec, name: str) -> int:
    """Pixels per side that a location has room for in the target of a map."""
    return spec.max_patch_size * modalities.get(name).image_factor


def check_grid(model: ModelConfig) -> None:
    """Checks what the stream can't do on a location grid.

    Raises:
      ValueError: with the first fault found.
    """
    encoder, head, pixels = (
        model.encoder_config, model.supervision_head_config, model.reconstructor_config
    )  # fmt: skip
    if encoder.attention_pooler_config is None:
        return
    if head is not None:
        factors = [modalities.get(name).image_factor for name in head.modality_configs]
        least = encoder.max_patch_size * max(factors, default=1)
        if (head.spatial_unfold or encoder.max_patch_size) < least:
            raise ValueError(
                f"model.supervision_head_config.spatial_unfold must be at least {least}, the "
                f"pixels of the largest patch, got {head.spatial_unfold}"
            )
    if pixels is not None and not pixels.decoder_config.use_attention_pooler:
        raise ValueError(
            "model.reconstructor_config.decoder_config needs use_attention_pooler=true where the "
            "encoder has an attention pooler"
        )


def fill_maps(spec: StreamSpec, rung: Rung, runs: list[PatchRun], device: Any) -> tuple:
    """What the locations of one device have to draw.

    Args:
      spec, rung: the stream and its capacities.
      runs: the device's samples in the order of their rows.
      device: where it is needed.

    Returns:
      Per map of `spec.maps`, float32 [1, loc, room * room * bands] on `device`: the pixels of each
      location of the first view at their own resolution in the first rows and columns, all else
      MISSING.
    """
    out = []
    for name in spec.maps:
        room, bands = map_room(spec, name), modalities.get(name).num_bands
        buffer, at = aligned_zeros(rung.loc, room * room * bands), 0
        buffer[...] = MISSING
        for run in runs:
            images = run.counts.group["data"][name][run.members]
            size = int(run.counts.group["patch_size"]) // run.counts.per_patch
            cut = own_pixels(images, name, size, spec.max_patch_size, np)
            cut = cut.reshape(-1, room * room * bands)
            buffer[at : at + len(cut)] = cut
            at += len(cut)
        out.append(buffer[None])
    return tuple(jax.device_put(out, device))
