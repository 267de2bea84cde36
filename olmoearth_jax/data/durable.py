"""Files that are whole and durable under their names, on this machine or in an object store."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
import uuid
from pathlib import Path
from typing import Any

from olmoearth_jax.data.remote import ObjectPath
from olmoearth_jax.files import write_atomically

LEFTOVER_S = 3600.0
"""Age at which a temporary file cannot be of a living writer."""

AnyFile = Path | ObjectPath


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sync_file(path: Path) -> None:
    """Makes a file's content durable."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def write_durably(path: AnyFile, text: str) -> None:
    """Replaces a file's content: temporary name, fsync, rename, fsync of the folder."""
    if isinstance(path, ObjectPath):
        return path.write(text.encode())
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text)
    sync_folder(path.parent)


def write_first(path: AnyFile, text: str) -> bool:
    """Writes a file whole unless it is there; whether this call wrote it."""
    if isinstance(path, ObjectPath):
        return path.write_first(text.encode())
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        return False
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        scratch.write_text(text, encoding="utf-8")
        sync_file(scratch)
        try:
            os.link(scratch, path)
        except FileExistsError:
            return False
        except OSError:  # no hard links here; the names are as good, the rest nearly
            with open(path, "x", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        sync_folder(path.parent)
        return True
    except FileExistsError:
        return False
    finally:
        scratch.unlink(missing_ok=True)


def size_of(path: AnyFile) -> int:
    """Bytes of a file. Raises OSError if there is none."""
    return path.size() if isinstance(path, ObjectPath) else os.path.getsize(path)


def modified(path: AnyFile) -> float:
    """When a file was written, in seconds since 1970. Raises OSError if there is none."""
    return path.modified() if isinstance(path, ObjectPath) else path.stat().st_mtime


def digest_of_file(path: AnyFile) -> str:
    """SHA-256 (hex) of a file's content."""
    if isinstance(path, ObjectPath):
        return path.digest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove_old(folder: AnyFile, pattern: str) -> None:
    """Removes what dead writers left: files of a pattern that no living one can still need."""
    if isinstance(folder, ObjectPath):
        return  # nothing is half-written there
    for path in folder.glob(pattern):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > LEFTOVER_S:
                path.unlink()


def read_json(path: AnyFile) -> dict[str, Any] | None:
    """The object in a JSON file, or None if there is none that can be read."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return held if isinstance(held, dict) else None
