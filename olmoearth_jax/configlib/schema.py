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
from olmoearth_jax.configlib.values import DEEPEST, plain, scalar, too_deep, unquoted
from olmoearth_jax.modalities import ModalityName, closest


class ConfigError(ValueError):
    """A configuration that cannot be used; `problems` holds one sentence per problem."""

    def __init__(self, problems: str | Sequence[str]):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


@functools.lru_cache(maxsize=256)
def hints(cls: type) -> dict[str, Any]:
    """Field name -> type of a config dataclass, in order."""
    known = typing.get_type_hints(cls, include_extras=True)
    return {f.name: known[f.name] for f in dataclasses.fields(cls)}


def strip_optional(hint: Any) -> tuple[Any, bool]:
    """(the type without None, whether None is allowed)."""
    if get_origin(hint) in (Union, types.UnionType):
        (inner,) = (a for a in get_args(hint) if a is not type(None))
        return inner, True
    return hint, False


def _names_modalities(hint: Any) -> bool:
    """Whether a list lists modalities by name, or the keys of a dict are such names."""
    return naming_part(hint) is not None


def naming_part(hint: Any) -> Any:
    """What of a type, or of a union of types, names modalities; None if nothing does."""
    parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return next((part for part in parts if get_args(part)[:1] == (ModalityName,)), None)


def _item_type(inner: Any) -> Any:
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
        elif dataclasses.is_dataclass(_item_type(inner)):
            out += valid_paths(_item_type(inner), f"{prefix}{name}.<name>.")
    return out


def _unknown_path(path: str, known: Sequence[str]) -> str:
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
            hint = _item_type(inner) or Any
        out.append(part)
    return ".".join(out)


def set_path(
    cfg: Any, path: str, value: Any, aliases: Iterable[str] = (), *, written: bool = False
) -> None:
    """Sets one canonical path in place; mappings merge key by key, everything else replaces.

    Args:
      cfg: root of the tree.
      path: dotted path.
      value: plain value.
      aliases: further valid paths, for the error text.
      written: `value` is as `values.parse` gives it, and its texts stand for what the annotation
        makes of them.

    Raises:
      ConfigError: unknown path, or a value of the wrong type.
    """
    parts = path.split(".")
    if len(parts) > DEEPEST or too_deep(value):
        raise ConfigError(f"config path {path[:60]!r} lies, or has values, too deep in each other")
    try:
        _set_below(type(cfg), cfg, parts, _Given(value, written), "")
    except _UnknownPath as e:
        raise ConfigError(_unknown_path(path, [*valid_paths(type(cfg)), *aliases])) from e


class _Given(typing.NamedTuple):
    value: Any
    written: bool


def _set_below(hint: Any, node: Any, parts: Sequence[str], given: _Given, path: str) -> Any:
    """`node`, of type `hint` and at `path`, with a value set at `parts` below it."""
    if not parts:
        return convert(hint, given.value, path, node, written=given.written)
    (inner, _), (name, *rest) = strip_optional(hint), parts
    prefix = path + "." if path else ""
    if dataclasses.is_dataclass(inner):
        known = hints(typing.cast(type, inner))
        if name not in known:
            raise _UnknownPath(f"unknown config path {prefix + name!r}")
        node = typing.cast(type, inner)() if node is None else node
        kept = getattr(node, name)
        setattr(node, name, _set_below(known[name], kept, rest, given, prefix + name))
        return node
    if get_origin(inner) is not dict and inner is not Any:
        raise _UnknownPath(f"unknown config path below {path!r}")
    node, item = dict(node) if isinstance(node, dict) else {}, _item_type(inner) or Any
    if name.replace("-", "_") in node:
        name = name.replace("-", "_")
    if _names_modalities(inner) and name not in node:
        (name,) = _modality_names([name], path)
    if dataclasses.is_dataclass(item) and name not in node:
        raise ConfigError(f"unknown config path {prefix + name!r}; {closest(name, node)}")
    node[name] = _set_below(item, node.get(name), rest, given, prefix + name)
    return node


def get_path(cfg: Any, path: str) -> Any:
    """The value at a dotted path. Raises ConfigError where there is none."""
    node = cfg
    for part in canonical(path, type(cfg)).split("."):
        if dataclasses.is_dataclass(node) and part in hints(type(node)):
            node = getattr(node, part)
        elif isinstance(node, dict) and part in node:
            node = node[part]
        else:
            raise ConfigError(_unknown_path(path, valid_paths(type(cfg))))
    return node


class _UnknownPath(ConfigError):
    """A dotted path leads to nothing."""


def describe(hint: Any) -> str:
    """A type in words, for error texts."""
    inner, optional = strip_optional(hint)
    words: dict[Any, str] = {int: "an integer", float: "a number", bool: "true or false"}
    words |= dict.fromkeys((str, ModalityName), "text")
    if get_origin(inner) is Literal:
        text = "one of: " + ", ".join(map(str, get_args(inner)))
    elif get_origin(inner) in (list, tuple):
        text = "a list, such as [a, b]"
    elif get_origin(inner) is dict or dataclasses.is_dataclass(inner):
        text = "a mapping, such as {a: 1}"
    else:
        text = words.get(inner, "any value")
    return text + " or null" if optional else text


