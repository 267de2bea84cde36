"""Models on a uniform batch: samples of one shape, every token in place, masks at the attention.

Nothing is removed, sorted or packed, so this is also what the packed stream is held to. Masks are
at token level (spec section 1.2).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from olmoearth_jax import modalities
from olmoearth_jax.masks import DECODE, MISSING_TOKEN, VISIBLE
from olmoearth_jax.model.attention import row_attention
from olmoearth_jax.model.blocks import PLAIN, Running
from olmoearth_jax.model.encoder import Encoder
from olmoearth_jax.model.patch_embed import PatchEmbeddings, grid_size, to_patches
from olmoearth_jax.model.pooler import GridSpec, LocationGrid
from olmoearth_jax.model.tokens import SlotTable, Tokens, days_since_2000

_Arrays = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class UniformBatch:
    """Samples of one shape and patch size, as a model takes them."""

    data: _Arrays
    """{modality: raster}; those that the model does not support are ignored."""
    masks: _Arrays
    """{modality: int8 [B, *token shape]}"""
    timestamps: Any
    """int [B, T, 3] of day 1..31, month 0..11, year"""
    patch_size: int
    input_res: float = 10.0
    """Metres per pixel."""
    location_size: int | None = None
    """Pixels per side of a location of the attention pooler; must divide the patch size, which is
    the default."""

    def layout(self, slots: SlotTable) -> tuple[dict[str, Any], Layout]:
        """The rasters that a model with these slots takes, and where their tokens lie.

        Raises:
          ValueError: there is none, or sides that the patch size does not divide.
        """
        data = {name: self.data[name] for name in slots.names if name in self.data}
        if not data:
            raise ValueError(
                f"the sample holds none of the model's modalities ({', '.join(slots.names)})"
            )
        shapes = {name: _token_shape(slots, name, x, self.patch_size) for name, x in data.items()}
        return data, layout_of(slots, shapes)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the tokens of each modality lie in the flattened axis of a uniform batch."""

    shapes: dict[str, tuple[int, ...]]
    """Modality -> token shape without the batch axis, (h, w, T, S), (T, S) or (S,)."""
    slices: dict[str, slice]
    """Modality -> slice of the token axis, row-major over its shape."""
    total: int
    """Tokens of a sample."""

    def join(self, per_modality: _Arrays) -> jax.Array:
        """{modality: [B, *shape, ...]} -> [B, N, ...]."""
        parts = []
        for name, shape in self.shapes.items():
            x = jnp.asarray(per_modality[name])
            size = int(np.prod(shape))
            parts.append(x.reshape(x.shape[0], size, *x.shape[1 + len(shape) :]))
        return jnp.concatenate(parts, axis=1)

    def cut(self, x: jax.Array) -> dict[str, jax.Array]:
        """[B, N, ...] -> {modality: [B, *shape, ...]}."""
        return {
            name: x[:, self.slices[name]].reshape(x.shape[0], *shape, *x.shape[2:])
            for name, shape in self.shapes.items()
        }


def layout_of(slots: SlotTable, token_shapes: Mapping[str, tuple[int, ...]]) -> Layout:
    """Layout from token shapes (without batch), in the slot table's order."""
    shapes, slices, start = {}, {}, 0
    for name in slots.names:
        if name in token_shapes:
            shapes[name] = tuple(token_shapes[name])
            stop = start + int(np.prod(shapes[name]))
            slices[name], start = slice(start, stop), stop
    return Layout(shapes, slices, start)


def _token_shape(slots: SlotTable, name: str, array: Any, patch_size: int) -> tuple[int, ...]:
    """Token shape, without batch, of a raster [B, H, W, T, C], [B, T, C] or [B, C]."""
    modality = modalities.get(name)
    sets = len(slots.of(name))
    if not modality.spatial:
        return (*array.shape[1:-1], sets)
    pixels = patch_size * modality.image_factor
    height, width, steps = array.shape[1:4]
    return (grid_size(height, pixels), grid_size(width, pixels), steps, sets)


