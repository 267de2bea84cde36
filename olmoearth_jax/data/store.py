"""Where sample files are read from: straight from the data set, throttled, or through a cache."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import os
import time
from pathlib import Path

from olmoearth_jax.data.errors import ReadError
from olmoearth_jax.data.hdf5_file import open_regular
from olmoearth_jax.data.remote import AnyPath, RemotePath

_RECOUNT = 256
"""Copies of this process after which the cache is measured anew."""

_log = logging.getLogger(__name__)


@dataclasses.dataclass
class SampleStore:
    """Maps a sample's path to a local one, copying it first where a cache is set.

    Once the cache is full (or can't be written any more, which is logged), further files are read
    in place. Nothing is thrown out: an epoch reads every file once, so any part of them is as good
    as another.

    Attributes:
      cache_dir: folder for copies; one sub-folder per data set, so that files of the same name
        from different data sets stay apart. None reads in place.
      samples_per_sec: most reads of the original files per second and process; None for no limit.
      cache_size_gb: size that the cache may reach, about; None for no limit.

    Raises:
      ValueError: impossible limits, or a cache that cannot be written.
    """

    cache_dir: Path | None = None
    samples_per_sec: float | None = None
    cache_size_gb: float | None = None
    _room: float = dataclasses.field(default=float("inf"), repr=False, compare=False)
    _copies: int = dataclasses.field(default=0, repr=False, compare=False)
    _last: float = dataclasses.field(default=float("-inf"), repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.samples_per_sec is not None and self.samples_per_sec <= 0:
            raise ValueError(f"samples_per_sec must be positive, got {self.samples_per_sec}")
        if self.cache_size_gb is not None and self.cache_size_gb < 0:
            raise ValueError(f"cache_size_gb must not be negative, got {self.cache_size_gb}")
        if self.cache_dir is not None:
            probe = Path(self.cache_dir) / f"probe.{os.getpid()}.tmp"
            try:
                probe.parent.mkdir(parents=True, exist_ok=True)
                probe.write_bytes(b"")
                probe.unlink()
            except OSError as e:
                raise ValueError(f"cache_dir {self.cache_dir} cannot be written: {e}") from e

    def local(self, path: AnyPath) -> AnyPath:
        """The file to open for the sample at `path`.

        Raises:
          ReadError: the file cannot be read.
        """
        copy = self._copy_of(path)
        if copy is not None and copy.exists() and not _outdated(copy, path):
            return copy
        if self.samples_per_sec is not None:
            time.sleep(max(0.0, self._last + 1 / self.samples_per_sec - time.monotonic()))
            self._last = time.monotonic()
        if copy is None or not self._has_room():
            return path
        return copy if self._copy(path, copy) else path

    def forget(self, path: AnyPath) -> bool:
        """Deletes the copy of the sample at `path`, which is damaged; False if there is none."""
        copy = self._copy_of(path)
        if copy is None or not copy.exists():
            return False
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            copy.unlink()
        return True

    def _copy_of(self, path: AnyPath) -> Path | None:
        if self.cache_dir is None:
            return None
        folder = path.parent if isinstance(path, RemotePath) else path.parent.absolute()
        key = hashlib.sha256(str(folder).encode()).hexdigest()[:16]
        return Path(self.cache_dir) / key / path.name

    def _has_room(self) -> bool:
        """Whether another file may be copied; other processes' copies are counted now and then."""
        if self.cache_size_gb is not None and self._copies % _RECOUNT == 0:
            self._room = self.cache_size_gb * 1e9
            for file in Path(self.cache_dir or "").rglob("*"):
                with contextlib.suppress(FileNotFoundError):  # another process's temporary file
                    self._room -= file.stat().st_size
        self._copies += 1
        return self._room > 0

    def _copy(self, path: AnyPath, copy: Path) -> bool:
        # Several processes may copy the same file at once: each has its own temporary name.
        temporary = copy.with_name(f"{copy.name}.{os.getpid()}.tmp")
        try:
            if isinstance(path, RemotePath):
                content = path.read_bytes()
            else:
                with open(open_regular(path), "rb") as file:
                    content = file.read()
        except FileNotFoundError:
            raise ReadError(path, "file does not exist") from None
        except OSError as e:
            raise ReadError(path, f"cannot be read ({e})") from e
        try:
            copy.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(content)
            os.replace(temporary, copy)
        except OSError as e:
            with contextlib.suppress(OSError):
                temporary.unlink()
            _log.warning("the cache takes no more files, which are read in place now: %s", e)
            self._room = float("-inf")
            self.cache_size_gb = None
            return False
        self._room -= len(content)
        return True


def _outdated(copy: Path, path: AnyPath) -> bool:
    """Whether a file was replaced after it was copied, as far as its folder is at hand to tell."""
    if isinstance(path, RemotePath):
        return False
    try:
        ours, its = copy.stat(), path.stat()
    except OSError:  # the original is out of reach, or the copy was just thrown away
        return False
    return its.st_size != ours.st_size or its.st_mtime > ours.st_mtime
