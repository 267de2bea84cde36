"""Help and mistakes on a command line, answered before a program imports what takes seconds.

`flag_table.json` holds, per program, its help and what is needed to read its flags; it is written
by `python -m tools.flag_table`. A program whose source has changed since answers by itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from olmoearth_jax.outputs import expand_home

TABLE = Path(__file__).with_name("flag_table.json")
HELP = ("--help", "-help", "-h", "--helpshort", "--helpfull", "-helpshort", "-helpfull")

DUMP = "OLMOEARTH_DUMP_FLAGS"
"""A variable of the environment: programs print their entry of the table and end."""

WITH_CONFIG = ("launch.train", "launch.dry_run", "launch.prep", "launch.visualize")
"""Programs that read the config of a run before anything else."""

_SHARED = (
    "launch/_app.py", "launch/_flags.py", "launch/_image_flags.py", "launch/_samples.py",
    "launch/_workers.py", "tools/_workers.py",
)  # fmt: skip


def of_command_line() -> str | None:
    """'launch.train' for `python -m launch.train ...` (or below the package), else None."""
    given = getattr(sys, "orig_argv", [])
    at = given.index("-m") if "-m" in given else len(given)
    if at + 1 >= len(given) or len(given) - at - 1 != len(sys.argv):
        return None
    return given[at + 1].removeprefix("olmoearth_jax.")


def answer(module: str | None, with_config: bool = True) -> None:
    """Ends the process if help was asked for, or with 2 at a mistake in flags or config.

    Args:
      module: as 'launch.train'; None does nothing.
      with_config: look into the config too, where the program reads one.
    """
    record = None if module is None or DUMP in os.environ else _record(module)
    if record is None:
        return
    if module == "launch.submit" and any(re.match("--?job(=|$)", a) for a in sys.argv):
        return  # job files alone have flags of their own
    from absl import flags

    from olmoearth_jax import plugins

    argv = expand_home(sys.argv)
    changes = (
        [a for a in argv if a.startswith(("-config.", "--config."))] if record["config"] else []
    )
    argv = [a for a in argv if a not in changes]
    if any(a in HELP for a in argv[1:]):
        show(record["help"])
    values = _values(record["flags"])
    own = plugins.allowed() or any(plugins.is_flag(a) for a in argv)
    try:
        rest = values([a for a in argv if not plugins.is_flag(a)])
    except flags.Error as e:
        _end([f"{e}{record['hint']}"])
    if with_config and module in WITH_CONFIG and len(rest) == 1 and not own:
        _check_config(values, changes)


def _check_config(values: Any, changes: Sequence[str]) -> None:
    from olmoearth_jax import config_files
    from olmoearth_jax.config import ConfigError, load_json

    file, saved = values["config"].value, values["config_json"].value
    if (file is None) == (saved is None):
        return
    try:
        base = load_json(saved) if file is None else config_files.load_file(file)
        if changes:
            from olmoearth_jax import overrides

            overrides.apply(base, changes)
    except ConfigError as e:
        _end(e.problems)
    except Exception:
        return  # a fault of the file, which the program shows


def show(text: str) -> NoReturn:
    """Prints help and ends the process."""
    try:
        print(text, flush=True)
    except BrokenPipeError:  # the reader has seen enough, as `head` has
        sys.stderr.close()
    sys.exit(0)


def _end(problems: Sequence[str]) -> None:
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    sys.stderr.flush()
    sys.exit(2)


def sources(module: str) -> list[Path]:
    """The files that a program's flags are defined in."""
    here = Path(__file__).resolve().parent
    top = here if (here / "launch").is_dir() else here.parent
    return [top / f"{module.replace('.', '/')}.py", *(top / name for name in _SHARED)]


def digest(module: str) -> str:
    """SHA-256 of the files that a program's flags are defined in."""
    found = hashlib.sha256()
    for path in sources(module):
        found.update(path.read_bytes())
    return found.hexdigest()


def _record(module: str) -> dict[str, Any] | None:
    """What the table says of a program; None if it says nothing, or what is out of date."""
    try:
        record = json.loads(TABLE.read_text(encoding="utf-8")).get(module)
        return record if record and record["digest"] == digest(module) else None
    except (OSError, ValueError, KeyError):
        return None


def describe(values: Any, help_text: str, hint: str, config: bool) -> dict[str, Any]:
    """The entry of the running program, without its digest."""
    from absl import flags

    held = {}
    for name in values:
        flag = values[name]
        if name != flag.name:
            continue  # its short name
        parser = flag.parser
        kind = "bool" if flag.boolean else type(parser).__name__
        if isinstance(flag, flags.MultiFlag):
            kind = f"Multi{kind}"
        about = {
            "kind": kind,
            "low": getattr(parser, "lower_bound", None),
            "high": getattr(parser, "upper_bound", None),
            "short": flag.short_name,
            "choices": list(getattr(parser, "enum_values", None) or []),
        }
        held[name] = {key: value for key, value in about.items() if value not in (None, [])}
    return {"help": help_text, "hint": hint, "config": config, "flags": held}


def _values(held: Mapping[str, Mapping[str, Any]]) -> Any:
    """Flags of the same names and kinds, without their meaning."""
    from absl import flags

    values = flags.FlagValues()
    for name, about in held.items():
        low, high = about.get("low"), about.get("high")
        kind, more = about["kind"], {"short_name": about.get("short"), "flag_values": values}
        multi = kind.startswith("Multi")
        kind = kind.removeprefix("Multi")
        if kind == "bool":
            flags.DEFINE_bool(name, None, "", **more)
        elif kind == "IntegerParser":
            define = flags.DEFINE_multi_integer if multi else flags.DEFINE_integer
            define(name, None, "", lower_bound=low, upper_bound=high, **more)
        elif kind == "FloatParser":
            define = flags.DEFINE_multi_float if multi else flags.DEFINE_float
            define(name, None, "", lower_bound=low, upper_bound=high, **more)
        elif kind == "EnumParser" and not multi:
            flags.DEFINE_enum(name, None, about["choices"], "", **more)
        else:
            define = flags.DEFINE_multi_string if multi else flags.DEFINE_string
            define(name, None, "", **more)
    return values
