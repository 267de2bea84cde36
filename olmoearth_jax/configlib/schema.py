"""Typed reading of plain values into config dataclasses: paths, conversion, error texts."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from olmoearth_jax import modalities
from olmoearth_jax.configlib.errors import ConfigError

MODALITY_LISTS = frozenset(
    {
        "training_modalities",
        "supported_modality_names",
        "only_decode_modalities",
        "decoded_modalities",
        "decodable_modalities",
        "fully_mask_modalities",
        "randomize_missing_modalities",
        "mask_negatives_for_modalities",
        "band_dropout_modalities",
        "input_modalities",
    }
)
"""Members, wherever they stand, that list modality names (upper case is accepted)."""

MODALITY_DICTS = frozenset(
    {
        "tokenization",
        "tokenization_overrides",
        "token_exit_cfg",
        "token_exit_cfg_b",
        "modality_weights",
    }
)
"""Members, wherever they stand, whose keys are modality names."""


def register_modalities(records: Any) -> dict[str, Any]:
    """Adds a user's modality records, or those of a JSON file, to the registry; returns them.

    Raises:
      ConfigError: no such file, or a malformed record.
    """
    path = "common.extra_modalities"
    if isinstance(records, str):
        try:
            records = json.loads(Path(records).read_text())
        except (OSError, ValueError) as e:
            raise ConfigError(f"config path {path!r}: cannot read {records!r}: {e}") from e
    if not isinstance(records, Mapping) or not all(
        isinstance(r, Mapping) for r in records.values()
    ):
        raise ConfigError(f"config path {path!r} takes records {{name: record}} or a JSON file")
    try:
        modalities.register_all(plain(records))
    except ValueError as e:
        raise ConfigError(f"config path {path!r}: {e}") from e
    return plain(records)


class Text(str):
    """A scalar from the command line that still knows how it was written."""

    value: Any

    def __new__(cls, raw: str, value: Any) -> Text:
        self = super().__new__(cls, raw)
        self.value = value
        return self


def plain(value: Any) -> Any:
    """`value` with every `Text` replaced by what it stands for."""
    if isinstance(value, Text):
        return value.value
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    return value


@functools.lru_cache(maxsize=256)
def hints(cls: type) -> dict[str, Any]:
    """Field name -> type of a config dataclass, in order."""
    known = typing.get_type_hints(cls)
    return {f.name: known[f.name] for f in dataclasses.fields(cls)}


def strip_optional(hint: Any) -> tuple[Any, bool]:
    """(the type without None, whether None is allowed)."""
    if get_origin(hint) in (Union, types.UnionType):
        rest = [a for a in get_args(hint) if a is not type(None)]
        if len(rest) != 1:
            raise TypeError(f"unsupported config type {hint}")
        return rest[0], True
    return hint, False


def valid_paths(cls: type, prefix: str = "") -> list[str]:
    """Every path of a config class; members of dicts are shown as `<name>`."""
    out = []
    for name, hint in hints(cls).items():
        path = prefix + name
        out.append(path)
        inner, _ = strip_optional(hint)
        if dataclasses.is_dataclass(inner):
            out += valid_paths(typing.cast(type, inner), path + ".")
        elif get_origin(inner) is dict and dataclasses.is_dataclass(get_args(inner)[1]):
            out += valid_paths(get_args(inner)[1], path + ".<name>.")
    return out


def unknown_path(path: str, root: type, more: typing.Iterable[str] = ()) -> str:
    """The error text for a path that is not in the tree."""
    known = [*valid_paths(root), *more]
    parent = path.rpartition(".")[0]
    candidates = [k for k in known if not path.startswith(k + ".")]
    near = difflib.get_close_matches(path, candidates, n=1, cutoff=0.7)
    if not near:  # the right name in the wrong place
        leaf = path.rpartition(".")[2]
        near = sorted((k for k in known if k.rpartition(".")[2] == leaf), key=len)[:1]
    if near:
        return f"unknown config path {path!r}; did you mean {near[0]!r}?"
    siblings = [k.rpartition(".")[2] for k in known if k.rpartition(".")[0] == parent]
    if siblings:
        return f"unknown config path {path!r}; {parent or 'the top'} has: {', '.join(siblings)}"
    return f"unknown config path {path!r}; the top has: {', '.join(hints(root))}"


def describe(hint: Any) -> str:
    """A type in words, for error texts."""
    inner, optional = strip_optional(hint)
    words = {int: "an integer", float: "a number", bool: "true or false", str: "text"}
    origin = get_origin(inner)
    if origin is Literal:
        text = "one of: " + ", ".join(str(a) for a in get_args(inner))
    elif origin is list:
        text = "a list, such as [a, b]"
    elif origin is dict or dataclasses.is_dataclass(inner):
        text = "a mapping, such as {a: 1}"
    else:
        text = words.get(inner, "any value")
    return text + " or null" if optional else text


def _wrong(path: str, hint: Any, value: Any) -> ConfigError:
    return ConfigError(f"config path {path!r} takes {describe(hint)}; got {show(value)}")


def show(value: Any) -> str:
    """A value as it is written on the command line."""
    return json.dumps(plain(value), ensure_ascii=False, default=str)


def convert(hint: Any, value: Any, path: str, base: Any = None) -> Any:
    """`value` as type `hint`.

    Args:
      hint: the field's type.
      value: plain Python value, perhaps holding `Text` scalars.
      path: dotted path, for error texts and to recognise modality names.
      base: present value; mappings are merged into it key by key (a copy is returned).

    Raises:
      ConfigError: the value does not fit; names path, value and what is expected.
    """
    inner, optional = strip_optional(hint)
    raw = plain(value)
    if raw is None:
        if optional or inner is Any:
            return None
        raise _wrong(path, hint, value)
    if inner is Any:
        return _free(value, path)
    if dataclasses.is_dataclass(inner):
        if not isinstance(value, Mapping):
            raise _wrong(path, hint, value)
        return _dataclass(typing.cast(type, inner), value, path, base)
    origin = get_origin(inner)
    if origin is list:
        return _list(hint, inner, value, path)
    if origin is dict:
        return _dict(hint, inner, value, path, base)
    return _scalar(hint, inner, value, path)


def _dataclass(cls: type, value: Mapping[str, Any], path: str, base: Any) -> Any:
    known = hints(cls)
    out = dataclasses.replace(base) if base is not None else cls()
    prefix = path + "." if path else ""
    problems = []
    for key, item in value.items():
        if key not in known:
            problems.append(
                f"unknown config path {prefix + key!r}; {modalities.closest(key, known)}"
            )
            continue
        try:
            kept = getattr(out, key) if base is not None else None
            setattr(out, key, convert(known[key], item, prefix + key, kept))
        except ConfigError as e:
            problems += e.problems
    if problems:
        raise ConfigError(problems)
    return out


def _list(hint: Any, inner: Any, value: Any, path: str) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise _wrong(path, hint, value)
    (item,) = get_args(inner)
    out = [convert(item, v, f"{path}[{i}]") for i, v in enumerate(value)]
    if path.rpartition(".")[2] in MODALITY_LISTS:
        return _modality_names(out, path)
    return out


def _dict(hint: Any, inner: Any, value: Any, path: str, base: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise _wrong(path, hint, value)
    _, item = get_args(inner)
    out = dict(base or {})
    by_modality = path.rpartition(".")[2] in MODALITY_DICTS
    for key, v in value.items():
        key = _modality_names([key], path)[0] if by_modality else str(key)
        out[key] = convert(item, v, f"{path}.{key}", out.get(key))
    return out


def _free(value: Any, path: str) -> Any:
    """A value of an untyped dict, with modality names brought to their registry form."""
    raw, name = plain(value), path.rpartition(".")[2]
    if name in MODALITY_LISTS and raw is not None:
        if not isinstance(raw, list):
            raise ConfigError(f"config path {path!r} takes a list, such as [a, b]; got {show(raw)}")
        return _modality_names(raw, path)
    if name in MODALITY_DICTS and isinstance(raw, dict):
        return {_modality_names([k], path)[0]: v for k, v in raw.items()}
    return raw


def _modality_names(names: list[Any], path: str) -> list[str]:
    try:
        return list(modalities.resolve(names))
    except ValueError as e:
        raise ConfigError(f"config path {path!r}: {e}") from e


def _scalar(hint: Any, inner: Any, value: Any, path: str) -> Any:
    raw = plain(value)
    if get_origin(inner) is Literal:
        for choice in get_args(inner):
            if raw == choice or str(value).lower() == str(choice):
                return choice
        raise ConfigError(
            f"config path {path!r} has no value {show(raw)}; "
            f"{modalities.closest(str(raw), [str(c) for c in get_args(inner)])}"
        )
    if inner is str:
        if isinstance(value, str) and not isinstance(raw, list | dict):
            return str(value)
        raise _wrong(path, hint, value)
    if inner is bool:
        if isinstance(raw, bool) or raw in (0, 1):
            return bool(raw)
        raise _wrong(path, hint, value)
    if isinstance(raw, bool) or not isinstance(raw, int | float):
        raise _wrong(path, hint, value)
    if inner is int:
        if float(raw).is_integer():
            return int(raw)
        raise _wrong(path, hint, value)
    return float(raw)
