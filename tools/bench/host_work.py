"""What `tools.bench.host` measures, in a process of its own: settings in as JSON, figures out.

Reads one line of settings, answers that it is ready, waits for a second line, measures.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from olmoearth_jax import modalities
from olmoearth_jax.config import ExperimentConfig
from olmoearth_jax.config_files import load_file
from olmoearth_jax.data import group as data_group
from olmoearth_jax.data.h5 import SampleFile, stored_names
from olmoearth_jax.data.index import DatasetIndex, Part
from olmoearth_jax.data.pipeline import TrainStream
from olmoearth_jax.mesh import make_mesh
from olmoearth_jax.stream import engine as stream_engine
from olmoearth_jax.stream import patches
from olmoearth_jax.stream.engine import StreamEngine
from olmoearth_jax.train import assemble, build, estimate, probe

from ..make_synthetic_dataset import Gaps, make_sample
from .lock_share import LockWatch

PHASES: tuple[tuple[str, Any, str], ...] = (
    ("crop", data_group.GroupMaker, "_read"),
    ("masks", data_group.GroupMaker, "_masks"),
    ("count", stream_engine, "count_tokens"),
    ("deal", stream_engine, "balance_devices"),
    ("deal", stream_engine, "needs"),
    ("deal", stream_engine, "fitting_rungs"),
    ("rows", stream_engine, "pack_device"),
    ("patches", stream_engine, "fill_buffers"),
    ("maps", stream_engine, "fill_maps"),
    ("maps", stream_engine, "fill_pixels"),
    ("copies", jax, "device_put"),
    ("copies", stream_engine, "global_arrays"),
    ("copies", stream_engine, "join_devices"),
)
"""(phase, owner, attribute) of the functions that are timed."""

_SAMPLES = 8
"""Different samples in memory; all files of the data set are one of them."""

_NEVER_READ = 4096
"""Files of the data set."""


@dataclasses.dataclass(frozen=True)
class MemoryArrays:
    """The content of a sample file, in memory."""

    arrays: dict[str, np.ndarray]
    timestamps: np.ndarray
    masks: dict[str, np.ndarray]

    @classmethod
    def complete(cls, number: int, tile_px: int) -> MemoryArrays:
        """A synthetic sample of twelve timesteps without gaps."""
        arrays, stamps, masks, _ = make_sample(0, number, tile_px, Gaps(0, 0))
        return cls(arrays, stamps, masks)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: x.shape for name, x in self.arrays.items()}

    @property
    def dtypes(self) -> dict[str, np.dtype]:
        return {name: x.dtype for name, x in self.arrays.items()}

    def window(self, name: str, window: tuple[slice, ...]) -> np.ndarray:
        """A view: nothing is read."""
        return self.arrays[name][window]


def memory_index(config: ExperimentConfig, tile_px: int) -> DatasetIndex:
    """The index of a data set that is nowhere."""
    names = modalities.in_sample_order(config.dataset.training_modalities)
    part = Part(Path("nowhere"), np.arange(_NEVER_READ), tile_px)
    return DatasetIndex((part,), names, "", "", None)


@contextlib.contextmanager
def files_in_memory(tile_px: int) -> Iterator[None]:
    """Within it, every sample file is one of a few samples in memory, open and checked."""
    arrays = [MemoryArrays.complete(n, tile_px) for n in range(_SAMPLES)]

    @functools.cache
    def opened(number: int, names: tuple[str, ...]) -> SampleFile:
        return SampleFile(f"sample_{number}", arrays[number], stored_names(names))

    @contextlib.contextmanager
    def open_sample(path: Any, names: Sequence[str]) -> Iterator[SampleFile]:
        number = int(Path(str(path)).stem.rpartition("_")[2])
        yield opened(number % _SAMPLES, tuple(names))

    with mock.patch.object(data_group, "open_sample", open_sample):
        yield


@functools.partial(jax.jit, static_argnames=("shapes",))
def _tiny(shapes: tuple[tuple[int, ...], ...]) -> tuple[jax.Array, ...]:
    """Takes what `patches._zeros` takes."""
    return tuple(jnp.zeros((*s[:-2], 1, s[-1])) for s in shapes)


@functools.partial(
    jax.jit, static_argnames=("layout", "slots", "cutting"), donate_argnames=("buffers",)
)
def _fill_nothing(buffers: Any, *inputs: Any, **static: Any) -> Any:
    """Takes what `patches._fill_chunk` takes, and leaves the buffers where the inputs are."""
    some = jax.tree.leaves(inputs)[-1].reshape(-1)[0]
    return tuple(b + some.astype(b.dtype) for b in buffers)


@contextlib.contextmanager
def patches_on_device() -> Iterator[None]:
    """Within it, images are sent to where programs resize them, as they are on a GPU.

    Where there is none, the programs neither zero nor resize anything: that is not the host's work.
    """
    with contextlib.ExitStack() as stack:
        if jax.default_backend() == "cpu":

            def fill(spec: Any, runs: Any, device: Any) -> tuple:
                cut = patches.embedded_patches
                return patches.fill_on_device(spec, runs, device, cut)

            stack.enter_context(mock.patch.object(patches, "_zeros", _tiny))
            stack.enter_context(mock.patch.object(patches, "_fill_chunk", _fill_nothing))
            stack.enter_context(mock.patch.object(stream_engine, "fill_buffers", fill))
        yield


@dataclasses.dataclass
class HostWork:
    """All that a host does for micro-steps, from samples in memory to arrays on the devices."""

    stream: TrainStream
    engine: StreamEngine
    micro_steps: int
    make: Callable[[int], Any]
    """Makes the group of that number, or has made it before."""

    @classmethod
    def build(
        cls, config: ExperimentConfig, groups: int, tile_px: int, made: bool = False
    ) -> HostWork:
        """The data stream and the engine of a config on all devices of this process.

        Args:
          config: the config.
          groups: of a pass, rounded up to whole micro-steps.
          tile_px: side of the samples in 10 m pixels.
          made: make groups once only, as if others did it.
        """
        mesh = make_mesh()
        objective = build.build_objective(config)
        timesteps = estimate.most_timesteps(config)
        spec = build.stream_of(config, timesteps, mesh.size, objective)
        ladder = build.size_ladder(
            config, spec, timesteps, [probe.complete(spec.modalities)], tile_px
        )
        engine = assemble.stream_engine(config, spec, ladder, objective, mesh)
        stream = build.build_stream(config, memory_index(config, tile_px))
        make = functools.cache(stream.group) if made else stream.group
        return cls(stream, engine, -(-groups // spec.groups), make)

    @property
    def samples(self) -> int:
        """Samples of a pass."""
        return self.micro_steps * self.engine.spec.groups * self.stream.group_size

    def one(self, number: int) -> tuple:
        """The device inputs of a micro-step, once they are there, and its rung."""
        k = self.engine.spec.groups
        groups = [self.make(number * k + n) for n in range(k)]
        (prepared,) = self.engine.prepare(groups)
        return jax.block_until_ready(prepared.inputs), prepared.key

    def run(self) -> None:
        """One pass over all micro-steps."""
        for number in range(self.micro_steps):
            self.one(number)

    def digest(self, with_patches: bool = True) -> str:
        """Of every bit that step programs read: equal if two versions pack alike."""
        total = hashlib.blake2b(digest_size=16)
        for number in range(self.micro_steps):
            (batch, buffers, pixels, drawn), rung = self.one(number)
            # What lies behind a rung's patches is never read.
            read = [b[:, :n] for b, n in zip(buffers, rung.patches, strict=True)]
            for x in jax.tree.leaves((batch, read if with_patches else (), pixels, drawn)):
                total.update(f"{x.shape} {x.dtype}".encode())
                total.update(np.asarray(x).tobytes())
        return total.hexdigest()


@dataclasses.dataclass
class Clock:
    """CPU seconds by phase, those of phases within a phase left out of it; for all threads."""

    spent: dict[str, float] = dataclasses.field(default_factory=dict)
    _own: threading.local = dataclasses.field(default_factory=threading.local)
    _adding: Any = dataclasses.field(default_factory=threading.Lock)

    def timed(self, phase: str, function: Any) -> Any:
        """`function`, its time counted."""

        def call(*args: Any, **kwargs: Any) -> Any:
            outer, self._own.inner = getattr(self._own, "inner", 0.0), 0.0
            start = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                whole = time.thread_time() - start
                with self._adding:
                    self.spent[phase] = self.spent.get(phase, 0.0) + whole - self._own.inner
                self._own.inner = outer + whole

        return call


def phases_of(work: HostWork) -> dict[str, float]:
    """CPU milliseconds per sample by phase, 'other' being the rest."""
    clock = Clock({phase: 0.0 for phase, _, _ in PHASES})
    with contextlib.ExitStack() as stack:
        for phase, owner, name in PHASES:
            timed = clock.timed(phase, getattr(owner, name))
            stack.enter_context(mock.patch.object(owner, name, timed))
        start = time.process_time()
        work.run()
        total = time.process_time() - start
    clock.spent["other"] = total - sum(clock.spent.values())
    return {k: 1e3 * v / work.samples for k, v in clock.spent.items()}


def measure(work: HostWork, repeats: int, watch: LockWatch) -> dict[str, Any]:
    """Speed, phases, and the share that holds Python's lock, each in passes of its own."""
    cpu, wall = [], []
    for _ in range(repeats):
        began, clock = time.process_time(), time.perf_counter()
        work.run()
        cpu.append(time.process_time() - began)
        wall.append(time.perf_counter() - clock)
    phases = phases_of(work)
    began, clock = time.process_time(), time.perf_counter()
    share = watch.share(work.run)
    # A thread that holds the lock computes, unless other processes have its core.
    spent = time.process_time() - began
    share = None if share is None else share * min(1.0, (time.perf_counter() - clock) / spent)
    return {
        "samples": work.samples,
        "cpu_s": statistics.median(cpu),
        "passes_cpu_s": sorted(cpu),
        "wall_s": statistics.median(wall),
        "phases_cpu_ms": phases,
        "lock_share": share,
    }


def main() -> None:
    """See the module."""
    given = json.loads(sys.stdin.readline())
    config = load_file(given["config"])
    with contextlib.ExitStack() as stack:
        stack.enter_context(files_in_memory(given["tile_px"]))
        if not given["numpy"]:
            stack.enter_context(patches_on_device())
        work = HostWork.build(config, given["groups"], given["tile_px"], given["made"])
        result = {"digest": work.digest(given["numpy"])}  # also the pass that warms up
        watch = LockWatch.calibrated(given["calibration_s"])
        devices = jax.devices()
        result |= {"device": f"{len(devices)} x {devices[0].device_kind}"}
        print(json.dumps({"ready": True}), flush=True)
        if sys.stdin.readline():
            print(json.dumps(result | measure(work, given["repeats"], watch)), flush=True)


if __name__ == "__main__":
    main()
