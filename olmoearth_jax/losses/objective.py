"""What a step minimises: the terms of a training module and how they add up (spec/train.md 4)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp

from olmoearth_jax.losses.distillation import Distillation
from olmoearth_jax.losses.mae import MAE
from olmoearth_jax.losses.pooled import InfoNCE, KoLeo
from olmoearth_jax.losses.rows import TokenLoss
from olmoearth_jax.losses.supervision import Supervision

_Exits = tuple[tuple[str, int], ...]
"""(modality, depth) pairs; a modality that is not listed has depth 0."""


@dataclasses.dataclass(frozen=True)
class NoTokenLoss(TokenLoss):
    """Stands for the token loss of a run that predicts pixels only."""

    name: ClassVar[str] = ""


@dataclasses.dataclass(frozen=True)
class Objective:
    """The terms of a training module."""

    token_loss: TokenLoss
    """Between decoded tokens and targets (of view A, if B has its own)."""
    contrastive: InfoNCE | None = None
    """Between the views' pooled vectors."""
    kind: str = "contrastive_latent_mim"
    """'contrastive_latent_mim', 'latent_mim', 'mae' or 'galileo'."""
    token_loss_b: TokenLoss | None = None
    """The loss of view B (galileo); None: the same."""
    regularizer: KoLeo | None = None
    """On pooled vectors where there are two views, else on encoder tokens."""
    mae: MAE | None = None
    """On reconstructed pixels."""
    exits: _Exits = ()
    """Depth at which each modality's target leaves the target encoder."""
    exits_b: _Exits | None = None
    """Those of view B (galileo); None: the same."""
    moving: bool = False
    """The target follows the online encoder, so all of its parameters are kept."""
    view_metrics: tuple[str, ...] = ()
    """A name per view under which its token loss is reported too."""
    supervision: Supervision | None = None
    """On maps drawn from the location grid."""
    distillation: Distillation | None = None
    """On the student beside the location grid."""

    @property
    def compares_tokens(self) -> bool:
        return not isinstance(self.token_loss, NoTokenLoss)

    @property
    def views(self) -> int:
        """Masked views of a sample."""
        return 1 if self.kind in ("latent_mim", "mae") else 2

    @property
    def pools(self) -> bool:
        """Whether a term reads the encoder's pooled projection."""
        on_pooled = self.regularizer is not None and self.views == 2
        return self.contrastive is not None or on_pooled

    @property
    def deep(self) -> bool:
        """Whether some target comes out of the target encoder's blocks."""
        pairs = (*self.exits, *(self.exits_b or ()))
        return self.compares_tokens and any(depth > 0 for _, depth in pairs)

    @property
    def keeps_target(self) -> bool:
        """Whether the state holds a target; MAE training takes the online encoder instead."""
        return self.kind != "mae"

    @property
    def full_target(self) -> bool:
        """Whether the target is a whole encoder rather than its patch projection."""
        return self.deep or self.moving or (self.kind == "mae" and self.compares_tokens)

    @property
    def scopes(self) -> tuple[str, ...]:
        """What rows the token losses compare, see `losses.TokenLoss`."""
        if not self.compares_tokens:
            return ()
        return tuple(dict.fromkeys(self.loss_of(v).scope for v in range(2)))

    def loss_of(self, view: int) -> TokenLoss:
        """The token loss of view 0 or 1."""
        return self.token_loss_b if view and self.token_loss_b is not None else self.token_loss

    def exits_of(self, view: int, names: Sequence[str]) -> dict[str, int]:
        """Exit depth of every modality in `names` for view 0 or 1."""
        chosen = self.exits_b if view and self.exits_b is not None else self.exits
        return dict.fromkeys(names, 0) | {n: d for n, d in chosen if n in names}

    @property
    def metric_name(self) -> str:
        """Name of the total among the metrics, without 'train/'."""
        latent = [self.token_loss.name] if self.compares_tokens else []
        if self.kind == "galileo":
            latent.append(self.loss_of(1).name)
        pixels = [] if self.mae is None else [self.mae.name]
        extra = [] if self.regularizer is None else [self.regularizer.name]
        parts = [*pixels, *latent, *extra] if self.kind == "mae" else [*latent, *extra, *pixels]
        parts += [] if self.supervision is None else ["supervision"]
        parts += [] if self.distillation is None else ["projection"]
        return "+".join(parts)

    def total(self, terms: Mapping[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
        """(loss, metrics) from the terms that are there.

        Args:
          terms: 'base' and 'mae' [views, groups]; 'regularizer', 'contrastive', 'supervision' and
            'projection' [groups].

        Returns:
          The mean over groups (float32 scalar), and the terms under their metric names.
        """
        per_group = jnp.zeros((), jnp.float32)
        for name, value in terms.items():
            per_group = per_group + (value.mean(0) if name in ("base", "mae") else value)
        aux = {k: v for k, v in terms.items() if k in ("base", "contrastive")}
        if self.regularizer is not None:
            aux[self.regularizer.name] = terms["regularizer"]
        if self.mae is not None and self.metric_name != self.mae.name:
            aux[self.mae.name] = terms["mae"]
        for view, name in enumerate(dict.fromkeys(self.view_metrics)):
            aux[name] = terms["base"][view]
        return per_group.mean(), aux


def spread_of(x: jax.Array, valid: jax.Array, segment: jax.Array, groups: int) -> jax.Array:
    """How evenly vectors of a group point in all directions: 1 for a sphere, 0 when all are one.

    The root mean square distance of the unit vectors from their mean. A falling value of targets
    or predictions shows collapse.

    Args:
      x: [..., width].
      valid: bool [...], the vectors that count.
      segment: int [...], group of each vector.
      groups: number of groups.

    Returns:
      float32 [groups]; 0 for a group without vectors.
    """
    x = jax.lax.stop_gradient(x).astype(jnp.float32)
    unit = x / jnp.sqrt(jnp.sum(jnp.square(x), -1, keepdims=True) + 1e-12)
    keep = (valid[..., None] & (segment[..., None] == jnp.arange(groups))).astype(jnp.float32)
    count = jnp.maximum(keep.reshape(-1, groups).sum(0), 1.0)
    total = jnp.einsum("...g,...w->gw", keep, unit, precision=jax.lax.Precision.HIGHEST)
    square = jnp.einsum("...g,...->g", keep, jnp.square(unit).sum(-1)) / count
    return jnp.sqrt(jnp.maximum(square - jnp.square(total / count[:, None]).sum(-1), 0.0))


def exit_pairs(depths: Mapping[str, int] | None) -> _Exits | None:
    """A mapping as hashable pairs; None stays None."""
    return None if depths is None else tuple(depths.items())
