"""Rewrites a dataset so that a crop can be read without decoding whole tiles.

  python -m tools.rechunk_h5 --h5py_dir=DIR --output_dir=DIR2 [--chunk_hw=32] [--chunk_t=3]

Every file is read back and compared before it gets its name. Run the same command again after an
interruption, or on other machines at the same time (--shard, --of): they share the work. The new
folder appears under its final name when it is complete; it is printed last. The original is not
touched.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from absl import flags

from olmoearth_jax import commands, outputs
from olmoearth_jax.data import blocks, chunk_index
from olmoearth_jax.data.blocks import ALONE, Place
from olmoearth_jax.data.checksums import file_digest, text_digest
from olmoearth_jax.data.errors import ReadError, translate_errors
from olmoearth_jax.data.h5_writer import (
    COMPRESSIONS,
    SETTINGS_FILE,
    Storage,
    write_arrays,
)
from olmoearth_jax.data.hdf5_file import every_array, open_hdf5
from olmoearth_jax.data.index import LATLON_FILE, METADATA_FILE, read_metadata
from olmoearth_jax.data.pool import WorkerDied, Workers, default_workers
from olmoearth_jax.data.progress import Progress
from olmoearth_jax.data.work_list import WorkList
from olmoearth_jax.files import replacing

from . import _workers


@dataclasses.dataclass(frozen=True)
class _Task:
    source: Path
    target: Path
    storage: Storage


def _new_name(folder: Path, storage: Storage) -> Path:
    """The dataset's folder relative to its tile folder, with the new compression in its name."""
    settings = storage.settings()
    told = [settings[k] for k in ("compression", "compression_opts")]
    how = "".join(f"_{text}" for text in told if text is not None)
    head = folder.parent.parent.name
    tail = re.search(r"_\d+_x_\d+$", head)
    if head.startswith("h5py_data_w_missing_timesteps") and tail:
        head = f"h5py_data_w_missing_timesteps{how}{tail.group()}"
    return Path(head) / folder.parent.name / folder.name


def rewrite(source: Path, target: Path, storage: Storage) -> None:
    """Writes a copy of a sample file with other chunks, and compares it with the original.

    Raises:
      ReadError: the original is damaged, or the copy differs from it.
      OSError: the disk is full or not writable.
    """
    with translate_errors(source), open_hdf5(source) as old:
        arrays = {n: d[()] for n, d in every_array(old).items()}
    with replacing(target) as temporary:
        write_arrays(temporary, arrays, storage)
        with translate_errors(source):
            _compare(source, temporary)


def _compare(source: Path, copy: Path) -> None:
    """Raises ReadError if a copy holds anything else than its original."""
    if problem := chunk_index.disagreement(copy):
        raise ReadError(source, f"the index of the copy names {problem}")
    with open_hdf5(source) as old, open_hdf5(copy) as new:
        copies, items = every_array(new), every_array(old)
        for name, item in items.items():
            made = copies.get(name)
            if made is None or len(copies) != len(items):
                raise ReadError(source, "the copy holds other arrays than the original")
            if made.dtype != item.dtype or made[()].tobytes() != item[()].tobytes():
                raise ReadError(source, f"the copy of {name!r} differs from the original")


def _run(task: _Task) -> bool:
    """Makes a copy; whether it was not there yet, whole, by a worker that was stopped."""
    if task.target.is_file():
        try:
            with translate_errors(task.target):
                _compare(task.source, task.target)
            return False
        except ReadError:
            pass
    rewrite(task.source, task.target, task.storage)
    return True


def rechunk(
    folder: Path,
    output_dir: Path,
    storage: Storage,
    workers: int = 0,
    say: Callable[[str], None] | None = None,
    at: Place = ALONE,
) -> tuple[Path, int]:
    """Rewrites a dataset; returns (its new folder, files written by this worker).

    Raises:
      ValueError: no dataset, a damaged file, or something else in the new folder's place.
      OthersAtWork: other workers hold the rest.
      OSError: the disk is full or not writable.
    """
    header, rows = read_metadata(folder)
    folder = Path(os.path.abspath(folder))  # its name and those above it are used
    final = output_dir / _new_name(folder, storage)
    if final.resolve() == folder.resolve():
        raise ValueError(f"--output_dir leads back to the original {folder}; give another folder")
    if final.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"--output_dir lies in the original {folder}; give another folder")
    outputs.check_folder(final.parent)
    numbers = sorted(rows[:, header.index("sample_index")].tolist())
    how = text_digest(dataclasses.asdict(storage))
    tables = [name for name in (METADATA_FILE, LATLON_FILE) if (folder / name).is_file()]
    digest = text_digest([how, *(file_digest(folder / name) for name in tables)])
    partial = final.with_name(f".{final.name}.{digest}.partial")
    job = partial.with_suffix(".job")
    if final.exists():
        held = (METADATA_FILE, *(f"sample_{n}.h5" for n in numbers))
        complete = all((final / name).is_file() for name in held) and _same_table(final, folder)
        if complete and _layout(final) == dataclasses.asdict(storage):
            blocks.clear(job)
            return final, 0
        raise ValueError(f"another dataset is in the way: {final}; move it or delete it")
    blocks.refuse_journal(final.with_name(f".{final.name}.{how}.partial"), "rechunking")
    partial.mkdir(parents=True, exist_ok=True)
    names = blocks.split([f"sample_{n}.h5" for n in numbers])
    work = WorkList(job, partial, digest, list(names))

    def write(scratch: Path) -> None:
        for name in tables:
            shutil.copyfile(folder / name, scratch / name)
        (scratch / SETTINGS_FILE).write_text(json.dumps(storage.settings(), indent=2))
        (scratch / "layout.json").write_text(json.dumps(dataclasses.asdict(storage)))

    return final, _rewrite_all(work, names, (folder, final, storage), workers, say, at, write)


def _rewrite_all(
    work: WorkList,
    names: Mapping[str, Sequence[str]],
    what: tuple[Path, Path, Storage],
    workers: int,
    say: Callable[[str], None] | None,
    at: Place,
    write: Callable[[Path], None],
) -> int:
    """Does this worker's share, and what comes last if it finds all done; files it wrote."""
    folder, final, storage = what
    todo = sum(len(names[u]) for u in work.units if work.marker(u) is None)
    progress, written = Progress(todo, "files", say), 0
    with Workers(workers) as pool:

        def do(unit: str) -> tuple[Mapping[str, object], Sequence[str]]:
            nonlocal written
            tasks = (_Task(folder / n, work.objects / n, storage) for n in names[unit])
            for _, new in pool.run(_run, tasks):
                written += new
                progress.step()
            return {}, names[unit]

        if blocks.run(work, do, at, final, say):
            blocks.publish(work.objects, final, work.folder, write)
        else:
            blocks.clear(work.objects, work.folder)
    return written


def _same_table(folder: Path, other: Path) -> bool:
    return (folder / METADATA_FILE).read_bytes() == (other / METADATA_FILE).read_bytes()


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
    _workers.define_flags()
    flags.adopt_module_key_flags(_workers)


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
        _workers.place(given),
    )
    print(f"{written} files written now")
    print(folder)


if __name__ == "__main__":
    _define_flags()
    commands.run_alone(lambda: _workers.share(main), refusals=(ValueError, OSError, WorkerDied))
