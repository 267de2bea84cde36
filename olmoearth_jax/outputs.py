"""What may be written where: nothing of a user's is overwritten, and nobody computes for nothing.

A file that is there already is replaced only if it carries our mark and is none of the inputs, so
that a command can be repeated; else the user must say so.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

MARK = "olmoearth-jax"
VERSION = "0.1.0"
SOFTWARE = f"{MARK} {VERSION}"
"""What our files say of the software that made them; they are known by its first word."""

NOTICE = "converted by olmoearth-jax"
"""What the attribution beside our exports says; it is a text without members."""

SCRIPT_MARK = f"# Written by {MARK}"
"""A line of the job files that we write."""

_FOLDER_MARK = "made_by.json"
_SCRIPTS = (".sh", ".sbatch", ".yaml")
_HOME = re.compile(r"(^|[=,\[]\s*)(~[\w.-]*(?=/)|~(?=$|[,\]]))")
_URL = re.compile(r"[a-z][a-z0-9+.-]+:/")
_MOST_JSON = 64 << 20
_MOST_MARK = 4096


def expand_home(argv: Sequence[str]) -> list[str]:
    """A command line with `~` and `~name/` replaced in the values of its flags too.

    A shell does it only where a word begins, and so not in `--output=~/map.tif`. Values may be
    lists, and settings such as `--set=task.h5py_dir=~/data`.
    """
    return [_expanded(argument) for argument in argv]


def _expanded(argument: str) -> str:
    flag, equals, value = argument.partition("=")
    if not (equals and flag.startswith("-")):
        return argument
    # Only where an item of a list or a setting begins: a ~ within a word is a letter.
    return flag + equals + _HOME.sub(lambda m: m[1] + os.path.expanduser(m[2]), value)


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
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is a pipe or device; the output must be a file")
    if path.exists() and not overwrite and not is_ours(path):
        raise ValueError(
            f"{path} exists and was not written by this program; give another name, or "
            "--overwrite to replace it"
        )
    check_folder(path.parent)


def claim(folder: Path, overwrite: bool = False) -> None:
    """Makes a folder for files that carry no mark themselves, and leaves the mark beside them.

    Raises:
      ValueError: it holds files already and no mark, or cannot be written to.
    """
    mark = folder / _FOLDER_MARK
    if folder.is_dir() and any(folder.iterdir()) and not overwrite and not is_ours(mark):
        raise ValueError(
            f"{folder} holds files that were not written by this program; give another folder, or "
            "--overwrite to write among them"
        )
    check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    mark.write_text(json.dumps({"software": MARK}) + "\n", encoding="utf-8")


def check_folder(folder: Path) -> None:
    """Raises ValueError if files cannot be written into a folder that is there or can be made."""
    if _URL.match(str(folder)):  # as a path has it, with one slash
        raise ValueError(f"{folder} is a URL, but results go to a folder of this machine here")
    above = folder.absolute()
    while not above.exists():
        above = above.parent
    if not above.is_dir():
        raise ValueError(f"{above} is a file, so nothing can be written to {folder}")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(f"the folder {above} cannot be written to")
    try:
        with tempfile.TemporaryFile(dir=above):  # permissions alone do not tell
            pass
    except OSError as e:
        raise ValueError(f"the folder {above} cannot be written to ({e.strerror})") from None


def _same(path: Path, other: Path) -> bool:
    try:
        return os.path.samefile(path, other)
    except OSError:  # one of them is not there
        return path.resolve() == other.resolve()


def is_ours(path: Path) -> bool:
    """Whether a file says that this program made it."""
    try:
        found = _software(path)
    # Whatever cannot be read as one of our files is none; no damage may end in a traceback.
    except Exception:
        return False
    return str(found).split(" ")[0] == MARK


def _software(path: Path) -> Any:
    """What a file says of the software that made it."""
    if path.suffix in (".tif", ".tiff"):
        import rasterio

        with rasterio.open(path, driver="GTiff") as file:
            return file.tags().get("SOFTWARE")
    if path.suffix == ".npz":
        import numpy as np

        # Opened here: NumPy leaves a damaged file open.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as held:
            if held.zip.getinfo("software.npy").file_size > _MOST_MARK:
                return None
            return held["software"].item()
    if path.suffix == ".safetensors":
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            head = json.loads(file.read(min(size, _MOST_JSON)))
        return head.get("__metadata__", {}).get("SOFTWARE")
    if path.suffix in (".h5", ".hdf5"):
        import h5py

        with h5py.File(path, "r") as file:
            return file.attrs.get("software")
    if path.suffix == ".parquet":
        import pyarrow.parquet

        return (pyarrow.parquet.read_schema(path).metadata or {})[b"software"].decode()
    if path.suffix in (".png", ".md", ".html"):
        mark = (NOTICE if path.suffix == ".md" else MARK).encode()
        with path.open("rb") as file:
            return MARK if mark in file.read(4096) else None
    if path.suffix in _SCRIPTS:
        with path.open("rb") as file:
            lines = file.read(4096).decode("utf-8", "replace").splitlines()
        return MARK if SCRIPT_MARK in lines else None
    if path.stat().st_size > _MOST_JSON:
        return None
    held = json.loads(path.read_text(encoding="utf-8"))
    return held.get("software") or held.get("properties", {}).get("olmoearth:software")
