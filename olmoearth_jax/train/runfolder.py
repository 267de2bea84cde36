"""The run folder: where a run keeps its files, the lock that keeps a second run out, and which
checkpoint is meant by a folder.

Layout::

    config.json  run.lock  metrics.jsonl  checkpoints/  tensorboard/  evals/  visualizations/
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from olmoearth_jax.files import write_atomically

_HEARTBEAT_S = 5.0
# A lock that we cannot judge by its process is watched for this long: no heartbeat means dead.
_WATCH_S = 4 * _HEARTBEAT_S


class RunFolder:
    """Paths of one run; `create` makes the folders."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root).expanduser().absolute()
        self.config = self.root / "config.json"
        self.metrics = self.root / "metrics.jsonl"
        self.lock_file = self.root / "run.lock"
        self.checkpoints = self.root / "checkpoints"
        self.tensorboard = self.root / "tensorboard"
        self.evals = self.root / "evals"
        self.visualizations = self.root / "visualizations"
        self.pictures = self.visualizations / "train"

    def create(self) -> RunFolder:
        """Makes the folder and its subfolders.

        Raises:
          ValueError: that is not possible, or the config.json there is none of a run.
        """
        self._refuse_others()
        try:
            for path in (self.checkpoints, self.tensorboard, self.evals, self.visualizations):
                path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"The run folder {self.root} cannot be created or written: {error.strerror}. "
                "Choose another one with --config.common.save_folder."
            ) from error
        return self

    def _refuse_others(self) -> None:
        """A run replaces config.json and cuts metrics.jsonl; weights and other programs have them
        too. Ours has metrics only where it has its config.
        """
        found: Any = None
        if self.config.is_file():
            foreign = self.config
            with contextlib.suppress(ValueError, RecursionError):
                found = json.loads(self.config.read_text(encoding="utf-8"))
        elif self.metrics.is_file() and self.metrics.stat().st_size:
            foreign = self.metrics
        else:
            return
        if not isinstance(found, dict) or "trainer" not in found:
            raise ValueError(
                f"{foreign} is none of a training run, which would replace it: choose another "
                "folder with --config.common.save_folder, or move the file away. (Weights to "
                "start from are given by --config.trainer.load_path.)"
            )

    def write_config(self, config: dict[str, Any]) -> None:
        """Writes config.json (atomically)."""
        write_atomically(self.config, json.dumps(config, indent=2) + "\n")


class RunFolderInUse(RuntimeError):
    """Another live process trains in this run folder."""


class RunFolderLost(RunFolderInUse):
    """Our lock is gone or belongs to another run: nothing more may be written."""


