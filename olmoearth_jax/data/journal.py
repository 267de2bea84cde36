"""Records of finished work that survive a kill, checksums, and a lock on a folder."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


class FolderInUse(ValueError):
    """Another process works in the folder."""


class Journal:
    """Finished items by key, one JSON line each; a context that closes the file.

    A line that a kill cut short, and what follows it, is forgotten.

    Args:
      path: the file; made on the first entry.
    """

    def __init__(self, path: Path):
        self.path = path
        self.records: dict[str, dict[str, Any]] = {}
        self._file = None
        kept = 0
        for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
            try:
                record = json.loads(line)
                if not line.endswith(b"\n"):
                    break
                self.records[record["key"]] = record
            except (ValueError, KeyError, TypeError):
                break
            kept += len(line)
        if path.exists():
            os.truncate(path, kept)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def add(self, key: str, record: Mapping[str, Any]) -> None:
        """Records `key` as finished."""
        entry = {"key": key, **record}
        self.records[key] = entry
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a")
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()


def file_digest(path: str | Path) -> str:
    """Checksum of a file's content (BLAKE2b, 128 bits, hex)."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def text_digest(value: Any) -> str:
    """Checksum of a JSON-like value, 16 hex digits."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


@contextlib.contextmanager
def lock_folder(folder: Path, who: str) -> Iterator[None]:
    """Holds a lock on `folder` (made if need be) that ends with this process; `who` holds it.

    Raises:
      FolderInUse: another process holds the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "lock"
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            file.seek(0)
            other = file.read().strip()
            raise FolderInUse(
                f"{who} is already running in {folder.parent} ({other or 'unknown process'}); "
                f"wait for it or stop it"
            ) from e
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}")
        file.flush()
        yield
