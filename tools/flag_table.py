"""Writes olmoearth_jax/flag_table.json: help and flags of every program, for quick answers.

python -m tools.flag_table            after a change of flags, of their texts, or of a docstring
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from olmoearth_jax import commands, early


def modules() -> list[str]:
    """Every program, less those that read their flags in their own way."""
    names = [module for module, _ in commands.VERBS.values()]
    names += [f"tools.bench.{name}" for name in commands.BENCHMARKS]
    return [name for name in names if name not in ("tools.convert_evals", "tools.bench.evals")]


def entry(module: str) -> dict[str, Any]:
    """What the program itself says of its flags.

    Raises:
      ValueError: it says nothing.
    """
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"], env={**os.environ, early.DUMP: "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    try:
        found = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        raise ValueError(f"{module} did not tell its flags: {done.stderr[-500:]}") from None
    return {"digest": early.digest(module), **found}


def main(argv: list[str]) -> None:
    """Writes the entries that are out of date, or with --all every one."""
    old = (
        json.loads(early.TABLE.read_text()) if early.TABLE.exists() and "--all" not in argv else {}
    )
    table = {}
    for module in modules():
        held = old.get(module)
        fresh = held is not None and held["digest"] == early.digest(module)
        table[module] = held if fresh else entry(module)
    early.TABLE.write_text(json.dumps(table, indent=0) + "\n")
    print(f"{early.TABLE}: {len(table)} programs")


if __name__ == "__main__":
    main(sys.argv[1:])
