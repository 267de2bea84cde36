"""Token losses without negatives: L1, L2, cosine, cross entropy.

Means over all decoded tokens of a group.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from olmoearth_jax.losses.discrimination import set_mean
from olmoearth_jax.losses.numerics import log_sum_exp, normalise
from olmoearth_jax.losses.rows import Scope, TokenLoss


@dataclasses.dataclass(frozen=True)
class _PerToken(TokenLoss, abc.ABC):
    scope: ClassVar[Scope] = "token"

    @abc.abstractmethod
    def per_token(self, pred: jax.Array, target: jax.Array) -> jax.Array:
        """Loss of each token [..., L]."""

    def set_value(
        self, pred: jax.Array, target: jax.Array, valid: jax.Array, modality: str | None = None
    ) -> tuple[jax.Array, jax.Array]:
        return set_mean(self.per_token(pred, target), valid)


@dataclasses.dataclass(frozen=True)
class L1(_PerToken):
    """Mean absolute error over tokens and features."""

    name: ClassVar[str] = "L1"

    def per_token(self, pred: jax.Array, target: jax.Array) -> jax.Array:
        return jnp.mean(jnp.abs(pred - target), axis=-1)


@dataclasses.dataclass(frozen=True)
class L2(_PerToken):
    """Mean squared error over tokens and features."""

    name: ClassVar[str] = "L2"

    def per_token(self, pred: jax.Array, target: jax.Array) -> jax.Array:
        return jnp.mean(jnp.square(pred - target), axis=-1)


@dataclasses.dataclass(frozen=True)
class CosineSimilarity(_PerToken):
    """Minus the mean cosine."""

    name: ClassVar[str] = "CosineSim"

    def per_token(self, pred: jax.Array, target: jax.Array) -> jax.Array:
        return -jnp.sum(normalise(pred, 1e-8) * normalise(target, 1e-8), axis=-1)


@dataclasses.dataclass(frozen=True)
class CrossEntropy(_PerToken):
    """Class logits in the features against integer class numbers."""

    name: ClassVar[str] = "CrossEntropy"

    def per_token(self, pred: jax.Array, target: jax.Array) -> jax.Array:
        if not jnp.issubdtype(target.dtype, jnp.integer):
            raise ValueError("cross_entropy needs integer class numbers as targets")
        chosen = jax.nn.one_hot(target, pred.shape[-1], dtype=jnp.float32)
        return log_sum_exp(pred) - jnp.sum(pred * chosen, axis=-1)
