"""Terms of the objective on the pooler's location grids: maps drawn from them, and the student.

Each gives a value per group, as the losses of `olmoearth_jax.losses.supervision` and
`olmoearth_jax.losses.distillation` do on grids of one shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from olmoearth_jax.losses.distillation import COSINE_EPS, GRAM_EPS, Distillation
from olmoearth_jax.losses.rows import normalise, products, safe_divide, segment_sum
from olmoearth_jax.losses.supervision import (
    Supervision,
    bilinear_matrix,
    map_loss,
    pixel_sums,
)
from olmoearth_jax.mesh import BATCH_AXES
from olmoearth_jax.modalities import MISSING
from olmoearth_jax.stream.locations import Cells, Located, cells_of, map_room
from olmoearth_jax.stream.row_maps import RowMaps
from olmoearth_jax.stream.rows import permute, take_rows
from olmoearth_jax.supervision_maps import MapTask

CHUNK = 1024
"""Locations whose maps are drawn at a time: a head gives each several thousand values."""

Terms = tuple[jax.Array, dict[str, jax.Array]]
"""(value [groups], metrics [groups] by name)."""


def supervision_terms(
    loss: Supervision, head: Any, maps: RowMaps, located: Located, targets: tuple
) -> Terms:
    """The weighted losses of the maps.

    Args:
      loss: the maps and their losses.
      head: the model's `SupervisionHead`.
      maps: of the batch.
      located: the grids.
      targets: from `locations.fill_maps`, [D, loc, room * room * bands].
    """
    cells, groups = cells_of(maps), maps.spec.groups
    total, metrics = jnp.zeros(groups, jnp.float32), {}
    for task, target in zip(loss.tasks, targets, strict=True):
        one = head.heads[task.name]
        turns = _turns(maps, task.name, head.unfold)
        draw = _Draw(task, one.kernel[...], one.bias[...], turns, groups)
        sums = _in_chunks(draw, located.tokens, target, cells)
        value = map_loss(task, sums)
        metrics[f"supervision/{task.name}"] = value
        if "unknown" in sums:
            seen = sums["count"] + sums["unknown"] * float(task.ignore_unknown)
            metrics[f"supervision/{task.name}_off_table"] = safe_divide(sums["unknown"], seen)
        total = total + task.weight * value
    return total, metrics


def _turns(maps: RowMaps, name: str, unfold: int) -> np.ndarray:
    """float32 [largest size + 1, room, unfold]: for each size of a location, the resize of one
    axis from what the head gives a cell to the cell's pixels, zero beyond them."""
    largest, room = maps.spec.max_patch_size, map_room(maps.spec, name)
    out = np.zeros((largest + 1, room, unfold), np.float32)
    for size in range(1, largest + 1):
        side = size * room // largest
        out[size, :side] = bilinear_matrix(unfold, side)
    return out


