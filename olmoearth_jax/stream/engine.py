"""What an engine is, and the stream engine: groups of a step -> packed micro-steps -> loss."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from olmoearth_jax.losses import Objective
from olmoearth_jax.mesh import global_arrays, join_devices, local_devices
from olmoearth_jax.stream.forward import StreamForward
from olmoearth_jax.stream.ladder import cheapest, fitting_rungs
from olmoearth_jax.stream.locations import fill_maps
from olmoearth_jax.stream.loss_terms import fill_pixels
from olmoearth_jax.stream.pack import pack_device
from olmoearth_jax.stream.patches import fill_buffers
from olmoearth_jax.stream.stream_shape import Rung, StreamSpec
from olmoearth_jax.stream.token_counts import TokenCounts, balance_devices, count_tokens, needs

_PACKING_THREADS = 8

Group = dict[str, Any]
"""Samples that share patch size and grid; see `olmoearth_jax.data.pipeline`."""


@dataclasses.dataclass
class Prepared:
    """One micro-step, planned on the host; its inputs move to the devices when asked for."""

    key: Any
    """Of the program that runs it."""
    pack: Callable[[], tuple]
    """Makes the inputs."""
    host: dict[str, float]
    """Counts that need no device."""
    bad_ids: list[str]
    """Samples that are holes."""

    @classmethod
    def of(
        cls, key: Any, pack: Callable[[], tuple], alive: np.ndarray, index: np.ndarray,
        counts: Mapping[str, float],
    ) -> Prepared:  # fmt: skip
        """A micro-step of samples numbered `index` [B] in the dataset, those not `alive` holes."""
        host = {"samples": int(alive.sum()), "holes": int((~alive).sum()), **counts}
        bad = [f"sample_{int(i)}" for i in index[~alive]]
        return cls(key, pack, {k: float(v) for k, v in host.items()}, bad)

    @functools.cached_property
    def inputs(self) -> tuple:
        """Device inputs, packed on first use and kept until `release`."""
        return self.pack()

    def release(self) -> None:
        """Forgets the inputs; a program that was given them keeps them while it needs them."""
        self.__dict__.pop("inputs", None)


class Engine(Protocol):
    """How groups become losses; see `StreamEngine`."""

    @property
    def objective(self) -> Objective:
        """The terms that are minimised."""
        ...

    def prepare(self, groups: Sequence[Group]) -> list[Prepared]:
        """Splits a step's groups into micro-steps."""
        ...

    def loss(
        self, params, target, inputs: tuple, key: jax.Array, program_key: Any
    ) -> tuple[jax.Array, Any]:
        """(loss, aux) of one micro-step; traced once per program key."""
        ...


_Agree = Callable[[int], int]
"""Host-side agreement on the bits that small integers share, without a device collective."""


def shared_bits(values: Sequence[int]) -> int:
    """The bits that all values have."""
    return functools.reduce(operator.and_, values)


