"""Composite encodings added to tokens (spec section 4)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from olmoearth_jax.model.layers import empty
from olmoearth_jax.model.rope import TIME_AXIS_MODES
from olmoearth_jax.model.tokens import SlotTable, Tokens


def quarter_width(width: int) -> int:
    """n, the channels of each of the four parts."""
    return width // 4


def sincos(position: jax.Array, width: int) -> jax.Array:
    """1-D sin/cos of float32 positions [...] -> [..., width]; frequencies 10000^(-i/(2 width))."""
    if width % 2:
        raise ValueError(f"sin/cos encodings need an even width, got {width}")
    exponent = np.arange(width // 2, dtype=np.float64) / (2 * width)
    omega = jnp.asarray(10000.0**-exponent, jnp.float32)
    angle = position.astype(jnp.float32)[..., None] * omega
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


@functools.lru_cache(maxsize=32)
def month_table(width: int) -> np.ndarray:
    """Fixed float32 [12, width]: first half sin(2 pi m / 12), second half cos."""
    angle = 2.0 * np.pi * np.arange(12) / 12.0
    half = width // 2
    table = np.concatenate(
        [np.repeat(np.sin(angle)[:, None], half, 1), np.repeat(np.cos(angle)[:, None], half, 1)], 1
    ).astype(np.float32)
    table.setflags(write=False)
    return table


class CompositeEncodings(nnx.Module):
    """Channel, timestep, month and position parts, a quarter of the width each."""

    def __init__(self, slots: SlotTable, width: int, position_encoding: str):
        n = quarter_width(width)
        if position_encoding == "absolute" and width % 16:
            raise ValueError(
                f"position_encoding 'absolute' needs an embedding size divisible by 16, got {width}"
            )
        if n % 2:
            raise ValueError(f"an embedding size of {width} gives an odd quarter; use another one")
        self.slots = slots
        self.width = width
        self.position_encoding = position_encoding
        self.channel = nnx.Dict({name: empty(len(slots.of(name)), n) for name in slots.names})

    def __call__(self, tokens: Tokens) -> jax.Array:
        """float32 [..., N, D] to add to the tokens; slot -1 gets zeros."""
        n = quarter_width(self.width)
        shape = tokens.shape
        # Products with a one-hot instead of gathers: their gradient is a product, no scatter-add.
        slot_ids = np.arange(len(self.slots), dtype=np.int32)
        one_hot = (jnp.asarray(tokens.slot)[..., None] == slot_ids).astype(jnp.float32)
        table = jnp.concatenate([self.channel[name][...] for name in self.slots.names])
        parts = [jnp.matmul(one_hot, table, precision=jax.lax.Precision.HIGHEST)]

        varies = _flag(self.slots.multitemporal, tokens)
        if self.position_encoding in TIME_AXIS_MODES:
            parts.append(jnp.zeros((*shape, n), jnp.float32))
        else:
            parts.append(jnp.where(varies, sincos(jnp.asarray(tokens.time), n), 0.0))
        months = jnp.take(jnp.asarray(month_table(n)), tokens.month, axis=0, mode="clip")
        parts.append(jnp.where(varies, months, 0.0))

        rest = self.width - 3 * n
        if self.position_encoding == "absolute":
            place = jnp.concatenate(
                [sincos(tokens.gsd * tokens.col, n // 2), sincos(tokens.gsd * tokens.row, n // 2)],
                axis=-1,
            )
            parts.append(jnp.where(_flag(self.slots.spatial, tokens), place, 0.0))
            rest -= n
        parts.append(jnp.zeros((*shape, rest), jnp.float32))
        return jnp.concatenate(parts, axis=-1)


def _flag(per_slot: np.ndarray, tokens: Tokens) -> jax.Array:
    """Looks a per-slot flag up for every token, [..., 1]; slot -1 gives False."""
    padded = jnp.asarray(np.append(per_slot, False))
    # Slot -1 takes the appended last entry.
    return jnp.take(padded, jnp.where(tokens.slot < 0, len(per_slot), tokens.slot))[..., None]