class _Draw:
    """Draws one map of some locations and sums its errors up per group."""

    def __init__(
        self, task: MapTask, kernel: jax.Array, bias: jax.Array, turns: np.ndarray, groups: int
    ):
        self.task, self.turns, self.groups = task, turns, groups
        self.kernel, self.bias = kernel.astype(jnp.float32), bias.astype(jnp.float32)

    def __call__(self, kernel, bias, tokens, target, size, group) -> dict[str, jax.Array]:
        """Sums [groups, ...] from tokens [D, n, width], target [D, n, pixels] and [D, n] each."""
        high = jax.lax.Precision.HIGHEST
        turn = jnp.take(jnp.asarray(self.turns), size, axis=0)
        room, unfold = turn.shape[-2:]
        y = jnp.matmul(tokens.astype(jnp.float32), kernel, precision=high) + bias
        y = y.reshape(*y.shape[:2], -1, unfold, unfold)
        y = jnp.einsum("dncrs,dnar->dncas", y, turn, precision=high)
        y = jnp.einsum("dncas,dnbs->dnabc", y, turn, precision=high)
        pixels = target.reshape(-1, room, room, target.shape[-1] // room**2)
        sums = pixel_sums(self.task, y.reshape(-1, *y.shape[2:]), pixels)
        own = group.reshape(-1)
        return {k: segment_sum(v, own, self.groups) for k, v in sums.items()}


def _in_chunks(draw: _Draw, tokens, target, cells: Cells) -> dict[str, jax.Array]:
    """The sums of all locations; what is drawn is drawn again in the backward pass, not kept."""
    given = [(tokens, 0.0), (target, MISSING), (cells.size, 0), (cells.group, 0)]
    devices, count = tokens.shape[:2]
    one = jax.checkpoint(draw.__call__)
    if count <= CHUNK:
        return one(draw.kernel, draw.bias, *(x for x, _ in given))
    parts = -(-count // CHUNK)
    size = -(-count // parts)
    cut = []
    for x, fill in given:
        pad = [(0, 0), (0, parts * size - count)] + [(0, 0)] * (x.ndim - 2)
        x = jnp.pad(x, pad, constant_values=fill)
        cut.append(x.reshape(devices, parts, size, *x.shape[2:]).swapaxes(0, 1))
    found = jax.lax.map(lambda xs: one(draw.kernel, draw.bias, *xs), tuple(cut))
    return jax.tree.map(lambda x: x.sum(0), found)


def distillation_terms(
    loss: Distillation,
    back: Mapping[int, Callable[[jax.Array], jax.Array]],
    maps: RowMaps,
    located: Located,
    key: jax.Array,
    mesh: Mesh | None = None,
) -> Terms:
    """The loss of the student.

    Args:
      loss: the loss.
      back: its back-projections by width.
      maps: of the batch.
      located: the grids; they get no gradient.
      key: decides which cells are compared where a group has too many.
      mesh: devices.
    """
    cells, groups = cells_of(maps), maps.spec.groups
    assert located.student is not None
    real = cells.first
    g, z = (
        jnp.where(real[..., None], x.astype(jnp.float32), 0.0)
        for x in (jax.lax.stop_gradient(located.tokens), located.student)
    )
    own, flat = cells.group.reshape(-1), real.reshape(-1)
    count = segment_sum(flat.astype(jnp.float32), own, groups)
    compared = _Compared(loss, maps, cells, key, mesh)
    teacher = compared.cosines(g)
    metrics: dict[str, jax.Array] = {}
    for width in loss.widths:
        prefix = z[..., :width]
        cosine = normalise(back[width](prefix), COSINE_EPS) * normalise(g, COSINE_EPS)
        part = jnp.where(real, 1.0 - jnp.sum(cosine, -1), 0.0).reshape(-1)
        name = "projection/distill_{}_d" + str(width)
        metrics[name.format("cosine")] = safe_divide(segment_sum(part, own, groups), count)
        metrics[name.format("gram")] = compared.difference(prefix, teacher)
    return jnp.stack(list(metrics.values())).sum(0), metrics


class _Compared:
    """Which cells of each group are compared with one another, and how they are fetched.

    All real cells of a group, or those with the lowest scores where it has too many. As in
    `losses.distillation`, a score depends on the sample's place in the step and on the cell only.
    """

    def __init__(
        self, loss: Distillation, maps: RowMaps, cells: Cells, key: jax.Array, mesh: Mesh | None
    ):
        spec = maps.spec
        groups, size = spec.groups, cells.first.size
        most = min(loss.gram_max_tokens, size, spec.group_size * spec.loc_bound)
        self.mesh = mesh if mesh is not None and groups % mesh.size == 0 else None
        group = jnp.where(cells.first, cells.group, groups).reshape(-1)
        scores = jnp.zeros(size, jnp.uint32)
        if most < min(size, spec.group_size * spec.loc_bound):
            place = take_rows(maps.batch.position[..., None], cells.sample)[..., 0]
            scores = _scores(key, place.reshape(-1), cells.number.reshape(-1))
        order = jnp.lexsort((scores, group)).astype(jnp.int32)
        counts = jnp.sum(group[:, None] == jnp.arange(groups + 1), axis=0)
        starts = jnp.cumsum(counts) - counts
        rank = jnp.argsort(order).astype(jnp.int32) - jnp.take(starts, group)
        steps = jnp.arange(most)
        self.valid = steps < counts[:groups, None]
        at = jnp.minimum(starts[:groups, None] + steps, size - 1)
        self.index: jax.Array = jnp.where(self.valid, jnp.take(order, at), size)
        taken = (group < groups) & (rank < most)
        self.inverse = jnp.where(taken, group * most + rank, groups * most)

    def cosines(self, x: jax.Array) -> jax.Array:
        """float32 [groups, most, most]: of all pairs of compared cells of x [D, loc, width]."""
        flat = x.reshape(1, -1, x.shape[-1])
        found: Any = permute(flat, self.index[None], self.inverse[None, None])
        rows = found[0]
        if self.mesh is not None:
            rows = jax.lax.with_sharding_constraint(
                rows, NamedSharding(self.mesh, PartitionSpec(BATCH_AXES))
            )
        rows = normalise(rows, GRAM_EPS)
        return products(rows, rows)

    def difference(self, x: jax.Array, others: jax.Array) -> jax.Array:
        """[groups]: mean squared difference of the cosines of x from `others`."""
        pairs = (self.valid[:, :, None] & self.valid[:, None, :]).astype(jnp.float32)

        @jax.checkpoint
        def value(x: jax.Array, others: jax.Array) -> jax.Array:
            error = jnp.square(self.cosines(x) - others)
            return jnp.sum(error * pairs, (1, 2))

        return safe_divide(value(x, others), jnp.sum(pairs, (1, 2)))


def _scores(key: jax.Array, position: jax.Array, cell: jax.Array) -> jax.Array:
    """uint32 [n], as `losses.distillation.cell_scores` gives a sample's cells."""

    def one(place: jax.Array, number: jax.Array) -> jax.Array:
        own = jax.random.fold_in(jax.random.fold_in(key, place), number)
        return jax.random.bits(own, (), jnp.uint32)

    return jax.vmap(one)(position, cell)
