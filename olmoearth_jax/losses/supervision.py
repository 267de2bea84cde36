"""Maps drawn from the location grid, and how far they are off (spec/train_v1_3.md section 3).

Each map has one linear head. It gives every cell of the grid a block of pixels, which is brought
to the target's resolution. A loss is the mean over the valid pixels of a group; a map without any
has loss and gradient 0. All in float32.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from olmoearth_jax.losses.rows import Groups, safe_divide
from olmoearth_jax.modalities import MISSING
from olmoearth_jax.supervision_maps import MapTask, spacing

_RATE_LIMIT = 1e-3
"""Share of a channel's rarer answer that is assumed at least."""

_HIGHEST = lax.Precision.HIGHEST
Sums = dict[str, jax.Array]


@functools.lru_cache(maxsize=256)
def bilinear_matrix(in_size: int, out_size: int) -> np.ndarray:
    """One axis of a bilinear resize without antialiasing, float32 [out_size, in_size].

    Half-pixel centres; beyond the outer ones the outermost pixel counts alone.
    """
    matrix = np.zeros((out_size, in_size))
    for o in range(out_size):
        x = max((o + 0.5) * in_size / out_size - 0.5, 0.0)
        i = min(int(x), in_size - 1)
        matrix[o, i] += 1.0 - (x - i)
        matrix[o, min(i + 1, in_size - 1)] += x - i
    out = matrix.astype(np.float32)
    out.setflags(write=False)
    return out


def draw_map(
    grid: jax.Array, kernel: jax.Array, bias: jax.Array, unfold: int, size: tuple[int, int]
) -> jax.Array:
    """The map that a head draws.

    Args:
      grid: float [B, h, w, D], the location tokens.
      kernel: [D, C * unfold * unfold]; channel slowest, then row and column within the cell.
      bias: [C * unfold * unfold].
      unfold: pixels per side that a cell gets before the resize.
      size: (H, W), rows and columns of the target.

    Returns:
      float32 [B, H, W, 1, C].

    Where a cell covers a whole number of at most `unfold` target pixels, no pixel depends on a
    second cell. Then the resize is applied to the head instead of to the map, which gives the
    same at a fraction of the size.
    """
    rows, cols = grid.shape[1:3]
    grid = grid.astype(jnp.float32)
    blocks = kernel.astype(jnp.float32).reshape(len(kernel), -1, unfold, unfold)
    offsets = bias.astype(jnp.float32).reshape(-1, unfold, unfold)
    per_cell = size[0] // rows, size[1] // cols
    exact = per_cell[0] * rows == size[0] and per_cell[1] * cols == size[1]
    folded = exact and max(per_cell) <= unfold
    if folded:
        down = [jnp.asarray(bilinear_matrix(unfold, n)) for n in per_cell]
        if per_cell != (unfold, unfold):
            blocks = jnp.einsum("dcrs,ar,bs->dcab", blocks, *down, precision=_HIGHEST)
            offsets = jnp.einsum("crs,ar,bs->cab", offsets, *down, precision=_HIGHEST)
    y = jnp.einsum("bhwd,dcrs->bhrwsc", grid, blocks, precision=_HIGHEST)
    y = y + offsets.transpose(1, 2, 0)[:, None]
    batch, h, r, w, s, channels = y.shape
    y = y.reshape(batch, h * r, w * s, channels)
    if not folded:
        across = [
            jnp.asarray(bilinear_matrix(n, to)) for n, to in zip(y.shape[1:3], size, strict=True)
        ]
        y = jnp.einsum("byxc,ay,dx->badc", y, *across, precision=_HIGHEST)
    return y[:, :, :, None]


