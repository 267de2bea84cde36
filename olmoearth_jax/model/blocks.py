"""Pre-norm transformer blocks, self- or cross-attention (spec section 6).

A block sees tokens [..., N, D] of any layout; how tokens are gathered into attention rows is the
business of the `attend` callable that the engine supplies.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from olmoearth_jax.model import rope as rotary
from olmoearth_jax.model.config import EncoderConfig, PredictorConfig
from olmoearth_jax.model.layers import LayerNorm, Linear, empty, gelu, joined
from olmoearth_jax.model.rope import RopeConfig
from olmoearth_jax.model.variants import ALL, TODAY, Variant

Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""(q [..., Nq, H, hd], k [..., Nk, H, hd], v like k) -> [..., Nq, H, hd]."""

Drop = Callable[[Any, int], "jax.Array | None"]
"""(layer, branch 0 attention / 1 MLP) -> factor broadcastable to [..., N, 1], or None."""

_REMAT_POLICIES = ("none", "full", "dots")


@dataclasses.dataclass(frozen=True)
class BlockShape:
    """The sizes and parts of a block."""

    width: int
    heads: int
    mlp_ratio: float = 4.0
    qk_norm: bool = False
    rope: RopeConfig | None = None
    layer_scale: bool = False
    inner: int | None = None
    """Width that is split into heads; None: `width`."""
    context_width: int | None = None
    """Width of the tokens that give keys and values; None: `width`."""

    @classmethod
    def of(cls, config: EncoderConfig | PredictorConfig, width: int) -> BlockShape:
        """The blocks of an encoder or decoder."""
        scaled = config.layer_scale_init is not None
        rope = RopeConfig.of(config)
        return cls(width, config.num_heads, config.mlp_ratio, config.qk_norm, rope, scaled)


@dataclasses.dataclass(frozen=True)
class Reading:
    """What the queries of a block read, and how."""

    attend: Attend
    """Attention over q, k, v, supplied by the engine."""
    position: jax.Array | None = None
    """`rope.coordinates` of the queries, or None without rotary encodings."""
    context: jax.Array | None = None
    """Tokens that give keys and values, used as they are (not normed); None: self-attention."""
    context_position: jax.Array | None = None
    """`rope.coordinates` of the context."""


@dataclasses.dataclass(frozen=True)
class Running:
    """How a stack of blocks is run in training."""

    drop: Drop | None = None
    """Drop path factors."""
    remat: str | None = None
    """'none' (or None) keeps all activations, 'full' recomputes each block in the backward pass,
    'dots' keeps only the matrix products of tokens and weights."""
    attention: Any = "auto"
    """See `attention.row_attention`; only for engines that leave the choice to the model."""
    variant: Variant = TODAY
    """Other ways to compute the same."""


PLAIN = Running()


class Attention(nnx.Module):
    """Multi-head attention with separate projections; heads are contiguous channels."""

    def __init__(self, shape: BlockShape, dtype=jnp.float32):
        width, heads, rope = shape.width, shape.heads, shape.rope
        inner, context_width = shape.inner or width, shape.context_width or width
        if inner % heads:
            raise ValueError(f"an embedding size of {inner} cannot be split into {heads} heads")
        head_dim = inner // heads
        self.heads, self.head_dim, self.rope = heads, head_dim, rope
        self.query = Linear(width, inner, dtype)
        self.key = Linear(context_width, inner, dtype)
        self.value = Linear(context_width, inner, dtype)
        self.out = Linear(inner, width, dtype)
        self.q_norm = LayerNorm(head_dim) if shape.qk_norm else None
        self.k_norm = LayerNorm(head_dim) if shape.qk_norm else None
        if rope is not None:
            rope.check(head_dim)
        mixed = rope if rope is not None and rope.mixed else None
        self.rope_freqs = empty(mixed.num_axes, heads, head_dim // 2) if mixed else None

    def _split(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:-1], self.heads, self.head_dim)

    def _turn(
        self, x: jax.Array, norm: LayerNorm | None, position: jax.Array | None, variant: Variant
    ) -> jax.Array:
        if norm is not None:
            x = norm(x, variant).astype(x.dtype)
        rope = self.rope
        if rope is None or position is None:
            return x

        def turned(x, position, freqs):
            return rotary.rotate(x, rotary.angles(rope, position, self.head_dim, freqs))

        freqs = None if self.rope_freqs is None else self.rope_freqs[...]
        return (variant.again(turned) if variant.turn_again else turned)(x, position, freqs)

    def keys_values(
        self, context: jax.Array, position: jax.Array | None = None, variant: Variant = TODAY
    ) -> tuple[jax.Array, jax.Array]:
        """Keys (rotated) and values of `context` [..., Nk, D], each [..., Nk, H, hd]."""
        if variant.joined:
            k, v = joined([self.key, self.value], context)
        else:
            k, v = self.key(context), self.value(context)
        return self._turn(self._split(k), self.k_norm, position, variant), self._split(v)

    def within(
        self, x: jax.Array, position: jax.Array | None, attend: Attend, variant: Variant = TODAY
    ) -> jax.Array:
        """Self-attention of x [..., N, D]; returns float32 [..., N, D]."""
        if not variant.joined:
            keys_values = self.keys_values(x, position, variant)
            return self(x, position, attend, keys_values, variant)
        q, k, v = (self._split(y) for y in joined([self.query, self.key, self.value], x))
        q = self._turn(q, self.q_norm, position, variant)
        k = self._turn(k, self.k_norm, position, variant)
        return self._project(attend(q, k, v))

    def __call__(
        self,
        x: jax.Array,
        position: jax.Array | None,
        attend: Attend,
        keys_values: tuple[jax.Array, jax.Array],
        variant: Variant = TODAY,
    ) -> jax.Array:
        """Queries from x [..., Nq, D]; returns float32 [..., Nq, D]."""
        q = self._turn(self._split(self.query(x)), self.q_norm, position, variant)
        return self._project(attend(q, *keys_values))

    def _project(self, y: jax.Array) -> jax.Array:
        return self.out(y.reshape(*y.shape[:-2], -1), jnp.float32)


