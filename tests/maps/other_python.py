"""Programs of other people's packages, which live in the environment of `make env-maps`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def python_with(package: str) -> Path:
    """The interpreter of the environment for other programs; skips the test where there is none."""
    python = Path(f"{sys.prefix}-maps") / "bin" / "python"
    if not python.exists():
        pytest.skip(f"no {python}: make env-maps builds it, with Python 3.12 or later")
    done = subprocess.run([python, "-c", f"import {package}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return python


def run_in(python: Path, script: str, *arguments: str | Path) -> str:
    """What a script prints that is run by another interpreter, with this source tree."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    done = subprocess.run(
        [python, "-c", script, *map(str, arguments)],
        capture_output=True, text=True, cwd=ROOT, env={**env, "PYTHONPATH": str(ROOT)}, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.strip().splitlines()[-1]
