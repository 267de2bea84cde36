"""An HDF5 sample file, on h5py's low-level objects: the high-level ones cost as much time as small
arrays do.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import h5py
import h5py.h5o
import hdf5plugin  # noqa: F401  (registers the zstd and lz4 filters)
import numpy as np

from olmoearth_jax.data import zstd
from olmoearth_jax.data.errors import ReadError

MASK_GROUP = "missing_timesteps_masks"


class Hdf5File:
    """The arrays of an open file.

    Args:
      path: file name, for messages.
      file: from `open_file`.
      wanted: datasets to look for; others are ignored.

    Attributes:
      shapes, dtypes: per wanted array that is there.
      timestamps: the array of that name, as stored.
      masks: per wanted modality with one, as stored.

    Raises:
      ReadError: no timestamps, or a group where an array should be.
    """

    def __init__(self, path: str, file: h5py.h5f.FileID, wanted: Sequence[str]):
        self._path = path
        root = h5py.h5g.open(file, b"/")
        stored = set(root)
        self._sets = {n: self._open(root, n) for n in wanted if n.encode() in stored}
        self.shapes: dict[str, tuple[int, ...]] = {n: d.shape for n, d in self._sets.items()}
        self.dtypes: dict[str, np.dtype] = {n: d.dtype for n, d in self._sets.items()}
        if b"timestamps" not in stored:
            raise ReadError(path, "has no 'timestamps'")
        self.timestamps = _everything(self._open(root, "timestamps"))
        self.masks: dict[str, np.ndarray] = {}
        if MASK_GROUP.encode() in stored:
            group = h5py.h5o.open(root, MASK_GROUP.encode())
            if not isinstance(group, h5py.h5g.GroupID):
                raise ReadError(path, f"{MASK_GROUP!r} is an array, not a group")
            held = set(group)
            names = [n for n in wanted if n.encode() in held]
            self.masks = {n: _everything(self._open(group, n)) for n in names}

    def _open(self, group: h5py.h5g.GroupID, name: str) -> h5py.h5d.DatasetID:
        found = h5py.h5o.open(group, name.encode())
        if not isinstance(found, h5py.h5d.DatasetID):
            raise ReadError(self._path, f"{name!r} is a group, not an array")
        return found

    def window(self, name: str, window: tuple[slice, ...]) -> np.ndarray:
        """The part `window` of an array, in memory of its own.

        Only the chunks touched are decoded, and of an array that is one zstd chunk only the bytes
        up to the last row.
        """
        source, dtype = self._sets[name], self.dtypes[name]
        shape = tuple(max(0, w.stop - w.start) for w in window)
        if 0 in shape:
            return np.empty(shape, dtype)
        frame = _only_frame(source)
        if frame is not None:
            rows = (window[0].stop, *source.shape[1:])
            data = zstd.beginning(frame, math.prod(rows) * dtype.itemsize)
            return data.view(dtype).reshape(rows)[window].copy()
        out = np.empty(shape, dtype)
        space = source.get_space()
        space.select_hyperslab(tuple(w.start for w in window), shape)
        source.read(h5py.h5s.create_simple(shape), space, out)
        return out


def open_file(source: Path | IO[Any]) -> tuple[h5py.h5f.FileID, h5py.File | None]:
    """Opens a file on disk or in memory for reading: its identifier, to be closed by the caller,
    and an object to keep until then."""
    if isinstance(source, Path):
        return h5py.h5f.open(os.fsencode(source), h5py.h5f.ACC_RDONLY, _access()), None
    held = h5py.File(source, "r")
    return held.id, held


@functools.cache
def _access() -> h5py.h5p.PropFAID:
    access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    access.set_fclose_degree(h5py.h5f.CLOSE_STRONG)  # closing the file closes its arrays
    access.set_file_locking(False, True)
    return access


def _everything(source: h5py.h5d.DatasetID) -> np.ndarray:
    out = np.empty(source.shape, source.dtype)
    if out.size:
        source.read(h5py.h5s.ALL, h5py.h5s.ALL, out)
    return out


def _only_frame(source: h5py.h5d.DatasetID) -> bytes | None:
    """The compressed bytes of an array that is one zstd chunk as a whole, else None."""
    layout = source.get_create_plist()
    if (
        not zstd.available()
        or layout.get_layout() != h5py.h5d.CHUNKED
        or layout.get_chunk() != source.shape
        or [layout.get_filter(i)[0] for i in range(layout.get_nfilters())] != [zstd.FILTER_ID]
        or not source.get_num_chunks()
    ):
        return None
    skipped, frame = source.read_direct_chunk((0,) * len(source.shape))
    return None if skipped else frame