def tokens_from_grid(
    slots: SlotTable,
    layout: Layout,
    timestamps: Any,
    patch_size: Any,
    input_res: float = 10.0,
) -> Tokens:
    """Coordinates [B, N] of all tokens of a uniform batch, from its members (see there).

    `patch_size` may be traced.
    """
    timestamps = jnp.asarray(timestamps)
    batch = timestamps.shape[0]
    index = {key: [] for key in ("slot", "time", "row", "col", "dated")}
    for name, shape in layout.shapes.items():
        modality = modalities.get(name)
        sets = np.asarray(slots.of(name), np.int32)
        zero = np.zeros(shape, np.int32)
        varies = modality.multitemporal
        time = np.arange(shape[-2], dtype=np.int32)[:, None] if varies else 0
        row = np.arange(shape[0], dtype=np.int32)[:, None, None, None] if modality.spatial else 0
        col = np.arange(shape[1], dtype=np.int32)[:, None, None] if modality.spatial else 0
        dated = int(len(shape) > 1)
        for key, value in zip(index, (sets, time, row, col, dated), strict=True):
            index[key].append((zero + value).reshape(-1))
    slot, time, row, col, dated = (np.concatenate(v) for v in index.values())
    shape = (batch, layout.total)

    def spread(x: np.ndarray) -> jax.Array:
        return jnp.broadcast_to(jnp.asarray(x), shape)

    return Tokens(
        slot=spread(slot),
        time=spread(time),
        month=timestamps[:, time, 1] * dated,
        row=spread(row),
        col=spread(col),
        gsd=jnp.full(shape, patch_size * input_res / 10.0, jnp.float32),
        days=days_since_2000(timestamps)[:, time] * dated,
    )


def token_masks_from_pixels(
    slots: SlotTable, masks: _Arrays, patch_size: int
) -> dict[str, jax.Array]:
    """Token masks from pixel masks: the value at each patch's top-left pixel.

    Args:
      masks: {modality: int [B, H, W, T, >= S] (or [B, T, >= S], [B, >= S])}; entries beyond the
        number of band sets are ignored.
    """
    out = {}
    for name, mask in masks.items():
        step = patch_size * modalities.get(name).image_factor
        mask = mask[..., : len(slots.of(name))]
        out[name] = mask[:, ::step, ::step] if modalities.get(name).spatial else mask
    return out


def embed_patches(
    embeddings: PatchEmbeddings, data: _Arrays, patch_size: int
) -> dict[str, jax.Array]:
    """Patch embeddings {modality: [B, *token shape, D]} of rasters, spec section 3."""
    slots = embeddings.slots
    out = {}
    for name in slots.names:
        if name not in data:
            continue
        x = jnp.asarray(data[name], jnp.float32)
        if modalities.get(name).spatial:
            factor = modalities.get(name).image_factor
            x = to_patches(x, patch_size * factor, slots.base_patch_size * factor)
        parts = []
        for slot_id in slots.of(name):
            channels = np.asarray(slots.slots[slot_id].channels)
            parts.append(embeddings.project(slot_id, x[..., channels]))
        out[name] = jnp.stack(parts, axis=-2)
    return out


def attend_masked(key_mask: jax.Array | None, implementation: Any = "auto") -> Callable:
    """`attend` of a block over rows [B, N]: all queries, keys where `key_mask` [B, N]."""

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return row_attention(q, k, v, key_mask=key_mask, implementation=implementation)

    return attend


@dataclasses.dataclass
class Encoded:
    """What the encoder gives: tokens and masks per modality, and the pooled projection."""

    tokens: dict[str, jax.Array]
    masks: dict[str, jax.Array]
    project_aggregated: jax.Array | None
    coordinates: Tokens
    layout: Layout
    locations: LocationGrid | None = None
    """Grid of the attention pooler, where the encoder has one."""


