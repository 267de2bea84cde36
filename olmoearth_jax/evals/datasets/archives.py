"""Reading pickles and torch archives without running anything they name.

Published evaluation data come as pickles of third-party classes and as `torch.save` files. Both
are read by `interop.plain_pickle` with a short list of names; a file that asks for any other is
refused (spec/evals.md sections 13.2 and 13.3).
"""

from __future__ import annotations

import ast
import datetime
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from olmoearth_jax.interop import torch_file
from olmoearth_jax.interop.plain_pickle import (
    Maker,
    PickleDamaged,
    PickleRefused,
    PlainReader,
    Stateful,
    plain_key,
    shown,
)


class _Inert(Stateful):
    """Stands in for an object of another package: keeps its state and does nothing."""

    def __init__(self, *args: Any):
        self.args = args

    def with_state(self, state: Any) -> _Inert:
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, Mapping):
                vars(self).update({str(k): v for k, v in part.items()})
        return self


class _Dtype(Stateful):
    """A NumPy dtype by its plain name; the state may only say its byte order."""

    def __init__(self, name: Any = None, *_: Any):
        if not isinstance(name, str) or name not in _PLAIN:
            raise PickleRefused(f"it asks for the data type {shown(name)}")
        self.dtype = np.dtype(name)

    def with_state(self, state: Any) -> _Dtype:
        plain = isinstance(state, tuple) and state[2:5] == (None, None, None)
        if not plain or state[1] not in ("<", ">", "|", "="):
            raise PickleRefused("it makes up a data type")
        self.dtype = self.dtype.newbyteorder(state[1])
        return self


_PLAIN = {f"{kind}{size}" for kind in "iuf" for size in (2, 4, 8)} | {
    "b1", "i1", "u1", "bool", "float32", "float64", "int64", "int32", "uint8",
}  # fmt: skip


class _Array(Stateful):
    """An array before its state is known."""

    unfinished = True

    def with_state(self, state: Any) -> np.ndarray:
        if not isinstance(state, tuple) or len(state) != 5:
            raise PickleDamaged("an array has no state")
        _, shape, dtype, columns_first, data = state
        return _filled(shape, dtype, data, "F" if columns_first is True else "C")


def _filled(shape: Any, dtype: Any, data: Any, order: Any = "C") -> np.ndarray:
    """An array of exactly these bytes."""
    if not isinstance(dtype, _Dtype):
        raise PickleRefused("an array has no plain data type")
    if isinstance(data, str):
        data = data.encode("latin1")
    sizes = isinstance(shape, tuple) and len(shape) <= 16
    if not sizes or not all(type(n) is int and 0 <= n < 2**40 for n in shape):
        raise PickleDamaged("an array has no shape")
    if not isinstance(data, bytes) or len(data) != math.prod(shape) * dtype.dtype.itemsize:
        raise PickleRefused("an array does not hold the bytes of its shape")
    values = np.frombuffer(data, dtype.dtype)
    if dtype.dtype == np.bool_:  # NumPy relies on them being 0 or 1
        values = values.view(np.uint8) != 0
    return values.reshape(shape, order=order).copy()


def _scalar(dtype: Any, data: Any = None) -> Any:
    return _filled((), dtype, data)[()]


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    if not isinstance(text, str):
        raise PickleDamaged("bytes are written as something else than text")
    return text.encode("latin1")


def _plain_set(items: Any = ()) -> set:
    return set(map(plain_key, items))


def _ordered_dict(pairs: Any = ()) -> dict:
    return {plain_key(key): value for key, value in pairs}


def _from_numbers(kind: Any) -> Any:
    """A maker of things that are made of numbers, texts and nothing nested."""

    def make(*arguments: Any) -> Any:
        plain = (str, bytes, int, float, type(None), datetime.timedelta, datetime.timezone)
        if not all(isinstance(a, plain) for a in arguments):
            raise PickleRefused(f"a {kind.__name__} is made of other things than numbers")
        return kind(*arguments)

    return make


_INERT_PACKAGES = ("geobench", "affine", "rasterio")
_NAMES: dict[tuple[str, str], Any] = {
    ("numpy", "_reconstruct"): lambda *_: _Array(),
    ("numpy", "ndarray"): None,
    ("numpy", "scalar"): _scalar,
    ("numpy", "dtype"): _Dtype,
    **{
        ("datetime", kind.__name__): _from_numbers(kind)
        for kind in (
            datetime.date,
            datetime.datetime,
            datetime.time,
            datetime.timedelta,
            datetime.timezone,
        )
    },
    ("collections", "OrderedDict"): _ordered_dict,
    ("builtins", "set"): _plain_set,
    ("builtins", "frozenset"): _plain_set,
    **{("builtins", kind.__name__): _from_numbers(kind) for kind in (complex, slice)},
    ("_codecs", "encode"): _encode,
}
"""All that plain data may name: by package (NumPy moves things between its modules) and name."""


def _find(module: str, name: str) -> Any:
    module = "builtins" if module == "__builtin__" else module  # as Python 2 called it
    package = module.split(".")[0]
    if package in _INERT_PACKAGES:
        return Maker(name, _Inert)
    if (package, name) in _NAMES and (package == module or package == "numpy"):
        made = _NAMES[package, name]
        return None if made is None else Maker(name, made)
    raise PickleRefused(f"the file asks for {module}.{name}, which its format never needs")


def loads(data: bytes, where: str) -> Any:
    """Unpickles plain data.

    Raises:
      PickleRefused: it names anything beyond the short list.
      ValueError: damaged; the message names `where`.
    """
    try:
        return PlainReader(_find).load(data)
    except PickleRefused as e:
        raise PickleRefused(f"{where}: {e}") from None
    except PickleDamaged as e:
        raise ValueError(f"{where} is not a readable pickle: {e}") from None


def loads_literal(text: Any, where: str) -> Any:
    """Unpickles the text of a Python bytes literal, as GeoBench keeps it in an attribute."""
    if isinstance(text, bytes):
        text = text.decode("ascii", errors="replace")
    try:
        data = ast.literal_eval(str(text))
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError) as e:
        raise ValueError(f"{where}: the attribute is not a bytes literal") from e
    if not isinstance(data, bytes):
        raise ValueError(f"{where}: the attribute is a {type(data).__name__}, not bytes")
    return loads(data, where)


def load_torch(path: str | Path) -> Any:
    """Arrays (in dicts, lists, ...) of a `torch.save` zip archive, without torch.

    Raises:
      PickleRefused: it holds anything but tensors and containers.
      ValueError: not such an archive, or damaged.
    """
    try:
        return torch_file.read(path)
    except PickleRefused as e:
        raise PickleRefused(f"{path}: {e}") from None
    except ValueError as e:
        raise ValueError(f"{path} is not a torch archive, or is damaged: {e}") from None
