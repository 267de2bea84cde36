"""Rotary encodings from per-token coordinates (spec section 5); all angles in float32."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from olmoearth_jax.model.tokens import Tokens

ROPE_MODES = ("rope", "rope_mixed", "rope_3d", "rope_3d_mixed")
_MIXED_MODES = ("rope_mixed", "rope_3d_mixed")
TIME_AXIS_MODES = ("rope_3d", "rope_3d_mixed")


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """The rotary members of an encoder or decoder config; hashable."""

    mode: str
    base: float = 10000.0
    temporal_base: float | None = None
    temporal_dim_frac: float = 0.25
    coordinate_scale: float = 1.0
    temporal_coordinate_scale: float = 1.0

    @classmethod
    def of(cls, config) -> RopeConfig | None:
        """From an EncoderConfig or PredictorConfig; None in modes without rotation."""
        if config.position_encoding not in ROPE_MODES:
            return None
        return cls(
            config.position_encoding,
            config.rope_base,
            config.rope_temporal_base,
            config.temporal_rope_dim_frac,
            config.rope_coordinate_scale,
            config.rope_temporal_coordinate_scale,
        )

    @property
    def mixed(self) -> bool:
        return self.mode in _MIXED_MODES

    @property
    def num_axes(self) -> int:
        return 3 if self.mode in TIME_AXIS_MODES else 2

    def check(self, head_dim: int) -> None:
        """Raises ValueError if heads of that width cannot be rotated in this mode."""
        if self.mixed or self.mode == "rope":
            if head_dim % 4:
                raise ValueError(f"{self.mode!r} needs heads of a multiple of 4, got {head_dim}")
        else:
            _axial_chunks(self, head_dim)


def coordinates(config: RopeConfig, tokens: Tokens) -> jax.Array:
    """float32 [..., N, 2] (row, col), or [..., N, 3] (time, row, col)."""
    unit = jnp.asarray(tokens.gsd, jnp.float32) * np.float32(config.coordinate_scale)
    axes = [tokens.row * unit, tokens.col * unit]
    if config.num_axes == 3:
        days = jnp.asarray(tokens.days, jnp.float32)
        axes.insert(0, days * np.float32(config.temporal_coordinate_scale))
    return jnp.stack(axes, axis=-1)


def _axial_chunks(config: RopeConfig, head_dim: int) -> tuple[int, ...]:
    """Features of a head given to each axis in the axial modes.

    Raises:
      ValueError: the head width cannot be divided so.
    """
    if config.mode == "rope":
        return (head_dim // 2, head_dim // 2)
    temporal = max(2 * round(head_dim * config.temporal_dim_frac / 2), 2)
    rest = head_dim - temporal
    if rest <= 0 or rest % 4:
        raise ValueError(
            f"rope_3d: a head of {head_dim} with {temporal} temporal features leaves {rest}, "
            "which is not a positive multiple of 4"
        )
    return (temporal, rest // 2, rest // 2)


def angles(
    config: RopeConfig, position: jax.Array, head_dim: int, frequencies: jax.Array | None = None
) -> jax.Array:
    """Rotation angles, float32 [..., N, heads or 1, head_dim / 2].

    Args:
      position: output of `coordinates`.
      frequencies: learned [axes, heads, head_dim / 2], in the mixed modes.
    """
    position = position.astype(jnp.float32)
    if config.mixed:
        assert frequencies is not None
        terms = [
            position[..., axis, None, None] * frequencies[axis] for axis in range(config.num_axes)
        ]
        return sum(terms[1:], terms[0])
    parts = []
    for axis, size in enumerate(_axial_chunks(config, head_dim)):
        base = config.base
        if config.num_axes == 3 and axis == 0 and config.temporal_base is not None:
            base = config.temporal_base
        omega = float(base) ** -(np.arange(size // 2, dtype=np.float64) * 2.0 / size)
        parts.append(position[..., axis, None] * jnp.asarray(omega, jnp.float32))
    return jnp.concatenate(parts, axis=-1)[..., None, :]


def rotate(x: jax.Array, angle: jax.Array) -> jax.Array:
    """Rotates the feature pairs (2k, 2k + 1) of x [..., N, heads, head_dim] by `angle`."""
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    even, odd = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)


def mixed_magnitudes(head_dim: int, base: float) -> np.ndarray:
    """Initial magnitudes of the mixed frequencies, float64 [head_dim / 4]."""
    return base ** -(4.0 * np.arange(head_dim // 4) / head_dim)


def mixed_frequencies(
    rng: np.random.Generator, axes: int, heads: int, head_dim: int, base: float
) -> np.ndarray:
    """Initial mixed frequencies, float32 [axes, heads, head_dim / 2] (spec section 5).

    Per head, half of the pairs turn along a random direction, half along one orthogonal to it.
    """
    if axes == 2:
        phi = rng.uniform(0.0, 2.0 * np.pi, heads)
        first = np.stack([np.cos(phi), np.sin(phi)])
        second = np.stack([-np.sin(phi), np.cos(phi)])
    else:
        first = rng.standard_normal((axes, heads))
        first /= np.linalg.norm(first, axis=0)
        second = rng.standard_normal((axes, heads))
        second -= (second * first).sum(0) * first
        second /= np.linalg.norm(second, axis=0)
    magnitude = mixed_magnitudes(head_dim, base)
    return np.concatenate(
        [first[:, :, None] * magnitude, second[:, :, None] * magnitude], axis=-1
    ).astype(np.float32)
