"""Terms of the objective on the token stream; every one gives a value per group."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from olmoearth_jax.losses import Groups, KoLeo, Rows, TokenLoss, rows_value
from olmoearth_jax.losses.numerics import segment_sum
from olmoearth_jax.stream.layout import registers_of
from olmoearth_jax.stream.maps import Maps
from olmoearth_jax.stream.rows import RowMap, gather_rows, take_rows
from olmoearth_jax.stream.spec import SELF


def of_samples(maps: Maps) -> Groups:
    """Groups of the samples of all devices."""
    batch = maps.batch
    return Groups(batch.segment.reshape(-1), batch.weight.reshape(-1), maps.spec.groups)


def of_rows(maps: Maps) -> tuple[jax.Array, jax.Array]:
    """(segment, weight) [D, rows]; the segment of a row is view * groups + group."""
    spec, batch = maps.spec, maps.batch
    segment = take_rows(batch.segment[..., None], batch.row_sample)[..., 0]
    segment = batch.row_view * spec.groups + segment
    weight = take_rows(batch.weight[..., None], batch.row_sample)[..., 0]
    return segment, weight


def token_terms(loss: TokenLoss, maps: Maps, predictions: jax.Array, targets: jax.Array):
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


def _value(loss, maps: Maps, chosen: dict[str, tuple[str, RowMap]], predictions, targets):
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


def sample_means(maps: Maps, rows: RowMap, latent: jax.Array) -> jax.Array:
    """[D, views, samples, width]: mean of each sample's visible tokens; 0 without any."""
    extra = registers_of(maps.spec)
    if extra:
        latent = jnp.where((maps.register_number() < 0)[..., None], latent, 0.0)
    means = []
    for part, n in zip(gather_rows(latent, rows), rows.lengths, strict=True):
        count = jnp.maximum(n - extra, 1).astype(jnp.float32)[..., None]
        means.append(part.astype(jnp.float32).sum(2) / count)
    batch = maps.batch
    by_row = take_rows(jnp.concatenate(means, axis=1), batch.rank[:, maps.spec.plan(SELF)])
    return take_rows(by_row, batch.sample_row)


def pooled(head: Any, maps: Maps, rows: RowMap, latent: jax.Array) -> list[jax.Array]:
    """Per view the pooled projections [samples of all devices, width]."""
    if not head.aggregate_first:
        latent = head.project(latent)
    means = sample_means(maps, rows, latent)
    if head.aggregate_first:
        means = head.project(means)
    return [means[:, v].reshape(-1, means.shape[-1]) for v in range(maps.spec.views)]


def spread_vectors(loss: KoLeo, maps: Maps, vectors: list[jax.Array]) -> jax.Array:
    """[groups]: the regulariser on one vector per sample, mean over views."""
    groups = of_samples(maps)
    return jnp.stack([loss(x, groups) for x in vectors]).mean(0)


def spread_tokens(loss: KoLeo, maps: Maps, rows: RowMap, latent: jax.Array) -> jax.Array:
    """[groups]: the regulariser on the encoder tokens of the one view."""
    if loss.mode == "instance":
        means = sample_means(maps, rows, latent)
        return spread_vectors(loss, maps, [means[:, 0].reshape(-1, means.shape[-1])])
    batch = maps.batch
    segment, weight = of_rows(maps)
    segment = take_rows(segment[..., None], batch.enc_row)[..., 0]
    weight = take_rows(weight[..., None], batch.enc_row)[..., 0]
    weight = jnp.where(maps.register_number() < 0, weight, 0.0)
    vectors = latent.reshape(-1, latent.shape[-1])
    return loss(vectors, Groups(segment.reshape(-1), weight.reshape(-1), maps.spec.groups))
