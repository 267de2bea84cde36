"""Decompressing only the beginning of a zstd frame.

Published files hold an array as one compressed chunk, rows first. A crop needs the bytes up to its
last row, and HDF5 would decompress the rest as well. The decoder is the one inside hdf5plugin.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from pathlib import Path

import hdf5plugin
import numpy as np

FILTER_ID = 32015
"""Number under which HDF5 knows zstd."""

_RESET_SESSION = 1
_FIRST_ERROR = 2**64 - 4096
"""Return codes from here on are errors."""
_MAGIC = b"\x28\xb5\x2f\xfd"
_KEPT = 1 << 26
"""Largest memory in bytes that a thread keeps from call to call."""


class _Buffer(ctypes.Structure):
    """Memory, its size, and how much of it is used; both ZSTD_inBuffer and ZSTD_outBuffer."""

    _fields_ = (("data", ctypes.c_void_p), ("size", ctypes.c_size_t), ("pos", ctypes.c_size_t))


class _State(threading.local):
    """Decoder and memory of one thread, reused from call to call."""

    decoder: int | None = None
    memory: np.ndarray = np.empty(0, np.uint8)


_STATE = _State()


@functools.cache
def _library() -> ctypes.CDLL | None:
    """hdf5plugin's zstd, or None where it is built without these functions."""
    for path in sorted(Path(hdf5plugin.PLUGIN_PATH).glob("libh5zstd.*")):
        try:
            library = ctypes.CDLL(str(path))
            library.ZSTD_createDCtx.restype = ctypes.c_void_p
            library.ZSTD_DCtx_reset.argtypes = (ctypes.c_void_p, ctypes.c_int)
            step = library.ZSTD_decompressStream
            step.argtypes = (ctypes.c_void_p, ctypes.POINTER(_Buffer), ctypes.POINTER(_Buffer))
            step.restype = ctypes.c_size_t
        except (OSError, AttributeError):
            continue
        return library
    return None


def available() -> bool:
    """Whether `beginning` works in this installation."""
    return _library() is not None


def content_size(frame: bytes) -> int | None:
    """Bytes that a compressed frame says it holds; None where it does not say."""
    if not frame.startswith(_MAGIC) or len(frame) < 6:
        return None
    form = frame[4]
    alone = form >> 5 & 1  # without a byte for the window
    width = (alone, 2, 4, 8)[form >> 6]
    at = 6 - alone + (0, 1, 2, 4)[form & 3]  # behind the number of a dictionary
    if not width or form & 8 or len(frame) < at + width:
        return None
    return int.from_bytes(frame[at : at + width], "little") + (256 if width == 2 else 0)


def beginning(frame: bytes, size: int, whole: int | None = None) -> np.ndarray:
    """The first `size` bytes of a compressed frame, as uint8 valid until this thread's next call.

    Args:
      frame: compressed bytes.
      size: bytes wanted.
      whole: bytes that it may hold at most.

    Raises:
      ValueError: the frame is damaged, shorter than that, or holds more than `whole`.
    """
    library = _library()
    assert library is not None
    if whole is not None and (content_size(frame) or 0) > whole:
        raise ValueError("its compressed data hold more than their array")
    if _STATE.decoder is None:
        _STATE.decoder = library.ZSTD_createDCtx()
    memory = _STATE.memory
    if len(memory) < size:
        memory = np.empty(size, np.uint8)
        if size <= _KEPT:
            _STATE.memory = memory
    library.ZSTD_DCtx_reset(_STATE.decoder, _RESET_SESSION)
    source = _Buffer(ctypes.cast(ctypes.c_char_p(frame), ctypes.c_void_p), len(frame), 0)
    target = _Buffer(memory.ctypes.data, size, 0)
    while target.pos < size:
        before = target.pos, source.pos
        code = library.ZSTD_decompressStream(
            _STATE.decoder, ctypes.byref(target), ctypes.byref(source)
        )
        if code >= _FIRST_ERROR or before == (target.pos, source.pos):
            raise ValueError(f"its compressed data end or break off after {target.pos} bytes")
    return memory[:size]
