"""A whole conversion: scan every tile, number the kept ones, write their samples.

Both passes run in worker processes and can be stopped at any time: the scan and every finished file
are on record, so the same command goes on where it stopped. The dataset folder gets its final name
when everything in it is complete.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from olmoearth_jax import outputs
from olmoearth_jax.data.convert import tiles
from olmoearth_jax.data.convert.settings import Settings
from olmoearth_jax.data.convert.sources import Say, Source
from olmoearth_jax.data.convert.tree import TileJob
from olmoearth_jax.data.errors import ReadError
from olmoearth_jax.data.h5_writer import write_csv, write_sample, write_tables
from olmoearth_jax.data.journal import Journal, file_digest, lock_folder, text_digest
from olmoearth_jax.data.pool import run_tasks
from olmoearth_jax.data.progress import Progress

STATE_DIR = ".h5_conversion"
CHECKSUM_FILE = "checksums.csv"
TILES_FILE = "sample_tiles.csv"
DROPPED_FILE = "dropped.csv"
NOTES_FILE = "notes.csv"
RECORD_FILE = "conversion.json"


@dataclasses.dataclass(frozen=True)
class Conversion:
    """Outcome: the folder, its samples and how many of them this run wrote, the tiles that
    made no sample with the reason, and (tile, modality, text) of what was left out of others and
    of what was not taken as it came or in another unit than usual."""

    folder: Path
    samples: int
    written: int
    dropped: dict[str, str]
    removed: list[tuple[str, str, str]]
    notes: list[tuple[str, str, str]]


@dataclasses.dataclass(frozen=True)
class _Kept:
    """A tile that makes samples: the first one's number, and the modalities it has with notes."""

    job: TileJob
    first: int
    names: tuple[str, ...]
    signature: str
    notes: dict[str, str]
    empty: dict[str, list[int]]


@dataclasses.dataclass(frozen=True)
class _WriteTask:
    settings: Settings
    source: Source
    kept: _Kept
    folder: Path
    finished: Mapping[int, str]


def convert(
    settings: Settings,
    workers: int = 0,
    say: Say | None = None,
    skip_unreadable: bool = False,
    check_units: bool = True,
) -> Conversion:
    """Converts a tree, or goes on with a conversion that was stopped.

    It runs in `workers` processes, 0 for this one. Tiles with a file that cannot be read are
    dropped with `skip_unreadable`; without, they stop it before anything is written. With
    `check_units` that goes for values that cannot be too; odd ones are told once per modality.

    Raises:
      FolderInUse: another conversion runs in the same output folder.
      ValueError: wrong CSVs, unreadable files, no tile left, an output folder that cannot be one,
        or a dataset of other content in the place of this one.
      OSError: the disk is full or not writable.
    """
    state = settings.output_dir / STATE_DIR
    outputs.check_folder(state)
    with lock_folder(state, "a conversion"):
        source = settings.source()
        jobs = source.jobs(say)
        scans, problems = _scan(settings, source, jobs, workers, say, check_units)
        if problems and not skip_unreadable:
            shown = "; ".join(list(dict.fromkeys(problems.values()))[:5])
            raise ValueError(
                f"{len(problems)} of {len(jobs)} tiles cannot be used: {shown}. Mend them, or "
                f"drop these tiles with --skip_unreadable"
            )
        kept, dropped, removed = _select(settings, jobs, scans)
        dropped.update(problems)
        if not kept:
            reasons = "; ".join(f"{t}: {r}" for t, r in list(dropped.items())[:3])
            raise ValueError(f"no tile of {settings.tree} can be used ({reasons or 'no tiles'})")
        return _write(settings, source, kept, dropped, removed, workers, say)


def _scan(
    settings: Settings,
    source: Source,
    jobs: Sequence[TileJob],
    workers: int,
    say: Say | None,
    check_units: bool,
) -> tuple[dict[str, Any], dict[str, str]]:
    """(per tile its signature and unusable modalities, problems of tiles that cannot be read)."""
    journal = Journal(settings.output_dir / STATE_DIR / f"{settings.scan_digest()}.scan.jsonl")
    problems: dict[str, str] = {}
    failed, todo = set(), []
    for job in jobs:
        signature = source.signature(job)
        known = journal.records.get(_key(job), {})
        unseen = "empty" not in known or (check_units and not known.get("checked"))
        if known.get("signature") != signature or unseen:
            todo.append((source, job, signature, check_units))
    progress = Progress(len(todo), "tiles scanned", say)
    with journal:
        for (_, job, signature, _), found in run_tasks(_scan_tile, todo, workers):
            if isinstance(found, str):
                problems[str(job.cell)] = found
                failed.add(_key(job))
            else:
                record = {"signature": signature, **dataclasses.asdict(found)}
                journal.add(_key(job), record)
            progress.step()
    # A record of a failed tile is of its files as they were.
    scans = {key: record for key, record in journal.records.items() if key not in failed}
    if say:
        _warn(jobs, scans, say)
    return scans, dict(sorted(problems.items()))


