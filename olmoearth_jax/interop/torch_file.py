"""Reads and writes PyTorch's weight files without PyTorch.

A file is a ZIP archive: a pickle that describes the tensors, and one raw file for each storage.
The pickle is read by an interpreter that knows the few names a state dict consists of and refuses
all others, so nothing in a file can run code.
"""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

_DTYPES = {
    "DoubleStorage": np.float64, "FloatStorage": np.float32, "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16, "LongStorage": np.int64, "IntStorage": np.int32,
    "ShortStorage": np.int16, "CharStorage": np.int8, "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}  # fmt: skip


def read(path: Path) -> Any:
    """What a file holds, its tensors as arrays of their own dtype: for weights {key: array}.

    Raises:
      pickle.UnpicklingError: the file asks for anything but tensors and containers.
      ValueError, zipfile.BadZipFile, EOFError: damaged, cut off, or no such file.
    """
    with zipfile.ZipFile(path) as archive:
        inside = [n for n in archive.namelist() if n.endswith("/data.pkl")]
        if len(inside) != 1:
            raise pickle.UnpicklingError("the archive has no data.pkl")
        return _Reader(archive, inside[0].removesuffix("data.pkl")).load()


class _Reader(pickle.Unpickler):
    """Interprets the pickle of one archive."""

    def __init__(self, archive: zipfile.ZipFile, prefix: str):
        self._pickle = archive.open(f"{prefix}data.pkl")
        super().__init__(self._pickle)
        self.archive, self.prefix = archive, prefix
        self.storages: dict[str, np.ndarray] = {}
        big = f"{prefix}byteorder" in archive.namelist()
        self.order = ">" if big and archive.read(f"{prefix}byteorder") == b"big" else "<"

    def find_class(self, module: str, name: str) -> Any:
        """Called for every global of the pickle."""
        known = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): _tensor,
            ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
        }
        if module == "torch" and name in _DTYPES:
            return np.dtype(_DTYPES[name])
        if (module, name) in known:
            return known[module, name]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    def persistent_load(self, pid: Any) -> np.ndarray:
        """The storage that a tensor is a view of."""
        kind, dtype, key, _, count = pid
        if kind != "storage" or not isinstance(dtype, np.dtype):
            raise pickle.UnpicklingError(f"it asks for a {kind!r}")
        if key not in self.storages:
            raw = self.archive.read(f"{self.prefix}data/{key}")
            if len(raw) < count * dtype.itemsize:
                raise ValueError(f"storage {key} is too short")
            wide = dtype if dtype.itemsize == 1 or dtype.kind == "V" else dtype.newbyteorder("=")
            values = np.frombuffer(raw, dtype, count)
            self.storages[key] = values if self.order == "<" else values.byteswap().view(wide)
        return self.storages[key]


def _tensor(storage: np.ndarray, offset: int, size: tuple, stride: tuple, *_: Any) -> np.ndarray:
    """A copy of one tensor of a storage."""
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    empty = 0 in size
    if min((offset, *size, *stride), default=0) < 0 or (not empty and last >= len(storage)):
        raise ValueError("a tensor reaches beyond its storage")
    if empty:
        return np.zeros(size, storage.dtype)
    steps = [s * storage.itemsize for s in stride]
    return np.lib.stride_tricks.as_strided(storage[offset:], size, steps).copy()


def write(tensors: Mapping[str, np.ndarray], path: Path) -> None:
    """Writes float32 tensors as `torch.load(path, weights_only=True)` reads them.

    Args:
      tensors: float32 arrays by key.
      path: the file, replaced if it exists.
    """
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        with archive.open("archive/data.pkl", "w") as file:
            _write_pickle(file, tensors)  # pyright: ignore[reportArgumentType]
        archive.writestr("archive/byteorder", "little")
        for number, x in enumerate(tensors.values()):
            with archive.open(f"archive/data/{number}", "w", force_zip64=True) as file:
                file.write(np.ascontiguousarray(x, "<f4").data.cast("B") if x.size else b"")
        archive.writestr("archive/version", "3\n")


def _write_pickle(file: BinaryIO, tensors: Mapping[str, np.ndarray]) -> None:
    """The pickle of a state dict, by hand: its names need not exist in this process."""
    op = pickle

    def text(value: str) -> bytes:
        raw = value.encode()
        return op.BINUNICODE + struct.pack("<I", len(raw)) + raw

    def whole(value: int) -> bytes:
        if value < 2**31:
            return op.BININT + struct.pack("<i", value)
        return op.LONG1 + b"\x08" + struct.pack("<q", value)

    def several(values: tuple[int, ...]) -> bytes:
        return op.MARK + b"".join(map(whole, values)) + op.TUPLE

    no_hooks = op.GLOBAL + b"collections\nOrderedDict\n" + op.EMPTY_TUPLE + op.REDUCE
    file.write(op.PROTO + b"\x02" + op.EMPTY_DICT + op.MARK)
    for number, (key, x) in enumerate(tensors.items()):
        strides = np.empty(x.shape, np.int8).strides  # of single bytes: in elements
        file.write(text(key) + op.GLOBAL + b"torch._utils\n_rebuild_tensor_v2\n" + op.MARK)
        file.write(op.MARK + text("storage") + op.GLOBAL + b"torch\nFloatStorage\n")
        file.write(text(str(number)) + text("cpu") + whole(x.size) + op.TUPLE + op.BINPERSID)
        file.write(whole(0) + several(x.shape) + several(strides) + op.NEWFALSE + no_hooks)
        file.write(op.TUPLE + op.REDUCE)
    file.write(op.SETITEMS + op.STOP)
