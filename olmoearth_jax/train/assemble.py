"""Puts model, masking, losses and mesh together into an engine and a program."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from olmoearth_jax import modalities
from olmoearth_jax.masking import Strategy, TokenBounds, max_tokens
from olmoearth_jax.model import latent_mim
from olmoearth_jax.model.config import ModelConfig
from olmoearth_jax.stream.agree import host_agreement
from olmoearth_jax.stream.engine import StreamEngine
from olmoearth_jax.stream.forward import Objective, StreamForward
from olmoearth_jax.stream.ladder import ROW_FRACTIONS, band_set_counts, row_plans
from olmoearth_jax.stream.spec import Rung, StreamSpec, make_slots
from olmoearth_jax.stream.tables import BandDropout
from olmoearth_jax.train.dense_engine import DenseEngine


@dataclasses.dataclass(frozen=True)
class EngineOptions:
    """What the engines share besides the model.

    Attributes:
      dtype: compute dtype of matrix products.
      attention: 'auto', 'xla' or 'cudnn'.
      remat: 'none', 'dots' or 'full'.
      encoder_drop, decoder_drop: drop-path rates.
      band_dropout: band dropout of the online encoder, or None.
    """

    dtype: Any = jnp.float32
    attention: str = "auto"
    remat: str = "none"
    encoder_drop: float = 0.0
    decoder_drop: float = 0.0
    band_dropout: BandDropout | None = None

    @classmethod
    def of(cls, model: ModelConfig, **changes: Any) -> EngineOptions:
        """The drop rates of a model config, and `changes`."""
        encoder = model.encoder_config
        dropout = None
        if encoder.band_dropout_rate > 0:
            names = encoder.band_dropout_modalities
            dropout = BandDropout(
                encoder.band_dropout_rate,
                encoder.random_band_dropout,
                None if names is None else tuple(names),
            )
        decoder = 0.0 if model.decoder_config is None else model.decoder_config.drop_path
        return cls(
            encoder_drop=encoder.drop_path,
            decoder_drop=decoder,
            band_dropout=dropout,
            **changes,
        )


def micro_step_shape(global_batch: int, group: int, devices: int) -> tuple[int, int]:
    """(groups per micro-step, samples per device).

    k = min(groups, devices) whole groups, k dividing the number of groups, so that a device
    holds about one group's worth of samples.

    Raises:
      ValueError: the batch doesn't divide into groups, or a micro-step over the devices.
    """
    if global_batch % group:
        raise ValueError(
            f"data_loader.global_batch_size={global_batch} is not divisible by "
            f"train_module.rank_microbatch_size={group}"
        )
    groups = global_batch // group
    k = max(n for n in range(1, min(groups, devices) + 1) if groups % n == 0)
    if (k * group) % devices:
        raise ValueError(
            f"a micro-step of {k} groups of {group} samples does not divide over {devices} "
            f"devices; choose train_module.rank_microbatch_size as a multiple of {devices // k}"
        )
    return k, k * group // devices


def stream_spec(
    model: ModelConfig,
    strategies: Sequence[Strategy],
    grid_timesteps: Mapping[int, int],
    samples: int,
    devices: int,
    groups: int,
    views: int = 2,
    fractions: Sequence[float] = ROW_FRACTIONS,
    loss_scope: str = "modality",
) -> StreamSpec:
    """The static stream of a model under its masking.

    Args:
      strategies: masking of each distinct view.
      grid_timesteps: grid side -> timesteps the token budget allows.
      samples: per device and micro-step.
      devices, groups: per micro-step.
      views: masked views.
      fractions: attention row lengths relative to the bound.
      loss_scope: what the token loss's rows are (`losses.TokenLoss.scope`).
    """
    encoder = model.encoder_config
    names = modalities.in_sample_order(encoder.supported_modality_names)
    counts = band_set_counts(names, encoder.tokenization)

    def bounds(tokens: Mapping[str, tuple[int, int]], steps: int) -> TokenBounds:
        parts = [max_tokens(s, tokens, steps) for s in strategies]
        return TokenBounds(
            max(p.encode for p in parts),
            {n: max(p.encode_by_modality[n] for p in parts) for n in names},
            {n: max(p.decode[n] for p in parts) for n in names},
        )

    encodable = {
        n: any(n not in getattr(s, "only_decode_modalities", ()) for s in strategies)
        for n in names
    }
    slots = make_slots(
        names, encoder.tokenization, encoder.max_patch_size, grid_timesteps, encodable
    )
    plans, enc, dec = row_plans(
        names, counts, grid_timesteps, bounds, fractions, loss_scope in ("sample", "batch")
    )
    return StreamSpec(
        slots, names, plans, enc, dec, samples, devices, views, groups, encoder.max_patch_size
    )


def stream_engine(
    model: ModelConfig,
    spec: StreamSpec,
    ladder: Sequence[Rung],
    objective: Objective,
    mesh: Mesh,
    options: EngineOptions,
) -> StreamEngine:
    """The packed engine."""
    forward = StreamForward(
        graph=latent_mim.graph(model, options.dtype)[0],
        target_graph=latent_mim.target_graph(model, dtype=options.dtype)[0],
        spec=spec,
        objective=objective,
        mesh=mesh,
        attention=options.attention,
        remat=options.remat,
        encoder_drop=options.encoder_drop,
        decoder_drop=options.decoder_drop,
        band_dropout=options.band_dropout,
    )
    return StreamEngine(forward, ladder, mesh, host_agreement())


def dense_engine(
    model: ModelConfig,
    objective: Objective,
    mesh: Mesh,
    group_size: int,
    options: EngineOptions,
    views: int = 2,
) -> DenseEngine:
    """The oracle engine."""
    return DenseEngine(
        graph=latent_mim.graph(model, options.dtype)[0],
        target_graph=latent_mim.target_graph(model, dtype=options.dtype)[0],
        objective=objective,
        names=modalities.in_sample_order(model.encoder_config.supported_modality_names),
        mesh=mesh,
        group_size=group_size,
        views=views,
        encoder_drop=options.encoder_drop,
        decoder_drop=options.decoder_drop,
        band_dropout=options.band_dropout,
        remat=options.remat,
    )


def trainable_leaves(model: ModelConfig, contrastive: bool) -> Any:
    """Tree of bools: which parameters the optimiser touches (spec/train.md section 5.1).

    Left alone: channel embeddings that are not learnable, frozen patch embeddings, and the
    pooled projection where no loss reads it (no gradient at all, hence no decay either).
    """
    encoder, decoder = model.encoder_config, model.decoder_config
    out = {}
    for path, _ in latent_mim.flatten(latent_mim.graph(model)[1]):
        text = "/".join(path)
        keep = True
        if text.startswith("encoder/encodings/"):
            keep = encoder.learnable_channel_embeddings
        elif "/encodings/" in text and decoder is not None:
            keep = decoder.learnable_channel_embeddings
        elif text.startswith("encoder/patch_embeddings/"):
            keep = not encoder.frozen_patch_embeddings
        elif text.startswith("encoder/project_and_aggregate/"):
            keep = contrastive
        out[path] = np.bool_(keep)
    return latent_mim.unflatten(out)