def _with_registers(
    encoder: Encoder, x: jax.Array, tokens: Tokens, keys: jax.Array | None
) -> tuple[jax.Array, Tokens, jax.Array | None, int]:
    """Register tokens in front: no encodings, always attended."""
    if encoder.register_tokens is None:
        return x, tokens, keys, 0
    registers = encoder.register_tokens[...]
    batch, count = x.shape[0], registers.shape[0]
    x = jnp.concatenate([jnp.broadcast_to(registers, (batch, *registers.shape)), x], axis=1)
    blank = Tokens.blank((batch, count))
    tokens = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), blank, tokens)
    if keys is not None:
        keys = jnp.concatenate([jnp.ones((batch, count), bool), keys], axis=1)
    return x, tokens, keys, count


def encode_batch(
    encoder: Encoder,
    batch: UniformBatch,
    running: Running = PLAIN,
    exits: Mapping[str, int] | None = None,
    fast_pass: bool = False,
) -> Encoded:
    """The encoder on a uniform batch (spec section 7).

    Args:
      running: drop path, rematerialisation and attention.
      exits: token exit depths; all zero gives raw patch embeddings of all tokens.
      fast_pass: attend to all tokens whatever the masks, and pool nothing.

    Returns:
      `Encoded`; tokens are exactly 0 where the mask is not 0 (before the output projection),
      except with `fast_pass` or all exits 0.
    """
    slots, attention = encoder.slots, running.attention
    data, layout = batch.layout(slots)
    _check_exits(exits, layout, fast_pass)
    masks = {name: jnp.asarray(batch.masks[name]) for name in layout.shapes}
    patch_size, input_res = batch.patch_size, batch.input_res
    tokens = tokens_from_grid(slots, layout, batch.timestamps, patch_size, input_res)
    x = layout.join(embed_patches(encoder.patch_embeddings, data, patch_size))
    visible = layout.join(masks) == VISIBLE
    raw = exits is not None and not any(exits[name] for name in layout.shapes)
    if not raw:
        keys = None if fast_pass else visible
        x, where, keys, count = _with_registers(encoder, x, tokens, keys)
        x = encoder.encode(x, where, attend_masked(keys, attention), running, exits)[:, count:]
        if not fast_pass:
            x = jnp.where(visible[..., None], x, 0.0)
    locations = None
    if batch.location_size is not None and encoder.attention_pooler is None:
        raise ValueError("location_size is for encoders with an attention pooler (v1.3)")
    if encoder.attention_pooler is not None and not raw:
        grid = GridSpec.of(layout, patch_size, input_res, batch.location_size)
        read = attend_masked(None if fast_pass else visible, attention)
        locations = encoder.attention_pooler(x, tokens, grid, read, attend_masked(None, attention))
    x = encoder.project_output(x)
    pooled = None
    if not fast_pass and (locations is not None or encoder.attention_pooler is None):
        pooled = pool_and_project(encoder, x, visible, locations)
    return Encoded(layout.cut(x), masks, pooled, tokens, layout, locations)


def pool_and_project(
    encoder: Encoder, x: jax.Array, visible: jax.Array, locations: LocationGrid | None
) -> jax.Array:
    """The pooled projection [B, D]: over the location grid if there is one, else the tokens."""
    if locations is None:
        return encoder.project_and_aggregate(x, visible)
    grid = locations.flat
    return encoder.project_and_aggregate(grid, jnp.ones(grid.shape[:2], bool))


def _check_exits(exits: Mapping[str, int] | None, layout: Layout, fast_pass: bool) -> None:
    if exits is None:
        return
    if fast_pass:
        raise ValueError("fast_pass cannot be combined with token exits")
    absent = [name for name in layout.shapes if name not in exits]
    if absent:
        raise ValueError(f"token exits need a depth for every modality; missing: {absent}")


