"""An index in front of an HDF5 sample file, by which a crop is read without the HDF5 library.

Opening the arrays of a small-chunked file through HDF5 takes longer than decompressing a crop of
them. Files that this package writes in small zstd chunks therefore say in their user block, which
HDF5 skips, where every chunk lies. To everybody else they are ordinary HDF5 files.

The block: `MAGIC`, the length and CRC-32 of what follows (two little-endian uint32), a JSON text, a
zero byte, and per chunk, array by array, its offset (uint64) and, after all offsets, its size
(uint32). The JSON tells the length of the file, timestamps, masks, and per array shape, dtype and
chunk shape.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import operator
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from olmoearth_jax.data import zstd
from olmoearth_jax.data.hdf5_file import MASK_GROUP, every_array, open_hdf5, open_regular, room

MAGIC = b"OEJINDEX"
_PREFIX = len(MAGIC) + 8
_FIRST_READ = 16384
"""Bytes read at first: the index of nine modalities in the default chunks fits."""


@dataclasses.dataclass(frozen=True)
class _Array:
    """One array: its form, and its chunks' offsets and sizes in C order of the chunk grid."""

    shape: tuple[int, ...]
    dtype: np.dtype
    chunk: tuple[int, ...]
    offsets: list[int]
    sizes: list[int]

    @property
    def grid(self) -> tuple[int, ...]:
        """Chunks along each axis."""
        return _grid(self.shape, self.chunk)