class RunLock:
    """Context manager: one training process (process 0 of a run) per run folder.

    The lock file names process and host. A lock is stale if its process is gone (same host and
    same process namespace), or if nobody has renewed it for `watch_s` seconds (any other host,
    where clocks and process numbers mean nothing to us). Stale locks are replaced. Who has lost
    the lock learns it from `check`, which belongs before every write.
    """

    def __init__(
        self, path: Path, *, heartbeat_s: float = _HEARTBEAT_S, watch_s: float = _WATCH_S
    ) -> None:
        self._path = path
        self._heartbeat_s = heartbeat_s
        self._watch_s = watch_s
        self._stop = threading.Event()
        self._lost = False
        self._record = json.dumps(_identity() | {"token": uuid.uuid4().hex})

    def __enter__(self) -> RunLock:
        while not self._try_create():
            held = _read(self._path)
            if held is None:
                continue  # released between our two looks
            if not self._is_stale(held):
                if _read(self._path) is None:
                    continue
                raise RunFolderInUse(_in_use_message(self._path, held))
            self._remove_stale(held)
        threading.Thread(target=self._renew, name="run-lock", daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        if _read(self._path) == self._record:
            self._path.unlink(missing_ok=True)

    def check(self) -> None:
        """Raises RunFolderLost if the lock file is gone or was replaced, now or earlier."""
        try:
            held = _read(self._path)
        except OSError:
            return  # a disk that is briefly absent tells nothing
        if held != self._record:
            self._lost = True
        if not self._lost:
            return
        folder = self._path.parent
        if held is None:
            what = f"{self._path} was deleted" if folder.is_dir() else f"{folder} was deleted"
            raise RunFolderLost(
                f"{what} while this run was writing there, so it ends: nothing protects the "
                "folder from a second run. Start it again to go on from its newest checkpoint."
            )
        owner = _parse(held)
        raise RunFolderLost(
            f"The run folder {folder} was taken over by process {owner.get('pid', '?')} on "
            f"{owner.get('host', '?')} while this run stood still, so this one ends without "
            "another write. Nothing is to be done if that is the same run, started again."
        )

    def _try_create(self) -> bool:
        # A hard link is created with its content or not at all, on network file systems too.
        own = self._path.with_name(f".{self._path.name}.{uuid.uuid4().hex[:8]}")
        try:
            own.write_text(self._record, encoding="utf-8")
            os.link(own, self._path)
            return True
        except FileExistsError:
            return False
        except OSError as error:
            raise ValueError(
                f"The run folder {self._path.parent} cannot be locked: {error.strerror}. Make "
                "room or choose another one with --config.common.save_folder."
            ) from error
        finally:
            own.unlink(missing_ok=True)

    def _is_stale(self, held: str) -> bool:
        owner = _parse(held)
        pid, started = owner.get("pid"), owner.get("started")
        if _is_near(owner) and type(pid) is int and isinstance(started, str):
            # The start time tells our process from a later one with its number.
            return _process_start(pid) != started
        before = _stamp(self._path)
        deadline = time.monotonic() + self._watch_s
        while time.monotonic() < deadline:
            time.sleep(min(0.2, self._watch_s))
            if _stamp(self._path) != before:
                return False
        return True

    def _remove_stale(self, held: str) -> None:
        aside = self._path.with_name(f".{self._path.name}.stale.{uuid.uuid4().hex[:8]}")
        try:
            os.rename(self._path, aside)
        except FileNotFoundError:
            return
        if _read(aside) != held:  # another starter replaced it meanwhile: give it back
            os.rename(aside, self._path)
            return
        aside.unlink(missing_ok=True)

    def _renew(self) -> None:
        while not self._stop.wait(self._heartbeat_s):
            try:
                if _read(self._path) not in (self._record, None):
                    self._lost = True  # `check` tells it; another's lock is not ours to renew
                    return
                os.utime(self._path)
            except OSError:
                continue  # a full or briefly absent disk must not end the run


def _identity() -> dict[str, Any]:
    pid = os.getpid()
    return {
        "pid": pid,
        "host": socket.gethostname(),
        "started": _process_start(pid),
        "boot": _first_line("/proc/sys/kernel/random/boot_id"),
        "namespace": _namespace(),
    }


def _namespace() -> str:
    """The namespace in which our process number counts, as 'pid:[4026531836]'; '' if unknown."""
    try:
        # Not realpath: that resolves /proc/self too, and no two processes would be alike.
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _is_near(owner: dict[str, Any]) -> bool:
    """Whether the number of a lock's process means something to us: same host, boot, namespace."""
    here = _identity()
    space = owner.get("namespace")
    # Older locks hold a path, '/proc/<pid>/ns/pid:[...]'.
    space = space.rsplit("/", 1)[-1] if isinstance(space, str) else None
    same = all(owner.get(key) == here[key] for key in ("host", "boot"))
    return same and space == here["namespace"]


def _process_start(pid: int) -> str | None:
    """Start time of a process in clock ticks since boot; 'alive' without /proc; None if gone."""
    stat = _first_line(f"/proc/{pid}/stat")
    if stat:
        fields = stat.rsplit(")", 1)[1].split()
        return None if fields[0] in "ZX" else fields[19]  # a zombie writes no more
    if Path("/proc/self/stat").exists() or pid <= 0:
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "alive"


def _in_use_message(path: Path, held: str) -> str:
    owner = _parse(held)
    return (
        f"The run folder {path.parent} is in use by process {owner.get('pid', '?')} on "
        f"{owner.get('host', '?')}. Stop that run or choose another --run_name. If it is surely "
        f"dead, delete {path}."
    )


def _parse(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None
    except IsADirectoryError as error:
        raise ValueError(f"{path} is a folder, not the lock of a run: delete it.") from error


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        stat = path.stat()
    except FileNotFoundError:
        return (0, 0)  # released: counts as a sign of life, the caller tries again
    return (stat.st_mtime_ns, stat.st_ino)


def _first_line(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
