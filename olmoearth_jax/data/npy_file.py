"""NumPy's own files, `.npy` and `.npz`, as others wrote them.

`numpy.load` makes room for whatever a header declares. Here a header is believed only as far as the
bytes behind it go, and nothing compressed is taken that is far larger than its file.
"""

from __future__ import annotations

import math
import os
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np

from olmoearth_jax.data.hdf5_file import open_regular, room

_KINDS = "biufcmMSU"
_MOST_HEADER = 10_000
_READERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def read(path: str | Path) -> Any:
    """The array of an `.npy` file, or {name: array} of an `.npz` file, as its content says.

    Raises:
      ValueError: not such a file, damaged, of Python objects, or larger than the file explains.
      OSError: it cannot be opened.
    """
    path = Path(path)
    with open(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        try:
            if file.read(4) == b"PK\x03\x04":
                file.seek(0)
                return _members(file, size)
            file.seek(0)
            return array(file, size)
        except Exception as e:
            # A damaged archive or header makes the libraries raise whatever its bytes spell.
            told = str(e) or type(e).__name__
            raise ValueError(f"{path} cannot be read as a NumPy file: {told}") from None


def array(file: IO[bytes], size: int) -> np.ndarray:
    """The array of an open `.npy` file.

    Args:
      file: at its begin.
      size: bytes from there to its end.

    Raises:
      ValueError: it is none, or holds fewer bytes than its header declares.
    """
    version = np.lib.format.read_magic(file)
    if version not in _READERS:
        raise ValueError(f"its format {version} is not that of an array of numbers")
    shape, by_columns, dtype = _READERS[version](file, max_header_size=_MOST_HEADER)
    if dtype.kind not in _KINDS:
        raise ValueError(f"it holds {str(dtype)[:40]} and no numbers")
    if any(n < 0 for n in shape) or len(shape) > 32:
        raise ValueError("its shape makes no sense")
    wanted = math.prod(shape) * dtype.itemsize
    if wanted > size - file.tell():
        raise ValueError(f"its header declares {wanted} bytes, more than the file holds")
    raw = np.empty(wanted, np.uint8)
    filled, room_left = 0, raw.data
    while filled < wanted:
        got = file.readinto(room_left[filled:])  # pyright: ignore[reportAttributeAccessIssue]
        if not got:
            raise ValueError("it is cut off")
        filled += got
    values = raw.view(dtype)
    if dtype == np.bool_:  # NumPy relies on them being 0 or 1
        values = values.view(np.uint8) != 0
    return values.reshape(shape, order="F" if by_columns else "C")


def _members(file: IO[bytes], size: int) -> dict[str, np.ndarray]:
    most, out = room(size), {}
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            name = info.filename.removesuffix(".npy")
            most -= info.file_size
            if most < 0:
                raise ValueError("its arrays are far larger than the file")
            if info.compress_type == zipfile.ZIP_STORED and info.file_size > size:
                raise ValueError(f"{name} is longer than the file")
            with archive.open(info) as member:
                out[name] = array(member, info.file_size)
                if member.read(1):
                    raise ValueError(f"{name} holds more than its array")
    return out
