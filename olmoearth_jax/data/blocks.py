"""Long work on many files: any number of workers share a work list of blocks of them.

A worker is a process of a command with local processes of its own; see `work_list` for how several
come, go and die, and `worker_place` for their numbers.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from olmoearth_jax.data.durable import sync_file, sync_folder
from olmoearth_jax.data.errors import ReadError
from olmoearth_jax.data.work_list import WorkList

BLOCK = 256
"""Files of a unit. Changing it makes other units of work that was begun, but the same files."""

Item = TypeVar("Item")
Do = Callable[[str], tuple[Mapping[str, Any], Sequence[str]]]


class OthersAtWork(RuntimeError):
    """Nothing is left to do here, but other workers still hold blocks."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Which worker of how many this is, and whether it waits for what others hold."""

    index: int = 0
    count: int = 1
    wait: bool = False


ALONE = Place()


class _Halt(BaseException):
    """Ends a run at once, because of its cause or because the work is over."""


def split(items: Sequence[Item], size: int | None = None) -> dict[str, Sequence[Item]]:
    """Blocks of items, `BLOCK` each by default, by the names of their units."""
    step = max(1, BLOCK if size is None else size)
    return {f"{i // step:06d}": items[i : i + step] for i in range(0, len(items), step)}


def run(
    work: WorkList,
    do: Do,
    at: Place = ALONE,
    final: Path | None = None,
    say: Callable[[str], None] | None = None,
) -> bool:
    """Does blocks until all are done; what failed in an earlier run is tried again.

    A damaged file fails its block only, and is raised when the other blocks are done; every other
    error ends the run at once.

    Args:
      work: the blocks.
      do: works on one, see `WorkList.run`.
      at: this worker's place.
      final: what the last worker makes of all blocks; when it is there, nothing is left to do.
      say: is told when this worker begins to wait.

    Returns:
      whether the blocks still have to be put together: False if `final` is there.

    Raises:
      ValueError: a file is damaged; the text is that of its `ReadError`.
      OthersAtWork: others hold the blocks that are left, and this worker does not wait.
      OSError: the disk is full or not writable.
      Exception: whatever `do` raised.
    """
    raised: dict[str, ReadError] = {}

    def guarded(unit: str) -> tuple[Mapping[str, Any], Sequence[str]]:
        if final is not None and final.exists():
            raise _Halt
        try:
            return do(unit)
        except ReadError as e:
            raised[unit] = e
            raise
        except Exception as e:
            raise _Halt from e

    work.forgive()
    try:
        found = work.run(guarded, at.index, at.count, attempts=1)
        if found.busy and at.wait:
            if say is not None:
                say(f"waiting for {len(found.busy)} blocks of files that other workers hold")
            found = work.run(guarded, at.index, at.count, wait=True, attempts=1)
    except _Halt as e:
        # A worker that did a block once more may find that the others have renamed the folder.
        if e.__cause__ is not None and not (_is_gone(e.__cause__) and _appears(final)):
            raise e.__cause__ from None
        return False
    if final is not None and final.exists():
        return False
    for unit, text in found.failed.items():
        raise raised.get(unit) or ValueError(text)
    if found.busy:
        raise OthersAtWork(f"nothing left to do here; others work on {len(found.busy)} blocks")
    return True


def _is_gone(error: BaseException) -> bool:
    return isinstance(error, FileNotFoundError)


def _appears(final: Path | None) -> bool:
    for _ in range(20):
        if final is not None and final.exists():
            return True
        time.sleep(0.1)
    return False


def publish(partial: Path, final: Path, job: Path, write: Callable[[Path], None]) -> None:
    """Puts a finished folder together and gives it its name; several workers may do it at a time.

    Args:
      partial: folder that holds the files of all blocks.
      final: its name to be.
      job: folder of the work list, on the same file system; it goes.
      write: writes all other files into the folder it is given; the same bytes in every worker.

    Raises:
      OSError: the disk is full or not writable.
    """
    try:
        # Written elsewhere and moved in: another worker may rename the folder meanwhile.
        job.mkdir(exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix="tables.", dir=job))
        write(scratch)
        for path in sorted(scratch.iterdir()):
            sync_file(path)
            os.replace(path, partial / path.name)
        for left in partial.glob("*.tmp"):
            left.unlink(missing_ok=True)
        sync_folder(partial)
        os.rename(partial, final)
        sync_folder(final.parent)
    except OSError:
        if not final.exists():
            raise
    clear(partial, job)


def clear(*folders: Path) -> None:
    """Removes folders of work that is finished, where they still are."""
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def at_work(job: Path) -> bool:
    """Whether another living worker holds a unit of a job's folder."""
    claims = job / "claims"
    units = [str(p.relative_to(claims))[: -len(".json")] for p in claims.rglob("*.json")]
    return bool(WorkList(job, job, "", units).claimed())


def refuse_journal(partial: Path, what: str) -> None:
    """Refuses to go on with what a version that kept a journal has begun.

    Raises:
      ValueError: `partial` holds such a journal.
    """
    if (partial / "finished.jsonl").exists():
        raise ValueError(
            f"{partial} is an unfinished {what} of an earlier version, which this one cannot go on "
            "with; delete that folder to begin anew"
        )
