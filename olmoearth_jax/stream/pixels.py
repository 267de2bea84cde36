"""Pixel targets of decoded patches, and the pixel loss of a reconstructor on the stream."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from olmoearth_jax import modalities
from olmoearth_jax.losses import MAE
from olmoearth_jax.losses.numerics import safe_divide, segment_sum
from olmoearth_jax.modalities import MISSING
from olmoearth_jax.model.resize import resize_matrix
from olmoearth_jax.stream.maps import Maps
from olmoearth_jax.stream.pack import PatchRun, target_sections
from olmoearth_jax.stream.patches import fill_buffers
from olmoearth_jax.stream.rows import permute, take_rows
from olmoearth_jax.stream.spec import StreamSpec
from olmoearth_jax.stream.tokens import model_slots


def own_pixels(x: Any, name: str, patch_size: int, base: int, xp: ModuleType) -> Any:
    """Images [B, H, W, T, C] -> patches [B, h, w, T, room, room, C] at their own resolution.

    A patch fills the first rows and columns of a base patch; the rest is missing.
    """
    factor = modalities.get(name).image_factor
    side = patch_size * factor
    b, height, width, steps, channels = x.shape
    x = x.reshape(b, height // side, side, width // side, side, steps, channels)
    x = x.transpose(0, 1, 3, 5, 2, 4, 6)
    more = (base - patch_size) * factor
    return xp.pad(x, [(0, 0)] * 4 + [(0, more)] * 2 + [(0, 0)], constant_values=MISSING)


def fill_pixels(spec: StreamSpec, runs: list[PatchRun], device: Any) -> tuple:
    """Pixel buffers of one device: per slot, float32 [1, buffer rows, slot.width].

    Patches stand where `patches.fill_buffers` puts them, at their own resolution.
    """
    return fill_buffers(spec, runs, device, own_pixels)


def _resizes(base: int, room: int, largest: int) -> np.ndarray:
    """float32 [largest + 1, room, base]: for each patch size the map from base to its pixels."""
    factor = room // largest
    out = np.zeros((largest + 1, room, base), np.float32)
    for size in range(1, largest + 1):
        out[size, : size * factor] = resize_matrix(base, size * factor)
    return out


def pixel_terms(
    loss: MAE, reconstructor: Any, maps: Maps, decoded: jax.Array, pixels: tuple
) -> jax.Array:
    """[views, groups]: the pixel loss of every view.

    Args:
      loss: the loss; only decoded tokens count.
      reconstructor: its heads are used.
      maps: of the batch.
      decoded: float32 [D, dec, width] from the reconstructor's decoder.
      pixels: see `fill_pixels`, [D, rows, width].
    """
    spec, batch, index = maps.spec, maps.batch, maps.batch.pixels
    assert index is not None
    count = spec.views * spec.groups
    tokens: Any = permute(decoded, index.token, index.inverse)
    starts = target_sections(maps.rung)
    numbers = model_slots(spec, reconstructor.slots)
    group = take_rows(batch.segment[..., None], index.sample)[..., 0]
    segment = jnp.arange(spec.views)[:, None] * spec.groups + group[:, None]
    weight = take_rows(batch.weight[..., None], index.sample)[..., 0]
    real = (index.token < decoded.shape[1]) & (weight > 0)[:, None]
    size = take_rows(batch.patch_size[..., None], index.sample)[..., 0]
    total = used = jnp.zeros(count, jnp.float32)
    for i, slot in enumerate(spec.slots):
        mine = slice(int(starts[i]), int(starts[i + 1]))
        if mine.start == mine.stop:
            continue
        band_set = reconstructor.slots.slots[numbers[i]].band_set
        head = reconstructor.heads[slot.modality][band_set]
        truth = pixels[i][:, : maps.rung.patches[i]]
        wide = (*truth.shape[:2], slot.patch_side, slot.patch_side, len(slot.channels))

        @jax.checkpoint
        def sums(head_tokens, truth, real, size, head=head, slot=slot, wide=wide):
            table = jnp.asarray(_resizes(head.base, slot.patch_side, spec.max_patch_size))
            turn, high = jnp.take(table, size, axis=0), jax.lax.Precision.HIGHEST
            patch = head(head_tokens, head.base)
            patch = jnp.einsum("dnyh,dvnhwc->dvnywc", turn, patch, precision=high)
            patch = jnp.einsum("dnxw,dvnywc->dvnyxc", turn, patch, precision=high)
            truth = truth.reshape(wide)[:, None]
            whole = ~jnp.any(truth == MISSING, axis=-1, keepdims=True)
            counts = jnp.broadcast_to(real[..., None, None, None] & whole, patch.shape)
            errors = loss.element(jnp.where(counts, patch - truth, 0.0))
            errors = jnp.where(counts, errors, 0.0)
            return errors.sum((3, 4, 5)), counts.astype(jnp.float32).sum((3, 4, 5))

        pair = sums(tokens[:, :, mine], truth, real[:, :, mine], size[:, mine])
        flat = segment[:, :, mine].reshape(-1)
        total = total + segment_sum(pair[0].reshape(-1), flat, count)
        used = used + segment_sum(pair[1].reshape(-1), flat, count)
    return (loss.weight * safe_divide(total, used)).reshape(spec.views, spec.groups)
