"""Reads and writes PyTorch's weight files without PyTorch.

A file is a ZIP archive: a pickle that describes the tensors, and one raw file for each storage.
The pickle is read by `plain_pickle`, which knows the few names a state dict consists of and refuses
all others. Files come from others: a tensor lies within its storage, a storage is as long as the
pickle says, and what is read in all is bounded by the length of the file.
"""

from __future__ import annotations

import dataclasses
import math
import os
import pickle
import stat
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from olmoearth_jax.interop.plain_pickle import (
    Maker,
    PickleDamaged,
    PickleRefused,
    PlainReader,
    shown,
)

_DTYPES = {
    "DoubleStorage": np.float64, "FloatStorage": np.float32, "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16, "LongStorage": np.int64, "IntStorage": np.int32,
    "ShortStorage": np.int16, "CharStorage": np.int8, "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}  # fmt: skip
_MOST_COPIES = 8
"""Tensors may share a storage; together they hold at most so many times the file's length."""
_MOST_AXES = 16
_OTHER_KINDS = ("Storage", "_rebuild_tensor_v3", "_rebuild_qtensor", "_rebuild_sparse_tensor")
"""Names of complex, quantized, sparse and very short numbers."""


class NumbersRefused(PickleRefused):
    """The tensors are of a kind that no weights have: complex, quantized, sparse, of 8 bits."""


def read(path: str | Path) -> Any:
    """What a file holds, its tensors as arrays of their own dtype: for weights {key: array}.

    Raises:
      PickleRefused: the file asks for anything but tensors and containers. `NumbersRefused`, if
        it does hold tensors, but of complex or quantized numbers, or of 8 bits.
      ValueError: damaged, cut off, or no such file.
    """
    try:
        with _opened(Path(path)) as file, zipfile.ZipFile(file) as archive:
            return _Archive(archive, os.fstat(file.fileno()).st_size).load()
    except (PickleRefused, PickleDamaged):
        raise
    except zipfile.BadZipFile as e:
        raise ValueError(f"no ZIP archive of tensors, as PyTorch writes since 1.6 ({e})") from None
    except Exception as e:
        # Damaged archives make zipfile raise whatever their bytes happen to spell.
        raise ValueError(str(e) or type(e).__name__) from None


def _opened(path: Path) -> BinaryIO:
    """Opens an ordinary file; a pipe or device could keep the reader waiting for ever."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError("it is a folder, pipe or device and no file")
    return open(descriptor, "rb")


@dataclasses.dataclass(frozen=True)
class _Dtype:
    """The kind of a storage, as the pickle names it."""

    dtype: np.dtype


@dataclasses.dataclass(frozen=True)
class _Storage:
    """Values that tensors are views of; never in the hands of the pickle as an array."""

    key: str
    values: np.ndarray


class _Archive:
    """One archive and what was read of it so far."""

    def __init__(self, archive: zipfile.ZipFile, size: int):
        self._archive, self._size = archive, size
        inside = [n for n in archive.namelist() if n.endswith("/data.pkl")]
        if len(inside) != 1:
            raise PickleRefused("the archive has no data.pkl, so it is none of PyTorch's")
        self._prefix = inside[0].removesuffix("data.pkl")
        order = f"{self._prefix}byteorder"
        big = order in archive.namelist() and self._member(order, 16).strip() == b"big"
        self._order = ">" if big else "<"
        self._room = _MOST_COPIES * size + (1 << 20)
        self._unread = size
        self._storages: dict[str, _Storage] = {}
        self._tensors: dict[tuple, np.ndarray] = {}

    def load(self) -> Any:
        reader = PlainReader(self._find, self._persistent)
        return reader.load(self._member(f"{self._prefix}data.pkl"))

    def _member(self, name: str, most: int | None = None) -> bytes:
        """A stored member as it is. PyTorch compresses none, and what is compressed can be of any
        size."""
        info = self._archive.getinfo(name)
        if info.flag_bits & 1:
            raise ValueError(f"{name} is encrypted")
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise ValueError(f"{name} is compressed, which PyTorch's files never are")
        if info.file_size > (self._size if most is None else most):
            raise ValueError(f"{name} is longer than it can be")
        return self._archive.read(info)

    def _find(self, module: str, name: str) -> Any:
        if module == "torch" and name in _DTYPES:
            return _Dtype(np.dtype(_DTYPES[name]))
        if module.split(".")[0] == "torch" and name.endswith(_OTHER_KINDS):
            raise NumbersRefused(f"it holds numbers of a kind that is not read ({name})")
        made = {
            ("collections", "OrderedDict"): _ordered_dict,
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch._utils", "_rebuild_parameter"): _parameter,
        }.get((module, name))
        if made is None:
            raise PickleRefused(f"it asks for {module}.{name}, which tensors never need")
        return Maker(name, made)

    def _persistent(self, pid: Any) -> _Storage:
        """The storage that a tensor is a view of."""
        kind, dtype, key, _, count = pid
        if kind != "storage" or not isinstance(dtype, _Dtype):
            raise PickleRefused(f"a tensor lies in {shown(kind)} and in no storage")
        if not isinstance(key, str) or not _whole(count):
            raise PickleDamaged("a storage has no name or length")
        if key not in self._storages:
            raw = self._member(f"{self._prefix}data/{key}")
            # Members of many names may lie at the same place of the file.
            self._unread -= len(raw)
            if self._unread < 0:
                raise PickleRefused("its storages together are larger than the file")
            wanted = count * dtype.dtype.itemsize
            if len(raw) < wanted:
                raise PickleDamaged(f"storage {key[:40]} is too short")
            if len(raw) > wanted:
                raise PickleDamaged(f"storage {key[:40]} is longer than the file says")
            self._storages[key] = _Storage(key, self._native(raw, dtype.dtype))
        found = self._storages[key]
        if len(found.values) != count or found.values.dtype != dtype.dtype:
            raise PickleDamaged(f"storage {key[:40]} is named twice, in two ways")
        return found

    def _native(self, raw: bytes, dtype: np.dtype) -> np.ndarray:
        values = np.frombuffer(raw, dtype)
        if dtype == np.bool_:  # NumPy relies on them being 0 or 1
            return values.view(np.uint8) != 0
        return values if self._order == "<" or dtype.itemsize == 1 else values.byteswap()

    def _tensor(
        self, storage: Any, offset: Any, size: Any, stride: Any, *_: Any
    ) -> np.ndarray:  # fmt: skip
        """A copy of one tensor of a storage."""
        form = (offset, *size, *stride) if isinstance(size, tuple) else ()
        whole = isinstance(stride, tuple) and len(size) == len(stride) <= _MOST_AXES
        if not isinstance(storage, _Storage) or not whole or not all(map(_whole, form)):
            raise PickleDamaged("a tensor has no storage, sizes and strides")
        values, last = storage.values, offset
        if 0 in size:
            return np.zeros(size, values.dtype)
        last += sum((n - 1) * s for n, s in zip(size, stride, strict=True))
        # More elements than the storage has would be the same ones again and again.
        if last >= len(values) or math.prod(size) > len(values):
            raise PickleDamaged("a tensor reaches beyond its storage")
        known = (storage.key, *form)
        if known not in self._tensors:
            self._room -= math.prod(size) * values.itemsize
            if self._room < 0:
                raise PickleRefused("its tensors together are far larger than the file")
            steps = [s * values.itemsize for s in stride]
            view = np.lib.stride_tricks.as_strided(values[offset:], size, steps)
            self._tensors[known] = view.copy()
        return self._tensors[known]


def _whole(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _ordered_dict(*items: Any) -> dict:
    if items:
        raise PickleRefused("it makes a dict of something")
    return {}


def _parameter(data: Any = None, *_: Any) -> np.ndarray:
    if not isinstance(data, np.ndarray):
        raise PickleDamaged("a parameter holds no tensor")
    return data


def write(tensors: Mapping[str, np.ndarray], path: Path) -> None:
    """Writes float32 tensors as `torch.load(path, weights_only=True)` reads them.

    Args:
      tensors: float32 arrays by key.
      path: the file, replaced if it exists.
    """
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        with archive.open(_entry("data.pkl"), "w") as file:
            _write_pickle(file, tensors)  # pyright: ignore[reportArgumentType]
        archive.writestr(_entry("byteorder"), "little")
        for number, x in enumerate(tensors.values()):
            with archive.open(_entry(f"data/{number}"), "w", force_zip64=True) as file:
                file.write(np.ascontiguousarray(x, "<f4").data.cast("B") if x.size else b"")
        archive.writestr(_entry("version"), "3\n")


def _entry(name: str) -> zipfile.ZipInfo:
    """A member of fixed date, so that the same tensors make the same bytes."""
    return zipfile.ZipInfo(f"archive/{name}", (1980, 1, 1, 0, 0, 0))


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
