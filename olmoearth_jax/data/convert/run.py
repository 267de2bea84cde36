"""A whole conversion: scan every tile, number the kept ones, write their samples.

Both passes are work lists of blocks that any number of workers share: they may come, go and be
killed at any time, and the same command goes on. Numbers follow from the scan, which all wait for.
The dataset folder gets its final name when everything in it is complete.
"""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from olmoearth_jax import outputs
from olmoearth_jax.data import blocks
from olmoearth_jax.data.blocks import ALONE, Place
from olmoearth_jax.data.checksums import file_digest, text_digest
from olmoearth_jax.data.convert import tiles
from olmoearth_jax.data.convert.scan import STATE_DIR, key, scan
from olmoearth_jax.data.convert.settings import Settings
from olmoearth_jax.data.convert.sources import Say, Source
from olmoearth_jax.data.convert.tree import TileJob
from olmoearth_jax.data.h5_writer import write_csv, write_sample, write_tables
from olmoearth_jax.data.pool import Workers
from olmoearth_jax.data.progress import Progress
from olmoearth_jax.data.work_list import WorkList

CHECKSUM_FILE = "checksums.csv"
TILES_FILE = "sample_tiles.csv"
_DROPPED_FILE = "dropped.csv"
_NOTES_FILE = "notes.csv"
_RECORD_FILE = "conversion.json"


