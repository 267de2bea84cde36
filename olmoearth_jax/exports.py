"""Packages that give away names of their modules, and import a module when it is first asked for.

So a package's list of what others may use costs nothing to those who need one module of it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any


def exported(package: str, homes: dict[str, str]) -> tuple[Callable, Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package.

    Args:
      package: its name.
      homes: by module below it the names that it gives away, separated by blanks.
    """
    home = {name: module for module, names in homes.items() for name in names.split()}

    def find(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{home[name]}"), name)

    return find, lambda: sorted(home)
