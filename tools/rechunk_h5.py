"""Rewrites a dataset so that a crop can be read without decoding whole tiles.

  python -m tools.rechunk_h5 --h5py_dir=DIR --output_dir=DIR2 [--chunk_hw=32] [--chunk_t=3]

Every file is read back and compared before it gets its name. Run the same command again after an
interruption: finished files are checked and kept. The new folder appears under its final name when
it is complete; it is printed last. The original is not touched.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import flags

from olmoearth_jax import commands
from olmoearth_jax.data import chunk_index
from olmoearth_jax.data.errors import ReadError, translate_errors
from olmoearth_jax.data.h5_writer import (
    COMPRESSIONS,
    SETTINGS_FILE,
    Storage,
    write_arrays,
)
from olmoearth_jax.data.hdf5_file import every_array, open_hdf5
from olmoearth_jax.data.index import LATLON_FILE, METADATA_FILE, read_metadata
from olmoearth_jax.data.journal import Journal, file_digest, lock_folder, text_digest
from olmoearth_jax.data.pool import WorkerDied, default_workers, run_tasks
from olmoearth_jax.data.progress import Progress
from olmoearth_jax.files import replacing


@dataclasses.dataclass(frozen=True)
class _Task:
    source: Path
    target: Path
    storage: Storage
    finished: str | None


def _new_name(folder: Path, storage: Storage) -> Path:
    """The dataset's folder relative to its tile folder, with the new compression in its name."""
    settings = storage.settings()
    how = "".join(f"_{settings[k]}" for k in ("compression", "compression_opts") if settings[k])
    head = folder.parent.parent.name
    tail = re.search(r"_\d+_x_\d+$", head)
    if head.startswith("h5py_data_w_missing_timesteps") and tail:
        head = f"h5py_data_w_missing_timesteps{how}{tail.group()}"
    return Path(head) / folder.parent.name / folder.name


def rewrite(source: Path, target: Path, storage: Storage) -> None:
    """Writes a copy of a sample file with other chunks, and compares it with the original.

    Raises:
      ReadError: the original is damaged, or the copy differs from it.
    """
    with (
        replacing(target) as temporary,
        translate_errors(source),
        open_hdf5(source) as old,
    ):
        write_arrays(temporary, {n: d[()] for n, d in every_array(old).items()}, storage)
        if problem := chunk_index.disagreement(temporary):
            raise ReadError(source, f"the index of the copy names {problem}")
        with open_hdf5(temporary) as new:
            copies = every_array(new)
            for name, item in every_array(old).items():
                copy = copies[name]
                if copy.dtype != item.dtype or copy[()].tobytes() != item[()].tobytes():
                    raise ReadError(source, f"the copy of {name!r} differs from the original")


def _run(task: _Task) -> str:
    if task.finished and task.target.is_file() and file_digest(task.target) == task.finished:
        return task.finished
    rewrite(task.source, task.target, task.storage)
    return file_digest(task.target)


def rechunk(
    folder: Path,
    output_dir: Path,
    storage: Storage,
    workers: int = 0,
    say: Callable[[str], None] | None = None,
) -> tuple[Path, int]:
    """Rewrites a dataset; returns (its new folder, files written by this run).

    Raises:
      ValueError: no dataset, a damaged file, or something else in the new folder's place.
      FolderInUse: another process rewrites into the same folder.
      OSError: the disk is full or not writable.
    """
    header, rows = read_metadata(folder)
    final = output_dir / _new_name(folder, storage)
    if final.resolve() == folder.resolve():
        raise ValueError(f"--output_dir leads back to the original {folder}; give another folder")
    numbers = sorted(rows[:, header.index("sample_index")].tolist())
    if final.exists():
        complete = all((final / f"sample_{n}.h5").is_file() for n in numbers)
        same = (final / METADATA_FILE).read_bytes() == (folder / METADATA_FILE).read_bytes()
        if complete and same and _layout(final) == dataclasses.asdict(storage):
            return final, 0
        raise ValueError(f"another dataset is in the way: {final}; move it or delete it")
    partial = final.with_name(f".{final.name}.{text_digest(dataclasses.asdict(storage))}.partial")
    with lock_folder(partial, "a rechunking"):
        written = _rewrite_all(folder, partial, numbers, storage, workers, say)
        for name in (METADATA_FILE, LATLON_FILE):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, partial / name)
        (partial / SETTINGS_FILE).write_text(json.dumps(storage.settings(), indent=2))
        (partial / "layout.json").write_text(json.dumps(dataclasses.asdict(storage)))
        (partial / "finished.jsonl").unlink()
        (partial / "lock").unlink()
        os.replace(partial, final)
    return final, written


def _rewrite_all(
    folder: Path,
    partial: Path,
    numbers: Sequence[int],
    storage: Storage,
    workers: int,
    say: Callable[[str], None] | None,
) -> int:
    for leftover in partial.glob("*.tmp"):
        leftover.unlink()
    journal = Journal(partial / "finished.jsonl")
    known = {key: record["digest"] for key, record in journal.records.items()}
    tasks = (
        _Task(folder / name, partial / name, storage, known.get(name))
        for name in (f"sample_{n}.h5" for n in numbers)
    )
    progress, written = Progress(len(numbers), "files", say), 0
    with journal:
        for task, digest in run_tasks(_run, tasks, workers):
            if task.finished != digest:
                journal.add(task.target.name, {"digest": digest})
                written += 1
            progress.step()
    return written


def _layout(folder: Path) -> object:
    try:
        return json.loads((folder / "layout.json").read_text())
    except (OSError, ValueError):
        return None


def _define_flags() -> None:
    flags.DEFINE_string("h5py_dir", None, "Dataset to rewrite.", required=True)
    flags.DEFINE_string("output_dir", None, "Folder to write the copy in.", required=True)
    flags.DEFINE_integer("chunk_hw", 32, "Side of chunks, in pixels.", lower_bound=1)
    flags.DEFINE_integer("chunk_t", 3, "Timesteps per chunk.", lower_bound=1)
    flags.DEFINE_enum("compression", "zstd", COMPRESSIONS[1:], "How arrays are compressed.")
    flags.DEFINE_integer("level", 3, "Level of gzip or zstd.")
    flags.DEFINE_integer("num_workers", None, "Worker processes; default: all cores but one.")


def main() -> None:
    given = flags.FLAGS
    workers = default_workers() if given.num_workers is None else given.num_workers
    level = given.level if given.compression != "lz4" else None
    storage = Storage(given.compression, level, None, given.chunk_hw, given.chunk_t)
    folder, written = rechunk(
        Path(given.h5py_dir),
        Path(given.output_dir),
        storage,
        workers,
        commands.say,
    )
    print(f"{written} files written now")
    print(folder)


if __name__ == "__main__":
    _define_flags()
    commands.run_alone(main, refusals=(ValueError, OSError, WorkerDied))
