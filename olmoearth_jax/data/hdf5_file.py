"""An HDF5 sample file, on h5py's low-level objects: the high-level ones cost as much time as small
arrays do.

Files come from others. HDF5 would follow what they say to any other file of this machine, and make
room for any size they declare. Here only what is stored in the file itself is read, and nothing
larger than its length explains.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import h5py
import h5py.h5l
import h5py.h5o
import hdf5plugin  # noqa: F401  (registers the zstd and lz4 filters)
import numpy as np

from olmoearth_jax.data import chunk_filters, zstd
from olmoearth_jax.data.errors import ReadError, translate_errors
from olmoearth_jax.modalities import MAX_TIMESTEPS

MASK_GROUP = "missing_timesteps_masks"
_MOST_ROWS = 4096
"""More timestamps are not even read; files hold at most a few of them."""
_ANY_ARRAY = 1 << 27
"""Bytes that an array may have in a file of any length: constant ones take next to nothing."""
_BEST_RATIO = 100
"""Beyond that an array is at most so many times as large as its file."""


class _Stored(NamedTuple):
    """An array that is in its file as a whole. HDF5 takes microseconds to tell each of these, so
    they are asked for once."""

    source: h5py.h5d.DatasetID
    layout: h5py.h5p.PropDCID
    shape: tuple[int, ...]
    dtype: np.dtype


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
        self._path, self._room = path, room(file.get_filesize())
        root = h5py.h5g.open(file, b"/")
        stored = _links(root)
        self._sets = {n: self._open(root, n, stored) for n in wanted if n.encode() in stored}
        self.shapes: dict[str, tuple[int, ...]] = {n: d.shape for n, d in self._sets.items()}
        self.dtypes: dict[str, np.dtype] = {n: d.dtype for n, d in self._sets.items()}
        if b"timestamps" not in stored:
            raise ReadError(path, "has no 'timestamps'")
        stamps = self._open(root, "timestamps", stored)
        check_timestamps(path, stamps.dtype, stamps.shape)
        self.timestamps = _everything(stamps)
        self.masks: dict[str, np.ndarray] = {}
        if MASK_GROUP.encode() in stored:
            group = _member(path, root, MASK_GROUP, stored)
            if not isinstance(group, h5py.h5g.GroupID):
                raise ReadError(path, f"{MASK_GROUP!r} is an array, not a group")
            held = _links(group)
            for name in (n for n in wanted if n.encode() in held):
                mask = self._open(group, name, held)
                check_mask(path, name, mask.dtype, mask.shape, len(self.timestamps))
                self.masks[name] = _everything(mask)

    def _open(self, group: h5py.h5g.GroupID, name: str, links: dict[bytes, int]) -> _Stored:
        found = _member(self._path, group, name, links)
        if not isinstance(found, h5py.h5d.DatasetID):
            raise ReadError(self._path, f"{name!r} is a group, not an array")
        return _stored(self._path, name, found, self._room)

    def window(self, name: str, window: tuple[slice, ...]) -> np.ndarray:
        """The part `window` of an array, in memory of its own.

        Only the chunks touched are decoded, and of an array that is one zstd chunk only the bytes
        up to the last row.
        """
        stored = self._sets[name]
        source, _, whole, dtype = stored
        shape = tuple(max(0, w.stop - w.start) for w in window)
        if 0 in shape:
            return np.empty(shape, dtype)
        frame = _only_frame(stored)
        if frame is not None:
            rows = (window[0].stop, *whole[1:])
            sizes = (math.prod(part) * dtype.itemsize for part in (rows, whole))
            data = zstd.beginning(frame, *sizes)
            return data.view(dtype).reshape(rows)[window].copy()
        _check_chunks(stored, window)
        out = np.empty(shape, dtype)
        space = source.get_space()
        space.select_hyperslab(tuple(w.start for w in window), shape)
        source.read(h5py.h5s.create_simple(shape), space, out)
        return out


def open_regular(path: Path) -> int:
    """A descriptor of an ordinary file, for reading; a link to one will do, as datasets are often
    put together from links.

    Raises:
      ReadError: a pipe, device or folder, which could keep the reader waiting for ever.
      OSError: it cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ReadError(path, "is a pipe, device or folder, not a file")
    return descriptor


