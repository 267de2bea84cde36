"""Plain values to and from a typed tree of dataclasses: conversion, dotted paths, error texts."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin

from olmoearth_jax import modalities
from olmoearth_jax.configlib.nesting import DEEPEST, too_deep
from olmoearth_jax.modalities import closest

MODALITY_LISTS = frozenset((
    "training_modalities", "supported_modality_names", "only_decode_modalities",
    "decoded_modalities", "decodable_modalities", "fully_mask_modalities",
    "randomize_missing_modalities", "mask_negatives_for_modalities", "band_dropout_modalities",
    "input_modalities", "token_budget_excluded_modalities",
))  # fmt: skip
"""Members, wherever they stand, that list modality names (upper case is accepted)."""

MODALITY_DICTS = frozenset((
    "tokenization", "tokenization_overrides", "token_exit_cfg", "token_exit_cfg_b",
    "modality_weights", "modality_configs",
))  # fmt: skip
"""Members, wherever they stand, whose keys are modality names."""


class ConfigError(ValueError):
    """A configuration that cannot be used; `problems` holds one sentence per problem."""

    def __init__(self, problems: str | Sequence[str]):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class Text(str):
    """A scalar from the command line that still knows how it was written."""

    value: Any

    def __new__(cls, raw: str, value: Any) -> Text:
        self = super().__new__(cls, raw)
        self.value = value
        return self


class Below(dict[str, Any]):
    """The one member that a dotted path names below its parent."""


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
        (inner,) = (a for a in get_args(hint) if a is not type(None))
        return inner, True
    return hint, False


def item_type(inner: Any) -> Any:
    """Type of the values of a dict type; None for other types."""
    return get_args(inner)[1] if get_origin(inner) is dict else None


def valid_paths(cls: Any, prefix: str = "") -> list[str]:
    """Every path of a config class; members of dicts are shown as `<name>`."""
    out = []
    for name, hint in hints(cls).items():
        inner, _ = strip_optional(hint)
        out.append(prefix + name)
        if dataclasses.is_dataclass(inner):
            out += valid_paths(inner, f"{prefix}{name}.")
        elif dataclasses.is_dataclass(item_type(inner)):
            out += valid_paths(item_type(inner), f"{prefix}{name}.<name>.")
    return out


def unknown_path(path: str, known: Sequence[str]) -> str:
    """The error text for a path that is not one of `known`."""
    text, parent = f"unknown config path {path!r}; ", path.rpartition(".")[0]
    if path.startswith("launch."):
        return text + "launch.submit has flags for jobs: --hosts, --gpus_per_host, ..."
    candidates = [k for k in known if not path.startswith(k + ".")]
    near = difflib.get_close_matches(path, candidates, n=1, cutoff=0.7)
    if not near:  # the right name in the wrong place
        leaf = path.rpartition(".")[2]
        near = sorted((k for k in known if k.rpartition(".")[2] == leaf), key=len)[:1]
    if near:
        return f"{text}did you mean {near[0]!r}?"
    siblings = [k.rpartition(".")[2] for k in known if k.rpartition(".")[0] == parent]
    top = [k for k in known if "." not in k]
    return f"{text}{parent if siblings and parent else 'the top'} has: {', '.join(siblings or top)}"


def canonical(path: str, root: Any) -> str:
    """`path` without leading dashes and `config.`, its `-` as `_` wherever the tree has it so."""
    out, hint = [], root
    for part in path.lstrip("-").removeprefix("config.").split("."):
        inner, _ = strip_optional(hint)
        if dataclasses.is_dataclass(inner):
            part = part.replace("-", "_")
            hint = hints(typing.cast(type, inner)).get(part, Any)
        else:
            hint = item_type(inner) or Any
        out.append(part)
    return ".".join(out)


def set_path(cfg: Any, path: str, value: Any, aliases: Iterable[str] = ()) -> None:
    """Sets one canonical path in place; mappings merge key by key, everything else replaces.

    Args:
      cfg: root of the tree.
      path: dotted path.
      value: plain value, perhaps with `Text` scalars.
      aliases: further valid paths, for the error text.

    Raises:
      ConfigError: unknown path, or a value of the wrong type.
    """
    parts = path.split(".")
    if len(parts) > DEEPEST or too_deep(value):
        raise ConfigError(f"config path {path[:60]!r} lies, or has values, too deep in each other")
    for part in reversed(parts):
        value = Below({part: value})
    try:
        new = convert(type(cfg), value, base=cfg)
    except _UnknownPath as e:
        raise ConfigError(unknown_path(path, [*valid_paths(type(cfg)), *aliases])) from e
    for f in dataclasses.fields(cfg):
        setattr(cfg, f.name, getattr(new, f.name))


def get_path(cfg: Any, path: str) -> Any:
    """The value at a dotted path. Raises ConfigError where there is none."""
    node = cfg
    for part in canonical(path, type(cfg)).split("."):
        if dataclasses.is_dataclass(node) and part in hints(type(node)):
            node = getattr(node, part)
        elif isinstance(node, dict) and part in node:
            node = node[part]
        else:
            raise ConfigError(unknown_path(path, valid_paths(type(cfg))))
    return node


class _UnknownPath(ConfigError):
    """A dotted path leads to nothing."""


def describe(hint: Any) -> str:
    """A type in words, for error texts."""
    inner, optional = strip_optional(hint)
    words = {int: "an integer", float: "a number", bool: "true or false", str: "text"}
    if get_origin(inner) is Literal:
        text = "one of: " + ", ".join(map(str, get_args(inner)))
    elif get_origin(inner) is list:
        text = "a list, such as [a, b]"
    elif get_origin(inner) is dict or dataclasses.is_dataclass(inner):
        text = "a mapping, such as {a: 1}"
    else:
        text = words.get(inner, "any value")
    return text + " or null" if optional else text


def _wrong(path: str, hint: Any, value: Any) -> ConfigError:
    if isinstance(value, Below):
        return _UnknownPath(f"unknown config path below {path!r}")
    got = json.dumps(plain(value), ensure_ascii=False, default=str)
    return ConfigError(f"config path {path!r} takes {describe(hint)}; got {got}")


def convert(hint: Any, value: Any, path: str = "", base: Any = None) -> Any:
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
    if plain(value) is None:
        if optional or inner is Any:
            return None
        raise _wrong(path, hint, value)
    origin = get_origin(inner)
    is_tree = dataclasses.is_dataclass(inner)
    if (is_tree or origin is dict) and not isinstance(value, Mapping):
        raise _wrong(path, hint, value)
    if is_tree:
        return _dataclass(typing.cast(type, inner), value, path, base)
    if origin is dict:
        return _dict(item_type(inner), value, path, base)
    if inner is Any and isinstance(value, Mapping):
        return _dict(Any, value, path, base if isinstance(base, dict) else {})
    if origin is list or (inner is Any and path.rpartition(".")[2] in MODALITY_LISTS):
        return _list(hint, inner, value, path)
    return plain(value) if inner is Any else _scalar(hint, inner, value, path)


def _dataclass(cls: type, value: Mapping[str, Any], path: str, base: Any) -> Any:
    known, prefix = hints(cls), path + "." if path else ""
    out = cls() if base is None else dataclasses.replace(base)
    problems: list[str] = []
    for key, item in value.items():
        if key not in known:
            text = f"unknown config path {prefix + key!r}; {closest(key, known)}"
            if isinstance(value, Below):
                raise _UnknownPath(text)
            problems.append(text)
            continue
        try:
            kept = getattr(out, key) if base is not None else None
            setattr(out, key, convert(known[key], item, prefix + key, kept))
        except _UnknownPath:
            raise
        except ConfigError as e:
            problems += e.problems
    if problems:
        raise ConfigError(problems)
    return out


def _list(hint: Any, inner: Any, value: Any, path: str) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise _wrong(path, hint if inner is not Any else list[str], value)
    item = get_args(inner)[0] if inner is not Any else str
    out = [convert(item, v, f"{path}[{i}]") for i, v in enumerate(value)]
    return _modality_names(out, path) if path.rpartition(".")[2] in MODALITY_LISTS else out


def _dict(item: Any, value: Mapping[str, Any], path: str, base: Any) -> dict[str, Any]:
    out = dict(base or {})
    for key, v in value.items():
        if isinstance(value, Below) and key.replace("-", "_") in out:
            key = key.replace("-", "_")
        if path.rpartition(".")[2] in MODALITY_DICTS and key not in out:
            (key,) = _modality_names([key], path)
        if isinstance(v, Below) and dataclasses.is_dataclass(item) and key not in out:
            raise ConfigError(f"unknown config path '{path}.{key}'; {closest(key, out)}")
        own = isinstance(v, Mapping) and not isinstance(v, Below) and item is Any
        kept = out.get(key)
        new = (
            _dict(Any, v, f"{path}.{key}", kept if isinstance(kept, dict) else {}) if own else None
        )
        out[str(key)] = new if own else convert(item, v, f"{path}.{key}", kept)
    return out


def _modality_names(names: list[Any], path: str) -> list[str]:
    try:
        return list(modalities.resolve(names))
    except ValueError as e:
        raise ConfigError(f"config path {path!r}: {e}") from e


def _scalar(hint: Any, inner: Any, value: Any, path: str) -> Any:
    raw = plain(value)
    number = isinstance(raw, int | float) and not isinstance(raw, bool)
    if get_origin(inner) is Literal:
        for choice in get_args(inner):
            if raw == choice or str(value).lower() == str(choice):
                return choice
        if not isinstance(value, Mapping):
            near = closest(str(raw), map(str, get_args(inner)))
            raise ConfigError(f"config path {path!r} has no value {json.dumps(raw)}; {near}")
    elif inner is str and isinstance(value, str):
        return str(value)
    elif inner is bool and (isinstance(raw, bool) or (number and raw in (0, 1))):
        return bool(raw)
    elif inner is int and number and (isinstance(raw, int) or raw.is_integer()):
        return int(raw)
    elif inner is float and number:
        try:
            return float(raw)
        except OverflowError:
            return math.inf if raw > 0 else -math.inf  # which no setting takes
    raise _wrong(path, hint, value)


def register_modalities(records: Any) -> dict[str, Any]:
    """Adds a user's modality records, or those of a JSON file, to the registry; returns them.

    Raises:
      ConfigError: no such file, or a malformed record.
    """
    records, path = plain(records), "common.extra_modalities"
    whole = isinstance(records, dict) and all(isinstance(r, dict) for r in records.values())
    if not whole and not isinstance(records, str):
        raise ConfigError(f"config path {path!r} takes records {{name: record}} or a JSON file")
    try:
        if isinstance(records, str):
            names = modalities.register_file(records)
            return {n: dict(r) for n, r in modalities.user_records().items() if n in names}
        modalities.register_all(records)
    except ValueError as e:
        raise ConfigError(f"config path {path!r}: {e}") from e
    return records
