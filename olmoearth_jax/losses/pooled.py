"""Losses on one vector per sample: InfoNCE between views, and the KoLeo regulariser.

Both work per group, leave holes out of rows and negatives alike, and give 0 with zero gradient
where a group has nothing to compare. spec/train.md sections 3.2 and 3.4.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from olmoearth_jax import modalities
from olmoearth_jax.losses.rows import (
    NEGATIVE,
    Groups,
    check_tau,
    diagonal,
    log_sum_exp,
    normalise,
    products,
    safe_divide,
)
from olmoearth_jax.masks import VISIBLE


@dataclasses.dataclass(frozen=True)
class InfoNCE:
    """Contrastive loss between the pooled vectors of view A and view B, from A to B only."""

    tau: float = 0.1
    weight: float = 1.0

    name: ClassVar[str] = "InfoNCE"

    def __post_init__(self) -> None:
        check_tau(self.tau)

    def __call__(self, a: jax.Array, b: jax.Array, groups: Groups | None = None) -> jax.Array:
        """weight * mean of -log softmax of a's cosines (over tau) with every b of its group.

        Args:
          a, b: float [n, D], vectors of the two views of n samples; gradients flow into both.
          groups: of the samples; None: all in one, without holes.

        Returns:
          float32 [groups]. A group of one sample has 0.
        """
        groups = Groups.given(groups, len(a))
        segment, real = groups.segment, groups.weight > 0
        a, b = (jnp.where(real[:, None], x.astype(jnp.float32), 0.0) for x in (a, b))
        scores = products(normalise(a), normalise(b)) / self.tau
        keep = (segment[:, None] == segment[None, :]) & real[None, :]
        losses = log_sum_exp(jnp.where(keep, scores, NEGATIVE)) - diagonal(scores)
        losses = jnp.where(real, losses, 0.0)
        return self.weight * groups.mean(losses, jnp.ones_like(groups.weight))


@dataclasses.dataclass(frozen=True)
class KoLeo:
    """Spreads vectors out: minus the mean log distance to the nearest neighbour in the group."""

    weight: float = 0.1
    mode: str = "instance"
    """'instance' (one vector per sample) or 'patch' (every encoder token); only
    `tokens_to_vectors` reads it."""
    eps: float = 1e-8
    """Added to norms, components and the logarithm's argument."""

    name: ClassVar[str] = "KoLeo"

    def __post_init__(self) -> None:
        if self.mode not in ("instance", "patch"):
            raise ValueError(f"the KoLeo mode must be 'instance' or 'patch', got {self.mode!r}")
        if not self.eps > 0:  # equal vectors have a distance of 0, and a logarithm is taken of it
            raise ValueError(f"the KoLeo eps must be greater than 0, got {self.eps}")

    def __call__(self, x: jax.Array, groups: Groups | None = None) -> jax.Array:
        """Value per group of vectors [n, D]; 0 for groups of fewer than two."""
        groups = Groups.given(groups, len(x))
        segment, real = groups.segment, groups.weight > 0
        x = normalise(jnp.where(real[:, None], x.astype(jnp.float32), 0.0), self.eps)
        own = jnp.eye(len(x), dtype=bool)
        peers = (segment[:, None] == segment[None, :]) & real[None, :] & ~own
        cosine = lax.stop_gradient(products(x, x))
        nearest = jnp.argmax(jnp.where(peers, cosine, -2.0), axis=-1)
        # One-hot product instead of a gather: its gradient is no scatter.
        chosen = (nearest[:, None] == jnp.arange(len(x))[None, :]).astype(jnp.float32)
        neighbour = jnp.matmul(chosen, x, precision=lax.Precision.HIGHEST)
        square = jnp.sum(jnp.square(x - neighbour + self.eps), axis=-1)
        apart = square > 0
        distance = jnp.where(apart, jnp.sqrt(jnp.where(apart, square, 1.0)), 0.0)
        counts = (jnp.any(peers, axis=-1) & real).astype(jnp.float32)
        logs = jnp.log(distance + self.eps)
        return -self.weight * groups.mean(logs, counts)

    def tokens_to_vectors(
        self,
        tokens: Mapping[str, jax.Array],
        masks: Mapping[str, jax.Array],
        groups: Groups | None = None,
    ) -> tuple[jax.Array, Groups]:
        """(x [n, D], their groups) from encoder tokens [B, N, D] and masks [B, N].

        'instance': the mean of each sample's encoder tokens, weight 0 if it has none; 'patch':
        every token, weight 0 unless it is an encoder token.
        """
        names = modalities.in_sample_order(tokens)
        x = jnp.concatenate([tokens[m].astype(jnp.float32) for m in names], axis=1)
        visible = jnp.concatenate([masks[m] == VISIBLE for m in names], axis=1)
        groups = Groups.given(groups, len(x))
        visible = (visible & (groups.weight > 0)[:, None]).astype(jnp.float32)
        if self.mode == "patch":
            n = x.shape[1]
            flat = x.reshape(-1, x.shape[-1])
            return flat, Groups(jnp.repeat(groups.segment, n), visible.reshape(-1), groups.count)
        count = visible.sum(axis=1)
        total = jnp.einsum("bn,bnd->bd", visible, x, precision=lax.Precision.HIGHEST)
        means = safe_divide(total, count[:, None])
        return means, groups._replace(weight=(count > 0).astype(jnp.float32))