def room(file_bytes: int) -> int:
    """Bytes that an array of a file of that length may have."""
    return _ANY_ARRAY + _BEST_RATIO * file_bytes


def _check_room(path: str | Path, name: str, size: int, most: int) -> None:
    """Raises ReadError if an array or chunk of `size` bytes is more than `room` allows."""
    if size > most:
        raise ReadError(path, f"{name!r} declares {size} bytes, more than the file can hold")


def check_timestamps(path: str, dtype: np.dtype, shape: tuple[int, ...] | None) -> None:
    """Raises ReadError unless timestamps are whole numbers [t, 3] of a sensible number."""
    if shape is None or dtype.kind not in "iu" or len(shape) != 2 or shape[1] != 3:
        raise ReadError(
            path, f"'timestamps' must be whole numbers [timesteps, 3], got {dtype} {shape}"
        )
    if shape[0] > _MOST_ROWS:
        raise ReadError(path, f"has {shape[0]} timesteps, at most {MAX_TIMESTEPS} are supported")


def check_mask(
    path: str, name: str, dtype: np.dtype, shape: tuple[int, ...] | None, rows: int
) -> None:
    """Raises ReadError unless a timestep mask has one true or false per timestamp."""
    if shape != (rows,) or dtype.kind not in "biu":
        raise ReadError(
            path,
            f"the timestep mask of {name!r} must be true/false [{rows}], got {dtype} {shape}",
        )


@contextlib.contextmanager
def open_hdf5(path: Path) -> Iterator[h5py.File]:
    """Opens any HDF5 file of others for reading. Get its arrays by `stored_array`, which keeps to
    the file; h5py itself follows links to other files.

    Raises:
      ReadError: no such file, not an ordinary one, or not HDF5.
    """
    with translate_errors(path):
        os.close(open_regular(path))
        file = h5py.File(path, "r", locking=False)
    with file:
        yield file


def stored_array(file: h5py.File, name: str) -> np.ndarray:
    """An array of a file as a whole, by its path within the file.

    Raises:
      ReadError: no such array, damaged, not stored in the file itself, or larger than it explains.
    """
    with translate_errors(file.filename):
        found: Any = file.id
        for part in (p for p in name.split("/") if p):
            group = h5py.h5g.open(found, b"/") if found is file.id else found
            if not isinstance(group, h5py.h5g.GroupID) or not group.links.exists(part.encode()):
                raise ReadError(file.filename, f"has no array {name!r}")
            found = _member(file.filename, group, part, _links(group))
        if not isinstance(found, h5py.h5d.DatasetID):
            raise ReadError(file.filename, f"{name!r} is a group, not an array")
        _check_chunks(_stored(file.filename, name, found, room(file.id.get_filesize())))
        return h5py.Dataset(found)[()]


def every_array(file: h5py.File) -> dict[str, h5py.Dataset]:
    """All arrays of a file by their paths.

    Raises:
      ReadError: a link instead of something stored, an array that `stored_array` refuses, or
        arrays that together are larger than the file explains.
    """
    out: dict[str, h5py.Dataset] = {}
    most = room(file.id.get_filesize())

    def check(group: h5py.Group) -> None:
        for name, kind in _links(group.id).items():
            _check_link(file.filename, name.decode(errors="replace"), kind)

    def visit(name: str, item: object) -> None:
        nonlocal most
        if isinstance(item, h5py.Dataset):
            stored = _stored(file.filename, name, item.id, most)
            most -= math.prod(stored.shape) * stored.dtype.itemsize  # of all arrays together
            _check_chunks(stored)
            out[name] = item
        elif isinstance(item, h5py.Group):
            check(item)

    with translate_errors(file.filename):
        check(file)
        file.visititems(visit)
    return out


def open_file(source: Path | IO[Any]) -> tuple[h5py.h5f.FileID, h5py.File | None]:
    """Opens a file on disk or in memory for reading: its identifier, to be closed by the caller,
    and an object to keep until then."""
    if isinstance(source, Path):
        os.close(open_regular(source))
        return h5py.h5f.open(os.fsencode(source), h5py.h5f.ACC_RDONLY, _access()), None
    held = h5py.File(source, "r")
    return held.id, held


@functools.cache
def _access() -> h5py.h5p.PropFAID:
    access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    access.set_fclose_degree(h5py.h5f.CLOSE_STRONG)  # closing the file closes its arrays
    access.set_file_locking(False, True)
    return access


