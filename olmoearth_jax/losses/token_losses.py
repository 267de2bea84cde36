"""Token losses: discrimination, and those without negatives (L1, L2, cosine, cross entropy).

Discrimination: each predicted token has to pick its own target among a set. For a token i of a set
Q with scores s_ij = p_i.t_j / tau (both normalised), its loss is 2 tau (log sum_j exp s_ij - s_ii);
spec/train.md sections 3 and 3.1. The others are means over all decoded tokens of a group.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from olmoearth_jax import modalities
from olmoearth_jax.losses.rows import (
    NEGATIVE,
    Rows,
    Scope,
    TokenLoss,
    check_tau,
    diagonal,
    log_sum_exp,
    normalise,
    products,
)
from olmoearth_jax.modalities import ModalityName


def _token_losses(scores: jax.Array, keep: jax.Array, tau: float) -> jax.Array:
    """2 tau (log sum_j exp s_ij - s_ii) over the last axis, for pairs in `keep` [..., I, J]."""
    return 2.0 * tau * (log_sum_exp(jnp.where(keep, scores, NEGATIVE)) - diagonal(scores))


def _set_mean(losses: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(mean over valid tokens [...], number of them [...]); 0 for an empty set."""
    count = jnp.sum(valid, axis=-1).astype(jnp.float32)
    total = jnp.sum(jnp.where(valid, losses, 0.0), axis=-1)
    return total / jnp.maximum(count, 1.0), count


def _weight(modality: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError(
            f"modality_weights.{modality} must be a number of 0 or more, got {value!r}"
        )
    return float(value)


@dataclasses.dataclass(frozen=True)
class PatchDiscrimination(TokenLoss):
    """Negatives are all decoded tokens of the same sample, whatever their modality."""

    tau: float = 0.1
    pred2unit: bool = False
    weight: float = 1.0

    name: ClassVar[str] = "PatchDisc"
    scope: ClassVar[Scope] = "sample"

    def __post_init__(self) -> None:
        check_tau(self.tau)

    def set_value(
        self, pred: jax.Array, target: jax.Array, valid: jax.Array, modality: str | None = None
    ) -> tuple[jax.Array, jax.Array]:
        scores = products(normalise(pred), normalise(target)) / self.tau
        losses = _token_losses(scores, valid[..., None, :], self.tau)
        value, count = _set_mean(losses, valid)
        return value, (count > 0).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class ModalityPatchDiscrimination(PatchDiscrimination):
    """Negatives are the sample's decoded tokens of the same modality; summed over modalities."""

    modality_weights: dict[ModalityName, Any] | tuple[tuple[str, float], ...] | None = None
    """Factor per modality; one that is present but not listed is an error."""

    name: ClassVar[str] = "ModalityPatchDisc"
    scope: ClassVar[Scope] = "modality"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.modality_weights, Mapping):
            pairs = tuple(
                (modalities.get(m).name, _weight(m, w)) for m, w in self.modality_weights.items()
            )
            object.__setattr__(self, "modality_weights", pairs)

    def modality_factor(self, modality: str) -> float:
        if self.modality_weights is None:
            return 1.0
        weights = dict(self.modality_weights)
        if modality not in weights:
            raise ValueError(
                f"modality_weights has no entry for {modality!r}; it lists {', '.join(weights)}"
            )
        return weights[modality]


@dataclasses.dataclass(frozen=True)
class MaskedNegatives(ModalityPatchDiscrimination):
    """Modality patch discrimination without negatives whose target equals the token's own.

    A pair of tokens has the same target if the cosine of their targets is over the threshold. A
    set in which some token has the same target as all others says nothing and is left out.

    Attributes:
      same_target_threshold: the cosine; 1 or more switches the rule off.
      mask_negatives_for_modalities: where the rule applies; None: everywhere.
      modality_weights: factor per modality; one not listed has 1.
    """

    same_target_threshold: float = 0.999
    mask_negatives_for_modalities: tuple[ModalityName, ...] | None = None

    name: ClassVar[str] = "ModalityPatchDiscMasked"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mask_negatives_for_modalities is not None:
            names = modalities.resolve(list(self.mask_negatives_for_modalities))
            object.__setattr__(self, "mask_negatives_for_modalities", names)

    def modality_factor(self, modality: str) -> float:
        return dict(self.modality_weights or ()).get(modality, 1.0)

    def set_value(
        self, pred: jax.Array, target: jax.Array, valid: jax.Array, modality: str | None = None
    ) -> tuple[jax.Array, jax.Array]:
        listed = self.mask_negatives_for_modalities
        if self.same_target_threshold >= 1 or (listed is not None and modality not in listed):
            return super().set_value(pred, target, valid, modality)
        target = normalise(lax.stop_gradient(target))
        same = products(target, target) > self.same_target_threshold
        column = valid[..., None, :]
        several = jnp.sum(valid, axis=-1) > 1
        alike = jnp.all(same | ~column, axis=-1) & valid
        skip = jnp.any(alike, axis=-1) & several
        keep = column & (~same | jnp.eye(same.shape[-1], dtype=bool))
        scores = products(normalise(pred), target) / self.tau
        value, count = _set_mean(_token_losses(scores, keep, self.tau), valid)
        counts = (count > 0) & ~skip
        return jnp.where(counts, value, 0.0), counts.astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class MaskedNegativesVec(MaskedNegatives):
    """The same value under the name the v1.1 and v1.2 runs log."""

    name: ClassVar[str] = "ModalityPatchDiscMaskedVec"


