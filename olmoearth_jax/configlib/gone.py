"""A setting that is gone, `engine`: what command lines and saved configs of before say of it."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import Any

from olmoearth_jax.configlib.schema import ConfigError

_log = logging.getLogger(__name__)

ENGINE, STREAM, DENSE = "engine", "stream", "dense"


def left_out(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """A saved config without the setting; what it said, if it was right, has no effect."""
    if values.get(ENGINE) not in (STREAM, DENSE):
        return values
    note(values)
    return {name: value for name, value in values.items() if name != ENGINE}


def note(values: Mapping[str, Any]) -> None:
    """Says once that a run of the dense engine goes on on the token stream."""
    if values.get(ENGINE) == DENSE:
        _say_once()


@functools.cache
def _say_once() -> None:
    _log.warning(
        "The saved config has engine=dense, which is gone: the run uses the token stream, which "
        "computes the same losses."
    )


def refuse(value: Any) -> None:
    """Lets a command line or a config file say what is so anyway, and nothing else.

    Raises:
      ConfigError: another value than 'stream'.
    """
    if value != STREAM:
        raise ConfigError(
            f"config path {ENGINE!r} is gone: the token stream is the only engine that trains, and "
            "the dense one is an oracle of the tests; leave it out"
        )
