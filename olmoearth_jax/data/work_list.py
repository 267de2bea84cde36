"""Long work on many files by any number of processes that come, go and are killed.

The work is a list of units in a fixed order. A unit is done when its marker is there: the marker
names the objects that the unit's one writer made, and is written last. Claims only save work: two
workers on one unit do it twice and write the same. Nothing must be agreed upon, and the state is
what lies on disk:

    job.json            what determines the result; the first writer wins
    done/<id>.json      marker
    failed/<id>.json    the last error and the number of attempts
    claims/<id>.json    who works on a unit; touched every minute, worthless after ten
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from olmoearth_jax.data.durable import (
    AnyFile,
    digest_of_file,
    modified,
    read_json,
    remove_old,
    size_of,
    sync_file,
    sync_folder,
    write_durably,
    write_first,
)
from olmoearth_jax.data.remote import ObjectPath
from olmoearth_jax.data.worker_place import order

_STALE_S = 600.0
"""Age at which a claim means nothing any more."""
TOUCH_S = 60.0
STOPPED = 75
"""Exit code of a worker that was asked to end."""

_HOST = socket.gethostname()
_ME = uuid.uuid4().hex
_REFUSED = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)


class Stopped(BaseException):
    """The process was asked to end (SIGTERM)."""


@contextlib.contextmanager
def stopping() -> Iterator[None]:
    """Within it SIGTERM raises `Stopped` in the main thread."""

    def stop(*_: Any) -> None:
        raise Stopped

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def digest_of(members: Mapping[str, Any]) -> str:
    """SHA-256 of JSON with sorted keys and no blanks."""
    text = json.dumps(members, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def open_job(path: AnyFile, job: Mapping[str, Any], decides: Sequence[str]) -> str:
    """Writes job.json, or compares with the one that is there; the digest of the job.

    Args:
      path: of the file.
      job: its members.
      decides: names of those that determine values; they make the digest.

    Raises:
      ValueError: another job is there; the message shows the members that differ.
    """
    digest = digest_of({name: job[name] for name in decides})
    text = json.dumps({**job, "job_digest": digest}, indent=1, sort_keys=True) + "\n"
    if write_first(path, text):
        return digest
    held = read_json(path)
    if held is None:
        raise ValueError(f"{path} cannot be read; give another --output")
    if held.get("job_digest") != digest:
        raise another_job(path, held, json.loads(text), decides)
    return digest


def another_job(
    path: AnyFile, there: Mapping[str, Any], here: Mapping[str, Any], decides: Sequence[str]
) -> ValueError:
    """The error of a job.json that holds another job; shows the members that differ."""
    rows = differences({k: there.get(k) for k in decides}, {k: here[k] for k in decides})
    shown = "; ".join(f"{name}: {a} there, {b} here" for name, a, b in rows[:8])
    return ValueError(
        f"{path.parent.parent} holds another job ({shown or 'another version of it'}); give "
        "another --output, or the same flags and inputs as before"
    )


def differences(there: Any, here: Any, name: str = "") -> list[tuple[str, str, str]]:
    """(dotted name, value there, value here) of the members of two plain objects that differ."""
    if isinstance(there, dict) and isinstance(here, dict):
        out = []
        for key in sorted({*there, *here}):
            out += differences(there.get(key), here.get(key), f"{name}.{key}" if name else key)
        return out
    return [] if there == here else [(name, _short(there), _short(here))]


def _short(value: Any) -> str:
    text = json.dumps(value, sort_keys=True)
    return text if len(text) <= 70 else f"{text[:67]}..."


@dataclasses.dataclass
class Outcome:
    """What a worker saw at its end.

    Attributes:
      made: units that it finished itself.
      failed: error by unit.
      busy: units that others hold.
    """

    made: int = 0
    failed: dict[str, str] = dataclasses.field(default_factory=dict)
    busy: list[str] = dataclasses.field(default_factory=list)


_COUNTS = ("valid", "nodata", "clipped", "largest", "seconds")
"""Members of markers that are finite numbers where they are given."""


def objects_of(marker: Mapping[str, Any]) -> dict[str, list[Any]] | None:
    """[size, digest] of the objects that a marker names; None if it is damaged.

    Keys lead below the folder of objects and nowhere else.
    """
    held = marker.get("objects")
    numbers = [marker.get(name, 0) for name in _COUNTS]
    finite = all(isinstance(n, int | float) and abs(n) < 1e300 for n in numbers)
    if not isinstance(held, dict) or not finite:
        return None
    for key, told in held.items():
        kinds = [type(v) for v in told] if isinstance(told, list) else []
        if kinds != [int, str] or key.startswith("/") or ".." in key.split("/"):
            return None
    return held


P = TypeVar("P", Path, ObjectPath)


class WorkList(Generic[P]):
    """Units, their markers and claims below a folder.

    Attributes:
      folder: where done, failed and claims lie.
      objects: folder that the keys of objects start at.
      digest: of the job; markers of another job do not count.
      units: the ids in plan order; they may hold slashes.
      earlier: digests of smaller jobs that this one grew from, whose markers count too.
    """

    def __init__(
        self, folder: P, objects: P, digest: str,
        units: Sequence[str], earlier: Sequence[str] = (),
    ):  # fmt: skip
        self.folder, self.objects, self.digest, self.units = folder, objects, digest, units
        self.earlier = tuple(earlier)

    def is_ours(self, record: Mapping[str, Any]) -> bool:
        """Whether a marker is of this job, or of one that it grew from."""
        return record.get("job_digest") in (self.digest, *self.earlier)

    def _path(self, kind: str, unit: str) -> P:
        return self.folder / kind / f"{unit}.json"

    def marker(self, unit: str) -> dict[str, Any] | None:
        """The marker of a unit, if it counts: of this job, and all its objects are there."""
        held = read_json(self._path("done", unit))
        if held is None or not self.is_ours(held):
            return None
        objects = objects_of(held)
        try:
            sizes = {key: size_of(self.objects / key) for key in objects or ()}
        except (OSError, ValueError):  # a name may hold a null byte
            return None
        fits = objects is not None and all(sizes[k] == size for k, (size, _) in objects.items())
        return held if fits else None

    def failure(self, unit: str) -> dict[str, Any] | None:
        """What is recorded of a unit's failed attempts."""
        held = read_json(self._path("failed", unit)) or {}
        ours = held.get("job_digest") == self.digest and isinstance(held.get("attempts"), int)
        return held if ours else None

    def state(self, unit: str) -> str:
        """'done', 'empty' (done, without data), 'claimed', 'failed' or 'planned'."""
        marker = self.marker(unit)
        if marker is not None:
            return "done" if marker.get("valid", 1) else "empty"
        if self._held_by_other(self._path("claims", unit)):
            return "claimed"
        return "failed" if self.failure(unit) else "planned"

    def claimed(self) -> list[str]:
        """The units that other living workers hold."""
        return [u for u in self.units if self._held_by_other(self._path("claims", u))]

    def _held_by_other(self, path: AnyFile) -> bool:
        """Whether a claim still means something to this process."""
        try:
            age = time.time() - modified(path)
        except OSError:
            return False
        held = read_json(path) or {}
        if held.get("token") == _ME:
            return False
        here = held.get("host") == _HOST and isinstance(held.get("pid"), int)
        # Our own number with another token: the claim is of an earlier life of a container.
        if here and (held["pid"] == os.getpid() or not _alive(held["pid"])):
            return False
        return abs(age) <= _STALE_S  # a time to come is of a clock that goes wrong

    def claim(self, unit: str) -> bool:
        """Claims a unit; False if somebody else works on it."""
        path = self._path("claims", unit)
        told = {"host": _HOST, "pid": os.getpid(), "token": _ME, "time": time.time()}
        for _ in range(3):
            if write_first(path, json.dumps(told)):
                return True
            if self._held_by_other(path):
                return False
            path.unlink(missing_ok=True)
        return False

    def release(self, unit: str) -> None:
        """Gives a claim back."""
        path = self._path("claims", unit)
        if (read_json(path) or {}).get("token") == _ME:
            path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _kept_fresh(self, unit: str) -> Iterator[None]:
        ended, path = threading.Event(), self._path("claims", unit)

        def touch() -> None:
            while not ended.wait(TOUCH_S):
                with contextlib.suppress(OSError):
                    if isinstance(path, ObjectPath):
                        path.write(path.read_bytes())
                    else:
                        os.utime(path)

        thread = threading.Thread(target=touch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def finish(self, unit: str, record: Mapping[str, Any], objects: Sequence[str]) -> None:
        """Makes objects durable, then the marker, then removes what was said of the unit before.

        Args:
          unit: its id.
          record: members of the marker.
          objects: keys of all that the unit wrote.
        """
        sizes = {}
        for key in objects:
            path = self.objects / key
            if isinstance(path, Path):
                sync_file(path)
            sizes[key] = [size_of(path), digest_of_file(path)]
        for folder in {above for key in objects for above in self._folders(key)}:
            sync_folder(folder)
        marker = {"id": unit, "job_digest": self.digest, "objects": sizes, **record}
        marker["worker"] = f"{_HOST}:{os.getpid()}"
        path = self._path("done", unit)
        write_durably(path, json.dumps(marker, sort_keys=True) + "\n")
        remove_old(path.parent, f".{path.name}.*.tmp")
        self._path("failed", unit).unlink(missing_ok=True)

    def _folders(self, key: str) -> Iterator[Path]:
        folder = (self.objects / key).parent
        while isinstance(folder, Path) and folder != self.objects:
            yield folder
            folder = folder.parent

    def _note_failure(self, unit: str, error: BaseException) -> None:
        attempts = (self.failure(unit) or {}).get("attempts", 0) + 1
        told = {"id": unit, "job_digest": self.digest, "error": str(error) or repr(error),
                "kind": type(error).__name__, "attempts": attempts}  # fmt: skip
        write_durably(self._path("failed", unit), json.dumps(told) + "\n")

    def run(
        self,
        work: Callable[[str], tuple[Mapping[str, Any], Sequence[str]]],
        index: int = 0,
        count: int = 1,
        *,
        steal: bool = True,
        wait: bool = False,
        attempts: int = 3,
        say: Callable[[str, Mapping[str, Any]], None] = lambda unit, record: None,
    ) -> Outcome:
        """Works until nothing is left to do here.

        Args:
          work: writes the objects of a unit, whole ones under their final names; returns the
            members of the marker and the keys of the objects. Its errors are those of the unit,
            but for a disk that is full or may not be written to: that ends the run.
          index, count: of this worker.
          steal: take the units of others when its own are done.
          wait: wait for what others hold, until all is done.
          attempts: times that a unit is tried in all.
          say: is called after each unit with its id and marker.

        Raises:
          OSError: nothing can be written.
          Stopped: see `stopping`; the claim is given back.
        """
        made = 0
        while True:
            found, again = Outcome(made), False
            for at in order(len(self.units), index, count, steal):
                unit = self.units[at]
                state = self.take(unit, work, attempts, say)
                if state == "failed":
                    found.failed[unit] = str((self.failure(unit) or {}).get("error"))
                elif state == "busy":
                    found.busy.append(unit)
                else:
                    again |= state != "done"
                    made += state == "made"
            found.made = made
            if not again and not (wait and found.busy):
                return found
            if not again:
                time.sleep(min(TOUCH_S, 5.0))

    def take(
        self,
        unit: str,
        work: Callable[[str], tuple[Mapping[str, Any], Sequence[str]]],
        attempts: int = 3,
        say: Callable[[str, Mapping[str, Any]], None] = lambda unit, record: None,
    ) -> str:
        """Works on one unit, if it is free; see `run`.

        Returns:
          'made' by this call, 'tried' if the attempt failed, 'done' before it, 'busy' with another
          worker, 'failed' as often as it may.
        """
        if self.marker(unit) is not None:
            return "done"
        if (self.failure(unit) or {}).get("attempts", 0) >= attempts:
            return "failed"
        # SIGTERM may come between the claim and what follows it.
        try:
            if not self.claim(unit):
                return "busy"
            return "made" if self._try(unit, work, say) else "tried"
        finally:
            self.release(unit)

    def forgive(self) -> None:
        """Forgets failed attempts, so that every unit may be tried again."""
        for unit in self.units:
            self._path("failed", unit).unlink(missing_ok=True)

    def undo(self, unit: str) -> None:
        """Removes the marker of a unit, which is to be done again."""
        self._path("done", unit).unlink(missing_ok=True)

    def forget(self, unit: str) -> None:
        """Removes the claim on a unit whose worker is known to be dead."""
        self._path("claims", unit).unlink(missing_ok=True)

    def _try(self, unit: str, work: Any, say: Any) -> bool:
        """One attempt at a claimed unit; whether it is done now by this."""
        if self.marker(unit) is not None:  # done between the look and the claim
            return False
        with self._kept_fresh(unit):
            begun = time.monotonic()
            try:
                record, objects = work(unit)
                record = {**record, "seconds": round(time.monotonic() - begun, 3)}
                self.finish(unit, record, objects)
            except Exception as e:
                if isinstance(e, PermissionError) or getattr(e, "errno", None) in _REFUSED:
                    raise
                self._note_failure(unit, e)
                return False
        say(unit, record)
        return True


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True