def _wrong(path: str, hint: Any, value: Any) -> ConfigError:
    got = json.dumps(value, ensure_ascii=False, default=str)
    return ConfigError(f"config path {path!r} takes {describe(hint)}; got {got}")


def convert(
    hint: Any, value: Any, path: str = "", base: Any = None, *, written: bool = False
) -> Any:
    """`value` as type `hint`.

    Args:
      hint: the field's type.
      value: plain Python value.
      path: dotted path, for error texts.
      base: present value; mappings are merged into it key by key (a copy is returned).
      written: see `set_path`.

    Raises:
      ConfigError: the value does not fit; names path, value and what is expected.
    """
    inner, optional = strip_optional(hint)
    if written and isinstance(value, str):
        value, written = _read(inner, value, optional), False
    if value is None:
        if optional or inner is Any:
            return None
        raise _wrong(path, hint, value)
    origin = get_origin(inner)
    is_tree = dataclasses.is_dataclass(inner)
    if (is_tree or origin is dict) and not isinstance(value, Mapping):
        raise _wrong(path, hint, plain(value) if written else value)
    if is_tree:
        return _dataclass(typing.cast(type, inner), value, path, base, written)
    if origin is dict or (inner is Any and isinstance(value, Mapping)):
        return _dict(inner, value, path, base if isinstance(base, dict) else {}, written)
    if origin in (list, tuple):
        return _list(hint, inner, value, path, written)
    value = plain(value) if written else value
    return value if inner is Any else _scalar(hint, inner, value, path)


def _read(inner: Any, text: str, optional: bool) -> Any:
    """What a text from the command line stands for where a value of type `inner` is wanted.

    Where null is not taken, 'none' is the text, as of position encodings.
    """
    choices = get_args(inner) if get_origin(inner) is Literal else ()
    for choice in choices:
        if text.lower() == str(choice):
            return choice
    value = scalar(text)
    empty = value is None and (optional or text.lower() != "none")
    stays = inner in (str, ModalityName) and not empty and unquoted(text) is None
    return text if stays else value


def _dataclass(cls: type, value: Mapping[str, Any], path: str, base: Any, written: bool) -> Any:
    known, prefix = hints(cls), path + "." if path else ""
    out = cls() if base is None else dataclasses.replace(base)
    problems: list[str] = []
    for key, item in value.items():
        if key not in known:
            problems.append(f"unknown config path {prefix + key!r}; {closest(key, known)}")
            continue
        try:
            kept = getattr(out, key) if base is not None else None
            setattr(out, key, convert(known[key], item, prefix + key, kept, written=written))
        except ConfigError as e:
            problems += e.problems
    if problems:
        raise ConfigError(problems)
    return out


def _list(hint: Any, inner: Any, value: Any, path: str, written: bool) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise _wrong(path, hint, value)
    item = get_args(inner)[0]
    out = [convert(item, v, f"{path}[{i}]", written=written) for i, v in enumerate(value)]
    return _modality_names(out, path) if _names_modalities(inner) else out


def _dict(
    inner: Any, value: Mapping[str, Any], path: str, base: dict[str, Any], written: bool
) -> dict[str, Any]:
    out, item = dict(base), _item_type(inner) or Any
    for key, v in value.items():
        if _names_modalities(inner) and key not in out:
            (key,) = _modality_names([key], path)
        out[str(key)] = convert(item, v, f"{path}.{key}", out.get(key), written=written)
    return out


def _modality_names(names: list[Any], path: str) -> list[str]:
    try:
        return list(modalities.resolve(names))
    except ValueError as e:
        raise ConfigError(f"config path {path!r}: {e}") from e


def _scalar(hint: Any, inner: Any, value: Any, path: str) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if get_origin(inner) is Literal:
        for choice in get_args(inner):
            if value == choice or str(value).lower() == str(choice):
                return choice
        if not isinstance(value, Mapping):
            near = closest(str(value), map(str, get_args(inner)))
            raise ConfigError(f"config path {path!r} has no value {json.dumps(value)}; {near}")
    elif inner in (str, ModalityName) and isinstance(value, str):
        return value
    elif inner is bool and (isinstance(value, bool) or (number and value in (0, 1))):
        return bool(value)
    elif inner is int and number and (isinstance(value, int) or value.is_integer()):
        return int(value)
    elif inner is float and number:
        try:
            return float(value)
        except OverflowError:
            return math.inf if value > 0 else -math.inf  # which no setting takes
    raise _wrong(path, hint, value)


def register_modalities(records: Any) -> dict[str, Any]:
    """Adds a user's modality records, or those of a JSON file, to the registry; returns them.

    Raises:
      ConfigError: no such file, or a malformed record.
    """
    path = "common.extra_modalities"
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