def decode_batch(decoder: Any, encoded: Encoded, running: Running = PLAIN) -> dict[str, jax.Array]:
    """The predictor on a uniform batch: outputs at all positions (spec section 8.6)."""
    layout = encoded.layout
    mask = layout.join(encoded.masks)
    visible, decoded = (mask == VISIBLE)[..., None], (mask == DECODE)[..., None]
    # Encoder and decoder share their slots, so the coordinates carry over.
    tokens = encoded.coordinates
    context = decoder.context(layout.join(encoded.tokens), tokens)
    read, places, keys = context, tokens, visible[..., 0]
    if decoder.location_embed is not None and encoded.locations is not None:
        # The grid is all that is read: patch tokens do not reach the predictions.
        read, keys = decoder.location_context(encoded.locations.flat), None
        places = encoded.locations.positions
    x = decoder.decode(
        decoder.queries(tokens),
        tokens,
        (read, places),
        attend_masked(keys, running.attention),
        running,
    )
    out = jnp.where(decoded, x, jnp.where(visible, context, 0.0))
    return layout.cut(decoder.output(out))


@dataclasses.dataclass
class Forward:
    """Output of a whole model on one view."""

    encoder: dict[str, jax.Array]
    """Tokens per modality, [B, *token shape, D_out]."""
    decoder: dict[str, jax.Array] | None
    """Predictions per modality at all positions, or None without a decoder."""
    reconstructed: dict[str, jax.Array] | None
    """Pixels per modality, or None without a reconstructor."""
    project_aggregated: jax.Array | None
    """[B, D_out]"""
    masks: dict[str, jax.Array]
    """Token masks per modality."""
    locations: LocationGrid | None = None
    """Grid of the attention pooler, if there is one."""


def forward_batch(
    model: Any,
    batch: UniformBatch,
    view: int = 0,
    encoder: Running = PLAIN,
    decoder: Running = PLAIN,
) -> Forward:
    """Encoder, decoder and reconstructor of a model on one view.

    Args:
      model: a `latent_mim.Model`.
      view: 0 or 1, picks the decoder of a Galileo model.
      encoder, decoder: how their blocks run.
    """
    encoded = encode_batch(model.encoder, batch, encoder)
    predictor, pixels = model.decoder_of(view), None
    decoded = None if predictor is None else decode_batch(predictor, encoded, decoder)
    if model.reconstructor is not None:
        inner = decode_batch(model.reconstructor.decoder, encoded, decoder)
        pixels = {
            name: model.reconstructor.reconstruct(name, x, batch.patch_size)
            for name, x in inner.items()
        }
    pooled, grid = encoded.project_aggregated, encoded.locations
    return Forward(encoded.tokens, decoded, pixels, pooled, encoded.masks, grid)


def target_batch(
    target: Any,
    batch: UniformBatch,
    exits: Mapping[str, int] | None = None,
    running: Running = PLAIN,
) -> dict[str, jax.Array]:
    """Targets per modality on the unmasked sample: mask 3 stays missing, the rest is seen.

    Args:
      target: a `TargetProjection` (every exit must be 0) or an `Encoder`.
      exits: token exit depths; None runs the whole encoder.

    Raises:
      ValueError: a projection-only target with an exit deeper than 0.
    """
    if not isinstance(target, Encoder):
        if exits is not None and any(exits.values()):
            raise ValueError("a projection-only target needs all token exit depths to be 0")
        tokens = embed_patches(target.patch_embeddings, batch.data, batch.patch_size)
        return {name: target.project_output(x) for name, x in tokens.items()}
    seen = {
        name: jnp.where(jnp.asarray(mask) == MISSING_TOKEN, MISSING_TOKEN, VISIBLE)
        for name, mask in batch.masks.items()
    }
    return encode_batch(target, dataclasses.replace(batch, masks=seen), running, exits).tokens
