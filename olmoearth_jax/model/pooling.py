"""Pooling of encoder tokens into one vector per sample or per location (spec section 14)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from olmoearth_jax import modalities
from olmoearth_jax.masks import VISIBLE

PoolingType = Literal["mean", "max"]
_Arrays = Mapping[str, Any]
LOCATIONS = ("location", "student")
PLACES = ("instance", "spatial", "spatial_concat", *LOCATIONS)
"""What there can be one embedding of; see `Pooling`."""


def _reduce(x: jax.Array, visible: jax.Array, how: PoolingType) -> jax.Array:
    """Reduces axis -2 of x [..., N, D] where visible [..., N]: empty means 0, empty maxima -inf."""
    if how == "max":
        return jnp.max(jnp.where(visible[..., None], x, -jnp.inf), axis=-2)
    total = jnp.sum(jnp.where(visible[..., None], x, 0.0), axis=-2)
    return total / jnp.maximum(jnp.sum(visible, axis=-1), 1)[..., None]


def _check(how: str) -> None:
    if how not in ("mean", "max"):
        raise ValueError(f"unknown pooling type {how!r}; known: mean, max")


def _names(tokens: _Arrays) -> tuple[str, ...]:
    return modalities.in_masked_order(tokens)


def pool_instance(tokens: _Arrays, masks: _Arrays, how: PoolingType = "max") -> jax.Array:
    """One vector per sample over all visible tokens of all modalities.

    Args:
      tokens: {modality: float [B, ..., D]}.
      masks: {modality: int [B, ...]}, 0 is visible.
      how: 'mean' or 'max'.

    Returns:
      [B, D].

    Raises:
      ValueError: a sample has no visible token (checked on concrete arrays only).
    """
    _check(how)
    flat, seen = [], []
    for name in _names(tokens):
        x, mask = jnp.asarray(tokens[name]), jnp.asarray(masks[name])
        flat.append(x.reshape(x.shape[0], -1, x.shape[-1]))
        seen.append((mask == VISIBLE).reshape(mask.shape[0], -1))
    visible = jnp.concatenate(seen, axis=1)
    if not isinstance(visible, jax.core.Tracer) and not bool(visible.any(axis=1).all()):
        raise ValueError("cannot pool a sample that has no visible token")
    return _reduce(jnp.concatenate(flat, axis=1), visible, how)


def spatial_names(masks: _Arrays) -> tuple[str, ...]:
    """Spatial modalities with a visible token anywhere in the batch (concrete masks)."""
    return _spatial(masks, np.any)


def _concat_names(masks: _Arrays) -> tuple[str, ...]:
    """Spatial modalities that are visible everywhere in the batch (concrete masks)."""
    return _spatial(masks, np.all)


def _spatial(masks: _Arrays, where: Callable[[np.ndarray], Any]) -> tuple[str, ...]:
    names = (name for name in _names(masks) if modalities.get(name).spatial)
    return tuple(name for name in names if where(np.asarray(masks[name]) == VISIBLE))


def pool_spatial(
    tokens: _Arrays,
    masks: _Arrays,
    how: PoolingType = "max",
    names: tuple[str, ...] | None = None,
) -> jax.Array:
    """One vector per location: over time and band sets, then over modalities.

    Takes the modalities `names`; by default those of `spatial_names`, and masks must be concrete
    arrays then. Modalities count equally in the mean, whatever their number of tokens.

    Returns:
      [B, h, w, D]; where a modality shows nothing its mean is 0 and its maximum -inf.

    Raises:
      ValueError: no modality qualifies.
    """
    _check(how)
    parts = []
    for name in spatial_names(masks) if names is None else names:
        x = jnp.asarray(tokens[name])
        x = x.reshape(*x.shape[:3], -1, x.shape[-1])
        visible = jnp.asarray(masks[name]) == VISIBLE
        parts.append(_reduce(x, visible.reshape(x.shape[:4]), how))
    if not parts:
        raise ValueError("no spatial modality has a visible token to pool")
    stacked = jnp.stack(parts)
    return jnp.max(stacked, axis=0) if how == "max" else jnp.mean(stacked, axis=0)


def pool_spatial_concat(
    tokens: _Arrays, masks: _Arrays, names: tuple[str, ...] | None = None
) -> jax.Array:
    """Mean over time, band sets side by side: [B, h, w, band sets, D].

    Takes the modalities `names`; by default those of `_concat_names` (concrete masks).

    Raises:
      ValueError: no modality qualifies.
    """
    chosen = _concat_names(masks) if names is None else names
    parts = [jnp.mean(jnp.asarray(tokens[name]), axis=3) for name in chosen]
    if not parts:
        raise ValueError("no spatial modality is visible everywhere, so none can be concatenated")
    return jnp.concatenate(parts, axis=3)


def centre_token(pooled: Any) -> Any:
    """The middle location of a spatial pooling, [B, h, w, ...] -> [B, ...]."""
    return pooled[:, pooled.shape[1] // 2, pooled.shape[2] // 2]


@dataclasses.dataclass(frozen=True)
class Pooling:
    """How tokens become embeddings."""

    how: PoolingType = "mean"
    place: str = "instance"
    """'instance': one per sample, [B, D]; 'spatial': one per patch, [B, h, w, D];
    'spatial_concat': one per patch and band set, [B, h, w, S, D]; 'centre': that of the middle
    patch, [B, D]. 'location' and 'student' are made by the encoder itself."""
    names: tuple[str, ...] | None = None
    """Modalities that count where space is kept; see `over`."""
    reduce: str = "spatial"
    """What is made of the grid of 'location' and 'student': as it is, 'spatial', its mean,
    'instance', or its middle cell, 'centre'."""
    channels: int | None = None
    """First channels of that grid that are kept; None keeps all."""

    def of_grid(self, grid: jax.Array) -> jax.Array:
        """Embeddings of a grid [B, h, w, D] that the encoder made, as `reduce` and `channels` say;
        the slice is not normalised again."""
        grid = grid[..., : self.channels]
        if self.reduce == "instance":
            return jnp.mean(grid, axis=(1, 2))
        return centre_token(grid) if self.reduce == "centre" else grid

    def over(self, masks: _Arrays) -> Pooling:
        """The same with the modalities that count in a batch of these (concrete) masks."""
        if self.place in ("instance", *LOCATIONS):
            return self
        names = _concat_names(masks) if self.place == "spatial_concat" else spatial_names(masks)
        return dataclasses.replace(self, names=names)

    def __call__(self, tokens: _Arrays, masks: _Arrays) -> jax.Array:
        """Pools tokens; masks are concrete unless `names` are set.

        Raises:
          ValueError: no modality qualifies.
        """
        if self.place == "instance":
            return pool_instance(tokens, masks, self.how)
        if self.place == "spatial_concat":
            return pool_spatial_concat(tokens, masks, self.names)
        spatial = pool_spatial(tokens, masks, self.how, self.names)
        return centre_token(spatial) if self.place == "centre" else spatial
