"""The stream engine: groups of a step -> packed micro-steps -> loss."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from olmoearth_jax.losses import Objective
from olmoearth_jax.stream.census import Census, deal, needs, take_census
from olmoearth_jax.stream.forward import StreamForward
from olmoearth_jax.stream.ladder import holding, lowest
from olmoearth_jax.stream.layout import TARGET, is_deep, registers_of, wants_pixels
from olmoearth_jax.stream.pack import pack_device
from olmoearth_jax.stream.patches import fill_buffers
from olmoearth_jax.stream.pixels import fill_pixels
from olmoearth_jax.stream.spec import CROSS, SELF, Rung, StreamSpec
from olmoearth_jax.train.engine import Group, Prepared
from olmoearth_jax.train.sharding import global_array, join_devices, local_devices

_PACKING_THREADS = 8

Agree = Callable[[int], int]
"""Host-side agreement on the bits that small integers share, without a device collective."""


def shared_bits(values: Sequence[int]) -> int:
    """The bits that all values have."""
    return functools.reduce(operator.and_, values)


def alone(value: int) -> int:
    """`Agree` of a single process."""
    return value


class StreamEngine:
    """Packs groups of any shapes into rungs and evaluates the stream loss.

    Args:
      forward: the loss.
      ladder: rungs, cheapest first; the last is the hard bound.
      mesh: devices.
      agree: bits common to all processes: the rungs that hold everybody's share.
    """

    def __init__(
        self, forward: StreamForward, ladder: Sequence[Rung], mesh: Mesh, agree: Agree = alone
    ):
        self.forward, self.ladder, self.mesh, self.agree = forward, tuple(ladder), mesh, agree
        self.rung_counts = np.zeros(len(self.ladder), np.int64)

    @property
    def objective(self) -> Objective:
        return self.forward.objective

    @property
    def spec(self) -> StreamSpec:
        return self.forward.spec

    def prepare(self, groups: Sequence[Group]) -> list[Prepared]:
        """Micro-steps of k whole groups each, which move to the devices when they are due.

        Raises:
          ValueError: the groups of a step don't divide into micro-steps.
        """
        k = self.spec.groups
        if len(groups) % k:
            raise ValueError(
                f"{len(groups)} groups of a step do not divide into micro-steps of {k}"
            )
        return [self._micro_step(groups[i : i + k]) for i in range(0, len(groups), k)]

    def _micro_step(self, groups: Sequence[Group]) -> Prepared:
        censuses = [take_census(g, self.spec) for g in groups]
        devices = local_devices(self.mesh)
        owner = deal(np.concatenate([c.loads for c in censuses]), len(devices))
        need = needs(censuses, owner, self.spec, len(devices))
        # A rung that holds this process's share need not hold another's, whatever its place in
        # the ladder: all say which ones would do.
        number = lowest(self.agree(holding(self.ladder, need)))
        self.rung_counts[number] += 1
        return self._plan(censuses, owner, self.ladder[number])

    def every_program(self, groups: Sequence[Group]) -> Iterator[Prepared]:
        """Per rung a micro-step of holes only: what all programs can be compiled from.

        Args:
          groups: the groups of a step; only their shapes matter.
        """
        empty = []
        for group in groups[: self.spec.groups]:
            empty.append({**group, "ok": np.zeros_like(group["ok"])})
        censuses = [take_census(g, self.spec) for g in empty]
        devices = len(local_devices(self.mesh))
        owner = deal(np.concatenate([c.loads for c in censuses]), devices)
        for rung in self.ladder:
            yield self._plan(censuses, owner, rung)

    def _plan(self, censuses: list[Census], owner: np.ndarray, rung: Rung) -> Prepared:
        devices = len(local_devices(self.mesh))
        host = _host_counts(censuses, devices, rung, self.spec)
        bad = [
            f"sample_{int(i)}"
            for c in censuses
            for i, ok in zip(c.group["index"], c.alive, strict=True)
            if not ok
        ]
        return Prepared(rung, lambda: self._pack(censuses, owner, rung), host, bad)

    def _pack(self, censuses: list[Census], owner: np.ndarray, rung: Rung) -> tuple:
        devices = local_devices(self.mesh)

        def share(number: int) -> tuple:
            mine = pack_device(self.spec, rung, censuses, _members(censuses, owner == number))
            pixels = wants_pixels(self.spec)
            return (
                mine.arrays,
                fill_buffers(self.spec, mine.runs, devices[number]),
                fill_pixels(self.spec, mine.runs, devices[number]) if pixels else (),
            )

        if len(devices) > 1:
            # One thread alone could not keep eight GPUs busy; copies leave the interpreter free.
            with ThreadPoolExecutor(min(len(devices), _PACKING_THREADS)) as pool:
                shares = list(pool.map(share, range(len(devices))))
        else:
            shares = [share(0)]
        arrays, *filled = zip(*shares, strict=True)
        batch = jax.tree.map(lambda *xs: global_array(self.mesh, np.stack(xs)), *arrays)
        patches, pixels = (
            tuple(join_devices(self.mesh, shards) for shards in zip(*parts, strict=True))
            for parts in filled
        )
        return batch, patches, pixels

    def loss(self, params: Any, target: Any, inputs: tuple, key: jax.Array, program_key: Rung):
        """See `train.step.Engine`."""
        batch, patches, pixels = inputs
        return self.forward(params, target, batch, patches, key, program_key, pixels)


def _members(censuses: list[Census], mine: np.ndarray) -> list[np.ndarray]:
    """Per group, the samples selected by `mine` (bool over samples in group order)."""
    out, start = [], 0
    for c in censuses:
        stop = start + len(c.alive)
        out.append(np.flatnonzero(mine[start:stop]))
        start = stop
    return out


def _host_counts(
    censuses: list[Census], devices: int, rung: Rung, spec: StreamSpec
) -> dict[str, float]:
    """Counts of this process's samples, summed over micro-steps by the caller."""
    encoded = sum(int(c.enc.sum()) for c in censuses)
    decoded = sum(int(c.dec.sum()) for c in censuses)
    alive = sum(int(c.alive.sum()) for c in censuses)
    # The target encoder's stream is as long as its patch buffers.
    seen = sum(int(c.need.sum()) for c in censuses) if is_deep(spec) else 0
    room = (rung.enc + rung.dec) * devices
    if is_deep(spec):
        room += (sum(rung.patches) + registers_of(spec) * spec.samples) * devices
    return {
        "samples": float(alive),
        "holes": float(sum(len(c.alive) for c in censuses) - alive),
        "encoded_tokens": float(encoded),
        "decoded_tokens": float(decoded),
        "target_tokens": float(seen),
        "stream_tokens": float(room),
        "attention_pairs": float(_real_pairs(censuses, spec)),
        "row_pairs": float(devices * _row_pairs(rung, spec)),
        "overflowed_tokens": 0.0,
    }


def _real_pairs(censuses: list[Census], spec: StreamSpec) -> int:
    """Query-key pairs that exist: one layer of each attention."""
    pairs = sum(int((c.enc * (c.enc + c.dec.sum(-1))).sum()) for c in censuses)
    if is_deep(spec):
        pairs += sum(int((c.need.sum(1) ** 2).sum()) for c in censuses)
    return pairs


def _row_pairs(rung: Rung, spec: StreamSpec) -> int:
    """Query-key pairs that one layer of each attention computes on padded rows."""
    attentions = (p for p, plan in enumerate(spec.plans) if plan.name in (SELF, CROSS, TARGET))
    return sum(rung.pairs(p) for p in attentions)
