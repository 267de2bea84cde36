"""Programs with flags of their own and no config: errors for users, exit codes."""

from __future__ import annotations

import sys
from collections.abc import Callable

from absl import flags
from absl import logging as absl_logging

from olmoearth_jax import commands, platforms

from ._app import USER_ERROR, is_users


def run(body: Callable[[], int], values: flags.FlagValues) -> None:
    """Runs a program and ends the process.

    Args:
      body: does the work after the flags are read; gives the exit code.
      values: the program's flags.
    """
    commands.run(lambda rest: guarded(body, rest), values)


def guarded(body: Callable[[], int], rest: list[str]) -> int:
    """The exit code of `body`; a mistake of the user is one sentence and the code for it."""
    absl_logging.set_verbosity(absl_logging.ERROR)
    try:
        if len(rest) > 1:
            raise ValueError(f"unexpected argument {rest[1]!r}")
        return body()
    except (ValueError, OSError) as e:
        if not is_users(e):
            raise
        told = str(e)
    except RuntimeError as e:
        told = platforms.problem(e)
        if told is None:
            raise
    print(f"error: {told}", file=sys.stderr, flush=True)
    return USER_ERROR


def needed(values: flags.FlagValues, name: str) -> str:
    """The text of a flag that must be given.

    Raises:
      ValueError: it is not.
    """
    value = values[name].value
    if not value:
        raise ValueError(f"give --{name}")
    return str(value)


def take_device(number: int | None) -> None:
    """Starts JAX and makes one device its default, for --device.

    Raises:
      ValueError: JAX finds no devices, or there is none of this number.
    """
    import jax

    platforms.check()
    if number is None:
        return
    devices = jax.devices()
    if number >= len(devices):
        raise ValueError(f"there is no device {number}; there are {len(devices)}")
    jax.config.update("jax_default_device", devices[number])