@dataclasses.dataclass(frozen=True)
class Conversion:
    """Outcome: the folder, its samples and how many of them this worker wrote, the tiles that
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
class _Chosen:
    """Tiles to write with their numbers, why others are dropped, what is left out of kept ones."""

    kept: list[_Kept]
    dropped: dict[str, str]
    removed: list[tuple[str, str, str]]


@dataclasses.dataclass(frozen=True)
class _WriteTask:
    settings: Settings
    source: Source
    kept: _Kept
    folder: Path


def convert(
    settings: Settings,
    workers: int = 0,
    say: Say | None = None,
    skip_unreadable: bool = False,
    check_units: bool = True,
    at: Place = ALONE,
) -> Conversion:
    """Converts a tree, or goes on with a conversion that was stopped or that others work on.

    It runs in `workers` processes, 0 for this one. Tiles with a file that cannot be read are
    dropped with `skip_unreadable`; without, they stop it before anything is written. With
    `check_units` that goes for values that cannot be too; odd ones are told once per modality.

    Raises:
      ValueError: wrong CSVs, unreadable files, no tile left, an output folder that cannot be one,
        a dataset of other content in the place of this one, or an unfinished conversion of a
        version that kept a journal.
      OthersAtWork: other workers hold the rest of the samples, and `at` does not wait.
      OSError: the disk is full or not writable.
    """
    outputs.check_folder(settings.output_dir / STATE_DIR)
    source = settings.source()
    jobs = source.jobs(say)
    busy = any(blocks.at_work(job) for job in _begun(settings, "job"))
    with Workers(workers) as pool:
        scans, problems = scan(settings, source, jobs, pool, say, check_units, at, retry=not busy)
        if problems and not skip_unreadable:
            shown = "; ".join(list(dict.fromkeys(problems.values()))[:5])
            raise ValueError(
                f"{len(problems)} of {len(jobs)} tiles cannot be used: {shown}. Mend them, or "
                f"drop these tiles with --skip_unreadable"
            )
        chosen = _select(settings, jobs, scans)
        chosen.dropped.update(problems)
        if not chosen.kept:
            reasons = "; ".join(f"{t}: {r}" for t, r in list(chosen.dropped.items())[:3])
            raise ValueError(f"no tile of {settings.tree} can be used ({reasons or 'no tiles'})")
        return _write(settings, source, chosen, pool, say, at)


def _begun(settings: Settings, kind: str) -> list[Path]:
    """Folders ('partial' or 'job') of unfinished conversions of the same settings."""
    return sorted(settings.output_dir.glob(f"*/*/.*.{settings.digest()}.*.{kind}"))


def _plan(
    settings: Settings, job: TileJob, names: Sequence[str], empty: Mapping[str, Sequence[int]]
) -> tiles.TimePlan:
    return tiles.plan_time(job.dates, names, settings.keep_unmatched, empty, settings.length.select)


def _select(settings: Settings, jobs: Sequence[TileJob], scans: Mapping[str, Any]) -> _Chosen:
    kept: list[_Kept] = []
    dropped: dict[str, str] = {}
    removed: list[tuple[str, str, str]] = []
    for job in jobs:
        scan = scans.get(key(job))
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
    return _Chosen(kept, dropped, removed)


def _write(
    settings: Settings,
    source: Source,
    chosen: _Chosen,
    pool: Workers,
    say: Say | None,
    at: Place,
) -> Conversion:
    kept = chosen.kept
    samples = len(kept) * settings.pieces
    final = settings.output_dir / settings.storage.folder(
        settings.modalities, samples, settings.tile_px, settings.required
    )
    content = text_digest([settings.digest(), [(k.names, k.signature) for k in kept]])
    notes = [(str(k.job.cell), n, text) for k in kept for n, text in k.notes.items()]
    result = Conversion(final, samples, 0, chosen.dropped, chosen.removed, notes)
    partial = final.with_name(f".{final.name}.{settings.digest()}.{content}.partial")
    job = partial.with_suffix(".job")
    if final.exists():
        _check_complete(final, content)
        blocks.clear(partial, job)
        return result
    _make_room(settings, partial)
    partial.mkdir(parents=True, exist_ok=True)
    parts = blocks.split(kept, blocks.BLOCK // settings.pieces)
    work = WorkList(job, partial, content, list(parts))

    def write(folder: Path) -> None:
        write_csv(folder / CHECKSUM_FILE, ("sample_index", "blake2b"), _checksums(work))
        _write_reports(settings, source, chosen, folder)
        if notes:
            write_csv(folder / _NOTES_FILE, ("tile", "modality", "note"), notes)
        text = {"content": content, "settings": settings.record(), "tiles": len(kept)}
        (folder / _RECORD_FILE).write_text(json.dumps(text, indent=1, default=str))

    progress, written = Progress(_missing(work, parts) * settings.pieces, "samples", say), 0

    def do(unit: str) -> tuple[Mapping[str, Any], Sequence[str]]:
        nonlocal written
        tasks = (_WriteTask(settings, source, tile, partial) for tile in parts[unit])
        digests: dict[int, str] = {}
        for _, made in pool.run(_write_tile, tasks):
            digests |= made
            written += len(made)
            progress.step(settings.pieces)
        names = [f"sample_{n}.h5" for n in sorted(digests)]
        return {"digests": sorted(digests.items())}, names

    if blocks.run(work, do, at, final, say):
        blocks.publish(partial, final, job, write)
    else:
        blocks.clear(partial, job)
    return dataclasses.replace(result, written=written)


def _missing(work: WorkList, parts: Mapping[str, Sequence[_Kept]]) -> int:
    return sum(len(part) for unit, part in parts.items() if work.marker(unit) is None)


def _checksums(work: WorkList) -> list[tuple[int, str]]:
    """Number and checksum of all samples.

    Raises:
      FileNotFoundError: another worker has put the folder together meanwhile.
    """
    rows = []
    for unit in work.units:
        marker = work.marker(unit)
        if marker is None:
            raise FileNotFoundError(f"the marker of block {unit} is gone")
        rows += marker["digests"]
    return rows


def _make_room(settings: Settings, partial: Path) -> None:
    """Removes what was begun of the same settings for files as they were, and refuses what an
    earlier version began."""
    for other in sorted(partial.parent.glob(f".*.{settings.digest()}.partial")):
        blocks.refuse_journal(other, "conversion")
        blocks.clear(other)
    for other in _begun(settings, "partial"):
        job = other.with_suffix(".job")
        if other != partial and not blocks.at_work(job):
            blocks.clear(other, job)


def _check_complete(folder: Path, content: str) -> None:
    """Holds a finished folder to what it should hold, and its files to their checksums.

    Raises:
      ValueError: another dataset; a file is missing or was changed.
    """
    try:
        record = json.loads((folder / _RECORD_FILE).read_text())
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


def _write_tile(task: _WriteTask) -> dict[int, str]:
    """Writes a tile's samples; the checksum of each by number."""
    kept, settings = task.kept, task.settings
    plan = _plan(settings, kept.job, kept.names, kept.empty)
    centre = np.array(task.source.centre(kept.job.cell))
    cut = tiles.pieces(task.source, kept.job, kept.names, plan, settings.pieces)
    done = {}
    for number, arrays in zip(range(kept.first, kept.first + settings.pieces), cut, strict=True):
        path = task.folder / f"sample_{number}.h5"
        write_sample(path, arrays, plan.timestamps, plan.masks, centre, settings.storage)
        done[number] = file_digest(path)
    return done


def _write_reports(settings: Settings, source: Source, chosen: _Chosen, folder: Path) -> None:
    """The dataset's tables, which tile each sample comes from, and what was left out and why."""
    rows, places, centres = [], [], []
    for tile in chosen.kept:
        cell = tile.job.cell
        present = [int(n in tile.names) for n in settings.modalities]
        for piece in range(settings.pieces):
            rows.append([tile.first + piece, *present])
            places.append([tile.first + piece, cell.crs, cell.col, cell.row, piece])
            centres.append(source.centre(cell))
    write_tables(folder, settings.modalities, rows, np.array(centres, np.float64), settings.storage)
    write_csv(folder / TILES_FILE, ("sample_index", "crs", "col", "row", "subtile"), places)
    lost = [(tile, "", reason) for tile, reason in chosen.dropped.items()]
    write_csv(folder / _DROPPED_FILE, ("tile", "modality", "reason"), [*lost, *chosen.removed])