@dataclasses.dataclass(frozen=True)
class AdjustedPatchDiscrimination(TokenLoss):
    """Patch discrimination whose negatives are weighted by how hard they are.

    The weight of a negative score is a normal density (mean mu, spread sigma) of its cosine,
    divided by its mean over the token's negatives; no gradient flows through it. Samples without
    decoded tokens are left out.
    """

    tau: float = 0.1
    mu: float = 0.7
    sigma: float = 1.0
    pred2unit: bool = False

    name: ClassVar[str] = "AdjustedPatchDisc"
    scope: ClassVar[Scope] = "sample"

    def __post_init__(self) -> None:
        check_tau(self.tau)
        if self.sigma <= 0:
            raise ValueError(f"sigma must be positive, got {self.sigma}")

    def set_value(
        self, pred: jax.Array, target: jax.Array, valid: jax.Array, modality: str | None = None
    ) -> tuple[jax.Array, jax.Array]:
        cosine = products(normalise(pred), normalise(target))
        own = jnp.eye(cosine.shape[-1], dtype=bool)
        column = valid[..., None, :]
        log_density = -0.5 * ((lax.stop_gradient(cosine) - self.mu) / self.sigma) ** 2
        log_density = jnp.where(column & ~own, log_density, NEGATIVE)
        negatives = jnp.sum(valid, axis=-1)[..., None, None] - 1.0
        weights = negatives * jnp.exp(log_density - log_sum_exp(log_density)[..., None])
        scores = cosine * jnp.where(own, 1.0, weights) / self.tau
        value, count = _set_mean(_token_losses(scores, column, self.tau), valid)
        return value, (count > 0).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class AllDiscrimination(TokenLoss):
    """Negatives are all decoded tokens of the group, of all samples and modalities.

    The mean over samples counts those without decoded tokens. Memory is quadratic in the tokens
    of a group.
    """

    tau: float = 0.1
    pred2unit: bool = False

    name: ClassVar[str] = "AllDisc"
    scope: ClassVar[Scope] = "batch"

    def __post_init__(self) -> None:
        check_tau(self.tau)

    def group_values(self, rows: Sequence[Rows], num_segments: int) -> list[jax.Array]:
        flat = [
            (
                r.pred.reshape(-1, r.pred.shape[-1]),
                r.target.reshape(-1, r.target.shape[-1]),
                r.valid.reshape(-1),
                jnp.repeat(r.segment, r.valid.shape[1]),
            )
            for r in rows
        ]
        pred, target, valid, segment = (jnp.concatenate(c) for c in zip(*flat, strict=True))
        scores = products(normalise(pred), normalise(target)) / self.tau
        keep = valid[None, :] & (segment[:, None] == segment[None, :])
        losses = _token_losses(scores, keep, self.tau)
        values, start = [], 0
        for r in rows:
            part = losses[start : start + r.valid.size].reshape(r.valid.shape)
            values.append(_set_mean(part, r.valid)[0])
            start += r.valid.size
        return values


@dataclasses.dataclass(frozen=True)
class ModalityAllDiscrimination(AllDiscrimination):
    """The same for each modality by itself, summed over modalities."""

    name: ClassVar[str] = "ModalityAllDisc"
    scope: ClassVar[Scope] = "modality_batch"


@dataclasses.dataclass(frozen=True)
class _PerToken(TokenLoss, abc.ABC):
    scope: ClassVar[Scope] = "token"

    @abc.abstractmethod
    def per_token(self, pred: jax.Array, target: jax.Array) -> jax.Array:
        """Loss of each token [..., L]."""

    def set_value(
        self, pred: jax.Array, target: jax.Array, valid: jax.Array, modality: str | None = None
    ) -> tuple[jax.Array, jax.Array]:
        return _set_mean(self.per_token(pred, target), valid)


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