def draw_vector(grid: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """Values [B, C] of a modality without pixels: the head on the mean of the grid."""
    mean = grid.astype(jnp.float32).mean(axis=(1, 2))
    return jnp.matmul(mean, kernel.astype(jnp.float32), precision=_HIGHEST) + bias


def class_index(values: jax.Array, class_values: tuple[float, ...]) -> jax.Array:
    """int32 [...]: number of the nearest class value, the first of equally near ones."""
    table = jnp.asarray(np.asarray(class_values, np.float32))
    return jnp.argmin(jnp.abs(values[..., None] - table), axis=-1).astype(jnp.int32)


def _unknown_codes(values: jax.Array, task: MapTask) -> jax.Array:
    """bool [...]: values that stand for no class of the table, in the units of the data set."""
    table = jnp.asarray(np.asarray(task.known_values, np.float32))
    distance = jnp.min(jnp.abs(values[..., None] - table), axis=-1)
    return distance > np.float32(min(spacing(task.known_values) / 4, 1e6))


def pixel_sums(task: MapTask, prediction: jax.Array, target: jax.Array) -> Sums:
    """What a loss needs of each sample, to be added up over the samples of a group.

    Args:
      prediction: float32 [B, ..., C], see `draw_map`.
      target: float [B, ..., bands], normalised, MISSING where there is nothing.

    Returns:
      float32 [B] or [B, C] by name: 'count', the valid pixels; 'unknown', those of them that are
      of no class; and the sums of the loss's parts.
    """
    target = target.astype(jnp.float32)
    valid = jnp.all(target != MISSING, axis=-1)
    target = jnp.where(valid[..., None], target, 0.0)
    over = tuple(range(1, valid.ndim))
    sums: Sums = {}
    if task.task_type == "classification":
        value = target[..., 0]
        if task.known_values:
            unknown = valid & _unknown_codes(value, task)
            sums["unknown"] = jnp.sum(unknown.astype(jnp.float32), over)
            valid = valid & ~unknown if task.ignore_unknown else valid
        chosen = class_index(value, task.class_values)
        log_p = jax.nn.log_softmax(prediction, axis=-1)
        # A product with one-hot rows, not a gather, so that the gradient is no scatter.
        hit = chosen[..., None] == jnp.arange(task.channels)
        loss = -jnp.sum(jnp.where(hit, log_p, 0.0), axis=-1)
        sums["loss"] = jnp.sum(jnp.where(valid, loss, 0.0), over)
    elif task.task_type == "binary_classification":
        keep = valid[..., None].astype(jnp.float32)
        sums["positive"] = jnp.sum(keep * target, over)
        sums["yes"] = jnp.sum(keep * target * jax.nn.softplus(-prediction), over)
        sums["no"] = jnp.sum(keep * (1.0 - target) * jax.nn.softplus(prediction), over)
    else:
        error = prediction - target
        loss = jnp.abs(error) if task.regression_loss_type == "l1" else jnp.square(error)
        sums["loss"] = jnp.sum(jnp.where(valid[..., None], loss, 0.0), (*over, -1))
    return sums | {"count": jnp.sum(valid.astype(jnp.float32), over)}


def map_loss(task: MapTask, sums: Sums) -> jax.Array:
    """float32 [groups]: the unweighted loss, from `pixel_sums` added up per group."""
    count = sums["count"]
    if task.task_type == "binary_classification":
        balance = jnp.ones_like(sums["positive"])
        if task.pos_weight:
            share = safe_divide(sums["positive"], count[:, None])
            share = lax.stop_gradient(jnp.clip(share, _RATE_LIMIT, 1.0 - _RATE_LIMIT))
            balance = (1.0 - share) / share
        return safe_divide(jnp.sum(balance * sums["yes"] + sums["no"], -1), count * task.channels)
    values = task.channels if task.task_type == "regression" else 1
    return safe_divide(sums["loss"], count * values)


@dataclasses.dataclass(frozen=True)
class Supervision:
    """The weighted sum of the losses of several maps.

    Attributes:
      tasks: the maps.
    """

    tasks: tuple[MapTask, ...]

    def __call__(
        self,
        predictions: Mapping[str, jax.Array],
        targets: Mapping[str, jax.Array],
        groups: Groups | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """(weighted sum [groups], metrics).

        Args:
          predictions: per map float32 [B, H, W, 1, C] (`draw_map`).
          targets: per map float [B, H, W, 1, bands], as the data set delivers them; a map may be
            absent.
          groups: the samples' groups; None: one without holes.

        Returns:
          Metrics by name, [groups] each: 'supervision/<map>', its unweighted loss, and
          'supervision/<map>_off_table', the share of valid pixels of no class.
        """
        if groups is None:
            groups = Groups.given(None, len(next(iter(predictions.values()))))
        total, metrics = jnp.zeros(groups.count, jnp.float32), {}
        for task in self.tasks:
            if task.name not in targets or task.name not in predictions:
                metrics[f"supervision/{task.name}"] = jnp.zeros(groups.count, jnp.float32)
                continue
            sums = pixel_sums(task, predictions[task.name], targets[task.name])
            sums = {k: _by_group(v, groups) for k, v in sums.items()}
            loss = map_loss(task, sums)
            metrics[f"supervision/{task.name}"] = loss
            if "unknown" in sums:
                seen = sums["count"] + sums["unknown"] * float(task.ignore_unknown)
                metrics[f"supervision/{task.name}_off_table"] = safe_divide(sums["unknown"], seen)
            total = total + task.weight * loss
        return total, metrics


def _by_group(x: jax.Array, groups: Groups) -> jax.Array:
    """Sums [groups, ...] of x [B, ...] over the samples that count."""
    real = (groups.weight > 0).reshape(-1, *(1,) * (x.ndim - 1))
    return groups.sum(jnp.where(real, x, 0.0))
