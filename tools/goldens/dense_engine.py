"""The dense engine: one group per micro-step, every token in place, masks as attention masks.

Slow and memory hungry; it is what the token stream is held to, in golden checks, benchmarks and
tests, which put it together with `dense_engine`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from olmoearth_jax import modalities
from olmoearth_jax.config import ExperimentConfig
from olmoearth_jax.losses import Groups, Objective, spread_of
from olmoearth_jax.losses.distillation import cell_scores
from olmoearth_jax.masks import DECODE, MISSING_TOKEN, VISIBLE, living
from olmoearth_jax.mesh import batch_sharding
from olmoearth_jax.model.blocks import Running
from olmoearth_jax.model.latent_mim import merge
from olmoearth_jax.model.uniform_batch import (
    Forward,
    UniformBatch,
    forward_batch,
    target_batch,
)
from olmoearth_jax.stream.engine import Group, Prepared
from olmoearth_jax.stream.patch_tables import BandDropout, band_keeps, dropout_key, keep_scales
from olmoearth_jax.train.assemble import parts_of
from olmoearth_jax.train.query_stride import QueryStride, query_stride


@dataclasses.dataclass
class DenseEngine:
    """Evaluates the losses of one group at a time with the dense forward.

    Attributes:
      graph, target_graph: module structures (`model.latent_mim.graph`, `target_graph`).
      objective: the losses.
      names: trained modalities in sample order.
      mesh: devices; a group's samples are split over them.
      group_size: samples of a group.
      views: masked views.
      encoder_drop, decoder_drop: drop-path rates.
      band_dropout: band dropout of the online encoder, or None.
      remat: rematerialisation policy of the blocks.
      query_stride: draws how fine the location grid is; None: one location per patch.
    """

    graph: Any
    target_graph: Any
    objective: Objective
    names: tuple[str, ...]
    mesh: Mesh
    group_size: int
    views: int = 2
    encoder_drop: float = 0.0
    decoder_drop: float = 0.0
    band_dropout: BandDropout | None = None
    remat: str = "none"
    query_stride: QueryStride | None = None

    def prepare(self, groups: Sequence[Group]) -> list[Prepared]:
        """One micro-step per group; holes keep their place with weight 0."""
        return [self._prepare(g) for g in groups]

    def _prepare(self, group: Group) -> Prepared:
        masks = [group[k] for k in ("mask_a", "mask_b")[: self.views]]
        alive = living(group["ok"], ([view[n] for n in self.names] for view in masks))
        kept = [
            {n: np.where(_like(alive, v[n]), v[n], np.int8(MISSING_TOKEN)) for n in self.names}
            for v in masks
        ]
        inputs = {
            "data": {n: group["data"][n] for n in self.names},
            "masks": kept,
            "timestamps": group["timestamps"],
            "weight": alive.astype(np.float32),
            "position": group["position"].astype(np.int32),
        }
        if len(alive) % self.mesh.size:
            raise ValueError(
                f"the dense engine splits a group of {len(alive)} samples over "
                f"{self.mesh.size} devices, which does not divide"
            )
        encoded = sum(int((v[n] == VISIBLE).sum()) for v in kept for n in self.names)
        decoded = sum(int((v[n] == DECODE).sum()) for v in kept for n in self.names)
        total = self.views * sum(int(np.prod(kept[0][n].shape)) for n in self.names)
        host = {
            "encoded_tokens": encoded,
            "decoded_tokens": decoded,
            "stream_tokens": 2 * total,
            "overflowed_tokens": 0,
        }
        grid, patch = int(group["grid"]), int(group["patch_size"])
        shape = (grid, patch, group["timestamps"].shape[1])
        if self.query_stride is not None:
            place = int(group["epoch"]), int(group["group"])
            shape = (*shape, self.query_stride.draw(patch, grid, *place))

        def pack() -> tuple:
            return (jax.device_put(inputs, batch_sharding(self.mesh)),)

        return Prepared.of(("dense", *shape), pack, alive, group["index"], host)

    def loss(self, params: Any, target: Any, inputs: tuple, key: jax.Array, program_key: Any):
        """See `stream.engine.Engine`."""
        (batch,) = inputs
        patch_size = program_key[2]
        location_size = program_key[4] if self.query_stride is not None else None
        model = merge(self.graph, params)
        out: list[Forward] = []
        for view, masks in enumerate(batch["masks"]):
            dropped = self._dropped(model, batch, view, key)
            depth = len(model.encoder.blocks)
            encoder_drop = self._drop(self.encoder_drop, depth, batch, view, key, 1)
            decoder_drop = self._drop(self.decoder_drop, model.decoder_depth, batch, view, key, 2)
            sample = UniformBatch(
                dropped, masks, batch["timestamps"], patch_size, location_size=location_size
            )
            encoder, decoder = (Running(x, self.remat) for x in (encoder_drop, decoder_drop))
            out.append(forward_batch(model, sample, view, encoder, decoder))
        terms, spreads = {}, {}
        if self.objective.compares_tokens:
            targets = self._targets(params, target, batch, patch_size)
            spreads = self._spreads(out, targets, batch)
            base = [self._token_loss(v, o, targets[v], batch) for v, o in enumerate(out)]
            terms["base"] = jnp.stack(base)
        if self.objective.mae is not None:
            terms["mae"] = jnp.stack([self._pixel_loss(o, batch) for o in out])
        if self.objective.regularizer is not None:
            terms["regularizer"] = jnp.stack([self._spread(o, batch) for o in out]).mean(0)
        if self.objective.contrastive is not None:
            pooled: list[Any] = [o.project_aggregated for o in out]
            terms["contrastive"] = self.objective.contrastive(pooled[0], pooled[1], _group(batch))
        on_grid, metrics = self._grid_terms(model, out[0], batch, key)
        total, aux = self.objective.total(terms | on_grid)
        return total, {**aux, **spreads, **metrics}

    def _grid_terms(
        self, model: Any, out: Forward, batch: dict, key: jax.Array
    ) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """(terms, metrics) of the losses on the location grid, [1] each."""
        terms, metrics = {}, {}
        supervision, distillation = self.objective.supervision, self.objective.distillation
        if supervision is not None:
            assert out.locations is not None
            targets = {t.name: batch["data"][t.name] for t in supervision.tasks}
            sizes = {n: (x.shape[1], x.shape[2]) for n, x in targets.items()}
            drawn = model.supervision_head(out.locations.tokens, sizes)
            terms["supervision"], found = supervision(drawn, targets, _group(batch))
            metrics |= found
        if distillation is not None:
            grid = out.locations
            assert grid is not None and grid.student is not None
            rows, cols = grid.tokens.shape[1:3]
            loss, found = distillation(
                grid.tokens,
                grid.student,
                model.location_token_distillation_head.by_width,
                scores=cell_scores(jax.random.fold_in(key, 3), batch["position"], rows * cols),
                sample_weight=batch["weight"],
            )
            terms["projection"] = loss[None]
            metrics |= {k: v[None] for k, v in found.items()}
        return terms, metrics

    def _spreads(self, out: list[Forward], targets: list[dict], batch: dict) -> dict:
        """`spread_of` all decoded tokens and their targets, both views together."""
        real = jnp.concatenate(
            [m[n].reshape(-1) == DECODE for m in batch["masks"] for n in self.names]
        )
        sides = {"prediction_spread": [o.decoder for o in out], "target_spread": targets}
        return {
            key: spread_of(
                jnp.concatenate(
                    [_flat(v[n]).reshape(-1, v[n].shape[-1]) for v in views for n in self.names]
                ),
                real,
                jnp.zeros(real.shape, jnp.int32),
                1,
            )
            for key, views in sides.items()
        }

    def _targets(self, params: Any, target: Any, batch: dict, patch_size: int) -> list[dict]:
        """Per view the targets {modality: [B, N, D]}, computed once where the exits agree."""
        if not self.objective.keeps_target:
            target = params["encoder"]
        frozen = merge(self.target_graph, jax.lax.stop_gradient(target))
        exits = [self.objective.exits_of(v, self.names) for v in range(self.views)]
        sample = UniformBatch(batch["data"], batch["masks"][0], batch["timestamps"], patch_size)
        made: dict[tuple, dict] = {}
        for depths in exits:
            known = tuple(depths.items())
            if known not in made:
                found = target_batch(frozen, sample, depths)
                made[known] = {n: _flat(jax.lax.stop_gradient(x)) for n, x in found.items()}
        return [made[tuple(depths.items())] for depths in exits]

    def _token_loss(self, view: int, out: Forward, targets: dict, batch: dict) -> jax.Array:
        """[1]: the token loss of one view."""
        assert out.decoder is not None
        predictions = {n: _flat(x) for n, x in out.decoder.items()}
        masks = {n: x.reshape(len(x), -1) for n, x in batch["masks"][view].items()}
        return self.objective.loss_of(view)(predictions, targets, masks, _group(batch))

    def _pixel_loss(self, out: Forward, batch: dict) -> jax.Array:
        """[1]: the pixel loss of one view."""
        assert self.objective.mae is not None and out.reconstructed is not None
        return self.objective.mae(out.reconstructed, batch["data"], out.masks, _group(batch))

    def _spread(self, out: Forward, batch: dict) -> jax.Array:
        """[1]: the regulariser on pooled vectors, or on encoder tokens if there is one view."""
        loss = self.objective.regularizer
        assert loss is not None
        x: Any = out.project_aggregated
        groups = _group(batch)
        if self.objective.views == 1:
            tokens = {n: _flat(v) for n, v in out.encoder.items()}
            masks = {n: v.reshape(len(v), -1) for n, v in out.masks.items()}
            x, groups = loss.tokens_to_vectors(tokens, masks, groups)
        return loss(x, groups)

    def _drop(self, rate: float, depth: int, batch: dict, view: int, key: jax.Array, number: int):
        """Drop path of one view; the same draws as the stream engine's."""
        position = batch["position"][None]
        views = jnp.full_like(position, view)
        scales = keep_scales(jax.random.fold_in(key, number), rate, depth, position, views)
        if scales is None:
            return None
        return lambda layer, branch: scales[layer, branch][0][:, None, None]

    def _dropped(self, model: Any, batch: dict, view: int, key: jax.Array) -> dict:
        """Rasters of one view after band dropout (linear per channel: before the resize)."""
        dropout = self.band_dropout
        if dropout is None or dropout.rate <= 0:
            return batch["data"]
        out = dict(batch["data"])
        slots = model.encoder.slots
        numbers = [i for n in self.names for i in slots.of(n)]
        for number, slot_id in enumerate(numbers):
            slot = slots.slots[slot_id]
            own = dropout_key(key, view, number)
            keep = band_keeps(dropout, slot, batch["position"], self.group_size, own)
            if keep is None:
                continue
            x = out[slot.modality]
            full = jnp.ones((x.shape[0], modalities.get(slot.modality).num_bands))
            full = full.at[:, np.asarray(slot.channels)].set(keep)
            out[slot.modality] = x * full.reshape(len(x), *(1,) * (x.ndim - 2), -1)
        return out


def dense_engine(
    config: ExperimentConfig, objective: Objective, mesh: Mesh, group_size: int
) -> DenseEngine:
    """The engine that computes what `assemble.stream_engine` does for the same config."""
    names = config.model.encoder_config.supported_modality_names
    return DenseEngine(
        names=modalities.in_sample_order(names),
        mesh=mesh,
        group_size=group_size,
        views=objective.views,
        query_stride=query_stride(config),
        **parts_of(config, objective),
    )


def _group(batch: dict) -> Groups:
    """A micro-step is a single group."""
    return Groups(jnp.zeros(batch["weight"].shape[0], jnp.int32), batch["weight"])


def _flat(x: jax.Array) -> jax.Array:
    """[B, *token shape, D] -> [B, N, D]."""
    return x.reshape(x.shape[0], -1, x.shape[-1])


def _like(flags: np.ndarray, x: np.ndarray) -> np.ndarray:
    return flags.reshape(-1, *(1,) * (x.ndim - 1))