def _warn(jobs: Sequence[TileJob], scans: Mapping[str, Any], say: Say) -> None:
    """Says once per modality what is odd about the values of some tiles."""
    odd: dict[str, list[tuple[TileJob, str]]] = {}
    for job in jobs:
        for name, text in scans.get(_key(job), {}).get("unusual", {}).items():
            odd.setdefault(name, []).append((job, text))
    for name, tiles_of in odd.items():
        (first, text), count = tiles_of[0], sum(name in job.dates for job in jobs)
        say(f"warning: {len(tiles_of)} of {count} tiles, such as {first.cell}: {text}")


def _key(job: TileJob) -> str:
    return f"{job.cell}_{job.cell.factor}"


def _scan_tile(task: tuple[Source, TileJob, str, bool]) -> tiles.Findings | str:
    """What a tile holds, or why it cannot be used."""
    source, job, _, check_units = task
    try:
        return tiles.inspect(source, job, check_units)
    except ReadError as e:
        return str(e)


def _plan(
    settings: Settings, job: TileJob, names: Sequence[str], empty: Mapping[str, Sequence[int]]
) -> tiles.TimePlan:
    return tiles.plan_time(job.dates, names, settings.keep_unmatched, empty, settings.length.select)


def _select(
    settings: Settings, jobs: Sequence[TileJob], scans: Mapping[str, Any]
) -> tuple[list[_Kept], dict[str, str], list[tuple[str, str, str]]]:
    """(kept tiles with their numbers, dropped tiles, what was left out of kept ones)."""
    kept: list[_Kept] = []
    dropped: dict[str, str] = {}
    removed: list[tuple[str, str, str]] = []
    for job in jobs:
        scan = scans.get(_key(job))
        if scan is None:
            continue  # cannot be read
        names = tuple(n for n in job.dates if n not in scan["faults"])
        faults, notes, empty = dict(scan["faults"]), {}, scan["empty"]
        how = (settings.keep_unmatched, settings.length, empty)
        reason = tiles.drop_reason(job, names, (), *how)
        if reason is None:
            plan = _plan(settings, job, names, empty)
            faults.update(plan.removed)
            for name, count in plan.unmatched.items():
                notes[name] = f"{count} timesteps on dates that the longest series lacks"
            lead, left = tiles.longest(job.dates, names), len(plan.timestamps)
            if lead is not None and left < len(job.dates[lead]):
                more = len(job.dates[lead]) - left
                notes[lead] = f"{more} timesteps farther from the middle of their months"
            names = tuple(n for n in names if n not in plan.removed)
            reason = tiles.drop_reason(job, names, settings.required, *how)
        if reason is not None:
            because = "".join(f"; {n} {why}" for n, why in faults.items())
            dropped[str(job.cell)] = reason + because
            continue
        removed += [(str(job.cell), name, why) for name, why in (faults | notes).items()]
        said = {n: text for n, text in scan["notes"].items() if n in names}
        # Samples of such a tile are others than those of a conversion that did not look.
        signature = text_digest([scan["signature"], said]) if said else scan["signature"]
        kept.append(_Kept(job, len(kept) * settings.pieces, names, signature, said, scan["empty"]))
    return kept, dropped, removed


