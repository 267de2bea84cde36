"""Reading the blocks of a shard, in this process or in others.

Nothing here imports JAX: the other processes need neither its memory nor a device.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence

from olmoearth_jax.data.pool import WorkerDied, Workers
from olmoearth_jax.data.raster_lattice import LatticeStack
from olmoearth_jax.data.rasters import Window
from olmoearth_jax.maps.imagery import Part

Place = tuple[slice, slice]
"""Rows and columns of a window."""

_numbers = itertools.count()
_held: dict[int, LatticeStack] = {}
"""The open rasters of this process if it is a reader, by the number of their part."""


class Readers:
    """Reads windows, some of them ahead if there are several processes; a context that ends them.

    Args:
      count: processes; 0 or 1 reads in the calling thread.
    """

    def __init__(self, count: int):
        self._workers = Workers(count, apart=True) if count > 1 else None

    def __enter__(self) -> Readers:
        return self

    def __exit__(self, *_: object) -> None:
        if self._workers is not None:
            self._workers.__exit__()

    def windows(self, part: Part, places: Sequence[Place]) -> Iterator[Window]:
        """The windows of a part at these places, in their order.

        Raises:
          ValueError: a raster that cannot be read.
          WorkerDied: a reader was killed; the next call starts others.
        """
        if self._workers is None:
            with LatticeStack(*part) as stack:
                yield from (stack.read(*place) for place in places)
            return
        number = next(_numbers)
        try:
            yield from self._workers.in_order(_read, ((number, part, place) for place in places))
        except WorkerDied as e:
            raise WorkerDied(
                "a process that reads was killed, perhaps for lack of memory: lower --readers"
            ) from e


def _read(task: tuple[int, Part, Place]) -> Window:
    number, part, place = task
    if number not in _held:
        _close()
        _held[number] = LatticeStack(*part)
    with contextlib.ExitStack() as failed:
        failed.callback(_close)
        window = _held[number].read(*place)
        failed.pop_all()
    return window


def _close() -> None:
    while _held:
        _held.popitem()[1].close()
