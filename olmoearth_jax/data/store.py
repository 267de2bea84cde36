"""Where sample files are read from: straight from the data set, throttled, or through a cache."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import shutil
import time
from pathlib import Path

from olmoearth_jax.data.h5 import ReadError
from olmoearth_jax.data.remote import AnyPath, RemotePath

_RECOUNT = 256
"""Copies of this process after which the cache is measured anew."""


@dataclasses.dataclass
class SampleStore:
    """Maps a sample's path to a local one, copying it first where a cache is set.

    Attributes:
      cache_dir: folder for copies; one sub-folder per data set, so that files of the same name
        from different data sets stay apart. None reads in place.
      cache_size_gb: once the cache holds about this much, further files are read in place. Nothing
        is thrown out: an epoch reads every file once, so any part of them is as good as another.
      samples_per_sec: most reads of the original files per second and process; None for no limit.
    """

    cache_dir: Path | None = None
    samples_per_sec: float | None = None
    cache_size_gb: float | None = None
    _room: float = dataclasses.field(default=0.0, repr=False, compare=False)
    _copies: int = dataclasses.field(default=0, repr=False, compare=False)
    _last: float = dataclasses.field(default=float("-inf"), repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.samples_per_sec is not None and self.samples_per_sec <= 0:
            raise ValueError(f"samples_per_sec must be positive, got {self.samples_per_sec}")
        if self.cache_size_gb is not None and self.cache_size_gb < 0:
            raise ValueError(f"cache_size_gb must not be negative, got {self.cache_size_gb}")

    def local(self, path: AnyPath) -> AnyPath:
        """The file to open for the sample at `path`.

        Raises:
          ReadError: the file cannot be copied to the cache.
        """
        copy = self._copy_of(path)
        if copy is not None and copy.exists():
            return copy
        self._wait()
        if copy is None or not self._has_room():
            return path
        self._copy(path, copy)
        return copy

    def forget(self, path: AnyPath) -> bool:
        """Deletes the copy of the sample at `path`, which is damaged; False if there is none."""
        copy = self._copy_of(path)
        if copy is None or not copy.exists():
            return False
        copy.unlink(missing_ok=True)
        return True

    def _copy_of(self, path: AnyPath) -> Path | None:
        if self.cache_dir is None:
            return None
        key = hashlib.sha256(str(path.parent).encode()).hexdigest()[:16]
        return Path(self.cache_dir) / key / path.name

    def _has_room(self) -> bool:
        """Whether another file may be copied; other processes' copies are counted now and then."""
        if self.cache_size_gb is None:
            return True
        if self._copies % _RECOUNT == 0:
            files = Path(self.cache_dir or "").rglob("*")
            self._room = self.cache_size_gb * 1e9 - sum(f.stat().st_size for f in files)
        self._copies += 1
        return self._room > 0

    def _wait(self) -> None:
        if self.samples_per_sec is not None:
            rest = self._last + 1 / self.samples_per_sec - time.monotonic()
            if rest > 0:
                time.sleep(rest)
            self._last = time.monotonic()

    def _copy(self, path: AnyPath, copy: Path) -> None:
        # Several processes may copy the same file at once: each has its own temporary name.
        temporary = copy.with_name(f"{copy.name}.{os.getpid()}.tmp")
        try:
            copy.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(path, RemotePath):
                temporary.write_bytes(path.read_bytes())
            else:
                shutil.copyfile(path, temporary)
            self._room -= temporary.stat().st_size
            os.replace(temporary, copy)
        except FileNotFoundError:
            raise ReadError(path, "file does not exist") from None
        except OSError as e:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise ReadError(path, f"cannot be copied to the cache {copy.parent} ({e})") from e
