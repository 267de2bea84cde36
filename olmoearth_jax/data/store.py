"""Where sample files are read from: straight from the data set, throttled, or through a cache."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import time
from pathlib import Path

from olmoearth_jax.data.h5 import ReadError


@dataclasses.dataclass
class SampleStore:
    """Maps a sample's path to a local one, copying it first where a cache is set.

    Attributes:
      cache_dir: folder for copies; one sub-folder per data set, so that files of the same name
        from different data sets stay apart. None reads in place.
      samples_per_sec: most reads of the original files per second and process; None for no limit.
    """

    cache_dir: Path | None = None
    samples_per_sec: float | None = None
    _last: float = dataclasses.field(default=float("-inf"), repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.samples_per_sec is not None and self.samples_per_sec <= 0:
            raise ValueError(f"samples_per_sec must be positive, got {self.samples_per_sec}")

    def local(self, path: Path) -> Path:
        """The file to open for the sample at `path`.

        Raises:
          ReadError: the file cannot be copied to the cache.
        """
        if self.cache_dir is None:
            self._wait()
            return path
        folder = Path(self.cache_dir) / hashlib.sha256(str(path.parent).encode()).hexdigest()[:16]
        copy = folder / path.name
        if not copy.exists():
            self._wait()
            self._copy(path, copy)
        return copy

    def _wait(self) -> None:
        if self.samples_per_sec is not None:
            rest = self._last + 1 / self.samples_per_sec - time.monotonic()
            if rest > 0:
                time.sleep(rest)
            self._last = time.monotonic()

    def _copy(self, path: Path, copy: Path) -> None:
        # Several processes may copy the same file at once: each has its own temporary name.
        temporary = copy.with_name(f"{copy.name}.{os.getpid()}.tmp")
        try:
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, temporary)
            os.replace(temporary, copy)
        except FileNotFoundError:
            raise ReadError(path, "file does not exist") from None
        except OSError as e:
            temporary.unlink(missing_ok=True)
            raise ReadError(path, f"cannot be copied to the cache {copy.parent} ({e})") from e
