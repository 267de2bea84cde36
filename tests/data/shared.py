"""Several processes that share the work of one command, in small blocks."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import runpy, sys
from olmoearth_jax.data import blocks
blocks.BLOCK = int(sys.argv[1])
del sys.argv[1]
module = sys.argv.pop(1)
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


def start(module: str, arguments: Sequence[str], block: int = 4) -> subprocess.Popen[str]:
    """A tool in a process of its own, with blocks of `block` files."""
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(block), module, *arguments, "--num_workers=0"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def ended(process: subprocess.Popen[str], code: int = 0) -> list[str]:
    """The lines that a process printed; it must end with `code`."""
    out, err = process.communicate(timeout=240)
    assert process.returncode == code, err
    return out.splitlines()


def content(folder: Path) -> dict[str, bytes]:
    """All files of a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
