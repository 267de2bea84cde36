"""What may be written where: nothing of a user's is overwritten, and nobody computes for nothing.

A file that is there already is replaced only if it carries our mark and is none of the inputs, so
that a command can be repeated; else the user must say so.
"""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

MARK = "olmoearth-jax"
"""What our files say of the software that made them."""

_HOME = re.compile(r"~[^/=,]*/")
_MOST_JSON = 64 << 20


def expand_home(argv: Sequence[str]) -> list[str]:
    """A command line with `~/` and `~name/` replaced in the values of its flags too.

    A shell does it only where a word begins, and so not in `--output=~/map.tif`.
    """
    return [_expanded(argument) for argument in argv]


def _expanded(argument: str) -> str:
    flag, equals, value = argument.partition("=")
    if not (equals and flag.startswith("-")):
        return argument
    # Lists are separated by commas; only an item that is wholly a path of a home is replaced.
    items = value.split(",")
    return flag + equals + ",".join(os.path.expanduser(i) if _HOME.match(i) else i for i in items)


def check(path: Path, inputs: Iterable[Path] = (), overwrite: bool = False) -> None:
    """Looks whether a file may be written, before any work is done.

    Args:
      path: the file to be.
      inputs: files that the work reads.
      overwrite: the user wants it replaced, whatever it is.

    Raises:
      ValueError: it is an input, a folder, a file that is not ours, or its folder cannot be
        written to.
    """
    for given in inputs:
        if _same(path, given):
            raise ValueError(
                f"{path} would replace one of the inputs ({given}); give another output name"
            )
    if path.is_dir():
        raise ValueError(f"{path} is a folder; the output must be a file")
    if path.exists() and not overwrite and not is_ours(path):
        raise ValueError(
            f"{path} exists and was not written by this program; give another name, or "
            "--overwrite to replace it"
        )
    check_folder(path.parent)


def check_folder(folder: Path) -> None:
    """Raises ValueError if files cannot be written into a folder that is there or can be made."""
    above = folder.absolute()
    while not above.exists():
        above = above.parent
    if not above.is_dir():
        raise ValueError(f"{above} is a file, so nothing can be written to {folder}")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(f"the folder {above} cannot be written to")


def _same(path: Path, other: Path) -> bool:
    try:
        return os.path.samefile(path, other)
    except OSError:  # one of them is not there
        return path.resolve() == other.resolve()


def is_ours(path: Path) -> bool:
    """Whether a file says that this program made it."""
    try:
        found = _software(path)
    except (OSError, ValueError, KeyError, AttributeError, zipfile.BadZipFile):
        return False
    return str(found).startswith(MARK)


def _software(path: Path) -> Any:
    """What a file says of the software that made it."""
    if path.suffix in (".tif", ".tiff"):
        import rasterio
        from rasterio.errors import RasterioError

        try:
            with rasterio.open(path) as file:
                return file.tags().get("SOFTWARE")
        except RasterioError:
            return None
    if path.suffix == ".npz":
        import numpy as np

        with np.load(path, allow_pickle=False) as held:
            return held["software"].item() if "software" in held.files else None
    if path.suffix == ".safetensors":
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            head = json.loads(file.read(min(size, _MOST_JSON)))
        return head.get("__metadata__", {}).get("SOFTWARE")
    if path.suffix == ".png":
        with path.open("rb") as file:
            return MARK if MARK.encode() in file.read(4096) else None
    if path.stat().st_size > _MOST_JSON:
        return None
    held = json.loads(path.read_text(encoding="utf-8"))
    return held.get("software") or held.get("properties", {}).get("olmoearth:software")
