"""Loss of one micro-step on the token stream: every view, every group, in one program."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from olmoearth_jax.losses import Objective, spread_of
from olmoearth_jax.model.blocks import Running
from olmoearth_jax.model.latent_mim import merge
from olmoearth_jax.model.tokens import Tokens
from olmoearth_jax.model.variants import TODAY, Variant
from olmoearth_jax.stream import location_terms, loss_terms
from olmoearth_jax.stream.locations import Located, locate
from olmoearth_jax.stream.pack import MicroBatch
from olmoearth_jax.stream.patch_tables import (
    BandDropout,
    drop_fn,
    keep_scales,
    online_table,
    stream_tokens,
    target_table,
)
from olmoearth_jax.stream.row_maps import RowMaps, stream_attention
from olmoearth_jax.stream.rows import RowMap, permute, take_rows
from olmoearth_jax.stream.stream_shape import CROSS, Rung, StreamSpec


class _Seen(NamedTuple):
    """What the decoders read."""

    latent: jax.Array
    tokens: Tokens
    cross: tuple[RowMap, RowMap]
    """Rows of the decoders' queries and of their keys."""
    key: jax.Array
    located: Located | None = None
    """The grid of the pooler, which is all that the decoders then read."""


@dataclasses.dataclass(frozen=True)
class StreamForward:
    """The loss function of one rung family."""

    graph: Any
    """Module structure of the model (`olmoearth_jax.model.params.split`)."""
    target_graph: Any
    """Module structure of the frozen target projection."""
    spec: StreamSpec
    """The stream."""
    objective: Objective
    """The losses."""
    mesh: Mesh | None = None
    """Devices of the leading axis."""
    attention: str = "auto"
    """'auto', 'xla' or 'cudnn'."""
    remat: str = "none"
    """Rematerialisation policy of the blocks."""
    encoder_drop: float = 0.0
    """Drop-path rates."""
    decoder_drop: float = 0.0
    """Likewise."""
    band_dropout: BandDropout | None = None
    """Band dropout of the online encoder, or None."""
    variant: Variant = TODAY
    """How the blocks are computed."""

    def __call__(
        self,
        params: Any,
        target: Any,
        batch: MicroBatch,
        patches: tuple,
        key: Any,
        rung: Rung,
        pixels: tuple = (),
        drawn: tuple = (),
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Mean over the micro-step's groups of the reference's per-microbatch loss.

        Args:
          params: online parameters (nested dict, float32).
          target: parameters of the frozen target.
          batch: index arrays, leading axis = devices.
          patches: per slot, float32 [D, buffer rows, width].
          key: PRNG key of the step.
          rung: capacities the batch was packed for.
          pixels: per slot, float32 [D, buffer rows, width] of pixels at their own resolution, if
            the objective compares pixels.
          drawn: per map, see `locations.fill_maps`, if there is supervision.

        Returns:
          The loss (float32 scalar) and its terms by metric name, float32.
        """
        model, maps = merge(self.graph, params), RowMaps(self.spec, rung, batch)
        objective, rows = self.objective, maps.encoder()
        latent, tokens = self._encode(model, maps, patches, key, rows)
        located, context = None, None
        if self.spec.loc_bound:
            how = self._running(None)
            located = locate(model.encoder, maps, latent, tokens, self.mesh, how)
            context = maps.locations(CROSS)
        seen = _Seen(latent, tokens, (maps.decoder(), context or maps.context()), key, located)
        terms, parts = {}, {}
        if objective.compares_tokens:
            predictions = self._predict(model, maps, seen)
            if not objective.keeps_target:
                target = params["encoder"]
            targets = self._targets(jax.lax.stop_gradient(target), maps, patches)
            terms["base"], parts = self._token_terms(maps, predictions, targets)
            parts = {**parts, **self._spreads(maps, predictions, targets)}
        if objective.mae is not None:
            tokens = self._pixel_tokens(model, maps, seen)
            terms["mae"] = loss_terms.pixel_terms(
                objective.mae, model.reconstructor, maps, tokens, pixels
            )
        terms |= self._pooled_terms(model, maps, rows, latent, located)
        on_grid, found = self._grid_terms(model, maps, located, drawn, key)
        total, aux = objective.total(terms | on_grid)
        return total, {**aux, **parts, **found}

    def _pooled_terms(
        self, model, maps: RowMaps, rows: RowMap, latent, located: Located | None
    ) -> dict:
        """The terms on pooled vectors, and the regulariser on tokens where there is one view."""
        objective, terms = self.objective, {}
        vectors = []
        if objective.pools:
            head = model.encoder.project_and_aggregate
            if located is None:
                vectors = loss_terms.pooled(head, maps, rows, latent)
            else:
                vectors = loss_terms.pooled_locations(head, maps, located.tokens)
        if objective.regularizer is not None:
            if objective.views == 1:
                spread = loss_terms.spread_tokens(objective.regularizer, maps, rows, latent)
            else:
                spread = loss_terms.spread_vectors(objective.regularizer, maps, vectors)
            terms["regularizer"] = spread
        if objective.contrastive is not None:
            terms["contrastive"] = objective.contrastive(
                vectors[0], vectors[1], loss_terms.of_samples(maps)
            )
        return terms

    def _grid_terms(self, model, maps: RowMaps, located: Located | None, drawn: tuple, key):
        """(terms, metrics) of the losses on the location grid."""
        terms, metrics = {}, {}
        supervision, distillation = self.objective.supervision, self.objective.distillation
        if supervision is not None:
            assert located is not None
            terms["supervision"], found = location_terms.supervision_terms(
                supervision, model.supervision_head, maps, located, drawn
            )
            metrics |= found
        if distillation is not None:
            assert located is not None
            back = model.location_token_distillation_head.by_width
            own = jax.random.fold_in(key, 3)
            terms["projection"], found = location_terms.distillation_terms(
                distillation, back, maps, located, own, self.mesh
            )
            metrics |= found
        return terms, metrics

    def _spreads(self, maps: RowMaps, predictions: jax.Array, targets: jax.Array) -> dict:
        """`spread_of` the decoded tokens and their targets, both views of a group together."""
        groups, of_row = self.spec.groups, loss_terms.of_rows(maps)[0]
        rows = maps.batch.dec_row
        owner = take_rows(of_row[..., None], rows)[..., 0] % groups
        real = rows < of_row.shape[1]
        sides = {"prediction_spread": predictions, "target_spread": targets}
        return {name: spread_of(x, real, owner, groups) for name, x in sides.items()}

    def _scales(self, rate: float, depth: int, batch: MicroBatch, key, row: jax.Array):
        position = take_rows(batch.position[..., None], batch.row_sample)[..., 0]
        return drop_fn(keep_scales(key, rate, depth, position, batch.row_view), row)

    def _running(self, drop: Any) -> Running:
        return Running(drop, self.remat, self.attention, self.variant)

    def _encode(self, model, maps: RowMaps, patches, key, rows: RowMap):
        encoder, batch = model.encoder, maps.batch
        tokens = stream_tokens(self.spec, encoder.slots, batch.enc_coord, batch.enc_row, batch)
        table, index, inverse = online_table(encoder, maps, patches, self.band_dropout, key)
        x = self._with_registers(encoder, permute(table, index, inverse), maps.register_number())
        attend = stream_attention(rows, rows, self.mesh, self.attention)
        drop_key = jax.random.fold_in(key, 1)
        drop = self._scales(self.encoder_drop, len(encoder.blocks), batch, drop_key, batch.enc_row)
        latent = encoder.encode(x, tokens, attend, self._running(drop))
        return encoder.project_output(latent), tokens

    def _with_registers(self, encoder, x: jax.Array, number: jax.Array) -> jax.Array:
        """Fills the first tokens of every row with the register tokens."""
        if encoder.register_tokens is None:
            return x
        # A product with a one-hot: its gradient is a product, no scatter-add.
        one_hot = (number[..., None] == jnp.arange(self.spec.registers)).astype(jnp.float32)
        registers = encoder.register_tokens[...]
        return x + jnp.matmul(one_hot, registers, precision=jax.lax.Precision.HIGHEST)

    def _decode(self, decoder, model, maps: RowMaps, seen: _Seen) -> jax.Array:
        """Predictions [D, dec, width] of one decoder."""
        batch, (queries, keys) = maps.batch, seen.cross
        wanted = stream_tokens(self.spec, decoder.slots, batch.dec_coord, batch.dec_row, batch)
        attend = stream_attention(queries, keys, self.mesh, self.attention)
        drop_key = jax.random.fold_in(seen.key, 2)
        drop = self._scales(self.decoder_drop, model.decoder_depth, batch, drop_key, batch.dec_row)
        read: tuple[jax.Array, Tokens | jax.Array]
        if seen.located is None:
            read = decoder.context(seen.latent, seen.tokens), seen.tokens
        else:
            read = decoder.location_context(seen.located.tokens), seen.located.positions
        queries = decoder.queries(wanted)
        out = decoder.decode(queries, wanted, read, attend, self._running(drop))
        return decoder.output(out)

    def _pixel_tokens(self, model, maps: RowMaps, seen: _Seen):
        """What predicts pixels, see `loss_terms.pixel_terms`.

        A visible token predicts its own from what the decoder would read of it; one that only the
        target sees is zero before the output layer.
        """
        decoder = model.reconstructor.decoder
        decoded = self._decode(decoder, model, maps, seen)
        if not self.spec.all_pixels:
            return decoded, None
        context = decoder.context(seen.latent, seen.tokens)
        blank = decoder.output(jnp.zeros_like(context[0, 0]))
        return jnp.concatenate([decoded, decoder.output(context)], axis=1), blank

    def _by_view(self, batch: MicroBatch, a: jax.Array, b: jax.Array) -> jax.Array:
        """Tokens [D, dec, width]: those of the first view from `a`, the others from `b`."""
        view = take_rows(batch.row_view[..., None], batch.dec_row)
        return jnp.where(view == 0, a, b)

    def _predict(self, model, maps: RowMaps, seen: _Seen) -> jax.Array:
        def run(decoder):
            return self._decode(decoder, model, maps, seen)

        if self.objective.kind != "galileo":
            return run(model.decoder_of(0))
        # Both decoders run on all tokens: views have no fixed place in the stream.
        return self._by_view(maps.batch, run(model.decoder_of(0)), run(model.decoder_of(1)))

    def _targets(self, target: Any, maps: RowMaps, patches) -> jax.Array:
        """Targets [D, dec, width] of the decoded tokens, without gradient."""
        encoder = merge(self.target_graph, target)
        table = target_table(encoder, self.spec, maps.rung, patches)
        views = [self.objective.exits_of(v, self.spec.modalities) for v in (0, 1)]
        made = []
        for exits in views[:1] if views[0] == views[1] else views:
            out = self._target(encoder, maps, table, exits)
            made.append(jax.lax.stop_gradient(out))
        return made[0] if len(made) == 1 else self._by_view(maps.batch, *made)

    def _target(self, encoder, maps: RowMaps, table: jax.Array, exits: dict[str, int]) -> jax.Array:
        batch, stream = maps.batch, maps.batch.target
        if not any(exits.values()):
            return take_rows(encoder.project_output(table), batch.dec_patch)
        assert stream is not None
        tokens = stream_tokens(self.spec, encoder.slots, stream.coord, stream.row, batch)
        rows = maps.target()
        attend = stream_attention(rows, rows, self.mesh, self.attention)
        x = take_rows(table, stream.patch)
        x = self._with_registers(encoder, x, maps.target_register_number())
        x = encoder.encode(x, tokens, attend, exits=exits)
        return take_rows(encoder.project_output(x), stream.dec_token)

    def _token_terms(self, maps: RowMaps, predictions, targets):
        """([views, groups], parts) of the token loss, each view by its own."""
        losses = [self.objective.loss_of(v) for v in range(self.spec.views)]
        if len(set(losses)) == 1:
            return loss_terms.token_terms(losses[0], maps, predictions, targets)
        values = [loss_terms.token_terms(x, maps, predictions, targets)[0][v]
                  for v, x in enumerate(losses)]  # fmt: skip
        return jnp.stack(values), {}
