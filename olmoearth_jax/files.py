"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import re
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from olmoearth_jax.proposals import nearest

_POINTER = b"version https://git-lfs"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, which becomes `path` at the end, or goes after an error.

    Raises:
      OSError: a folder, pipe or device stands there, which a file must not replace.
    """
    if path.exists() and not path.is_file() and not path.is_symlink():
        raise OSError(f"{path} is a pipe, device or folder, in whose place no file can be written")
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(path: Path) -> None:
    """Removes the temporary files that killed writers of `path` left beside it.

    For files that one process at a time writes; another one's unfinished file would go too.
    """
    for left in path.parent.glob(f".{path.name}.{'[0-9a-f]' * 8}.tmp"):
        left.unlink(missing_ok=True)


def remove_leftovers_in(folder: Path) -> None:
    """As `remove_leftovers`, of all files below a folder."""
    for left in folder.rglob(".*.tmp"):
        if is_leftover(left):
            left.unlink(missing_ok=True)


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Waits until no other process is in such a block for the same folder.

    The system takes the lock away with the process. Where a file system has none, nothing waits.
    """
    with open(folder / ".lock", "ab") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def is_leftover(path: Path) -> bool:
    """Whether a name is one under which `replacing` and its like write before they rename."""
    return re.fullmatch(r"\..+\.[0-9a-f]{8}\.tmp", path.name) is not None


def check_file(path: str | Path) -> None:
    """Raises OSError if a pipe, device or folder stands in the place of a file.

    Opening a pipe waits for ever, and a device may never end. What does not exist is left to
    whoever opens it.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise OSError("it is a pipe, device or folder and no file")


def is_pointer(path: Path) -> bool:
    """Is the file what Git leaves in a large file's place where Git LFS has not fetched it?

    Raises:
      OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return file.read(len(_POINTER)) == _POINTER


def no_folder(path: Path) -> str:
    """Says that there is no such folder, and which one beside it was probably meant."""
    try:
        names = [p.name for p in path.parent.iterdir() if p.is_dir()]
    except OSError:
        names = []
    near = nearest(path.name, names)
    meant = "" if near is None else f"; did you mean {path.parent / near}?"
    return f"there is no folder {path}{meant}"


def write_atomically(path: Path, text: str) -> None:
    """Replaces a file's content: a reader sees the old content or the new, never a part."""
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def json_plain(value: Any) -> Any:
    """A copy that JSON can hold: names are texts, and NaN and infinities are null."""
    if isinstance(value, Mapping):
        return {str(k): json_plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [json_plain(v) for v in value]
    value = value.item() if type(value).__module__ == "numpy" and value.shape == () else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def append_json(path: Path, item: Any) -> None:
    """Adds one line of JSON to a file; half a line that a crash has left is ended first."""
    with open(path, "ab+") as file:
        file.seek(max(file.seek(0, 2) - 1, 0))
        cut = file.read(1) not in (b"", b"\n")
        file.write(("\n" * cut + json.dumps(item) + "\n").encode())


def json_of_line(line: str) -> Any:
    """The value of a line; None if a crash has cut it short, or it is nested without end."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def read_json_lines(path: Path) -> list[Any]:
    """The values of a file's lines, without those that a crash has cut short; [] without file."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return [value for line in lines if (value := json_of_line(line)) is not None]
