"""The stream of training batches: groups made by worker processes, in an order of their own."""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import grain
import numpy as np
from absl import flags

from olmoearth_jax import modalities as registry
from olmoearth_jax.data.budget import check_grids
from olmoearth_jax.data.group import (
    GROUP_KEYS,
    PROBLEMS,
    Group,
    GroupMaker,
    MaskStrategy,
    Transform,
)
from olmoearth_jax.data.index import DatasetIndex
from olmoearth_jax.data.order import steps_per_pass
from olmoearth_jax.data.store import SampleStore
from olmoearth_jax.data.subset import array_shape
from olmoearth_jax.modalities import Tokenization

_log = logging.getLogger(__name__)

_ENOUGH_TO_JUDGE = 20
"""Samples that must have been read before a share of bad ones stops the run."""

_MIN_SHARED_BYTES = 1 << 16
"""Arrays below this size are cheaper to copy between processes than to share."""


class TooManyBadSamples(RuntimeError):
    """More samples than allowed could not be used; the message names files and problems."""


@dataclasses.dataclass(eq=False, repr=False)
class TrainStream:
    """The batches of a training run, as a pure function of seed and step.

    The stream is bit for bit the same for any number of workers, may be entered at any step, and
    the parts that several hosts receive are together what one host would.

    Args:
      index: the data set (`index.prepare`).
      modalities: training modalities; must be those of the index.
      mask_a: masking of the first view, `strategy(missing, MaskContext) -> masks`; picklable.
      mask_b: masking of the second view; None for one view.
      global_batch_size: samples per optimiser step, over all hosts.
      group_size: samples per group, over all hosts.
      samples_per_shape: contiguous samples that share a patch size and a grid.
      patch_sizes: patch sizes to draw from (10 m pixels).
      grids: grid sides to draw from (patches); each draw is limited to what fits the tiles.
      token_budget: tokens per sample, which sets the timesteps of each grid; None for no limit.
      tokenization: the model's band sets, for the masks.
      budget_tokenization: band sets by which the budget is counted; the registry's by default,
        whatever the model's (as in the published v1.1 and v1.2 runs, spec/data.md Q8).
      seed: of order, shapes, crops and masks.
      num_workers: reader processes; 0 reads in a thread of this process.
      prefetch: groups each worker prepares ahead.
      host_index, host_count: which part of every group this host reads.
      max_bad_fraction: largest share of unreadable samples, judged from 20 samples on.
      repeats: passes over the data per epoch.
      shuffle: False reads in natural order.
      use_cutmix: crops of scattered patches.
      transform: augmentation of whole groups (`transforms`), or None.
      normalized: False yields raw values.
      cache_dir: folder to copy sample files to before reading; None reads in place.
      cache_size_gb: size from which no more files are copied there; None for no limit.
      samples_per_sec: limit of reads per worker; None for none.

    Attributes:
      steps_per_epoch: optimiser steps per epoch.
      groups_per_step: groups per optimiser step.
      timesteps: timesteps of a crop, per grid side.

    Raises:
      ValueError: sizes that do not divide, a budget or tile too small, or hosts that would split
        what has to stay together.
    """

    index: DatasetIndex
    _: dataclasses.KW_ONLY
    modalities: Sequence[str]
    mask_a: MaskStrategy
    mask_b: MaskStrategy | None = None
    global_batch_size: int
    group_size: int
    samples_per_shape: int = 64
    patch_sizes: Sequence[int] = tuple(range(1, 9))
    grids: Sequence[int] = tuple(range(1, 13))
    token_budget: int | None = 2250
    tokenization: Tokenization = Tokenization()
    budget_tokenization: Tokenization = Tokenization()
    seed: int = 3622
    num_workers: int = 0
    prefetch: int = 2
    host_index: int = 0
    host_count: int = 1
    max_bad_fraction: float = 0.1
    repeats: int = 1
    shuffle: bool = True
    use_cutmix: bool = False
    transform: Transform | None = None
    normalized: bool = True
    cache_dir: str | Path | None = None
    cache_size_gb: float | None = None
    samples_per_sec: float | None = None

    def __post_init__(self) -> None:
        names = registry.in_sample_order(registry.resolve(self.modalities))
        if names != self.index.modalities:
            raise ValueError(
                f"the index was prepared for {', '.join(self.index.modalities)}, "
                f"not for {', '.join(names)}"
            )
        self._check_sizes()
        self._check_hosts()
        self.timesteps = check_grids(
            names,
            self.patch_sizes,
            self.grids,
            self.token_budget,
            self.index.tile_px,
            self.budget_tokenization,
        )
        passes = steps_per_pass(len(self.index), self.global_batch_size)
        self.steps_per_epoch = passes * self.repeats
        self.groups_per_step = self.global_batch_size // self.group_size
        self._health = _Health(self.max_bad_fraction)
        cache = None if self.cache_dir is None else Path(self.cache_dir)
        shared = {f.name for f in dataclasses.fields(GroupMaker)} & set(vars(self))
        self._maker = GroupMaker(
            **{name: getattr(self, name) for name in shared - {"index"}},
            index=dataclasses.replace(self.index, latlon=None),  # workers have no use for it
            store=SampleStore(cache, self.samples_per_sec, self.cache_size_gb),
        )

    def _check_sizes(self) -> None:
        counts = ("global_batch_size", "group_size", "samples_per_shape", "prefetch", "repeats")
        for name in counts:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_workers < 0:
            raise ValueError(f"num_workers must not be negative, got {self.num_workers}")
        for name in ("global_batch_size", "samples_per_shape"):
            if getattr(self, name) % self.group_size:
                raise ValueError(
                    f"{name} {getattr(self, name)} must be a multiple of the micro-batch size "
                    f"{self.group_size} (train_module.rank_microbatch_size)"
                )

    def _check_hosts(self) -> None:
        hosts = self.host_count
        if not 0 <= self.host_index < hosts:
            raise ValueError(f"host {self.host_index} is not one of {hosts} hosts")
        if hosts > self.group_size:
            raise ValueError(
                f"{hosts} hosts cannot share groups of {self.group_size} samples; use larger "
                f"micro-batches (train_module.rank_microbatch_size)"
            )
        for part in (self.mask_a, self.mask_b, self.transform):
            if hosts > 1 and getattr(part, "needs_whole_group", False):
                raise ValueError(
                    f"{type(part).__name__} needs all samples of a group on one host, "
                    f"so it cannot be used with {hosts} hosts"
                )

    @property
    def samples_read(self) -> int:
        """Samples this host has received so far."""
        return self._health.read

    @property
    def samples_bad(self) -> int:
        """Of these, the ones that could not be read or held non-finite values."""
        return self._health.bad

    def shapes(self, step: int) -> list[tuple[int, int, int]]:
        """(patch size, grid, timesteps) of each group of a step, without reading any data."""
        first = step * self.groups_per_step
        return [self._maker.shape(first + i) for i in range(self.groups_per_step)]

    def group(self, number: int) -> Group:
        """Makes one group in this process; numbers run from 0 through all epochs.

        Raises:
          TooManyBadSamples: as `batches`.
        """
        return self._receive(self._maker(number))

    def batches(self, start_step: int = 0, stop_step: int | None = None) -> Iterator[list[Group]]:
        """The groups of each optimiser step, from `start_step` up to `stop_step` (endless if None).

        Close the iterator (or exhaust it) to end the worker processes.

        Raises:
          ValueError: a negative or reversed range.
          TooManyBadSamples: the share of unusable samples passed `max_bad_fraction`.
        """
        if start_step < 0 or (stop_step is not None and stop_step < start_step):
            raise ValueError(f"cannot read the steps from {start_step} to {stop_step}")
        last = sys.maxsize if stop_step is None else stop_step * self.groups_per_step
        return self._batches(start_step * self.groups_per_step, last)

    def _batches(self, first: int, last: int) -> Iterator[list[Group]]:
        iterator = iter(self._dataset(first, last))
        try:
            step: list[Group] = []
            for group in iterator:
                step.append(self._receive(group))
                if len(step) == self.groups_per_step:
                    yield step
                    step = []
        finally:
            iterator.close()

    def _dataset(self, first: int, last: int) -> grain.IterDataset:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain reads absl flags, also where no absl app runs
        groups = grain.MapDataset.range(first, last).map(self._maker)
        threads = 0 if self.num_workers else 1
        options = grain.ReadOptions(
            num_threads=threads, prefetch_buffer_size=self.prefetch if threads else 0
        )
        dataset = groups.to_iter_dataset(options)
        if not self.num_workers:
            return dataset
        dataset = grain.experimental.WithOptionsIterDataset(
            dataset, grain.experimental.DatasetOptions(min_shm_size=self._shared_bytes())
        )
        return dataset.mp_prefetch(
            grain.MultiprocessingOptions(
                num_workers=self.num_workers, per_worker_buffer_size=self.prefetch
            ),
            worker_init_fn=_start_worker,
        )

    def _shared_bytes(self) -> int:
        """Size from which arrays go through shared memory: never, where that is too small."""
        folder = "/dev/shm"
        if not os.path.isdir(folder):
            return _MIN_SHARED_BYTES
        room = os.statvfs(folder)
        ahead = self.num_workers * (self.prefetch + 2) + 2 * self.groups_per_step
        if ahead * self._largest_group() < room.f_bavail * room.f_frsize:
            return _MIN_SHARED_BYTES
        _log.warning(
            "%s is too small for the groups that are read ahead; they are copied between "
            "processes instead, which is slower (in Docker: --shm-size or --ipc=host)",
            folder,
        )
        return sys.maxsize

    def _largest_group(self) -> int:
        """Bytes of the largest group this host can receive."""
        maker, most = self._maker, 0
        for grid, steps in self.timesteps.items():
            side = grid * min(max(maker.patch_sizes), maker.index.tile_px // grid)
            names = maker.index.modalities
            values = sum(int(np.prod(array_shape(n, side, steps))) for n in names)
            most = max(most, 4 * values)
        return most * -(-maker.group_size // maker.host_count)

    def _receive(self, group: Group) -> Group:
        self._health.add(len(group["ok"]), group.pop(PROBLEMS))
        # Passing between processes sorts the keys, so the documented order is restored here.
        return {key: self._plain(group[key]) for key in GROUP_KEYS if key in group}

    def _plain(self, value):
        """Copies arrays out of shared memory, which is then free for the workers."""
        if isinstance(value, dict):
            return {name: self._plain(value[name]) for name in self._maker.index.modalities}
        return np.array(value) if self.num_workers else value


class _Health:
    """Counts samples, logs the bad ones once each, and stops a run that has too many."""

    def __init__(self, max_bad_fraction: float):
        if not 0 <= max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction must be in [0, 1], got {max_bad_fraction}")
        self.max_bad_fraction = max_bad_fraction
        self.read = self.bad = 0
        self._seen: dict[str, str] = {}

    def add(self, count: int, problems: Sequence[tuple[str, str]]) -> None:
        self.read += count
        self.bad += len(problems)
        for path, problem in problems:
            if path not in self._seen:
                _log.warning("sample left out: %s: %s", path, problem)
            self._seen[path] = problem
        judged = self.read >= _ENOUGH_TO_JUDGE
        if problems and judged and self.bad > self.max_bad_fraction * self.read:
            shown = "; ".join(f"{p}: {t}" for p, t in list(self._seen.items())[:5])
            more = f"; and {len(self._seen) - 5} more files" if len(self._seen) > 5 else ""
            raise TooManyBadSamples(
                f"{self.bad} of {self.read} samples could not be used, more than the allowed "
                f"{self.max_bad_fraction:.0%} (data_loader.max_bad_fraction): {shown}{more}"
            )


def _start_worker(worker: int, workers: int) -> None:
    """Leaves signals to the main process, and ends the worker when that is gone."""
    del worker, workers
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
