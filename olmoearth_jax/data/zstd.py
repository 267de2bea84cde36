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


def beginning(frame: bytes, size: int) -> np.ndarray:
    """The first `size` bytes of a compressed frame, as uint8 valid until this thread's next call.

    Raises:
      ValueError: the frame is damaged, or shorter than that.
    """
    library = _library()
    assert library is not None
    if _STATE.decoder is None:
        _STATE.decoder = library.ZSTD_createDCtx()
    if len(_STATE.memory) < size:
        _STATE.memory = np.empty(size, np.uint8)
    library.ZSTD_DCtx_reset(_STATE.decoder, _RESET_SESSION)
    source = _Buffer(ctypes.cast(ctypes.c_char_p(frame), ctypes.c_void_p), len(frame), 0)
    target = _Buffer(_STATE.memory.ctypes.data, size, 0)
    while target.pos < size:
        before = target.pos, source.pos
        code = library.ZSTD_decompressStream(
            _STATE.decoder, ctypes.byref(target), ctypes.byref(source)
        )
        if code >= _FIRST_ERROR or before == (target.pos, source.pos):
            raise ValueError(f"its compressed data end or break off after {target.pos} bytes")
    return _STATE.memory[:size]
