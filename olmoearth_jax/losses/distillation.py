"""The loss of the small student beside the location grid (spec/train_v1_3.md section 4).

For every prefix of the student's channels: one minus the cosine between each cell of the grid and
what a back-projection makes of the prefix, and the squared difference of the cosines between
cells. The grid is the teacher and gets no gradient. All in float32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax import lax

from olmoearth_jax.losses.rows import normalise, products, safe_divide

COSINE_EPS = 1e-8
GRAM_EPS = 1e-12


def cell_scores(key: jax.Array, position: jax.Array, cells: int) -> jax.Array:
    """Random numbers uint32 [B, cells] that decide which cells are compared with each other.

    Each depends only on the key, the sample's place in the step and the cell's number, never on
    where or with what it is computed.

    Args:
      key: PRNG key of the step.
      position: int32 [B].
      cells: cells per sample.
    """

    def one(place: jax.Array, cell: jax.Array) -> jax.Array:
        own = jax.random.fold_in(jax.random.fold_in(key, place), cell)
        return jax.random.bits(own, (), jnp.uint32)

    return jax.vmap(jax.vmap(one, (None, 0)), (0, None))(position, jnp.arange(cells))


def drawn_cells(scores: jax.Array, real: jax.Array, count: int) -> jax.Array:
    """int32 [count]: places of the real cells with the lowest scores, then of other cells.

    Args:
      scores: uint32 [n].
      real: bool [n].
      count: at most n.
    """
    return jnp.lexsort((scores, ~real))[:count].astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class Distillation:
    """The loss of a student.

    Attributes:
      widths: prefixes of the student's channels.
      gram_max_tokens: most cells of a group that are compared with each other.
    """

    widths: tuple[int, ...]
    gram_max_tokens: int = 2048

    def __post_init__(self) -> None:
        if not self.widths or min(self.widths) < 1:
            raise ValueError(f"student_dims must be positive widths, got {list(self.widths)}")
        if self.gram_max_tokens < 1:
            raise ValueError(f"gram_max_tokens must be positive, got {self.gram_max_tokens}")
        object.__setattr__(self, "widths", tuple(sorted(set(self.widths), reverse=True)))

    def __call__(
        self,
        teacher: jax.Array,
        student: jax.Array,
        back: Mapping[int, Callable[[jax.Array], jax.Array]],
        *,
        scores: jax.Array | None = None,
        sample_weight: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """(loss, metrics) of one group.

        Args:
          teacher: float [B, ..., D], location tokens.
          student: float [B, ..., S].
          back: per width the back-projection [n, width] -> [n, D].
          scores: uint32 [B, ...] from `cell_scores`; needed where there are more cells than
            `gram_max_tokens`.
          sample_weight: float [B], 0 for holes; None: all 1.

        Returns:
          float32 scalars; metrics 'projection/distill_cosine_d<width>' and
          'projection/distill_gram_d<width>'.

        Raises:
          ValueError: a prefix wider than the student, or too many cells without scores.
        """
        if max(self.widths) > student.shape[-1]:
            raise ValueError(
                f"the student has {student.shape[-1]} channels, fewer than the prefix of "
                f"{max(self.widths)}"
            )
        real = jnp.ones(len(teacher), bool) if sample_weight is None else sample_weight > 0
        real = jnp.broadcast_to(real.reshape(-1, *(1,) * (teacher.ndim - 2)), teacher.shape[:-1])
        real = real.reshape(-1)
        g = lax.stop_gradient(_cells(teacher, real))
        z = _cells(student, real)
        chosen = self._chosen(real, scores)
        metrics: dict[str, jax.Array] = {}
        for width in self.widths:
            prefix = z[:, :width]
            cosine = _cosine(back[width](prefix), g)
            part = jnp.where(real, 1.0 - cosine, 0.0)
            metrics[f"projection/distill_cosine_d{width}"] = _mean(part, real)
            metrics[f"projection/distill_gram_d{width}"] = _gram(prefix, g, real, chosen)
        return jnp.sum(jnp.stack(list(metrics.values()))), metrics

    def _chosen(self, real: jax.Array, scores: jax.Array | None) -> jax.Array | None:
        """Places of the cells that are compared, None for all."""
        if len(real) <= self.gram_max_tokens:
            return None
        if scores is None:
            raise ValueError(f"{len(real)} cells, more than {self.gram_max_tokens}: give scores")
        return drawn_cells(scores.reshape(-1), real, self.gram_max_tokens)


def _cells(x: jax.Array, real: jax.Array) -> jax.Array:
    """float32 [n, width]; cells of holes are 0."""
    return jnp.where(real[:, None], x.astype(jnp.float32).reshape(-1, x.shape[-1]), 0.0)


def _mean(values: jax.Array, real: jax.Array) -> jax.Array:
    return safe_divide(jnp.sum(values), jnp.sum(real.astype(jnp.float32)))


def _cosine(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.sum(normalise(a, COSINE_EPS) * normalise(b, COSINE_EPS), axis=-1)


def _gram(z: jax.Array, g: jax.Array, real: jax.Array, chosen: jax.Array | None) -> jax.Array:
    """Mean squared difference of the cosines between all pairs of the chosen real cells."""
    if chosen is not None:
        # All places differ, so the gradient of the gather adds nothing up.
        how = {"unique_indices": True, "mode": "promise_in_bounds"}
        z, g, real = (x.at[chosen].get(**how) for x in (z, g, real))
    z, g = normalise(z, GRAM_EPS), normalise(g, GRAM_EPS)
    error = jnp.square(products(z, z) - products(g, g))
    pairs = (real[:, None] & real[None, :]).astype(jnp.float32)
    return safe_divide(jnp.sum(error * pairs), jnp.sum(pairs))
