"""The attention pooler of v1.3: a grid of queries reads the tokens (spec/model_v1_3.md 2)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from olmoearth_jax import modalities
from olmoearth_jax.model.blocks import (
    PLAIN,
    Attend,
    Block,
    BlockShape,
    Reading,
    Running,
    run_block,
)
from olmoearth_jax.model.config import AttentionPoolerConfig, EncoderConfig, ModelConfig
from olmoearth_jax.model.layers import LayerNorm, Linear, empty
from olmoearth_jax.model.rope import ROPE_MODES, RopeConfig, coordinates
from olmoearth_jax.model.tokens import Tokens
from olmoearth_jax.model.variants import ALL


@dataclasses.dataclass(frozen=True)
class GridSpec:
    """Where the locations lie."""

    rows: int
    """Patches per axis."""
    cols: int
    """Likewise."""
    per_patch: int
    """Locations per side of a patch."""
    gsd: Any
    """Side of a patch in units of 10 m (a number, traced or not)."""

    @classmethod
    def of(
        cls, layout: Any, patch_size: int, input_res: float, location_size: int | None
    ) -> GridSpec:
        """Grid over the largest patch grid of a layout (`uniform_batch.Layout`).

        Raises:
          ValueError: no modality with a grid, or a location size that doesn't divide the patch.
        """
        size = patch_size if location_size is None else location_size
        if size < 1 or patch_size % size:
            raise ValueError(f"a location size of {size} does not divide the patch of {patch_size}")
        grids = [s[:2] for n, s in layout.shapes.items() if modalities.get(n).spatial]
        if not grids:
            raise ValueError("the attention pooler needs at least one modality with a pixel grid")
        rows, cols = (max(g[i] for g in grids) for i in range(2))
        return cls(rows, cols, patch_size // size, patch_size * input_res / 10.0)

    @property
    def shape(self) -> tuple[int, int]:
        """Locations per axis."""
        return self.rows * self.per_patch, self.cols * self.per_patch

    def positions(self, scale: float) -> jax.Array:
        """float32 [Q, 2] (row, col) of the locations, row-major, times the coordinate scale."""
        unit = jnp.asarray(self.gsd, jnp.float32) * np.float32(scale)
        axes = [
            ((np.arange(n, dtype=np.float32) + 0.5) / self.per_patch - 0.5) * unit
            for n in self.shape
        ]
        rows, cols = jnp.meshgrid(*axes, indexing="ij")
        return jnp.stack([rows.reshape(-1), cols.reshape(-1)], axis=-1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LocationGrid:
    """What the pooler gives."""

    tokens: jax.Array
    """float32 [B, rows, cols, pooler_dim]."""
    positions: jax.Array
    """float32 [B, rows * cols, 2]."""
    student: jax.Array | None
    """float32 [B, rows, cols, largest student width], or None."""

    @property
    def flat(self) -> jax.Array:
        """Location tokens [B, rows * cols, pooler_dim]."""
        return self.tokens.reshape(self.tokens.shape[0], -1, self.tokens.shape[-1])


class AttentionPooler(nnx.Module):
    """Alternates reads of the encoder's final tokens and self-attention of the queries."""

    def __init__(self, config: EncoderConfig, dtype=jnp.float32):
        pooler = config.attention_pooler_config
        assert pooler is not None
        width, depth = pooler.pooler_dim, pooler.pooler_depth
        heads = pooler.num_heads or config.num_heads
        inner = pooler.attn_dim or width
        reads = depth if pooler.per_depth_read_proj and depth > 1 else 1
        project = pooler.attn_dim is None
        self.coordinate_scale = config.rope_coordinate_scale
        self.encoder_rope = RopeConfig.of(config)
        self.learned_query = empty(1, width)
        # One of each pair: shared by all reads, or one per read.
        tokens = config.embedding_size
        self.input_norm = LayerNorm(tokens) if reads == 1 else None
        self.input_norms = nnx.List([LayerNorm(tokens) for _ in range(reads if reads > 1 else 0)])
        self.kv_proj = Linear(tokens, width, dtype) if project and reads == 1 else None
        count = reads if project and reads > 1 else 0
        self.kv_projs = nnx.List([Linear(tokens, width, dtype) for _ in range(count)])
        rope = RopeConfig("rope", config.rope_base)

        def block(context_width: int) -> Block:
            shape = BlockShape(
                width, heads, config.mlp_ratio, config.qk_norm, rope, inner=inner,
                context_width=context_width,
            )  # fmt: skip
            return Block(shape, dtype)

        context = width if project else tokens
        self.read_blocks = nnx.List([block(context) for _ in range(depth)])
        self.self_blocks = nnx.List([block(width) for _ in range(depth)])
        self.norm = LayerNorm(width)
        student = max(pooler.student_dims) if pooler.student_dims else None
        self.student = None if student is None else Linear(width, student, dtype)
        normed = student is not None and pooler.student_output_norm
        self.student_norm = LayerNorm(student) if student is not None and normed else None

    def __call__(
        self,
        x: jax.Array,
        tokens: Tokens,
        grid: GridSpec,
        attend_read: Attend,
        attend_self: Attend,
    ) -> LocationGrid:
        """Pools the encoder's normed tokens.

        Args:
          x: float32 [B, N, D].
          tokens: their coordinates.
          grid: where the locations lie.
          attend_read: attention of the queries to the tokens that may be read.
          attend_self: attention among the queries.
        """
        assert self.encoder_rope is not None
        places = coordinates(self.encoder_rope, tokens)[..., -2:]
        return self.pool(x, places, grid, attend_read, attend_self)

    def pool(
        self,
        x: jax.Array,
        places: jax.Array,
        grid: GridSpec,
        attend_read: Attend,
        attend_self: Attend,
        order: np.ndarray | None = None,
    ) -> LocationGrid:
        """As `__call__`, from positions [B, N, 2] (row, col).

        `order` [Q] lists the row-major locations in the order in which the attentions want them.
        """
        batch, (rows, cols) = x.shape[0], grid.shape
        where = grid.positions(self.coordinate_scale)
        at = jnp.broadcast_to(where if order is None else where[order], (batch, *where.shape))
        q = self.locate(x, places, at, attend_read, attend_self)
        if order is not None:
            q = q[:, np.argsort(order)]  # sorted on the host, not by the compiler
        located = q.reshape(batch, rows, cols, -1)
        positions = jnp.broadcast_to(where, (batch, *where.shape))
        return LocationGrid(located, positions, self.student_of(located))

    def locate(
        self,
        x: jax.Array,
        places: jax.Array,
        at: jax.Array,
        attend_read: Attend,
        attend_self: Attend,
        running: Running = PLAIN,
    ) -> jax.Array:
        """The location tokens alone, in any layout.

        Args:
          x, places: tokens float32 [..., N, D] and their positions [..., N, 2] (row, col).
          at: positions of the locations, float32 [..., Q, 2].
          attend_read, attend_self: see `__call__`.
          running: how the blocks run.

        Returns:
          float32 [..., Q, pooler_dim].
        """
        q = jnp.broadcast_to(self.learned_query[...], (*at.shape[:-1], self.norm.scale.shape[0]))
        shared = None if self.input_norm is None else _context(x, self.input_norm, self.kv_proj)

        def layer_of(number: Any, q: jax.Array, read: Block, mix: Block, *own: Any) -> jax.Array:
            context = shared if shared is not None else _context(x, *own)
            q = run_block(read, number, q, Reading(attend_read, at, context, places), running)
            return run_block(mix, number, q, Reading(attend_self, at), running)

        own = [self.input_norms, self.kv_projs] if len(self.kv_projs) else [self.input_norms]
        lists = [self.read_blocks, self.self_blocks, *(own if shared is None else [])]
        layers = list(zip(*lists, strict=True))
        variant = running.variant
        q = q.astype(variant.stream_dtype)
        if len(layers) < 2 or variant.unroll == ALL:
            for number, modules in enumerate(layers):
                q = layer_of(number, q, *modules)
            return self.norm(q)
        # One loop over stacked parameters, as `blocks.run_blocks`: shorter to compile.
        graphs = [nnx.split(module)[0] for module in layers[0]]
        states = [tuple(nnx.split(module)[1] for module in layer) for layer in layers]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)

        def body(q: jax.Array, item: tuple) -> tuple[jax.Array, None]:
            number, found = item
            modules = [nnx.merge(g, state) for g, state in zip(graphs, found, strict=True)]
            return layer_of(number, q, *modules), None

        items = (jnp.arange(len(layers)), stacked)
        return self.norm(jax.lax.scan(body, q, items, unroll=variant.unroll)[0])

    def student_of(self, located: jax.Array) -> jax.Array | None:
        """The student [..., S] of location tokens, which get no gradient; None without one."""
        if self.student is None:
            return None
        y = self.student(jax.lax.stop_gradient(located), jnp.float32)
        return y if self.student_norm is None else self.student_norm(y)


