"""Config files: where they are found, and how a module is made of one.

The ones that come with the program are the modules of `olmoearth_jax.configs`, also in a source
tree, where their folder stands beside the package. A file of the user is loaded as if it lay among
them, so that a copy of one still imports what it did (`from . import common`).
"""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

from olmoearth_jax.config import ConfigError, ExperimentConfig
from olmoearth_jax.configlib import gone
from olmoearth_jax.proposals import nearest

_PACKAGE = "olmoearth_jax.configs"


def _folder() -> Path:
    """The folder of the config files that come with the program."""
    here = Path(__file__).resolve().parent
    inside = here / "configs"
    return inside if inside.is_dir() else here.parent / "configs"


def load_file(text: str) -> ExperimentConfig:
    """The config of `FILE.py[:argument]`.

    A file that is not found from the working directory is looked for among the program's own,
    which also have names without folder and ending: `base:version=v1_2`, `ema`.

    Raises:
      ConfigError: no such file, no get_config in it, a bad argument, or a setting that is gone.
    """
    module, argument = load_module(text)
    if not hasattr(module, "get_config"):
        raise ConfigError(f"config file {module.__file__!r} has no function get_config(arg)")
    values: Any = module.get_config(argument)
    if isinstance(values, ExperimentConfig):
        gone.refuse(getattr(values, gone.ENGINE, gone.STREAM))
        return values
    return ExperimentConfig.from_dict(values.to_dict() if hasattr(values, "to_dict") else values)


def load_module(text: str) -> tuple[types.ModuleType, str]:
    """(the module, the argument) of `FILE.py[:argument]`.

    Raises:
      ConfigError: no such file.
    """
    name, _, argument = text.partition(":")
    path = _find(name)
    if path.suffix != ".py":
        raise ConfigError(f"config file {name!r} is not a Python file; for JSON use --config_json")
    _own_package()
    return _execute(_module_name(path), path), argument


def _find(name: str) -> Path:
    own = _folder()
    named = [own / f"{name}.py", own / "ablations" / f"{name}.py"] if name else []
    for path in (Path(name), own.parent / name, *named):
        if path.is_file():
            return path
    known = [p.relative_to(own.parent) for p in sorted(own.rglob("[a-z]*.py"))]
    paths = [p.as_posix() for p in known if p.name != "common.py"]  # what the others share
    near = nearest(name, paths) or nearest(name, [p.stem for p in known])
    hint = "" if near is None else f"did you mean {near!r}? "
    raise ConfigError(f"config file {name!r} does not exist; {hint}known: {', '.join(paths)}")


def _own_package() -> None:
    """Makes the program's own configs importable by their name, installed or not."""
    if _PACKAGE in sys.modules or importlib.util.find_spec(_PACKAGE) is not None:
        return
    _execute(_PACKAGE, _folder() / "__init__.py", keep=True)


def _module_name(path: Path) -> str:
    """The name that a file is loaded under, which says what its relative imports mean."""
    whole, own = path.resolve(), _folder()
    if own in whole.parents:
        return ".".join((_PACKAGE, *whole.relative_to(own).with_suffix("").parts))
    return f"{_PACKAGE}.{path.stem}"


def _execute(name: str, path: Path, keep: bool = False) -> types.ModuleType:
    """Runs a file as the module `name`; a name is only kept for others to import if asked for."""
    inside = [str(path.parent)] if path.name == "__init__.py" else None
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=inside)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    if keep:
        sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
