"""Folders that are not on this machine: gs://, s3://, https:// and whatever else fsspec opens."""

from __future__ import annotations

import dataclasses
import io
import re
from pathlib import Path
from typing import IO, Any


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

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(f"{self.url}/{name}")

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
    def parent(self) -> RemotePath:
        return RemotePath(self.url.rpartition("/")[0])

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

    def _open_system(self) -> tuple[Any, str]:
        import fsspec

        try:
            return fsspec.core.url_to_fs(self.url)
        except ImportError as e:
            raise OSError(f"cannot open {self}: {e} (pip install 'olmoearth-jax[remote]')") from e
        except ValueError as e:
            raise OSError(f"cannot open {self}: {without_secrets(str(e))}") from e


AnyPath = Path | RemotePath


def location(path: str | Path | RemotePath) -> AnyPath:
    """A path on this machine, or a remote one if it starts with a protocol."""
    if isinstance(path, RemotePath | Path):
        return path
    return RemotePath(path) if re.match(r"[a-z][a-z0-9+.-]*://", path) else Path(path)
