"""Prints pip constraints that hold every dependency to its declared lower bound (make test-oldest).

python -m tools.oldest > oldest.txt
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

_BOUND = re.compile(r"([\w.-]+)(?:\[[\w,-]+\])?>=([\d.]+)")


def constraints(pyproject: str, extras: tuple[str, ...] = ("dev", "geo", "zarr")) -> list[str]:
    """Lines `name==version` of what a project and some of its extras depend on.

    Args:
      pyproject: text of pyproject.toml.
      extras: names of optional groups.

    Raises:
      ValueError: a dependency has no lower bound, or two groups bound it differently.
    """
    project = tomllib.loads(pyproject)["project"]
    wanted = list(project["dependencies"])
    for extra in extras:
        wanted += project["optional-dependencies"][extra]
    held: dict[str, str] = {}
    for text in wanted:
        found = _BOUND.match(text)
        if found is None:
            raise ValueError(f"{text!r} has no lower bound of the form name>=version")
        name, version = found[1].lower(), found[2]
        if held.setdefault(name, version) != version:
            raise ValueError(f"{name} has two lower bounds: {held[name]} and {version}")
    return [f"{name}=={version}" for name, version in sorted(held.items())]


if __name__ == "__main__":
    root = Path(__file__).resolve().parents[1]
    sys.stdout.write("\n".join(constraints((root / "pyproject.toml").read_text())) + "\n")