def _grid(shape: tuple[int, ...], chunk: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(-(-n // c) for n, c in zip(shape, chunk, strict=True))


def block_size(shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]) -> int:
    """Bytes of user block that an index of arrays {name: (shape, chunk)} may need.

    HDF5 asks for a power of two of at least 512.
    """
    chunks = sum(math.prod(_grid(shape, chunk)) for shape, chunk in shapes.values())
    rows = max([shape[-2] for shape, _ in shapes.values() if len(shape) > 1], default=0)
    room = _PREFIX + 12 * chunks + 256 * (len(shapes) + 1) + 64 * max(rows, 12) * (len(shapes) + 1)
    return max(512, 1 << (room - 1).bit_length())


def write(path: Path) -> bool:
    """Writes the index of a finished file into its user block.

    Returns:
      False where the file cannot have one: no room, arrays that are not all in zstd chunks, or
      contents that only reading through HDF5 judges and names.
    """
    with h5py.File(path, "r", locking=False) as file:
        room, found = file.userblock_size, _contents(file)
    if not room or found is None:
        return False
    timestamps, masks, arrays = found
    text = {
        "bytes": path.stat().st_size,
        "timestamps": timestamps.tolist(),
        "masks": {n: m.astype(int).tolist() for n, m in masks.items()},
        "arrays": {n: [a.shape, a.dtype.str, a.chunk] for n, a in arrays.items()},
    }
    offsets = np.array([o for a in arrays.values() for o in a.offsets], "<u8")
    sizes = np.array([s for a in arrays.values() for s in a.sizes], "<u4")
    body = json.dumps(text, separators=(",", ":")).encode() + b"\0"
    body += offsets.tobytes() + sizes.tobytes()
    head = np.array([len(body), zlib.crc32(body)], "<u4").tobytes()
    if _PREFIX + len(body) > room:
        return False
    with path.open("r+b") as file:
        file.write(MAGIC + head + body)
    return True


_Contents = tuple[np.ndarray, dict[str, np.ndarray], dict[str, _Array]]
"""Timestamps, masks and arrays of a file."""


def _contents(file: h5py.File) -> _Contents | None:
    """What the index of a file says; None where something is not of the published form.

    An index would hide such a thing from the checks of `Hdf5File` and `SampleFile`.
    """
    items = dict(file.items())
    group = items.pop(MASK_GROUP, None)
    if not isinstance(group, h5py.Group | None) or "timestamps" not in items:
        return None
    masks = {} if group is None else dict(group.items())
    arrays: dict[str, _Array] = {}
    for name, item in items.items():
        described = _describe(item.id) if isinstance(item, h5py.Dataset) else None
        if described is None:
            return None
        arrays[name] = described
    if any(not isinstance(m, h5py.Dataset) or m.dtype.kind != "b" for m in masks.values()):
        return None
    timestamps = items["timestamps"][()]
    if timestamps.dtype.kind not in "iu" or timestamps.ndim != 2:
        return None
    return timestamps, {n: m[()] for n, m in masks.items()}, arrays


def _describe(source: h5py.h5d.DatasetID) -> _Array | None:
    """An array as the index tells it; None where it cannot."""
    layout = source.get_create_plist()
    if layout.get_layout() != h5py.h5d.CHUNKED or not source.shape:
        return None
    if [layout.get_filter(i)[0] for i in range(layout.get_nfilters())] != [zstd.FILTER_ID]:
        return None
    chunk = layout.get_chunk()
    grid = _grid(source.shape, chunk)
    offsets, sizes = np.zeros(grid, np.int64), np.zeros(grid, np.int64)
    if source.get_num_chunks() != offsets.size:
        return None  # chunks that were never written have no place
    for i in range(source.get_num_chunks()):
        info = source.get_chunk_info(i)
        at = tuple(o // c for o, c in zip(info.chunk_offset, chunk, strict=True))
        if info.filter_mask:
            return None
        offsets[at], sizes[at] = info.byte_offset, info.size
    return _Array(
        source.shape, source.dtype, chunk, offsets.ravel().tolist(), sizes.ravel().tolist()
    )


class IndexedFile:
    """A file opened by its index; use `open_indexed`.

    Attributes:
      arrays: by name, timestamps too.
      shapes, dtypes: per array but timestamps.
      timestamps: whole numbers [t, 3].
      masks: per modality with one, bool [t].
    """

    def __init__(self, descriptor: int, text: Any, table: bytes, file_bytes: int):
        self._descriptor = descriptor
        self.arrays = _parse_arrays(text, table, file_bytes)
        self.shapes = {n: a.shape for n, a in self.arrays.items() if n != "timestamps"}
        self.dtypes = {n: a.dtype for n, a in self.arrays.items() if n != "timestamps"}
        stamps, masks = text.get("timestamps"), text.get("masks")
        if not isinstance(stamps, list) or not isinstance(masks, dict):
            raise ValueError("its index has no timestamps or masks")
        self.timestamps = np.array(stamps, np.int64)
        self.masks = {n: _parse_mask(m) for n, m in masks.items()}

    def window(self, name: str, window: tuple[slice, ...]) -> np.ndarray:
        """The part `window` of an array, in memory of its own.

        Raises:
          ValueError: damaged data.
        """
        array = self.arrays[name]
        shape = tuple(max(0, w.stop - w.start) for w in window)
        out = np.empty(shape, array.dtype)
        if 0 in shape:
            return out
        grid, size = array.grid, math.prod(array.chunk) * array.dtype.itemsize
        touched = [_overlaps(w, c) for w, c in zip(window, array.chunk, strict=True)]
        for pieces in itertools.product(*touched):
            number = 0
            for (chunk, _, _), along in zip(pieces, grid, strict=True):
                number = number * along + chunk
            frame = os.pread(self._descriptor, array.sizes[number], array.offsets[number])
            data = zstd.beginning(frame, size, size).view(array.dtype).reshape(array.chunk)
            out[tuple(p[2] for p in pieces)] = data[tuple(p[1] for p in pieces)]
        return out


def _parse_arrays(text: Any, table: bytes, file_bytes: int) -> dict[str, _Array]:
    """The arrays of an index, after checking all by which they are read later.

    Raises:
      ValueError: forms or places that no file has.
    """
    if not isinstance(text, dict) or not isinstance(text.get("arrays"), dict):
        raise ValueError("its index lists no arrays")
    count = len(table) // 12
    offsets = np.frombuffer(table, "<u8", count)
    sizes = np.frombuffer(table, "<u4", count, offset=8 * count)
    # Each alone first: the sum of two may be too large for its type.
    if count and (offsets.max() > file_bytes or (offsets + sizes).max() > file_bytes):
        raise ValueError("its index names places beyond its end")
    starts, lengths = offsets.tolist(), sizes.tolist()
    out: dict[str, _Array] = {}
    first = 0
    for name, entry in text["arrays"].items():
        shape, dtype, chunk = _parse_form(name, entry, room(file_bytes))
        last = first + math.prod(_grid(shape, chunk))
        out[name] = _Array(shape, dtype, chunk, starts[first:last], lengths[first:last])
        first = last
    if first != count or len(table) != 12 * count:
        raise ValueError(f"its index holds {count} places for {first} chunks")
    return out


def _parse_form(
    name: str, entry: Any, most: int
) -> tuple[tuple[int, ...], np.dtype, tuple[int, ...]]:
    """Shape, dtype and chunk of an array of an index."""
    if not isinstance(entry, list) or len(entry) != 3 or not isinstance(entry[1], str):
        raise ValueError(f"its index does not tell the form of {name!r}")
    shape, chunk = entry[0], entry[2]
    fits = isinstance(shape, list) and isinstance(chunk, list) and 0 < len(shape) == len(chunk)
    # A bool is an int to isinstance, and a float may equal one.
    whole = fits and set(map(type, (*shape, *chunk))) == {int}
    if not whole or min(chunk) < 1 or not all(map(operator.le, chunk, shape)):
        raise ValueError(f"its index gives {name!r} the shape {shape} in chunks of {chunk}")
    dtype = np.dtype(entry[1])
    if math.prod(shape) * dtype.itemsize > most:
        raise ValueError(f"its index makes {name!r} larger than the file can hold")
    return tuple(shape), dtype, tuple(chunk)


def _parse_mask(mask: Any) -> np.ndarray:
    if not isinstance(mask, list) or not set(mask) <= {0, 1}:
        raise ValueError("its index holds a timestep mask of something else than 0 and 1")
    return np.array(mask, bool)


def _overlaps(window: slice, chunk: int) -> list[tuple[int, slice, slice]]:
    """Per chunk along an axis that a window touches: (number, part of the chunk, of the window)."""
    out = []
    for number in range(window.start // chunk, (window.stop - 1) // chunk + 1):
        low = max(window.start, number * chunk)
        high = min(window.stop, (number + 1) * chunk)
        inside = slice(low - number * chunk, high - number * chunk)
        out.append((number, inside, slice(low - window.start, high - window.start)))
    return out


def open_indexed(descriptor: int) -> IndexedFile | None:
    """Reads the index of an open file.

    Args:
      descriptor: file descriptor; the caller closes it, after the last use of what is returned.

    Returns:
      None for a file without an index.

    Raises:
      ValueError: the index is damaged, or the file is not as long as it says.
    """
    if not zstd.available():
        return None
    head = os.pread(descriptor, _FIRST_READ, 0)
    if not head.startswith(MAGIC) or len(head) < _PREFIX:
        return None
    length, checksum = np.frombuffer(head, "<u4", 2, offset=len(MAGIC)).tolist()
    file_bytes = os.fstat(descriptor).st_size
    length = min(length, file_bytes)  # of a file cut short there is less
    body = head[_PREFIX : _PREFIX + length]
    if len(body) < length:
        body += os.pread(descriptor, length - len(body), _PREFIX + len(body))
    if len(body) < length or zlib.crc32(body) != checksum:
        raise ValueError("its index is damaged; copy the file again, or rechunk its original")
    text, _, table = body.partition(b"\0")
    parsed = json.loads(text)
    expected = parsed.get("bytes") if isinstance(parsed, dict) else None
    if file_bytes != expected:
        raise ValueError(f"it should be {expected} bytes long; copy it again")
    return IndexedFile(descriptor, parsed, table, file_bytes)


def disagreement(path: Path) -> str | None:
    """What a file's index says otherwise than the file, or None; so does one changed later.

    Raises:
      ValueError: see `open_indexed`.
    """
    with open(open_regular(path), "rb") as file:
        indexed = open_indexed(file.fileno())
    if indexed is None:
        return None
    with open_hdf5(path) as file:
        every_array(file)  # refuses what is not stored in the file
        truth = _contents(file)
    if truth is None or truth[2].keys() != indexed.arrays.keys():
        return "other arrays"
    timestamps, masks, arrays = truth
    if not np.array_equal(timestamps, indexed.timestamps):
        return "other timestamps"
    same = masks.keys() == indexed.masks.keys()
    if not same or any(not np.array_equal(m, indexed.masks[n]) for n, m in masks.items()):
        return "other timestep masks"
    moved = [n for n, array in arrays.items() if array != indexed.arrays[n]]
    return f"other places or forms of {', '.join(moved)}" if moved else None
