"""Heads that only training needs: maps from the location grid, and the student's way back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
from flax import nnx

from olmoearth_jax import modalities
from olmoearth_jax.losses.supervision import draw_map, draw_vector
from olmoearth_jax.model.layers import LayerNorm, Linear
from olmoearth_jax.supervision_maps import MapTask

WIDTH = "width_"
"""Prefix of the names of back-projections: a bare number would be the place in a list."""


class SupervisionHead(nnx.Module):
    """One linear head per map, on every cell of the location grid (spec/train_v1_3.md 3.1)."""

    def __init__(self, tasks: Sequence[MapTask], width: int, unfold: int):
        self.tasks = tuple(tasks)
        self.unfold = unfold
        self.heads = nnx.Dict(
            {t.name: Linear(width, t.channels * self._pixels(t.name)) for t in self.tasks}
        )

    def _pixels(self, name: str) -> int:
        """Values that a cell gives per channel."""
        return self.unfold**2 if modalities.get(name).spatial else 1

    def __call__(
        self, grid: jax.Array, sizes: Mapping[str, tuple[int, int]]
    ) -> dict[str, jax.Array]:
        """The maps, float32 [B, H, W, 1, C] each ([B, C] for a modality without pixels).

        Args:
          grid: float [B, h, w, D].
          sizes: (H, W) of the targets; maps that are not listed are not drawn.
        """
        out = {}
        for task in self.tasks:
            head = self.heads[task.name]
            if not modalities.get(task.name).spatial:
                out[task.name] = draw_vector(grid, head.kernel[...], head.bias[...])
            elif task.name in sizes:
                out[task.name] = draw_map(
                    grid, head.kernel[...], head.bias[...], self.unfold, sizes[task.name]
                )
        return out


class BackProjection(nnx.Module):
    """From a prefix of the student to the width of the grid: one layer, or two with a norm."""

    def __init__(self, width: int, hidden: int | None, out: int):
        self.linear = Linear(width, out) if hidden is None else None
        self.first = None if hidden is None else Linear(width, hidden)
        self.norm = None if hidden is None else LayerNorm(hidden)
        self.last = None if hidden is None else Linear(hidden, out)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[n, width] -> float32 [n, out]."""
        if self.linear is not None:
            return self.linear(x)
        assert self.first is not None and self.norm is not None and self.last is not None
        return self.last(jax.nn.relu(self.norm(self.first(x))))


class DistillationHead(nnx.Module):
    """The back-projections by width (spec/train_v1_3.md 4.3)."""

    def __init__(self, widths: Sequence[int], hidden: int | None, out: int):
        self.back_projections = nnx.Dict(
            {f"{WIDTH}{w}": BackProjection(w, hidden, out) for w in sorted(widths, reverse=True)}
        )

    @property
    def by_width(self) -> dict[int, BackProjection]:
        """The back-projections by the number of channels that they take."""
        return {int(k.removeprefix(WIDTH)): v for k, v in self.back_projections.items()}
