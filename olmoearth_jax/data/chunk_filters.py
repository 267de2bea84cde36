"""What a stored chunk of an HDF5 array holds once its filters are undone, told without HDF5.

HDF5 takes a chunk for as long as the array's form says, whatever its filters make of it: after a
shorter one it hands out memory that is not the file's, and for a longer one it makes room for all
of it. So the length is found out here first. Only filters that can be judged like that are taken.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

from olmoearth_jax.data import zstd

DEFLATE, SHUFFLE, FLETCHER32, LZF, LZ4 = 1, 2, 3, 32000, 32004
_CHECKSUM_BYTES = 4
_ENDS_EARLY = "its compressed data end early"
_NOT_READ = (
    "is compressed in a way that is not read (filter {}); write it again with gzip, zstd or lz4"
)


def check(filters: Sequence[int], frame: bytes, skipped: int, size: int) -> None:
    """Raises ValueError unless a chunk holds exactly `size` bytes after its filters.

    Args:
      filters: their numbers, in the order in which they were applied when writing.
      frame: the chunk as it lies in the file.
      skipped: bits of the filters that were left out for this chunk.
      size: bytes of a chunk of the array.
    """
    applied = [f for i, f in enumerate(filters) if not skipped >> i & 1]
    compressors = [f for f in applied if f not in (SHUFFLE, FLETCHER32)]
    if len(compressors) > 1:
        raise ValueError("is compressed twice, which is not read")
    first = applied.index(compressors[0]) if compressors else 0
    if SHUFFLE in applied[first + 1 :] and compressors:
        raise ValueError("is shuffled after it was compressed, which is not read")
    sums_inside = applied[:first].count(FLETCHER32) * _CHECKSUM_BYTES
    sums_outside = (applied.count(FLETCHER32) * _CHECKSUM_BYTES) - sums_inside
    length = len(frame) - sums_outside
    if length < 0:
        raise ValueError(_ENDS_EARLY)
    if compressors:
        length = _content(compressors[0], frame[:length], size + sums_inside) - sums_inside
    if length > size:
        raise ValueError("its compressed data hold more than their array")
    if length < size:
        raise ValueError(f"a chunk of it holds {max(length, 0)} bytes instead of {size}")


def _content(number: int, frame: bytes, most: int) -> int:
    """Bytes that a compressed frame makes; no more than `most` + 1 are counted where they have to
    be made for it."""
    if number == zstd.FILTER_ID:
        size = zstd.content_size(frame)
        if size is None:
            raise ValueError("its compressed data do not say how long they are")
        return size
    if number == DEFLATE:
        return _deflated(frame, most)
    if number == LZ4:
        return _lz4(frame)
    if number == LZF:
        return _lzf(frame, most)
    raise ValueError(_NOT_READ.format(number))


def _deflated(frame: bytes, most: int) -> int:
    try:
        return len(zlib.decompressobj().decompress(frame, most + 1))
    except zlib.error as e:
        raise ValueError(f"its compressed data are damaged ({e})") from None


def _lz4(frame: bytes) -> int:
    """The length in the head of a frame, after checking that its blocks lie within it."""
    if len(frame) < 12:
        raise ValueError(_ENDS_EARLY)
    total, block = int.from_bytes(frame[:8], "big"), int.from_bytes(frame[8:12], "big")
    if not block:
        raise ValueError(_ENDS_EARLY)
    at, made = 12, 0
    while made < total:
        stored = int.from_bytes(frame[at : at + 4], "big")
        at += 4 + stored
        made += block
        if at > len(frame):
            raise ValueError(_ENDS_EARLY)
    return total


def _lzf(frame: bytes, most: int) -> int:
    """The length that the operations of an LZF frame add up to."""
    at, made = 0, 0
    while at < len(frame) and made <= most:
        operation = frame[at]
        if operation < 32:  # that many bytes and one as they are
            at, made = at + operation + 2, made + operation + 1
            continue
        long = operation >> 5 == 7
        if at + 1 + long >= len(frame):
            raise ValueError(_ENDS_EARLY)
        made += (operation >> 5) + 2 + (frame[at + 1] if long else 0)
        at += 2 + long
    return made
