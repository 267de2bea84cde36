"""Token losses over padded sets, and their reduction to one value per group.

A *row* is a padded set of decoded tokens: those of one sample and modality, or of one sample over
all modalities, as the loss's `scope` says. A *group* (segment) is the set of samples over which
the reference normalises. Packed and padded tokens are reduced here alike. All arithmetic is
float32, products at the highest matmul precision.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from olmoearth_jax import modalities
from olmoearth_jax.masks import DECODE

NEGATIVE = -1e30
"""Score of an excluded pair: finite, so that rows without any pair stay finite too."""

_LOWEST_TAU = 1e-12
"""Scores are cosines over tau, and must stay far from `NEGATIVE` and the ends of float32."""


def check_tau(tau: float) -> None:
    """Raises ValueError for a temperature that no loss can be divided by."""
    if tau <= 0:
        raise ValueError(f"the temperature tau must be positive, got {tau}")
    if tau < _LOWEST_TAU:
        raise ValueError(f"the temperature tau must be at least {_LOWEST_TAU:g}, got {tau}")


def normalise(x: jax.Array, eps: float = 1e-12) -> jax.Array:
    """x / max(|x|, eps) over the last axis, float32; finite gradient at zero."""
    x = x.astype(jnp.float32)
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    long = square > eps * eps
    return x * jnp.where(long, lax.rsqrt(jnp.where(long, square, 1.0)), 1.0 / eps)


def products(a: jax.Array, b: jax.Array) -> jax.Array:
    """All inner products [..., I, J] of a [..., I, D] and b [..., J, D]."""
    return jnp.einsum("...id,...jd->...ij", a, b, precision=lax.Precision.HIGHEST)


def log_sum_exp(scores: jax.Array) -> jax.Array:
    """log sum exp over the last axis; excluded entries hold `NEGATIVE`."""
    top = lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    return jnp.log(jnp.sum(jnp.exp(scores - top), axis=-1)) + top[..., 0]


def diagonal(matrix: jax.Array) -> jax.Array:
    """Diagonal of the last two axes, without a gather (whose gradient would be a scatter)."""
    eye = jnp.eye(matrix.shape[-1], dtype=bool)
    return jnp.sum(jnp.where(eye, matrix, 0.0), axis=-1)


def safe_divide(a: jax.Array, b: jax.Array) -> jax.Array:
    """a / b, and 0 with zero gradient where b is 0."""
    return jnp.where(b > 0, a, 0.0) / jnp.where(b > 0, b, 1.0)


def segment_sum(values: jax.Array, segment: jax.Array, num_segments: int) -> jax.Array:
    """Sums [R, ...] by segment into [G, ...]: a product with one-hot rows, hence deterministic."""
    rows = (segment[:, None] == jnp.arange(num_segments)).astype(jnp.float32)
    return jnp.einsum("rg,r...->g...", rows, values, precision=lax.Precision.HIGHEST)


Scope = Literal["modality", "sample", "token", "modality_batch", "batch"]


class Groups(NamedTuple):
    """The groups that n samples (or vectors) belong to."""

    segment: jax.Array
    """int [n], group of each."""
    weight: jax.Array
    """float32 [n], 0 for holes, else 1."""
    count: int = 1

    @classmethod
    def given(cls, groups: Groups | None, size: int) -> Groups:
        """`groups`, or one group of that size without holes."""
        if groups is not None:
            return groups
        return cls(jnp.zeros(size, jnp.int32), jnp.ones(size, jnp.float32))

    def sum(self, values: jax.Array) -> jax.Array:
        """Sums [count, ...] of values [n, ...]."""
        return segment_sum(values, self.segment, self.count)

    def mean(self, values: jax.Array, counts: jax.Array) -> jax.Array:
        """Weighted mean per group [count] of values [n]; 0 where nothing counts."""
        counts = counts * self.weight
        total = self.sum(values * counts)
        return safe_divide(total, self.sum(counts))


class Rows(NamedTuple):
    """R padded sets of up to L tokens."""

    pred: jax.Array
    """float [R, L, D]"""
    target: jax.Array
    """float [R, L, D], or int [R, L] class numbers"""
    valid: jax.Array
    """bool [R, L], which places hold a decoded token"""
    segment: jax.Array
    """int [R], group of the row"""
    weight: jax.Array
    """float32 [R], 0 for rows of holes and for padding rows, else 1"""


@dataclasses.dataclass(frozen=True)
class TokenLoss:
    """A loss between predicted and target tokens.

    Scopes: 'modality', the sum over modalities of the mean over a group's contributing rows;
    'sample', the mean over contributing rows, each a sample with all its modalities; 'token', the
    mean over all tokens; 'modality_batch' and 'batch', like the first two but each token is
    compared with those of the whole group, so all of a group's rows are needed at once.
    """

    name: ClassVar[str] = ""
    """Name in metrics."""
    scope: ClassVar[Scope] = "modality"

    @property
    def needs_unit_predictions(self) -> bool:
        """Whether predictions are standardised per feature first."""
        return bool(getattr(self, "pred2unit", False))

    @property
    def factor(self) -> float:
        """Weight of the whole loss."""
        return float(getattr(self, "weight", 1.0))

    def modality_factor(self, modality: str) -> float:
        """Weight of one modality."""
        return 1.0

    def set_value(
        self, pred: jax.Array, target: jax.Array, valid: jax.Array, modality: str | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Mean loss of each set and how much it counts.

        Args:
          pred: float [..., L, D].
          target: float [..., L, D] (int [..., L] for class numbers); no gradient flows into it.
          valid: bool [..., L].
          modality: name, where the loss treats modalities differently.

        Returns:
          (value float32 [...], count float32 [...]): finite everywhere; a set that doesn't take
          part has count 0.
        """
        raise TypeError(f"{type(self).__name__} has no value per set of tokens")

    def group_values(self, rows: Sequence[Rows], num_segments: int) -> list[jax.Array]:
        """Batch scopes: per Rows the mean [R] over its tokens, compared with the whole group."""
        raise TypeError(f"{type(self).__name__} does not compare tokens of whole groups")

    def __call__(
        self,
        preds: Mapping[str, jax.Array],
        targets: Mapping[str, jax.Array],
        masks: Mapping[str, jax.Array],
        groups: Groups | None = None,
    ) -> jax.Array:
        """The loss on unpacked tokens, one value per group.

        Args:
          preds: per modality float [B, N, D].
          targets: the same shapes (for class numbers int [B, N] or [B, N, 1]).
          masks: per modality int [B, N]; tokens with mask 2 take part.
          groups: of the samples; None: all in one, without holes.

        Returns:
          float32 [groups]; 0 with zero gradient where nothing takes part.
        """
        groups = Groups.given(groups, len(next(iter(preds.values()))))
        return rows_value(self, _dense_rows(self, preds, targets, masks, groups), groups.count)


