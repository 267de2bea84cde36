"""Terms of the objective on the token stream; every one gives a value per group.

The last part compares the pixels of patches, which need buffers of their own.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from olmoearth_jax import modalities
from olmoearth_jax.losses import MAE, Groups, KoLeo, Rows, TokenLoss, rows_value
from olmoearth_jax.losses.rows import safe_divide, segment_sum
from olmoearth_jax.modalities import MISSING
from olmoearth_jax.model.patch_embed import resize_matrix
from olmoearth_jax.stream.pack import PatchRun, PixelIndex, target_sections
from olmoearth_jax.stream.patches import fill_buffers
from olmoearth_jax.stream.row_maps import RowMaps
from olmoearth_jax.stream.rows import RowMap, gather_rows, permute, take_rows
from olmoearth_jax.stream.stream_shape import GRID, SELF, StreamSpec


def of_samples(maps: RowMaps) -> Groups:
    """Groups of the samples of all devices."""
    batch = maps.batch
    return Groups(batch.segment.reshape(-1), batch.weight.reshape(-1), maps.spec.groups)


def of_rows(maps: RowMaps) -> tuple[jax.Array, jax.Array]:
    """(segment, weight) [D, rows]; the segment of a row is view * groups + group."""
    spec, batch = maps.spec, maps.batch
    segment = take_rows(batch.segment[..., None], batch.row_sample)[..., 0]
    segment = batch.row_view * spec.groups + segment
    weight = take_rows(batch.weight[..., None], batch.row_sample)[..., 0]
    return segment, weight


def token_terms(loss: TokenLoss, maps: RowMaps, predictions: jax.Array, targets: jax.Array):
    """A token loss on every view.

    Args:
      loss: the loss.
      maps: row maps of the batch.
      predictions, targets: [D, dec, width].

    Returns:
      (value [views, groups], {'modality/<name>': its part, the same shape}).
    """
    shape = (maps.spec.views, maps.spec.groups)
    if loss.scope in ("sample", "batch"):
        return _value(loss, maps, maps.whole(), predictions, targets).reshape(shape), {}
    by_name = maps.modalities()
    if loss.scope == "token":
        return _value(loss, maps, by_name, predictions, targets).reshape(shape), {}
    parts = {}
    for name, rows in by_name.items():
        value = _value(loss, maps, {name: rows}, predictions, targets)
        parts[f"modality/{name}"] = value.reshape(shape)
    return sum(parts.values(), jnp.zeros(shape, jnp.float32)), parts


def _value(loss, maps: RowMaps, chosen: dict[str, tuple[str, RowMap]], predictions, targets):
    """[views * groups]; rows and scores are recomputed in the backward pass, not kept."""
    spec, batch = maps.spec, maps.batch
    count = spec.views * spec.groups
    segment, weight = of_rows(maps)
    samples = segment_sum(weight.reshape(-1), segment.reshape(-1), count)

    @jax.checkpoint
    def value(predictions, targets):
        rows = {}
        for name, (plan, row_map) in chosen.items():
            order = batch.order[:, spec.plan(plan)]
            groups, weights = (jnp.take_along_axis(x, order, axis=1) for x in (segment, weight))
            rows[name] = _loss_rows(row_map, groups, weights, predictions, targets)
        return rows_value(loss, rows, count, samples)

    return value(predictions, targets)


def _loss_rows(rows: RowMap, segment, weight, predictions, targets) -> list[Rows]:
    """One `Rows` per row class, device and row axes merged."""
    out, first = [], 0
    for p, t, n in zip(
        gather_rows(predictions, rows), gather_rows(targets, rows), rows.lengths, strict=True
    ):
        mine = slice(first, first + p.shape[1])
        first += p.shape[1]
        valid = jnp.arange(p.shape[2]) < n[..., None]
        fields = (p, t, valid, segment[:, mine], weight[:, mine])
        if p.shape[1] and p.shape[2]:
            out.append(Rows(*(x.reshape(-1, *x.shape[2:]) for x in fields)))
    return out


def _sample_means(maps: RowMaps, rows: RowMap, latent: jax.Array) -> jax.Array:
    """[D, views, samples, width]: mean of each sample's visible tokens; 0 without any."""
    extra = maps.spec.registers
    if extra:
        latent = jnp.where((maps.register_number() < 0)[..., None], latent, 0.0)
    means = []
    for part, n in zip(gather_rows(latent, rows), rows.lengths, strict=True):
        count = jnp.maximum(n - extra, 1).astype(jnp.float32)[..., None]
        means.append(part.astype(jnp.float32).sum(2) / count)
    batch = maps.batch
    by_row = take_rows(jnp.concatenate(means, axis=1), batch.rank[:, maps.spec.plan(SELF)])
    return take_rows(by_row, batch.sample_row)