def _links(group: h5py.h5g.GroupID) -> dict[bytes, int]:
    """What is under every name of a group: something stored, or a link of some kind."""
    out: dict[bytes, int] = {}

    def note(name: bytes, info: Any) -> None:
        out[name] = info.type

    group.links.iterate(note, info=True)
    return out


def _check_link(path: str, name: str, kind: int) -> None:
    if kind == h5py.h5l.TYPE_HARD:
        return
    if kind == h5py.h5l.TYPE_SOFT:
        raise ReadError(path, f"{name!r} is a link; only what is stored under its name is read")
    raise ReadError(path, f"{name!r} lies outside the file, where nothing is read")


def _member(
    path: str, group: h5py.h5g.GroupID, name: str, links: dict[bytes, int]
) -> h5py.h5g.GroupID | h5py.h5d.DatasetID:
    """What is stored in a group under one of its names."""
    _check_link(path, name, links[name.encode()])
    return h5py.h5o.open(group, name.encode())


def _stored(path: str, name: str, source: h5py.h5d.DatasetID, most: int) -> _Stored:
    """Raises ReadError for arrays outside the file, and for sizes beyond `most` bytes."""
    layout = source.get_create_plist()
    kind = layout.get_layout()
    if kind == h5py.h5d.VIRTUAL or layout.get_external_count():
        raise ReadError(path, f"{name!r} lies outside the file, where nothing is read")
    shape, dtype = source.shape, source.dtype
    if shape is None:
        raise ReadError(path, f"{name!r} is empty")
    if dtype.hasobject:
        # Elements of such arrays are as long as the file says, and all may be one and the same.
        raise ReadError(path, f"{name!r} holds texts, lists or links and no numbers")
    _check_room(path, name, math.prod(shape) * dtype.itemsize, most)
    if kind == h5py.h5d.CHUNKED:
        # Chunks of arrays that can grow may be larger than the array.
        _check_room(path, name, math.prod(layout.get_chunk()) * dtype.itemsize, most)
    return _Stored(source, layout, shape, dtype)


def _check_chunks(stored: _Stored, window: tuple[slice, ...] | None = None) -> None:
    """Raises ValueError if a stored chunk of a window does not hold what a chunk does."""
    source, layout, shape, dtype = stored
    if layout.get_layout() != h5py.h5d.CHUNKED or not source.get_num_chunks():
        return
    filters = [layout.get_filter(i)[0] for i in range(layout.get_nfilters())]
    chunk = layout.get_chunk()
    size = math.prod(chunk) * dtype.itemsize
    window = window or tuple(slice(0, n) for n in shape)
    places = [range(w.start // c, -(-w.stop // c)) for w, c in zip(window, chunk, strict=True)]
    if math.prod(len(p) for p in places) > source.get_num_chunks():
        infos = (source.get_chunk_info(i) for i in range(source.get_num_chunks()))
        wanted: Iterator[tuple[int, ...]] = (i.chunk_offset for i in infos)
    else:
        pieces = itertools.product(*places)
        wanted = (tuple(n * c for n, c in zip(p, chunk, strict=True)) for p in pieces)
    for at in wanted:
        info = source.get_chunk_info_by_coord(at)
        if not info.size:
            continue
        if filters:
            skipped, frame = source.read_direct_chunk(at)
            chunk_filters.check(filters, frame, skipped, size)
        elif info.size != size:
            raise ValueError(f"a chunk of it holds {info.size} bytes instead of {size}")


def _everything(stored: _Stored) -> np.ndarray:
    _check_chunks(stored)
    out = np.empty(stored.shape, stored.dtype)
    if out.size:
        stored.source.read(h5py.h5s.ALL, h5py.h5s.ALL, out)
    return out


def _only_frame(stored: _Stored) -> bytes | None:
    """The compressed bytes of an array that is one zstd chunk as a whole, else None."""
    source, layout, shape, _ = stored
    if (
        not zstd.available()
        or layout.get_layout() != h5py.h5d.CHUNKED
        or layout.get_chunk() != shape
        or [layout.get_filter(i)[0] for i in range(layout.get_nfilters())] != [zstd.FILTER_ID]
        or not source.get_num_chunks()
    ):
        return None
    skipped, frame = source.read_direct_chunk((0,) * len(shape))
    return None if skipped else frame
