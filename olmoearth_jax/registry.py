"""Builds objects from configs of the form {'type': key, **arguments}, with clear errors."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from olmoearth_jax.modalities import closest


def build(
    registry: Mapping[str, type], config: Mapping[str, Any], what: str, default: str | None = None
) -> Any:
    """An instance of the dataclass that the config's type names; the config is left unchanged.

    Args:
      registry: dataclass of each type.
      config: the type and constructor arguments.
      what: the kind of object, for messages, e.g. 'loss'.
      default: type to assume where the config has none.

    Raises:
      ValueError: no or unknown type, unknown argument (the nearest one is named), missing or bad
        value.
    """
    arguments = dict(config)
    key = arguments.pop("type", None) or default
    if key is None:
        raise ValueError(f"a {what} needs a 'type'; {closest('', registry)}")
    if not isinstance(key, str):
        raise ValueError(
            f"the 'type' of a {what} must be a name, got {key!r}; {closest('', registry)}"
        )
    if key not in registry:
        raise ValueError(f"unknown {what} {key!r}; {closest(key, registry)}")
    fields = {f.name: f for f in dataclasses.fields(registry[key]) if f.init}
    for name, f in fields.items():
        if f.default is f.default_factory and name not in arguments:  # both are MISSING
            raise ValueError(f"{what} {key!r} needs {name!r}")
    for name, value in arguments.items():
        if name not in fields:
            raise ValueError(f"{what} {key!r} has no argument {name!r}; {closest(name, fields)}")
        _check_type(f"{what} {key!r}: {name}", fields[name].default, value)
    try:
        return registry[key](**arguments)
    except (TypeError, AttributeError, OverflowError, ZeroDivisionError) as e:
        raise ValueError(f"{what} {key!r} got a value of the wrong type: {e}") from e


def _check_type(label: str, default: Any, value: Any) -> None:
    """Holds a value to the plain type of the argument's default."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    wanted = None
    if isinstance(default, bool):
        wanted = None if isinstance(value, bool) else "true or false"
    elif isinstance(default, float):
        wanted = None if number else "a number"
    elif isinstance(default, int):
        whole = number and isinstance(value, int)
        wanted = None if value is None or whole else "a whole number"
    elif isinstance(default, str):
        wanted = None if isinstance(value, str) else "a string"
    if wanted:
        raise ValueError(f"{label} must be {wanted}, got {value!r}")
