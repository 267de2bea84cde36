"""Encoders in use: built once from a config, compiled with the pooling that is asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from olmoearth_jax.model import latent_mim, uniform_batch
from olmoearth_jax.model.config import ModelConfig
from olmoearth_jax.model.encoder import slot_table
from olmoearth_jax.model.pooling import LOCATIONS, Pooling
from olmoearth_jax.model.tokens import SlotTable

_DTYPES = (jnp.float32, jnp.bfloat16)


def encoder_graph(config: ModelConfig, dtype: Any = jnp.float32) -> nnx.GraphDef:
    """The graph of a model's encoder; `latent_mim.merge` makes a module of it and parameters."""
    return latent_mim.split(latent_mim.abstract(config, dtype).encoder)[0]


class FrozenEncoder:
    """The encoder of a pretrained model in evaluation mode.

    Args:
      config: model config.
      params: the model's parameters, or only {'encoder': ...}.
      dtype: type of the matrix products; float32 on CPUs and bfloat16 elsewhere by default.

    Raises:
      ValueError: another dtype.
    """

    def __init__(self, config: ModelConfig, params: Mapping[str, Any], dtype: Any = None):
        if dtype is None:
            dtype = _DTYPES[jax.default_backend() != "cpu"]
        self.config, self.dtype = config, jnp.dtype(dtype)
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype must be float32 or bfloat16, got {self.dtype}")
        self.slots = slot_table(config.encoder_config)
        self.graph = encoder_graph(config, self.dtype)
        self.params = jax.tree.map(jnp.asarray, params["encoder"])

    @property
    def embedding_size(self) -> int:
        """Width of a token."""
        encoder = self.config.encoder_config
        return encoder.output_embedding_size or encoder.embedding_size


@dataclasses.dataclass(frozen=True)
class Call:
    """What one compiled call does; all that is known before it."""

    graph: nnx.GraphDef
    patch_size: int
    pool: Pooling
    fast: bool = False
    """No token is missing."""
    location_size: int | None = None
    """Pixels per location, for encoders with an attention pooler; the patch by default."""
    slots: SlotTable | None = None
    """With the encoder's slots the masks are of pixels; without, of tokens."""


def embed(call: Call, params: Any, data: Any, masks: Any, timestamps: Any) -> jax.Array:
    """Encoder and pooling of one batch, to be compiled with `call` static.

    Args:
      params: encoder parameters.
      data: {modality: [B, H, W, T, C]}.
      masks: int8 per modality, of its tokens or (with `call.slots`) of its pixels.
      timestamps: int32 [B, T, 3].

    Returns:
      Embeddings of the form that `Pooling` tells.
    """
    if call.slots is not None:
        masks = uniform_batch.token_masks_from_pixels(call.slots, masks, call.patch_size)
    batch = uniform_batch.UniformBatch(
        data, masks, timestamps, call.patch_size, location_size=call.location_size
    )
    encoder = latent_mim.merge(call.graph, params)
    encoded = uniform_batch.encode_batch(encoder, batch, fast_pass=call.fast)
    grid: Any = encoded.locations
    if grid is not None and call.pool.place in LOCATIONS:
        chosen = grid.tokens if call.pool.place == "location" else grid.student
        return call.pool.of_grid(chosen)
    tokens = {n: x.astype(jnp.float32) for n, x in encoded.tokens.items()}
    return call.pool(tokens, masks)