def _write(
    settings: Settings,
    source: Source,
    kept: Sequence[_Kept],
    dropped: dict[str, str],
    removed: list[tuple[str, str, str]],
    workers: int,
    say: Say | None,
) -> Conversion:
    samples = len(kept) * settings.pieces
    final = settings.output_dir / settings.storage.folder(
        settings.modalities, samples, settings.tile_px, settings.required
    )
    content = text_digest([settings.digest(), [(k.names, k.signature) for k in kept]])
    notes = [(str(k.job.cell), n, text) for k in kept for n, text in k.notes.items()]
    result = Conversion(final, samples, 0, dropped, removed, notes)
    if final.exists():
        _check_complete(final, content)
        return result
    partial = final.with_name(f".{final.name}.{settings.digest()}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    for stale in partial.parent.glob(f".*.{settings.digest()}.partial"):
        if stale != partial:
            shutil.rmtree(stale)
    written = _write_samples(settings, source, kept, partial, workers, say)
    _write_reports(settings, source, kept, dropped, removed, partial)
    if notes:
        write_csv(partial / NOTES_FILE, ("tile", "modality", "note"), notes)
    text = {"content": content, "settings": settings.record(), "tiles": len(kept)}
    (partial / RECORD_FILE).write_text(json.dumps(text, indent=1, default=str))
    (partial / "finished.jsonl").unlink(missing_ok=True)
    os.replace(partial, final)
    return dataclasses.replace(result, written=written)


def _check_complete(folder: Path, content: str) -> None:
    """Holds a finished folder to what it should hold, and its files to their checksums.

    Raises:
      ValueError: another dataset; a file is missing or was changed.
    """
    try:
        record = json.loads((folder / RECORD_FILE).read_text())
    except (OSError, ValueError, RecursionError):
        record = None
    if not isinstance(record, dict) or record.get("content") != content:
        raise ValueError(f"another dataset is in the way: {folder}; move it or delete it")
    try:
        with (folder / CHECKSUM_FILE).open(newline="") as file:
            digests = [(int(r["sample_index"]), r["blake2b"]) for r in csv.DictReader(file)]
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as e:
        raise ValueError(
            f"{folder / CHECKSUM_FILE} cannot be read ({e!r}); delete the folder {folder} to "
            f"convert again"
        ) from e
    for number, digest in digests:
        path = folder / f"sample_{number}.h5"
        if not path.is_file() or file_digest(path) != digest:
            raise ValueError(
                f"{path} is missing or was changed since the conversion; delete the folder "
                f"{folder} to convert again"
            )


def _write_samples(
    settings: Settings,
    source: Source,
    kept: Sequence[_Kept],
    folder: Path,
    workers: int,
    say: Say | None,
) -> int:
    """Writes what is not there yet, and the checksums. Returns how many files it wrote."""
    for leftover in folder.glob("*.tmp"):
        leftover.unlink()
    journal = Journal(folder / "finished.jsonl")
    progress = Progress(len(kept) * settings.pieces, "samples", say)

    def tasks():
        for tile in kept:
            numbers = range(tile.first, tile.first + settings.pieces)
            known = {n: journal.records.get(str(n), {}) for n in numbers}
            finished = {
                n: r["digest"] for n, r in known.items() if r.get("signature") == tile.signature
            }
            yield _WriteTask(settings, source, tile, folder, finished)

    written = 0
    with journal:
        for task, digests in run_tasks(_write_tile, tasks(), workers):
            for number, digest in digests.items():
                if task.finished.get(number) != digest:
                    signature = task.kept.signature
                    journal.add(str(number), {"digest": digest, "signature": signature})
                    written += 1
            progress.step(settings.pieces)
    rows = [(n, journal.records[str(n)]["digest"]) for n in range(len(kept) * settings.pieces)]
    write_csv(folder / CHECKSUM_FILE, ("sample_index", "blake2b"), rows)
    return written


def _write_tile(task: _WriteTask) -> dict[int, str]:
    """Writes a tile's samples that are not finished; the checksum of each by number."""
    kept, settings = task.kept, task.settings
    paths = {
        n: task.folder / f"sample_{n}.h5" for n in range(kept.first, kept.first + settings.pieces)
    }
    done = {
        n: digest
        for n, digest in task.finished.items()
        if paths[n].is_file() and file_digest(paths[n]) == digest
    }
    if len(done) == len(paths):
        return done
    plan = _plan(settings, kept.job, kept.names, kept.empty)
    centre = np.array(task.source.centre(kept.job.cell))
    cut = tiles.pieces(task.source, kept.job, kept.names, plan, settings.pieces)
    for (number, path), arrays in zip(paths.items(), cut, strict=True):
        if number not in done:
            write_sample(path, arrays, plan.timestamps, plan.masks, centre, settings.storage)
            done[number] = file_digest(path)
    return done


def _write_reports(
    settings: Settings,
    source: Source,
    kept: Sequence[_Kept],
    dropped: Mapping[str, str],
    removed: Sequence[tuple[str, str, str]],
    folder: Path,
) -> None:
    """The dataset's tables, which tile each sample comes from, and what was left out and why."""
    rows, places, centres = [], [], []
    for tile in kept:
        cell = tile.job.cell
        present = [int(n in tile.names) for n in settings.modalities]
        for piece in range(settings.pieces):
            rows.append([tile.first + piece, *present])
            places.append([tile.first + piece, cell.crs, cell.col, cell.row, piece])
            centres.append(source.centre(cell))
    write_tables(folder, settings.modalities, rows, np.array(centres, np.float64), settings.storage)
    write_csv(folder / TILES_FILE, ("sample_index", "crs", "col", "row", "subtile"), places)
    lost = [(tile, "", reason) for tile, reason in dropped.items()]
    write_csv(folder / DROPPED_FILE, ("tile", "modality", "reason"), [*lost, *removed])
