"""Discrimination among all decoded tokens of a group (spec/train.md section 3)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp

from olmoearth_jax.losses.numerics import check_tau, normalise, products
from olmoearth_jax.losses.patch_discrimination import set_mean, token_losses
from olmoearth_jax.losses.rows import Rows, Scope, TokenLoss


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
        losses = token_losses(scores, keep, self.tau)
        values, start = [], 0
        for r in rows:
            part = losses[start : start + r.valid.size].reshape(r.valid.shape)
            values.append(set_mean(part, r.valid)[0])
            start += r.valid.size
        return values


@dataclasses.dataclass(frozen=True)
class ModalityAllDiscrimination(AllDiscrimination):
    """The same for each modality by itself, summed over modalities."""

    name: ClassVar[str] = "ModalityAllDisc"
    scope: ClassVar[Scope] = "modality_batch"