def _dense_rows(
    loss: TokenLoss,
    preds: Mapping[str, jax.Array],
    targets: Mapping[str, jax.Array],
    masks: Mapping[str, jax.Array],
    groups: Groups,
) -> dict[str, list[Rows]]:
    """Rows of unpacked tokens: one per sample, by modality or ('') over all modalities."""
    names = [m for m in modalities.in_sample_order(preds) if m in targets]
    if not names:
        raise ValueError("predictions and targets have no modality in common")
    by_name = {}
    for m in names:
        target = targets[m]
        if jnp.issubdtype(target.dtype, jnp.integer):
            target = target.reshape(preds[m].shape[:2])
        by_name[m] = Rows(preds[m], target, masks[m] == DECODE, groups.segment, groups.weight)
    if loss.scope not in ("sample", "batch"):
        return {m: [rows] for m, rows in by_name.items()}
    joined = [
        jnp.concatenate([getattr(by_name[m], field) for m in names], axis=1)
        for field in ("pred", "target", "valid")
    ]
    return {"": [Rows(joined[0], joined[1], joined[2], groups.segment, groups.weight)]}


def _clean(rows: Rows) -> Rows:
    """Float32 rows whose padding (and holes) can't spread anything, NaN included."""
    valid = rows.valid & (rows.weight > 0)[:, None]
    pred = jnp.where(valid[..., None], rows.pred.astype(jnp.float32), 0.0)
    target = rows.target
    if not jnp.issubdtype(target.dtype, jnp.integer):
        target = jnp.where(valid[..., None], target.astype(jnp.float32), 0.0)
    return Rows(pred, lax.stop_gradient(target), valid, rows.segment, rows.weight)


