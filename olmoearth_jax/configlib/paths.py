"""Reading and setting one dotted path of the configuration tree."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any, get_args, get_origin

from olmoearth_jax.configlib import schema
from olmoearth_jax.configlib.errors import ConfigError
from olmoearth_jax.configlib.tree import ExperimentConfig


def _step(hint: Any) -> tuple[Any, Any]:
    """(inner type, item type if it is a dict) of a field's type."""
    inner, _ = schema.strip_optional(hint)
    return inner, get_args(inner)[1] if get_origin(inner) is dict else None


def canonical(path: str) -> str:
    """`path` without leading dashes and `config.`, its `-` as `_` wherever the tree has it so."""
    path = path.lstrip("-")
    path = path.removeprefix("config.")
    parts, out, hint = path.split("."), [], ExperimentConfig
    for part in parts:
        inner, item = _step(hint)
        if dataclasses.is_dataclass(inner):
            known = schema.hints(typing.cast(type, inner))
            part = part.replace("-", "_")
            hint = known.get(part, Any)
        elif item is not None:
            hint = item
        else:
            hint = Any
        out.append(part)
    return ".".join(out)


def set_path(cfg: ExperimentConfig, path: str, value: Any, known: tuple[str, ...] = ()) -> None:
    """Sets one path; mappings merge key by key, everything else replaces.

    Args:
      cfg: changed in place.
      path: canonical dotted path.
      value: plain value, perhaps with `Text` scalars.
      known: further valid paths (aliases), for the error text.

    Raises:
      ConfigError: unknown path, or a value of the wrong type.
    """
    parts = path.split(".")
    _set(cfg, type(cfg), parts, value, path, known)


def _set(
    node: Any, hint: Any, parts: list[str], value: Any, path: str, known: tuple[str, ...]
) -> Any:
    """The node with `value` set below it at `parts` (a new node where it was None or a leaf)."""
    if not parts:
        return schema.convert(hint, value, path, node)
    inner, item = _step(hint)
    head, rest = parts[0], parts[1:]
    if dataclasses.is_dataclass(inner):
        cls = typing.cast(type, inner)
        members = schema.hints(cls)
        if head not in members:
            raise ConfigError(schema.unknown_path(path, ExperimentConfig, known))
        node = cls() if node is None else node
        kept = getattr(node, head)
        setattr(node, head, _set(kept, members[head], rest, value, path, known))
        return node
    if item is not None:
        node = {} if node is None else node
        key = _key(node, head, path, parts)
        if item is Any and rest:
            raise ConfigError(schema.unknown_path(path, ExperimentConfig, known))
        if dataclasses.is_dataclass(item) and key not in node and rest:
            raise ConfigError(
                f"unknown config path {path!r}; {schema.modalities.closest(head, node)}"
            )
        node[key] = _set(node.get(key), item, rest, value, path, known)
        return node
    raise ConfigError(schema.unknown_path(path, ExperimentConfig, known))


def _key(node: dict[str, Any], head: str, path: str, parts: list[str]) -> str:
    """The dict's own spelling of a key: `-` or `_`, and lower case for modalities."""
    for spelling in (head, head.replace("-", "_")):
        if spelling in node:
            return spelling
    owner = path.split(".")[: -len(parts)]
    if owner and owner[-1] in schema.MODALITY_DICTS:
        return schema._modality_names([head], ".".join(owner))[0]
    return head


def get_path(cfg: ExperimentConfig, path: str) -> Any:
    """The value at a dotted path.

    Raises:
      ConfigError: there is no such path.
    """
    node: Any = cfg
    for part in canonical(path).split("."):
        if dataclasses.is_dataclass(node) and part in schema.hints(type(node)):
            node = getattr(node, part)
        elif isinstance(node, dict) and part in node:
            node = node[part]
        else:
            raise ConfigError(schema.unknown_path(path, ExperimentConfig))
    return node
