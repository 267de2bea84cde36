"""Folders that are not on this machine: gs://, s3://, https:// and whatever else fsspec opens."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Self


def without_secrets(text: str) -> str:
    """A text with the names, passwords and signatures of the URLs in it left out."""
    text = re.sub(r"(?<=://)[^/?#\s'\"]+@", "...@", text)
    return re.sub(r"(://[^?\s'\"]*\?)[^\s'\"]+", r"\1...", text)


@dataclasses.dataclass(frozen=True, repr=False)
class RemotePath:
    """A file or folder at a URL, with the parts of `pathlib.Path` that reading needs.

    In messages (f"{path}") it stands without passwords and signatures; `str` has all of it.

    Args:
      url: with its protocol, without a slash at the end.
    """

    url: str

    def __post_init__(self) -> None:
        protocol, _, rest = self.url.partition("://")
        object.__setattr__(self, "url", f"{protocol}://{rest.rstrip('/')}")

    def __truediv__(self, name: str) -> Self:
        return type(self)(f"{self.url}/{name}")

    def __str__(self) -> str:
        return self.url

    def __format__(self, form: str) -> str:
        return format(without_secrets(self.url), form)

    def __repr__(self) -> str:
        return f"RemotePath({self})"

    @property
    def name(self) -> str:
        return self.parts[-1]

    @property
    def parts(self) -> tuple[str, ...]:
        protocol, _, rest = self.url.partition("://")
        return (f"{protocol}://", *(p for p in rest.split("/") if p))

    @property
    def parent(self) -> Self:
        return type(self)(self.url.rpartition("/")[0])

    def is_dir(self) -> bool:
        """Whether there is such a folder; a web server, which has none, is believed."""
        system, path = self._open_system()
        return self.url.startswith("http") or system.isdir(path)

    def is_file(self) -> bool:
        system, path = self._open_system()
        return system.exists(path)

    def glob(self, pattern: str) -> list[RemotePath]:
        """Nothing: searching a bucket is slow, and only hints need it."""
        del pattern
        return []

    def read_bytes(self) -> bytes:
        """The whole file, in one request.

        Raises:
          OSError: it cannot be read; FileNotFoundError if it does not exist.
        """
        system, path = self._open_system()
        try:
            return system.cat_file(path)
        except FileNotFoundError:
            raise FileNotFoundError(f"there is no file {self}") from None
        except Exception as e:  # protocols have errors of their own, such as HTTP's 403
            if isinstance(e, OSError) and without_secrets(str(e)) == str(e):
                raise
            raise OSError(f"{self} cannot be read: {without_secrets(str(e))}") from None

    def open(self, mode: str = "r", newline: str | None = None) -> IO[Any]:
        """The file's content, for reading only."""
        raw = io.BytesIO(self.read_bytes())
        return raw if "b" in mode else io.TextIOWrapper(raw, encoding="utf-8", newline=newline)

    def _open_system(self, **options: Any) -> tuple[Any, str]:
        import fsspec

        try:
            return fsspec.core.url_to_fs(self.url, **options)
        except ImportError as e:
            raise OSError(f"cannot open {self}: {e} (pip install 'olmoearth-jax[remote]')") from e
        except ValueError as e:
            raise OSError(f"cannot open {self}: {without_secrets(str(e))}") from e


class ObjectPath(RemotePath):
    """An object that may be written: a write is one request, seen whole or not at all.

    Errors are OSErrors without the secrets of the URL.
    """

    def check_writable(self) -> None:
        """Raises OSError for a protocol that is not there, or that nothing can be written by."""
        self._open_system()
        if self.url.startswith(("http://", "https://", "ftp://")):
            raise OSError(f"{self} cannot be written to: give a folder, or a URL of s3:// or gs://")

    def read_text(self, encoding: str = "utf-8") -> str:
        """The whole object as text."""
        return self.read_bytes().decode(encoding)

    def size(self) -> int:
        """Bytes. Raises FileNotFoundError if it does not exist."""
        return int(self._ask("info")["size"])

    def modified(self) -> float:
        """When it was written, by the store's clock, in seconds since 1970."""
        return self._ask("modified").timestamp()

    def digest(self) -> str:
        """SHA-256 (hex) of the content, read piece by piece."""
        system, path = self._system()
        with _telling(self), system.open(path, "rb") as file:
            found = hashlib.sha256()
            while piece := file.read(_PIECE):
                found.update(piece)
        return found.hexdigest()

    def write(self, data: bytes) -> None:
        """Replaces the content."""
        self._ask("pipe_file", data)

    def write_first(self, data: bytes) -> bool:
        """Writes the object unless it is there; whether this call wrote it."""
        try:
            self._ask("pipe_file", data, mode="create")
        except FileExistsError:
            return False
        return True

    def unlink(self, missing_ok: bool = False) -> None:
        """Removes the object."""
        try:
            self._ask("rm_file")
        except FileNotFoundError:
            if not missing_ok:
                raise

    def _system(self) -> tuple[Any, str]:
        # What others write must be seen, so nothing may be answered from an earlier listing.
        return self._open_system(use_listings_cache=False)

    def _ask(self, what: str, *given: Any, **options: Any) -> Any:
        system, path = self._system()
        with _telling(self):
            return getattr(system, what)(path, *given, **options)


_PIECE = 1 << 22


@contextlib.contextmanager
def _telling(path: RemotePath) -> Iterator[None]:
    """Makes OSErrors without secrets of the errors that protocols have of their own."""
    try:
        yield
    except (FileNotFoundError, FileExistsError, PermissionError) as e:
        raise type(e)(f"{path}: {without_secrets(str(e)) or type(e).__name__}") from None
    except Exception as e:
        raise OSError(f"{path}: {without_secrets(str(e)) or repr(e)}") from None


def place_of(text: str) -> Path | ObjectPath:
    """Where results lie: a folder of this machine, or a URL."""
    return ObjectPath(text) if _is_url(text) else Path(text).expanduser()


def output_place(text: str) -> Path | ObjectPath:
    """Where results go.

    Raises:
      OSError: a URL that nothing can be written to.
    """
    place = place_of(text)
    if isinstance(place, ObjectPath):
        place.check_writable()
    return place


def _is_url(text: str) -> bool:
    return re.match(r"[a-z][a-z0-9+.-]*://", text) is not None


AnyPath = Path | RemotePath


def location(path: str | Path | RemotePath) -> AnyPath:
    """A path on this machine, or a remote one if it starts with a protocol."""
    if isinstance(path, RemotePath | Path):
        return path
    return RemotePath(path) if _is_url(path) else Path(path)
