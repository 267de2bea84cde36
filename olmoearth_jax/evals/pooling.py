"""From tokens to embeddings (spec/evals.md section 4).

Tokens are {modality: [B, h, w, T, S, D]} (or without the leading space or time axes for
modalities that lack them), masks the same without D; a mask of 0 means the token counts.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from olmoearth_jax.evals.tasks import POOLING_TYPES, known

Tokens = Mapping[str, jax.Array]


def check_pooling(kind: str) -> None:
    known("pooling_type", kind, POOLING_TYPES)


def pool_instance(tokens: Tokens, masks: Tokens, kind: str = "mean") -> jax.Array:
    """Mean or maximum of all online tokens of all modalities: [B, D].

    A sample without any online token gives NaN (mean) or -inf (max); see `check_online`.
    """
    check_pooling(kind)
    names = list(tokens)
    batch = tokens[names[0]].shape[0]
    flat = jnp.concatenate([tokens[n].reshape(batch, -1, tokens[n].shape[-1]) for n in names], 1)
    online = jnp.concatenate([masks[n].reshape(batch, -1) for n in names], 1)[..., None] == 0
    if kind == "max":
        return jnp.max(jnp.where(online, flat, -jnp.inf), axis=1)
    return jnp.sum(jnp.where(online, flat, 0), axis=1) / online.sum(1)


def pool_spatial(tokens: Tokens, masks: Tokens, kind: str = "mean") -> jax.Array:
    """Pools time and band sets, then averages (or takes the maximum of) modalities: [B, h, w, D].

    Modalities without a grid, and those without an online token in the whole batch, do not count.
    """
    check_pooling(kind)
    total, used = None, 0.0
    for name, x in tokens.items():
        if x.ndim != 6:
            continue
        online = (masks[name] == 0)[..., None]
        if kind == "max":
            pooled = jnp.max(jnp.where(online, x, -jnp.inf), axis=(3, 4))
            total = pooled if total is None else jnp.maximum(total, pooled)
            continue
        count = jnp.maximum(online.sum((3, 4)), 1)
        pooled = jnp.sum(jnp.where(online, x, 0), axis=(3, 4)) / count
        # Traced, so an absent modality is left out by its weight and not by its name.
        weight = jnp.any(online).astype(jnp.float32)
        total = weight * pooled + (0 if total is None else total)
        used = used + weight
    if total is None:
        raise ValueError("spatial pooling needs a modality with a pixel grid")
    return total if kind == "max" else total / used


def pool_concat(tokens: Tokens, masks: Mapping[str, np.ndarray]) -> jax.Array:
    """Time means of the modalities that are online everywhere, side by side: [B, h, w, sum S, D].

    Args:
      masks: concrete arrays (which modalities take part decides the shape).
    """
    parts = [
        x.mean(axis=3)
        for name, x in tokens.items()
        if x.ndim == 6 and not np.any(np.asarray(masks[name]))
    ]
    if not parts:
        raise ValueError("no modality with a pixel grid is online in the whole batch")
    return jnp.concatenate(parts, axis=-2)


def centre_token(spatial: jax.Array) -> jax.Array:
    """The embedding in the middle of [B, h, w, D]: [B, D]."""
    return spatial[:, spatial.shape[1] // 2, spatial.shape[2] // 2]


def check_online(masks: Mapping[str, np.ndarray]) -> None:
    """Raises ValueError if a sample of the batch has no online token."""
    seen = [(np.asarray(m) == 0).reshape(len(m), -1).any(1) for m in masks.values()]
    empty = np.flatnonzero(~np.any(seen, axis=0))
    if len(empty):
        raise ValueError(f"samples {empty.tolist()} of the batch have no online token to pool")
