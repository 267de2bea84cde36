"""Programs with flags of their own and no config: parsing, errors for users, exit codes."""

from __future__ import annotations

import sys
from collections.abc import Callable

from absl import app, flags

from olmoearth_jax import platforms

from ._app import USER_ERROR, is_users
from .evaluate import read_flags


def run(body: Callable[[], int], values: flags.FlagValues, argv: list[str], about: str) -> None:
    """Runs a program and ends the process.

    Args:
      body: does the work after the flags are read; gives the exit code.
      values: the program's flags.
      argv: the command line.
      about: text for --help.
    """
    app.run(
        lambda rest: sys.exit(guarded(body, rest)), argv=argv,
        flags_parser=lambda given: read_flags(values, given, about),
    )  # fmt: skip


def guarded(body: Callable[[], int], rest: list[str]) -> int:
    """The exit code of `body`; a mistake of the user is one sentence and the code for it."""
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