class Mlp(nnx.Module):
    """Linear, exact GELU, Linear."""

    def __init__(self, width: int, hidden: int, dtype=jnp.float32):
        self.fc1 = Linear(width, hidden, dtype)
        self.fc2 = Linear(hidden, width, dtype)

    def __call__(self, x: jax.Array, variant: Variant = TODAY) -> jax.Array:
        """[..., N, D] -> float32 [..., N, D]."""
        hidden = self.fc1(x)
        if variant.keep_hidden:
            return self.fc2(variant.again(gelu)(hidden), jnp.float32)
        # The hidden layer is the widest thing a block makes: only what goes into the GELU is kept
        # for the backward pass.
        return variant.again(self._narrow)(hidden)

    def _narrow(self, hidden: jax.Array) -> jax.Array:
        return self.fc2(gelu(hidden), jnp.float32)


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); the stream x is float32 (see `Variant`)."""

    def __init__(self, shape: BlockShape, dtype=jnp.float32):
        width = shape.width
        self.norm1 = LayerNorm(width)
        self.attention = Attention(shape, dtype)
        self.norm2 = LayerNorm(width)
        self.mlp = Mlp(width, int(width * shape.mlp_ratio), dtype)
        self.layer_scale1 = empty(width) if shape.layer_scale else None
        self.layer_scale2 = empty(width) if shape.layer_scale else None

    def __call__(
        self,
        x: jax.Array,
        reading: Reading,
        scale: Callable[[int], jax.Array | None] | None = None,
        variant: Variant = TODAY,
    ) -> jax.Array:
        """One block.

        Args:
          x: [..., N, D] in the stream's type.
          reading: what these tokens attend to.
          scale: branch (0 or 1) -> drop path factor or None.
          variant: other ways to compute the same.
        """
        normed, position = self.norm1(x, variant), reading.position
        if reading.context is None:
            y = self.attention.within(normed, position, reading.attend, variant)
        else:
            read = reading.context, reading.context_position
            keys_values = self.attention.keys_values(*read, variant)
            y = self.attention(normed, position, reading.attend, keys_values, variant)
        x = _add(x, _scaled(y, self.layer_scale1, scale, 0))
        y = self.mlp(self.norm2(x, variant), variant)
        return _add(x, _scaled(y, self.layer_scale2, scale, 1))


def _add(x: jax.Array, y: jax.Array) -> jax.Array:
    """x + y in float32, in the type of x."""
    return (x.astype(jnp.float32) + y).astype(x.dtype)


def stack(shape: BlockShape, depth: int, dtype=jnp.float32) -> nnx.List:
    """That many blocks."""
    return nnx.List([Block(shape, dtype) for _ in range(depth)])


def _scaled(y: jax.Array, layer_scale: nnx.Param | None, scale, branch: int) -> jax.Array:
    if layer_scale is not None:
        y = y * layer_scale[...]
    factor = None if scale is None else scale(branch)
    return y if factor is None else y * factor


def run_block(
    block: Block, layer: int | jax.Array, x: jax.Array, reading: Reading, running: Running
) -> jax.Array:
    """Calls the block of a layer under a rematerialisation policy."""
    drop, remat = running.drop, running.remat
    if remat not in (None, *_REMAT_POLICIES):
        raise ValueError(f"unknown remat policy {remat!r}; known: {', '.join(_REMAT_POLICIES)}")

    def scale(branch: int) -> jax.Array | None:
        return None if drop is None else drop(layer, branch)

    def call(x: jax.Array, context: jax.Array | None) -> jax.Array:
        read = dataclasses.replace(reading, context=context)
        return block(x, read, scale, running.variant)

    if remat in (None, "none"):
        return call(x, reading.context)
    policy = None
    if remat == "dots":
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return jax.checkpoint(call, policy=policy)(x, reading.context)


def run_blocks(
    blocks: Sequence[Block], x: jax.Array, reading: Reading, running: Running
) -> jax.Array:
    """Calls all blocks in turn as one loop over their stacked parameters; float32 in and out.

    The program then holds one block whatever the depth, which is what keeps compilation short.
    """
    variant = running.variant
    x = x.astype(variant.stream_dtype)
    if len(blocks) < 2 or variant.unroll == ALL:
        for layer, block in enumerate(blocks):
            x = run_block(block, layer, x, reading, running)
        return x.astype(jnp.float32)
    parts = [nnx.split(block) for block in blocks]
    graph = parts[0][0]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[state for _, state in parts])

    def body(x: jax.Array, item: tuple) -> tuple[jax.Array, None]:
        layer, state = item
        return run_block(nnx.merge(graph, state), layer, x, reading, running), None

    items = (jnp.arange(len(blocks)), stacked)
    return jax.lax.scan(body, x, items, unroll=variant.unroll)[0].astype(jnp.float32)
