"""The cross-attention predictor (spec section 8), on tokens of any layout."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from olmoearth_jax.model.blocks import Attend, Block, Drop, run_blocks
from olmoearth_jax.model.config import PredictorConfig
from olmoearth_jax.model.encodings import CompositeEncodings
from olmoearth_jax.model.layers import LayerNorm, Linear, empty
from olmoearth_jax.model.rope import RopeConfig, coordinates
from olmoearth_jax.model.tokens import SlotTable, Tokens


class Predictor(nnx.Module):
    """Predicts hidden tokens from visible ones; queries never attend to each other."""

    def __init__(self, config: PredictorConfig, dtype=jnp.float32):
        width = config.decoder_embedding_size
        # Decoders embed no patches, so the base patch size of their slots is never used.
        self.slots = SlotTable.build(config.supported_modality_names, config.tokenization)
        self.width = width
        self.output_width = config.output_embedding_size or config.encoder_embedding_size
        self.rope = RopeConfig.of(config)
        self.input_norm = LayerNorm(config.encoder_embedding_size)
        self.embed = Linear(config.encoder_embedding_size, width, dtype)
        self.mask_token = empty(width)
        self.encodings = CompositeEncodings(self.slots, width, config.position_encoding)
        self.blocks = nnx.List(
            [
                Block(
                    width,
                    config.num_heads,
                    config.mlp_ratio,
                    config.qk_norm,
                    self.rope,
                    config.layer_scale_init is not None,
                    dtype,
                )
                for _ in range(config.depth)
            ]
        )
        grid = config.pooler_dim if config.use_attention_pooler else None
        self.location_embed = None if grid is None else Linear(grid, width, dtype)
        self.norm = LayerNorm(width)
        self.output_proj = Linear(width, self.output_width, dtype)

    def context(self, y: jax.Array, tokens: Tokens) -> jax.Array:
        """Encoder tokens [..., N, D_e] -> float32 context [..., N, D_d]."""
        return self.embed(self.input_norm(y), jnp.float32) + self.encodings(tokens)

    def location_context(self, grid: jax.Array) -> jax.Array:
        """Location tokens [..., Q, pooler_dim] -> float32 context [..., Q, D_d] (v1.3 spec 3)."""
        assert self.location_embed is not None
        return self.location_embed(grid, jnp.float32)

    def queries(self, tokens: Tokens) -> jax.Array:
        """float32 [..., N, D_d]: mask token plus encodings."""
        return self.mask_token[...] + self.encodings(tokens)

    def decode(
        self,
        x_q: jax.Array,
        tokens_q: Tokens,
        context: jax.Array,
        tokens_k: Tokens | jax.Array,
        attend: Attend,
        drop: Drop | None = None,
        remat: str | None = None,
    ) -> jax.Array:
        """Runs the blocks: queries [..., Nq, D_d] read the unchanging context [..., Nk, D_d].

        `tokens_k` are the context's tokens, or directly its positions [..., Nk, 2] (row, col).
        """
        position = context_position = None
        if self.rope is not None:
            position = coordinates(self.rope, tokens_q)
            on_grid = not isinstance(tokens_k, Tokens)
            context_position = tokens_k if on_grid else coordinates(self.rope, tokens_k)
        return run_blocks(
            self.blocks, x_q, position, attend, context, context_position, drop, remat
        )

    def output(self, x: jax.Array) -> jax.Array:
        """Final norm and projection, [..., D_d] -> float32 [..., D_out]."""
        return self.output_proj(self.norm(x), jnp.float32)