class StreamEngine:
    """Packs groups of any shapes into rungs and evaluates the stream loss.

    Args:
      forward: the loss.
      ladder: rungs, cheapest first; the last is the hard bound.
      mesh: devices.
      agree: bits common to all processes: the rungs that hold everybody's share.
      per_patch: locations per side of a patch in a group, where there is a pooler.
    """

    def __init__(
        self,
        forward: StreamForward,
        ladder: Sequence[Rung],
        mesh: Mesh,
        agree: _Agree = lambda bits: bits,
        per_patch: Callable[[Group], int] = lambda group: 1,
    ):
        self.forward, self.ladder, self.mesh, self.agree = forward, tuple(ladder), mesh, agree
        self.per_patch = per_patch
        self.expected = np.ones(len(self.ladder), np.int64)
        """Per rung how often it is likely to be used, in any unit."""
        self.flops: Callable[[Sequence[TokenCounts]], float] | None = None
        """Operations of training on the real tokens of groups, to be counted with them."""
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
        counts = [count_tokens(g, self.spec, self.per_patch(g)) for g in groups]
        devices = local_devices(self.mesh)
        owner = balance_devices(np.concatenate([c.loads for c in counts]), len(devices))
        need = needs(counts, owner, self.spec, len(devices))
        # A rung that holds this process's share need not hold another's, whatever its place in
        # the ladder: all say which ones would do.
        number = cheapest(self.agree(fitting_rungs(self.ladder, need)))
        self.rung_counts[number] += 1
        return self._plan(counts, owner, self.ladder[number])

    def every_program(self, groups: Sequence[Group], spare: bool = True) -> Iterator[Prepared]:
        """Per rung a micro-step of holes only: what programs can be compiled from.

        The rungs come in the order in which they are likely to be used.

        Args:
          groups: the groups of a step; only their shapes matter.
          spare: the hard bound too, where nothing that was simulated needs it.
        """
        empty = []
        for group in groups[: self.spec.groups]:
            empty.append({**group, "ok": np.zeros_like(group["ok"])})
        counts = [count_tokens(g, self.spec) for g in empty]
        devices = len(local_devices(self.mesh))
        owner = balance_devices(np.concatenate([c.loads for c in counts]), devices)
        order = np.argsort(-self.expected, kind="stable")
        top = len(self.ladder) - 1
        for number in order if spare or self.expected[top] else order[order != top]:
            yield self._plan(counts, owner, self.ladder[number])

    def _plan(self, counts: list[TokenCounts], owner: np.ndarray, rung: Rung) -> Prepared:
        devices = len(local_devices(self.mesh))
        host = _host_counts(counts, devices, rung, self.spec)
        work = {} if self.flops is None else {"flops": self.flops(counts)}
        index, alive = (
            np.concatenate(x)
            for x in zip(*((c.group["index"], c.alive) for c in counts), strict=True)
        )
        return Prepared.of(rung, lambda: self._pack(counts, owner, rung), alive, index, host | work)

    def _pack(self, counts: list[TokenCounts], owner: np.ndarray, rung: Rung) -> tuple:
        devices = local_devices(self.mesh)

        def share(number: int) -> tuple:
            mine = pack_device(self.spec, rung, counts, _members(counts, owner == number))
            pixels = self.spec.pixels
            return (
                mine.arrays,
                fill_buffers(self.spec, mine.runs, devices[number]),
                fill_pixels(self.spec, mine.runs, devices[number]) if pixels else (),
                fill_maps(self.spec, rung, mine.runs, devices[number]),
            )

        if len(devices) > 1:
            # One thread alone could not keep eight GPUs busy; copies leave the interpreter free.
            with ThreadPoolExecutor(min(len(devices), _PACKING_THREADS)) as pool:
                shares = list(pool.map(share, range(len(devices))))
        else:
            shares = [share(0)]
        arrays, *filled = zip(*shares, strict=True)
        batch = global_arrays(self.mesh, jax.tree.map(lambda *xs: np.stack(xs), *arrays))
        patches, pixels, drawn = (
            tuple(join_devices(self.mesh, shards) for shards in zip(*parts, strict=True))
            for parts in filled
        )
        return batch, patches, pixels, drawn

    def loss(self, params: Any, target: Any, inputs: tuple, key: jax.Array, program_key: Rung):
        """See `Engine`."""
        batch, patches, pixels, drawn = inputs
        return self.forward(params, target, batch, patches, key, program_key, pixels, drawn)


def _members(counts: list[TokenCounts], mine: np.ndarray) -> list[np.ndarray]:
    """Per group, the samples selected by `mine` (bool over samples in group order)."""
    out, start = [], 0
    for c in counts:
        stop = start + len(c.alive)
        out.append(np.flatnonzero(mine[start:stop]))
        start = stop
    return out


def _host_counts(
    counts: list[TokenCounts], devices: int, rung: Rung, spec: StreamSpec
) -> dict[str, int]:
    """Counts of this process's samples, summed over micro-steps by the caller."""
    encoded = sum(int(c.enc.sum()) for c in counts)
    decoded = sum(int(c.dec.sum()) for c in counts)
    located = sum(int(c.loc.sum()) for c in counts)
    # The target encoder's stream is as long as its patch buffers.
    seen = sum(int(c.need.sum()) for c in counts) if spec.deep else 0
    room = (rung.enc + rung.dec + rung.loc) * devices
    if spec.deep:
        room += (sum(rung.patches) + spec.registers * spec.samples) * devices
    return {
        "encoded_tokens": encoded,
        "decoded_tokens": decoded,
        "target_tokens": seen,
        **({"location_tokens": located} if spec.loc_bound else {}),
        "stream_tokens": room,
        "attention_pairs": _real_pairs(counts, spec),
        "row_pairs": devices * _row_pairs(rung, spec),
        "overflowed_tokens": 0,
    }


def _real_pairs(counts: list[TokenCounts], spec: StreamSpec) -> int:
    """Query-key pairs that exist: one layer of each attention."""
    pairs = 0
    for c in counts:
        read = c.loc if spec.loc_bound else c.enc
        pairs += int((c.enc * c.enc + read * c.dec.sum(-1)).sum())
        pairs += int((c.loc * (c.enc + c.loc)).sum())
    if spec.deep:
        pairs += sum(int((c.need.sum(1) ** 2).sum()) for c in counts)
    return pairs


def _row_pairs(rung: Rung, spec: StreamSpec) -> int:
    """Query-key pairs that one layer of each attention computes on padded rows."""
    return sum(rung.pairs(p) for p, plan in enumerate(spec.plans) if plan.is_attention)