def pooled_locations(head: Any, maps: RowMaps, tokens: jax.Array) -> list[jax.Array]:
    """As `pooled`, from the location tokens [D, loc, width] of each sample."""
    if not head.aggregate_first:
        tokens = head.project(tokens)
    rows = maps.locations(GRID)
    means = []
    for part, n in zip(gather_rows(tokens, rows), rows.lengths, strict=True):
        count = jnp.maximum(n, 1).astype(jnp.float32)[..., None]
        means.append(part.astype(jnp.float32).sum(2) / count)
    batch = maps.batch
    by_row = take_rows(jnp.concatenate(means, axis=1), batch.rank[:, maps.spec.plan(GRID)])
    found = take_rows(by_row, batch.sample_row)
    if head.aggregate_first:
        found = head.project(found)
    return [found[:, v].reshape(-1, found.shape[-1]) for v in range(maps.spec.views)]


def pooled(head: Any, maps: RowMaps, rows: RowMap, latent: jax.Array) -> list[jax.Array]:
    """Per view the pooled projections [samples of all devices, width]."""
    if not head.aggregate_first:
        latent = head.project(latent)
    means = _sample_means(maps, rows, latent)
    if head.aggregate_first:
        means = head.project(means)
    return [means[:, v].reshape(-1, means.shape[-1]) for v in range(maps.spec.views)]


def spread_vectors(loss: KoLeo, maps: RowMaps, vectors: list[jax.Array]) -> jax.Array:
    """[groups]: the regulariser on one vector per sample, mean over views."""
    groups = of_samples(maps)
    return jnp.stack([loss(x, groups) for x in vectors]).mean(0)


def spread_tokens(loss: KoLeo, maps: RowMaps, rows: RowMap, latent: jax.Array) -> jax.Array:
    """[groups]: the regulariser on the encoder tokens of the one view."""
    if loss.mode == "instance":
        means = _sample_means(maps, rows, latent)
        return spread_vectors(loss, maps, [means[:, 0].reshape(-1, means.shape[-1])])
    batch = maps.batch
    segment, weight = of_rows(maps)
    segment = take_rows(segment[..., None], batch.enc_row)[..., 0]
    weight = take_rows(weight[..., None], batch.enc_row)[..., 0]
    weight = jnp.where(maps.register_number() < 0, weight, 0.0)
    vectors = latent.reshape(-1, latent.shape[-1])
    return loss(vectors, Groups(segment.reshape(-1), weight.reshape(-1), maps.spec.groups))


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


def _of_patches(
    index: PixelIndex, tokens: jax.Array, blank: jax.Array | None
) -> tuple[Any, jax.Array]:
    """What predicts each patch [D, views, table, width], and whether the patch counts."""
    made: Any = permute(tokens, index.token, index.inverse)
    real = index.token < tokens.shape[1]
    if blank is None:
        return made, real
    empty = index.token > tokens.shape[1]
    return jnp.where(empty[..., None], blank, made), real | empty


def pixel_terms(
    loss: MAE,
    reconstructor: Any,
    maps: RowMaps,
    tokens: tuple[jax.Array, jax.Array | None],
    pixels: tuple,
) -> jax.Array:
    """[views, groups]: the pixel loss of every view.

    Args:
      loss: the loss.
      reconstructor: its heads are used.
      maps: of the batch.
      tokens: what predicts the patches, float32 [D, n, width] as `PixelIndex` counts them, and
        float32 [width], what a patch has that no token predicts (None: such patches don't count).
      pixels: see `fill_pixels`, [D, rows, width].
    """
    spec, batch, index = maps.spec, maps.batch, maps.batch.pixels
    assert index is not None
    count = spec.views * spec.groups
    made, real = _of_patches(index, *tokens)
    starts = target_sections(maps.rung)
    numbers = reconstructor.slots.numbers(spec.slots)
    group = take_rows(batch.segment[..., None], index.sample)[..., 0]
    segment = jnp.arange(spec.views)[:, None] * spec.groups + group[:, None]
    weight = take_rows(batch.weight[..., None], index.sample)[..., 0]
    real &= (weight > 0)[:, None]
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

        pair = sums(made[:, :, mine], truth, real[:, :, mine], size[:, mine])
        flat = segment[:, :, mine].reshape(-1)
        total = total + segment_sum(pair[0].reshape(-1), flat, count)
        used = used + segment_sum(pair[1].reshape(-1), flat, count)
    return (loss.weight * safe_divide(total, used)).reshape(spec.views, spec.groups)
