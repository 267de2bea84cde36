"""Device mesh, and shardings of parameters by (regex, spec) rules on their paths."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

BATCH_AXES = ("data", "fsdp")
"""Mesh axes over which samples are split."""

_Rules = Sequence[tuple[str, Sequence[Any]]]
"""(regular expression searched in 'encoder/blocks/0/mlp/fc1/kernel', mesh axis per dimension)."""

_DEFAULT_RULES: _Rules = (
    (r"(query|key|value|fc1)/kernel$", (None, "fsdp")),
    (r"(out|fc2)/kernel$", ("fsdp", None)),
)
"""What `mesh.fsdp` splits where a config gives no rules: the products of every block."""


def rules_of(given: Sequence[Sequence[Any]], fsdp: int) -> _Rules:
    """The rules of a config as `shardings` takes them, the default ones if it has none."""
    if not given and fsdp > 1:
        return _DEFAULT_RULES
    return [(pattern, tuple(axes)) for pattern, axes in given]


def mesh_sizes(data: int, fsdp: int, count: int) -> tuple[int, int]:
    """Sizes of the axes (data, fsdp) on `count` devices; -1 takes what the other axis leaves.

    Raises:
      ValueError: the sizes don't multiply to the number of devices.
    """
    sizes = [data, fsdp]
    if sizes.count(-1) > 1:
        raise ValueError("only one of mesh.data and mesh.fsdp can be -1")
    if -1 in sizes:
        other = sizes[1 - sizes.index(-1)]
        if other < 1 or count % other:
            raise ValueError(f"mesh axis of size {other} does not divide {count} devices")
        sizes[sizes.index(-1)] = count // other
    if sizes[0] * sizes[1] != count:
        raise ValueError(
            f"mesh.data={sizes[0]} x mesh.fsdp={sizes[1]} needs {sizes[0] * sizes[1]} devices, "
            f"but there are {count}"
        )
    return sizes[0], sizes[1]


def make_mesh(data: int = -1, fsdp: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """Mesh of axes (data, fsdp) over all devices; sizes as for `mesh_sizes`."""
    devices = list(jax.devices() if devices is None else devices)
    return Mesh(np.array(devices).reshape(mesh_sizes(data, fsdp, len(devices))), BATCH_AXES)


def path_text(path: tuple) -> str:
    """'a/b/0/c' of a key path of `jax.tree_util`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def shardings(tree: Any, mesh: Mesh, rules: _Rules = ()) -> Any:
    """NamedSharding of every leaf: the first rule that matches its path, else replicated.

    Moments of the optimiser carry their parameter's path, so one rule shards all three. A rule
    whose spec has more dimensions than a leaf, or does not divide it, leaves it replicated.

    Raises:
      ValueError: a rule names an axis the mesh doesn't have, or matches nothing.
    """
    used = [False] * len(rules)
    for pattern, spec in rules:
        for axis in spec:
            if axis is not None and axis not in mesh.axis_names:
                raise ValueError(
                    f"fsdp rule {pattern!r} names mesh axis {axis!r}; known: {mesh.axis_names}"
                )

    def of(path: tuple, leaf: Any) -> NamedSharding:
        text = path_text(path)
        for i, (pattern, spec) in enumerate(rules):
            if not re.search(pattern, text):
                continue
            used[i] = True
            fits = len(spec) <= len(leaf.shape) and all(
                axis is None or size % mesh.shape[axis] == 0
                for size, axis in zip(leaf.shape, spec, strict=False)
            )
            return NamedSharding(mesh, PartitionSpec(*spec) if fits else PartitionSpec())
        return NamedSharding(mesh, PartitionSpec())

    out = jax.tree_util.tree_map_with_path(of, tree)
    for hit, (pattern, _) in zip(used, rules, strict=True):
        if not hit:
            raise ValueError(f"fsdp rule {pattern!r} matches no parameter")
    return out


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of arrays whose leading axis is the devices."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def local_devices(mesh: Mesh) -> list[Any]:
    """This process's devices, in the order of the leading axis."""
    mine = jax.process_index()
    return [d for d in mesh.devices.flat if d.process_index == mine]


def global_arrays(mesh: Mesh, local: Any) -> Any:
    """Arrays split over all devices, as a tree, from this process's rows [local devices, ...]."""
    sharding = batch_sharding(mesh)
    if jax.process_count() == 1:
        return jax.device_put(local, sharding)  # all in one call, which is a third cheaper

    def spread(x: np.ndarray) -> jax.Array:
        return jax.make_array_from_process_local_data(sharding, x, (mesh.size, *x.shape[1:]))

    return jax.tree.map(spread, local)


def join_devices(mesh: Mesh, shards: Sequence[jax.Array]) -> jax.Array:
    """One array from one [1, ...] shard per local device."""
    shape = (mesh.size, *shards[0].shape[1:])
    return jax.make_array_from_single_device_arrays(shape, batch_sharding(mesh), list(shards))


def gathered(x: Any) -> np.ndarray:
    """A copy on the host, gathered from other processes where an array is spread over them."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable and not x.is_fully_replicated:
        x = multihost_utils.process_allgather(x, tiled=True)
    return np.array(x)