def _context(x: jax.Array, norm: LayerNorm, project: Linear | None = None) -> jax.Array:
    """What the locations read of tokens x: normed, and projected where that is configured."""
    y = norm(x)
    return y if project is None else project(y, jnp.float32)


def check_pooler(config: ModelConfig) -> None:
    """Checks the pooler of a model config, and that the decoder fits it.

    Raises:
      ValueError: with the first fault found.
    """
    encoder, decoder = config.encoder_config, config.decoder_config
    pooler: AttentionPoolerConfig | None = encoder.attention_pooler_config
    reads = decoder is not None and decoder.use_attention_pooler
    if reads and decoder is not None and decoder.pooler_dim is None:
        raise ValueError("a decoder with use_attention_pooler needs a pooler_dim")
    if pooler is None:
        return
    heads = pooler.num_heads or encoder.num_heads
    inner = pooler.attn_dim or pooler.pooler_dim
    if encoder.position_encoding not in ROPE_MODES:
        raise ValueError(
            "an attention pooler needs a rotary position_encoding "
            f"({', '.join(ROPE_MODES)}), not {encoder.position_encoding!r}"
        )
    if inner % heads or inner // heads % 4:
        raise ValueError(
            f"an attention pooler of width {inner} with {heads} heads: the width of a head must "
            "be a whole multiple of 4"
        )
    if pooler.pooler_depth < 1:
        raise ValueError("pooler_depth must be at least 1")
    if pooler.student_dims is not None and min(pooler.student_dims, default=0) < 1:
        raise ValueError(f"student_dims must be positive widths, got {pooler.student_dims}")
    if encoder.output_embedding_size:
        raise ValueError("an attention pooler does not go with output_embedding_size")
    if decoder is None:
        return
    if not reads:
        raise ValueError("the encoder has an attention pooler: set use_attention_pooler of the "
                         "decoder, which reads its grid")  # fmt: skip
    if decoder.pooler_dim != pooler.pooler_dim:
        raise ValueError(
            f"the decoder expects location tokens of width {decoder.pooler_dim}, but the pooler "
            f"gives {pooler.pooler_dim}"
        )
    if decoder.position_encoding in ("rope_3d", "rope_3d_mixed"):
        raise ValueError("a decoder that reads the location grid needs a position_encoding "
                         "without a time axis")  # fmt: skip
