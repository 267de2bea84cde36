"""The stream of training batches: groups made by worker processes, in an order of their own."""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from olmoearth_jax.data.group import GROUP_KEYS, PROBLEMS, Group, GroupMaker
from olmoearth_jax.data.pool import WorkerDied, watch_parent
from olmoearth_jax.data.subset import array_shape

_log = logging.getLogger(__name__)

_ENOUGH_TO_JUDGE = 20
"""Samples that must have been read before a share of bad ones stops the run."""

_MIN_SHARED_BYTES = 1 << 16
"""Arrays below this size are cheaper to copy between processes than to share."""


class TooManyBadSamples(RuntimeError):
    """More samples than allowed could not be used; the message names files and problems."""


class GroupFailed(Exception):
    """A group could not be made: what was a RuntimeError where it was made.

    A RuntimeError of the readers themselves then means that one of them is gone.
    """


@dataclasses.dataclass(eq=False, repr=False)
class TrainStream(GroupMaker):
    """The batches of a training run, as a pure function of seed and step.

    The stream is bit for bit the same for any number of workers, may be entered at any step, and
    the parts that several hosts receive are together what one host would.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self._health = _Health(self.loader.max_bad_fraction)

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
        return [self.shape(first + i) for i in range(self.groups_per_step)]

    def group(self, number: int) -> Group:
        """Makes one group in this process; numbers run from 0 through all epochs.

        Raises:
          TooManyBadSamples: as `batches`.
        """
        return self._receive(self.make(number), copy=False)

    def batches(self, start_step: int = 0, stop_step: int | None = None) -> Iterator[list[Group]]:
        """The groups of each optimiser step, from `start_step` up to `stop_step` (endless if None).

        Close the iterator (or exhaust it) to end the worker processes.

        Raises:
          ValueError: a negative or reversed range.
          TooManyBadSamples: the share of unusable samples passed `max_bad_fraction`.
          WorkerDied: a worker process was killed. What a worker raises is raised here, a
            RuntimeError as GroupFailed.
        """
        if start_step < 0 or (stop_step is not None and stop_step < start_step):
            raise ValueError(f"cannot read the steps from {start_step} to {stop_step}")
        last = sys.maxsize if stop_step is None else stop_step * self.groups_per_step
        return self._batches(start_step * self.groups_per_step, last)

    def _batches(self, first: int, last: int) -> Iterator[list[Group]]:
        iterator = iter(self._dataset(first, last))
        try:
            step: list[Group] = []
            while (group := self._next(iterator)) is not None:
                step.append(self._receive(group, copy=self.loader.num_workers > 0))
                if len(step) == self.groups_per_step:
                    yield step
                    step = []
        finally:
            iterator.close()

    def _next(self, iterator: Iterator[Group]) -> Group | None:
        """The next group, None after the last."""
        try:
            return next(iterator, None)
        except RuntimeError as e:
            if not self.loader.num_workers:
                raise
            raise WorkerDied(
                f"a reader process was killed, perhaps for lack of memory; lower "
                f"data_loader.num_workers or data_loader.prefetch_factor ({e})"
            ) from e

    def _make(self, number: int) -> Group:
        try:
            return self.make(number)
        except RuntimeError as e:
            raise GroupFailed(f"{type(e).__name__}: {e}").with_traceback(e.__traceback__) from None

    def _dataset(self, first: int, last: int) -> grain.IterDataset:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain reads absl flags, also where no absl app runs
        groups = grain.MapDataset.range(first, last).map(self._make)
        workers, ahead = self.loader.num_workers, self.loader.prefetch_factor
        if not workers:
            alone = grain.ReadOptions(num_threads=1, prefetch_buffer_size=ahead)
            return groups.to_iter_dataset(alone)
        dataset = groups.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
        dataset = grain.experimental.WithOptionsIterDataset(
            dataset, grain.experimental.DatasetOptions(min_shm_size=self._shared_bytes())
        )
        return dataset.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=ahead),
            worker_init_fn=_start_worker,
        )

    def _shared_bytes(self) -> int:
        """Size from which arrays go through shared memory: never, where that is too small."""
        folder = "/dev/shm"
        if not os.path.isdir(folder):
            return _MIN_SHARED_BYTES
        room = os.statvfs(folder)
        each = self.loader.prefetch_factor + 2
        ahead = self.loader.num_workers * each + 2 * self.groups_per_step
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
        most = 0
        for grid, steps in self.timesteps.items():
            side = grid * min(max(self.patch_sizes), self.index.tile_px // grid)
            shapes = [array_shape(n, side, steps) for n in self.index.modalities]
            most = max(most, 4 * sum(int(np.prod(s)) for s in shapes))
        return most * -(-self.group_size // self.host_count)

    def _receive(self, group: Group, copy: bool) -> Group:
        """`copy` moves arrays out of shared memory, which is then free for the workers."""
        self._health.add(len(group["ok"]), group.pop(PROBLEMS))

        def plain(value):
            if isinstance(value, dict):
                return {name: plain(value[name]) for name in self.index.modalities}
            return _take(value) if copy else value

        # Passing between processes sorts the keys, so the documented order is restored here.
        return {key: plain(group[key]) for key in GROUP_KEYS if key in group}


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


def _take(value: Any) -> Any:
    """A copy in this process's memory; the shared memory that the value came in is freed.

    Left to Grain, it is freed when the array is collected, in a thread of its own: on a busy
    machine two of 2,500 groups stayed, and over a long run such segments would fill /dev/shm.
    """
    copied = np.array(value)
    segment = getattr(value, "shm", None)
    if segment is not None and getattr(value, "_unlink_on_del", False):
        value._unlink_on_del = False
        segment.unlink()
    return copied


def _start_worker(worker: int, workers: int) -> None:
    """Leaves signals to the main process, and ends the worker when that is gone."""
    del worker, workers
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    watch_parent()