def _standardise(rows: Sequence[Rows], num_segments: int) -> list[Rows]:
    """Predictions to zero mean and unit spread per feature over each group's decoded tokens.

    (x - mean) / (std + 1e-4) with the unbiased std, as `pred2unit` asks for.
    """
    counts = [
        segment_sum(r.valid.sum(1).astype(jnp.float32), r.segment, num_segments) for r in rows
    ]
    count = jnp.asarray(sum(counts))[:, None]
    total = sum(segment_sum(r.pred.sum(1), r.segment, num_segments) for r in rows)
    mean = safe_divide(jnp.asarray(total), count)
    centred = [jnp.where(r.valid[..., None], r.pred - mean[r.segment][:, None], 0.0) for r in rows]
    square = sum(
        segment_sum((c * c).sum(1), r.segment, num_segments)
        for c, r in zip(centred, rows, strict=True)
    )
    variance = square / jnp.maximum(count - 1.0, 1.0)
    positive = variance > 0
    std = jnp.where(positive, jnp.sqrt(jnp.where(positive, variance, 1.0)), 0.0)
    scale = 1.0 / (std + 1e-4)
    return [
        r._replace(pred=c * scale[r.segment][:, None]) for c, r in zip(centred, rows, strict=True)
    ]


def rows_value(
    loss: TokenLoss,
    rows: Mapping[str, Sequence[Rows]],
    num_segments: int,
    group_samples: jax.Array | None = None,
) -> jax.Array:
    """The loss per group from rows.

    Args:
      loss: the loss; its `scope` says what a row is.
      rows: per modality (or under '' where rows span modalities) one or several `Rows`.
      num_segments: number of groups G.
      group_samples: float [G], samples per group without holes. Only batch scopes use it, to
        count samples without decoded tokens; None: the number of rows of weight 1.

    Returns:
      float32 [G]; 0 with zero gradient where nothing takes part.
    """
    total = jnp.zeros(num_segments, jnp.float32)
    all_sums = [jnp.zeros(num_segments, jnp.float32)] * 2
    for name in modalities.in_sample_order(rows) or tuple(rows):
        if not rows[name]:
            continue
        cleaned = [_clean(r) for r in rows[name]]
        if loss.needs_unit_predictions:
            cleaned = _standardise(cleaned, num_segments)
        sums = _sums(loss, name, cleaned, num_segments, group_samples)
        if loss.scope == "token":
            all_sums = [a + b for a, b in zip(all_sums, sums, strict=True)]
        else:
            total = total + loss.modality_factor(name) * safe_divide(*sums)
    if loss.scope == "token":
        total = safe_divide(*all_sums)
    return loss.factor * total


def _sums(
    loss: TokenLoss,
    name: str,
    rows: Sequence[Rows],
    num_segments: int,
    group_samples: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Numerator and denominator [G] of one modality's mean."""
    if loss.scope in ("modality_batch", "batch"):
        values = loss.group_values(rows, num_segments)
        pairs = [(v, jnp.ones_like(v)) for v in values]
    else:
        pairs = [loss.set_value(r.pred, r.target, r.valid, name or None) for r in rows]
    top = bottom = jnp.zeros(num_segments, jnp.float32)
    for (value, count), r in zip(pairs, rows, strict=True):
        count = count * r.weight
        top = top + segment_sum(value * count, r.segment, num_segments)
        bottom = bottom + segment_sum(count, r.segment, num_segments)
    if loss.scope in ("modality_batch", "batch") and group_samples is not None:
        bottom = group_samples
    return top, bottom
