"""Modules of a user that are imported before a run: masking strategies, losses and the like.

A config only names them, for information. Code is imported if this process was told so on its
command line (`--plugins=a,b`, with any program) or by its environment (`OLMOEARTH_PLUGINS=a,b`): a
config, a checkpoint or a job file of somebody else never makes anything run.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Iterable, Sequence

FLAG = "--plugins"
VARIABLE = "OLMOEARTH_PLUGINS"
HELP = "Modules of your own to import first, by commas (docs/new_masking.md)."

_NO_NAME = "{!r} is no name of a module: write a.b for a/b.py, without folder and ending"
_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)


def allowed() -> tuple[str, ...]:
    """Names of the modules that this process may import, in order."""
    given = os.environ.get(VARIABLE, "").split(",")
    return tuple(dict.fromkeys(name.strip() for name in given if name.strip()))


def is_flag(argument: str) -> bool:
    """Whether an argument of a command line is `--plugins` or `-plugins`, with or without names."""
    return argument.partition("=")[0] in (FLAG, FLAG[1:])


def take(argv: Sequence[str]) -> list[str]:
    """A command line without `--plugins=a,b`, whose names are allowed from here on.

    They go into the environment, so that processes that this one starts know them too.

    Raises:
      ValueError: the flag has no names.
    """
    out, names = [], list(allowed())
    for argument in argv:
        _, equals, value = argument.partition("=")
        if not is_flag(argument):
            out.append(argument)
        elif not equals or not value:
            raise ValueError(f"{FLAG} needs names of modules, as in {FLAG}=my_masks,my_losses")
        else:
            names += value.split(",")
    if len(out) < len(argv):
        os.environ[VARIABLE] = ",".join(dict.fromkeys(n.strip() for n in names if n.strip()))
    return out


def as_flags() -> list[str]:
    """The flag with which another program imports the same modules; [] if there are none."""
    names = allowed()
    return [f"{FLAG}={','.join(names)}"] if names else []


def load() -> None:
    """Imports the allowed modules, also from the working directory.

    Raises:
      ValueError: no module of that name, or one that imports what is not there.
    """
    for name in allowed():
        if found := problem_of(name):
            raise ValueError(f"{FLAG}: {found}")
        if name in sys.modules:
            continue
        if os.getcwd() not in sys.path and "" not in sys.path:
            sys.path.append(os.getcwd())  # a console command does not look there
        try:
            importlib.import_module(name)
        except ImportError as e:
            if name.endswith(".py"):  # a.py could be the module py of a package a, too
                raise ValueError(f"{FLAG}: {_NO_NAME.format(name)}") from None
            raise ValueError(f"{FLAG}: the module {name} cannot be imported: {e}") from None


def problem_of(name: str) -> str | None:
    """What is wrong with a name; None if it can be one of a module."""
    if _NAME.fullmatch(name):
        return None
    return _NO_NAME.format(name[:60])


def problems(names: Iterable[str]) -> list[str]:
    """One sentence where a config names modules that this process was not told to import."""
    wrong = [text for name in names if (text := problem_of(name))]
    if wrong:
        return [f"common.plugins: {text}" for text in wrong]
    absent = [name for name in names if name not in allowed()]
    if not absent:
        return []
    listed = ",".join(dict.fromkeys([*allowed(), *absent]))
    return [
        f"the config uses the plugins {', '.join(absent)}; their code is only imported if you "
        f"say so: add {FLAG}={listed} (or set {VARIABLE})"
    ]
