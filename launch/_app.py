"""The command line that all verbs share: config file, overrides, one clear error.

    --config=FILE.py[:argument,...]   a config file, or --config_json=FILE for a saved config
    --run_name=NAME                   the run's folder is ./local_output/NAME
    --config.<path>=<value>           any setting, as often as needed (docs/configuration.md)

A mistake of the user is printed without a traceback, and the exit code is 2.
"""

from __future__ import annotations

import dis
import errno
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from absl import app, flags

from olmoearth_jax import check, commands, config_files, overrides, platforms, plugins
from olmoearth_jax.config import ConfigError, ExperimentConfig, load_json
from olmoearth_jax.outputs import expand_home

USER_ERROR = commands.USER_ERROR

_FIRST = ("config", "run_name", "config_json")
"""Flags that every verb has."""

_OURS = tuple(str(Path(file).resolve().parent) for file in (config_files.__file__, __file__))

_REFUSALS = frozenset((
    errno.ENOENT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EISDIR,
    errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP, errno.EIO, errno.ESTALE,
))  # fmt: skip
"""What the operating system says of files, folders and disks that are not as they should be."""

_CONFIG = flags.DEFINE_string("config", None, "Config file, with an argument after a colon.")
_CONFIG_JSON = flags.DEFINE_string("config_json", None, "Saved config (config.json) to start from.")
_RUN_NAME = flags.DEFINE_string("run_name", None, "Names the run's folder and its logs.")


class UserError(ValueError):
    """A mistake of the user that is no config problem; its text is all that is printed."""


_Verb = Callable[[ExperimentConfig], int | None]


def run(verb: _Verb, require_valid: bool = True) -> None:
    """Runs a verb as a program and ends the process.

    Args:
      verb: gets the config and returns the exit code (None is 0).
      require_valid: stop at problems of the config before the verb is called.
    """
    rest, changes = overrides.take(expand_home(sys.argv))
    body = functools.partial(_main, verb=verb, changes=changes, require_valid=require_valid)
    app.run(body, argv=rest, flags_parser=_parse_flags)


def define_overwrite() -> None:
    """Adds --overwrite to a verb that writes files into folders of users."""
    if "overwrite" not in flags.FLAGS:  # another verb in the same process has it too
        flags.DEFINE_bool("overwrite", False, "Replace files that are not of this program.")


def load(
    config: str | None,
    config_json: str | None = None,
    run_name: str | None = None,
    changes: Sequence[str] = (),
) -> ExperimentConfig:
    """The config of a command line, unchecked.

    Args:
      config: `FILE.py[:argument]`, or None with `config_json`.
      config_json: a saved config or the run folder that holds one.
      run_name: given name; None keeps the config's own.
      changes: overrides `[--config.]path=value`.

    Raises:
      ConfigError: no or two configs, no such file, bad arguments or overrides (all listed).
    """
    if (config is None) == (config_json is None):
        raise ConfigError("give --config=configs/<size>.py or --config_json=FILE (one of them)")
    base = config_files.load_file(config) if config is not None else load_json(config_json or "")
    base.trainer.loaded = {}  # what another run has taken; one that goes on finds it again
    if run_name is not None:
        if config_json is not None and run_name != base.common.run_name:
            base.common.save_folder = None  # another run; its folder follows its name
        base.common.run_name = run_name
    cfg = overrides.apply(base, changes)
    cfg.common.plugins = list(dict.fromkeys([*cfg.common.plugins, *plugins.allowed()]))
    return cfg


def _parse_flags(argv: list[str]) -> list[str]:
    hint = " (settings of the run are given as --config.<path>=<value>)"
    return commands.parse_flags(flags.FLAGS, argv, hint, _FIRST)


def _main(argv: list[str], verb: _Verb, changes: list[str], require_valid: bool) -> int:
    if len(argv) > 1:
        _fail([f"unexpected argument {a!r}; write --config.<path>=<value>" for a in argv[1:]])
    try:
        cfg = load(_CONFIG.value, _CONFIG_JSON.value, _RUN_NAME.value, changes)
        if require_valid:
            check.checked(cfg)
        return verb(cfg) or 0
    except ConfigError as e:
        _fail(e.problems)
    except (ValueError, OSError) as e:
        if not is_users(e):
            raise
        _fail([str(e)])
    except (RuntimeError, AssertionError) as e:
        told = platforms.problem(e)
        if told is None:
            raise
        _fail([told])


def is_users(error: BaseException) -> bool:
    """Whether an error is a sentence for the user, and not a fault of this program.

    It is one if a `raise` of ours raised it as a ValueError or OSError, or if the operating system
    refused what it was asked for. A ValueError out of a call in our code, as of
    `zip(strict=True)` or `list.index`, is a fault, and its traceback is needed.
    """
    if isinstance(error, UserError | ConfigError):
        return True
    if isinstance(error, OSError) and error.errno in _REFUSALS:
        return True
    if not isinstance(error, ValueError | OSError) or error.__traceback__ is None:
        return False
    last = error.__traceback__
    while last.tb_next is not None:
        last = last.tb_next
    code = last.tb_frame.f_code
    raised = dis.opname[code.co_code[last.tb_lasti]] == "RAISE_VARARGS"
    return raised and code.co_filename.startswith(_OURS)


def _fail(problems: Sequence[str]) -> NoReturn:
    """Prints problems and ends the process with USER_ERROR."""
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    sys.stderr.flush()
    sys.exit(USER_ERROR)
