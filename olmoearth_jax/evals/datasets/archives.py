"""Reading pickles and torch archives without running anything they name.

Published evaluation data come as pickles of third-party classes and as `torch.save` files. Both
are read with an unpickler that knows a short list of names; a file that asks for any other is
refused (spec/evals.md sections 13.2 and 13.3).
"""

from __future__ import annotations

import ast
import collections
import datetime
import io
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


class UnsafePickle(ValueError):
    """A pickle names something that data of this kind never needs."""


class Inert:
    """Stands in for a class of another package: keeps its state and does nothing."""

    class_name = ""

    def __new__(cls, *args: Any, **kwargs: Any) -> Inert:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any):
        self.args = args

    def __setstate__(self, state: Any) -> None:
        parts = state if isinstance(state, tuple) else (state,)
        for part in parts:
            if isinstance(part, Mapping):
                self.__dict__.update(part)


_INERT_PACKAGES = ("geobench", "affine", "rasterio")
_NUMPY_TYPES = ("ndarray", "dtype", "float64", "float32", "int64", "int32", "bool_")
_NAMES: dict[tuple[str, str], Any] = {
    ("numpy", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("numpy", "scalar"): np.float64(0).__reduce__()[0],
    **{("numpy", name): getattr(np, name) for name in _NUMPY_TYPES},
    **{("datetime", n): getattr(datetime, n) for n in ("date", "datetime", "time")},
    **{("datetime", n): getattr(datetime, n) for n in ("timedelta", "timezone")},
    ("collections", "OrderedDict"): collections.OrderedDict,
    **{("builtins", kind.__name__): kind for kind in (set, frozenset, complex, slice)},
    ("_codecs", "encode"): lambda text, encoding="latin1": text.encode("latin1"),
}
"""All that plain data may name: by package (NumPy moves things between its modules) and name."""


class _Restricted(pickle.Unpickler):
    """Data only: containers, dates, NumPy arrays, and inert stand-ins of a few packages."""

    def find_class(self, module: str, name: str) -> Any:
        package = module.split(".")[0]
        if package in _INERT_PACKAGES:
            return type(name, (Inert,), {"class_name": name})
        if (package, name) in _NAMES and (package == module or package == "numpy"):
            return _NAMES[package, name]
        raise UnsafePickle(f"the file asks for {module}.{name}, which its format never needs")


def loads(data: bytes, where: str) -> Any:
    """Unpickles plain data.

    Raises:
      UnsafePickle: it names anything beyond the short list.
      ValueError: damaged; the message names `where`.
    """
    return _run(_Restricted(io.BytesIO(data)), where)


def loads_literal(text: str | bytes, where: str) -> Any:
    """Unpickles the text of a Python bytes literal, as GeoBench keeps it in an attribute."""
    if isinstance(text, bytes):
        text = text.decode("ascii", errors="replace")
    try:
        data = ast.literal_eval(text)
    except (ValueError, SyntaxError) as e:
        raise ValueError(f"{where}: the attribute is not a bytes literal") from e
    if not isinstance(data, bytes):
        raise ValueError(f"{where}: the attribute is a {type(data).__name__}, not bytes")
    return loads(data, where)


def _run(unpickler: pickle.Unpickler, where: str) -> Any:
    try:
        return unpickler.load()
    except UnsafePickle as e:
        raise UnsafePickle(f"{where}: {e}") from e
    except Exception as e:
        # Damaged pickles raise whatever their bytes happen to spell.
        raise ValueError(f"{where} is not a readable pickle: {e}") from e


_STORAGES = {
    "FloatStorage": "<f4", "DoubleStorage": "<f8", "HalfStorage": "<f2", "LongStorage": "<i8",
    "IntStorage": "<i4", "ShortStorage": "<i2", "CharStorage": "<i1", "ByteStorage": "<u1",
    "BoolStorage": "|b1",
}  # fmt: skip


class _TorchUnpickler(pickle.Unpickler):
    """Rebuilds tensors of a torch archive as arrays."""

    def __init__(self, data: bytes, storages: Any):
        super().__init__(io.BytesIO(data))
        self._storages = storages

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _STORAGES:
            return np.dtype(_STORAGES[name])
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        raise UnsafePickle(f"the file asks for {module}.{name}, which tensors never need")

    def persistent_load(self, pid: Any) -> np.ndarray:
        kind, dtype, key, _, count = pid
        if kind != "storage" or not isinstance(dtype, np.dtype):
            raise ValueError(f"unknown storage {kind!r}")
        return self._storages(str(key), dtype, int(count))


def _tensor(storage: np.ndarray, offset: int, shape: tuple, strides: tuple, *_: Any) -> np.ndarray:
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if all(shape) and (min((offset, *strides)) < 0 or last >= len(storage)):
        raise ValueError("a tensor reaches beyond its storage")
    size = storage.dtype.itemsize
    return np.lib.stride_tricks.as_strided(
        storage[offset:], shape, tuple(s * size for s in strides), writeable=False
    )


def load_torch(path: str | Path) -> Any:
    """Arrays (in dicts, lists, ...) of a `torch.save` zip archive, without torch.

    Raises:
      UnsafePickle: it holds anything but tensors and containers.
      ValueError: not such an archive, or damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            main = next((n for n in names if n.endswith("/data.pkl")), None)
            if main is None:
                raise ValueError(f"{path} is a zip file but no torch archive")
            root = main[: -len("data.pkl")]
            order = root + "byteorder"
            big = order in names and archive.read(order).strip() == b"big"

            def storage(key: str, dtype: np.dtype, count: int) -> np.ndarray:
                raw = archive.read(f"{root}data/{key}")
                return np.frombuffer(raw, dtype.newbyteorder(">") if big else dtype, count)

            return _run(_TorchUnpickler(archive.read(main), storage), str(path))
    except zipfile.BadZipFile as e:
        raise ValueError(
            f"{path} is not a torch archive (files of torch before 1.6 must be saved again)"
        ) from e
