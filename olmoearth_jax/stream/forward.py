"""Loss of one micro-step on the token stream: both views, every group, in one program."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from olmoearth_jax.losses import Rows, info_nce, rows_value
from olmoearth_jax.losses.numerics import segment_sum
from olmoearth_jax.model.latent_mim import merge
from olmoearth_jax.stream.attend import stream_attention
from olmoearth_jax.stream.pack import MicroBatch
from olmoearth_jax.stream.rows import RowMap, gather_rows, permute, row_map, take_rows
from olmoearth_jax.stream.spec import CROSS, SAMPLE, SELF, Rung, StreamSpec
from olmoearth_jax.stream.tables import BandDropout, online_table, target_table
from olmoearth_jax.stream.tokens import drop_fn, keep_scales, stream_tokens


@dataclasses.dataclass(frozen=True)
class Objective:
    """What a step minimises.

    Attributes:
      token_loss: a registered per-modality or per-sample token loss (`olmoearth_jax.losses`).
      contrastive: (temperature, weight) of InfoNCE between the views' pooled vectors, or None.
    """

    token_loss: Any
    contrastive: tuple[float, float] | None


@dataclasses.dataclass(frozen=True)
class StreamForward:
    """The loss function of one rung family.

    Attributes:
      graph: module structure of the model (`olmoearth_jax.model.params.split`).
      target_graph: module structure of the frozen target projection.
      spec: the stream.
      objective: the losses.
      mesh: devices of the leading axis.
      attention: 'auto', 'xla' or 'cudnn'.
      remat: rematerialisation policy of the blocks.
      encoder_drop, decoder_drop: drop-path rates.
      band_dropout: band dropout of the online encoder, or None.
    """

    graph: Any
    target_graph: Any
    spec: StreamSpec
    objective: Objective
    mesh: Mesh | None = None
    attention: str = "auto"
    remat: str = "none"
    encoder_drop: float = 0.0
    decoder_drop: float = 0.0
    band_dropout: BandDropout | None = None

    def __call__(
        self, params: Any, target: Any, batch: MicroBatch, patches: tuple, key: Any, rung: Rung
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Mean over the micro-step's groups of the reference's per-microbatch loss.

        Args:
          params: online parameters (nested dict, float32).
          target: parameters of the frozen target.
          batch: index arrays, leading axis = devices.
          patches: per slot, float32 [D, buffer rows, width].
          key: PRNG key of the step.
          rung: capacities the batch was packed for.

        Returns:
          The loss (float32 scalar) and {'base': [views, groups], 'contrastive': [groups],
          'modality/<name>': [views, groups]}, all float32.
        """
        model = merge(self.graph, params)
        rows = {
            SELF: self._enc_rows(batch, rung, SELF),
            CROSS: (self._dec_rows(batch, rung, CROSS), self._enc_rows(batch, rung, CROSS)),
        }
        latent, tokens = self._encode(model, batch, patches, key, rung, rows[SELF])
        predictions = self._decode(model, batch, latent, tokens, key, *rows[CROSS])
        target_model = merge(self.target_graph, target)
        table = target_table(target_model, self.spec, rung, patches)
        targets = take_rows(jax.lax.stop_gradient(table), batch.dec_patch)
        base, parts = self._token_losses(batch, rung, predictions, targets)
        total = base.mean(0)
        aux = {"base": base, **parts}
        if self.objective.contrastive is not None:
            nce = self._contrastive(model, batch, latent, rows[SELF])
            total, aux["contrastive"] = total + nce, nce
        return total.mean(), aux

    def _map(self, batch, rung: Rung, name: str, offset, length, member, bounds) -> RowMap:
        p = self.spec.plan(name)
        return row_map(
            offset, length, member, batch.order[:, p], batch.rank[:, p], rung.rows[p], bounds
        )

    def _enc_rows(self, batch: MicroBatch, rung: Rung, name: str) -> RowMap:
        keys = self.spec.plans[self.spec.plan(name)].keys
        extents = (batch.enc_offset, batch.enc_length, batch.enc_row)
        return self._map(batch, rung, name, *extents, keys)

    def _dec_rows(self, batch: MicroBatch, rung: Rung, name: str) -> RowMap:
        queries = self.spec.plans[self.spec.plan(name)].queries
        extents = (batch.dec_offset, batch.dec_length, batch.dec_row)
        return self._map(batch, rung, name, *extents, queries)

    def _scales(self, rate: float, depth: int, batch: MicroBatch, key, row: jax.Array):
        position = take_rows(batch.position[..., None], batch.row_sample)[..., 0]
        return drop_fn(keep_scales(key, rate, depth, position, batch.row_view), row)

    def _encode(self, model, batch, patches, key, rung, rows: RowMap):
        encoder = model.encoder
        tokens = stream_tokens(
            self.spec, encoder.slots, batch.enc_coord, batch.enc_row, batch
        )
        table, index, inverse = online_table(
            encoder, self.spec, rung, batch, patches, self.band_dropout, key
        )
        x = permute(table, index, inverse)
        attend = stream_attention(rows, rows, self.mesh, self.attention)
        drop_key = jax.random.fold_in(key, 1)
        drop = self._scales(self.encoder_drop, len(encoder.blocks), batch, drop_key, batch.enc_row)
        latent = encoder.encode(x, tokens, attend, drop=drop, remat=self.remat)
        return encoder.project_output(latent), tokens

    def _decode(self, model, batch, latent, tokens, key, dec_rows: RowMap, enc_rows: RowMap):
        decoder = model.decoder
        wanted = stream_tokens(
            self.spec, decoder.slots, batch.dec_coord, batch.dec_row, batch
        )
        attend = stream_attention(dec_rows, enc_rows, self.mesh, self.attention)
        drop_key = jax.random.fold_in(key, 2)
        drop = self._scales(self.decoder_drop, len(decoder.blocks), batch, drop_key, batch.dec_row)
        context = decoder.context(latent, tokens)
        out = decoder.decode(
            decoder.queries(wanted), wanted, context, tokens, attend, drop=drop, remat=self.remat
        )
        return decoder.output(out)

    def _token_losses(self, batch, rung, predictions, targets):
        """Per (view, group) value of the token loss, and its parts per modality."""
        loss = self.objective.token_loss
        shape = (self.spec.views, self.spec.groups)
        if loss.scope in ("sample", "batch"):
            maps = {"": (SAMPLE, self._dec_rows(batch, rung, SAMPLE))}
            return self._value(maps, batch, predictions, targets).reshape(shape), {}
        maps = {}
        for plan in self.spec.plans:
            if plan.name in self.spec.modalities:
                m = self.spec.modalities.index(plan.name)
                extents = (batch.mod_offset[..., m], batch.mod_length[..., m], batch.dec_row)
                rows = self._map(batch, rung, plan.name, *extents, plan.queries)
                maps[plan.name] = (plan.name, rows)
        if loss.scope == "token":
            return self._value(maps, batch, predictions, targets).reshape(shape), {}
        parts = {
            f"modality/{name}": self._value({name: rows}, batch, predictions, targets)
            for name, rows in maps.items()
        }
        parts = {name: value.reshape(shape) for name, value in parts.items()}
        return sum(parts.values(), jnp.zeros(shape, jnp.float32)), parts

    def _value(self, maps: dict, batch, predictions, targets) -> jax.Array:
        """[views * groups]; rows and scores are recomputed in the backward pass, not kept."""
        count = self.spec.views * self.spec.groups
        segment = take_rows(batch.segment[..., None], batch.row_sample)[..., 0]
        segment = batch.row_view * self.spec.groups + segment
        weight = take_rows(batch.weight[..., None], batch.row_sample)[..., 0]
        samples = segment_sum(weight.reshape(-1), segment.reshape(-1), count)

        @jax.checkpoint
        def value(predictions, targets):
            rows = {}
            for name, (plan, row_map_) in maps.items():
                order = batch.order[:, self.spec.plan(plan)]
                ordered = [jnp.take_along_axis(x, order, axis=1) for x in (segment, weight)]
                rows[name] = self._loss_rows(row_map_, *ordered, predictions, targets)
            return rows_value(self.objective.token_loss, rows, count, samples)

        return value(predictions, targets)

    def _loss_rows(self, rows: RowMap, segment, weight, predictions, targets) -> list[Rows]:
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

    def _contrastive(self, model, batch, latent, rows: RowMap) -> jax.Array:
        """[groups]: InfoNCE from view A to view B; negatives are the other samples of the group."""
        head = model.encoder.project_and_aggregate
        if not head.aggregate_first:
            latent = head.project(latent)
        means = []
        for part, n in zip(gather_rows(latent, rows), rows.lengths, strict=True):
            count = jnp.maximum(n, 1).astype(jnp.float32)[..., None]
            means.append(part.astype(jnp.float32).sum(2) / count)
        by_row = take_rows(jnp.concatenate(means, axis=1), batch.rank[:, self.spec.plan(SELF)])
        pooled = take_rows(by_row, batch.sample_row)
        if head.aggregate_first:
            pooled = head.project(pooled)
        a, b = (pooled[:, v].reshape(-1, pooled.shape[-1]) for v in (0, 1))
        temperature, weight = self.objective.contrastive
        return info_nce(
            a, b, batch.segment.reshape(-1), batch.weight.reshape(-1), self.spec.groups,
            tau=temperature, weight=weight,
        )  # fmt: skip
