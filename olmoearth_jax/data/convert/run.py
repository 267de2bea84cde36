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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from olmoearth_jax import modalities as registry
from olmoearth_jax.data.convert import tiles, tree
from olmoearth_jax.data.convert.index_csv import read_series
from olmoearth_jax.data.convert.tree import TileJob
from olmoearth_jax.data.errors import ReadError
from olmoearth_jax.data.h5_writer import Storage, write_csv, write_sample, write_tables
from olmoearth_jax.data.journal import Journal, file_digest, lock_folder, text_digest
from olmoearth_jax.data.pool import run_tasks
from olmoearth_jax.data.progress import Progress
from olmoearth_jax.modalities import IMAGE_TILE_PX, MAX_TIMESTEPS

STATE_DIR = ".h5_conversion"
CHECKSUM_FILE = "checksums.csv"
TILES_FILE = "sample_tiles.csv"
DROPPED_FILE = "dropped.csv"
NOTES_FILE = "notes.csv"
RECORD_FILE = "conversion.json"

OVER = ("refuse", "select")
_NEWER = {"min_timesteps": MAX_TIMESTEPS, "over": "refuse"}

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is converted and how.

    Attributes:
      tree: folder of the GeoTIFFs and CSVs.
      output_dir: folder in which the dataset's own folder is made.
      modalities: to convert, in the order of the metadata's columns; () for all in the tree.
      required: modalities without which a tile is dropped.
      tile_px: side of a sample in pixels of the tile grid; divides 256.
      storage: compression and chunks.
      keep_unmatched: see `tiles.plan_time`.
      min_timesteps: fewest timesteps of a tile's longest series.
      over: what becomes of a longer series than the models take: its tile is dropped ('refuse'), or
        it keeps per calendar month the date nearest its middle ('select').
    """

    tree: Path
    output_dir: Path
    modalities: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    tile_px: int = 128
    storage: Storage = dataclasses.field(default_factory=Storage)
    keep_unmatched: bool = False
    min_timesteps: int = MAX_TIMESTEPS
    over: str = "refuse"

    def __post_init__(self) -> None:
        if not 1 <= self.min_timesteps <= MAX_TIMESTEPS:
            raise ValueError(
                f"min_timesteps must lie in 1..{MAX_TIMESTEPS}, got {self.min_timesteps}"
            )
        if self.over not in OVER:
            raise ValueError(f"over must be one of {', '.join(OVER)}, got {self.over!r}")
        if self.over == "select" and self.keep_unmatched:
            raise ValueError(
                "a series cannot keep timesteps on dates that the longest one lacks "
                "(keep_unmatched) where that is shortened (over=select)"
            )
        if not self.tree.is_dir():
            raise ValueError(f"folder of GeoTIFFs does not exist: {self.tree}")
        if self.tile_px < 1 or IMAGE_TILE_PX % self.tile_px:
            raise ValueError(f"tile size must divide {IMAGE_TILE_PX}, got {self.tile_px}")
        found = self.modalities or tree.find_modalities(self.tree)
        if not found:
            raise ValueError(f"{self.tree} holds no index such as 10_sentinel2_l2a_monthly.csv")
        names = tree.check_names(found)
        required = tree.check_names(self.required)
        extra = [n for n in required if n not in names]
        if extra:
            raise ValueError(f"required modality {extra[0]!r} is not among the converted ones")
        object.__setattr__(self, "modalities", names)
        object.__setattr__(self, "required", required)

    @property
    def pieces(self) -> int:
        """Samples per tile."""
        return (IMAGE_TILE_PX // self.tile_px) ** 2

    def scan_digest(self) -> str:
        """Identifies what the scan of a tile depends on, besides the tile's files."""
        records = {n: dataclasses.asdict(registry.get(n)) for n in self.modalities}
        return text_digest([str(self.tree.absolute()), records])

    def digest(self) -> str:
        """Identifies what the content of the dataset depends on, besides the files."""
        parts = [self.required, self.tile_px, dataclasses.asdict(self.storage), self.keep_unmatched]
        newer = self.changed()
        extra = [newer] if newer else []
        return text_digest([self.scan_digest(), list(self.modalities), *parts, *extra])

    def changed(self) -> dict[str, Any]:
        """The settings of later versions that differ from what earlier ones did."""
        return {k: getattr(self, k) for k, v in _NEWER.items() if getattr(self, k) != v}

    def record(self) -> dict[str, Any]:
        """All settings, for the dataset's record; later ones only where they were used."""
        known = dataclasses.asdict(self)
        return {k: v for k, v in known.items() if k not in _NEWER} | self.changed()

    @property
    def length(self) -> tiles.Length:
        """How many timesteps a tile must have."""
        return tiles.Length(self.min_timesteps, self.over == "select")


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
    kept: _Kept
    folder: Path
    finished: Mapping[int, str]


def convert(
    settings: Settings,
    workers: int = 0,
    say: Say | None = None,
    skip_unreadable: bool = False,
) -> Conversion:
    """Converts a tree, or goes on with a conversion that was stopped.

    It runs in `workers` processes, 0 for this one. Tiles with a file that cannot be read are
    dropped with `skip_unreadable`; without, they stop it before anything is written.

    Raises:
      FolderInUse: another conversion runs in the same output folder.
      ValueError: wrong CSVs, unreadable files, no tile left, or a dataset of other content in
        the place of this one.
      OSError: the disk is full or not writable.
    """
    state = settings.output_dir / STATE_DIR
    with lock_folder(state, "a conversion"):
        series = {n: read_series(settings.tree, n) for n in settings.modalities}
        ignored = {n: s.ignored for n, s in series.items() if s.ignored}
        if say and ignored:
            text = ", ".join(f"{count} of {name}" for name, count in ignored.items())
            say(f"ignored CSV rows that repeat a timestep or are out of order: {text}")
            for name, listed in series.items():
                if listed.lost:
                    first = ", ".join(listed.lost[:3])
                    say(f"{len(listed.lost)} tiles of {name} have no image_idx 0, such as {first}")
        jobs = tree.enumerate_tiles(series)
        scans, problems = _scan(settings, jobs, workers, say)
        if problems and not skip_unreadable:
            shown = "; ".join(list(problems.values())[:5])
            raise ValueError(
                f"{len(problems)} of {len(jobs)} tiles cannot be read: {shown}. Mend them, or "
                f"drop these tiles with --skip_unreadable"
            )
        kept, dropped, removed = _select(settings, jobs, scans)
        dropped.update(problems)
        if not kept:
            reasons = "; ".join(f"{t}: {r}" for t, r in list(dropped.items())[:3])
            raise ValueError(f"no tile of {settings.tree} can be used ({reasons or 'no tiles'})")
        return _write(settings, kept, dropped, removed, workers, say)


def _signature(settings: Settings, job: TileJob) -> str:
    """Changes when a file of the tile or its dates do."""
    files = []
    for path in tree.raster_paths(settings.tree, job, job.dates):
        try:
            status = path.stat()
            files.append((path.name, status.st_size, status.st_mtime_ns))
        except OSError:
            files.append((path.name, None, None))
    return text_digest([files, dict(job.dates)])


def _scan(
    settings: Settings, jobs: Sequence[TileJob], workers: int, say: Say | None
) -> tuple[dict[str, Any], dict[str, str]]:
    """(per tile its signature and unusable modalities, problems of tiles that cannot be read)."""
    journal = Journal(settings.output_dir / STATE_DIR / f"{settings.scan_digest()}.scan.jsonl")
    problems: dict[str, str] = {}
    todo = []
    for job in jobs:
        signature = _signature(settings, job)
        known = journal.records.get(_key(job), {})
        if known.get("signature") != signature or "empty" not in known:
            todo.append((settings.tree, job, signature))
    progress = Progress(len(todo), "tiles scanned", say)
    with journal:
        for (_, job, signature), found in run_tasks(_scan_tile, todo, workers):
            if isinstance(found, str):
                problems[str(job.cell)] = found
            else:
                record = {"signature": signature, **dataclasses.asdict(found)}
                journal.add(_key(job), record)
            progress.step()
    return journal.records, dict(sorted(problems.items()))


def _key(job: TileJob) -> str:
    return f"{job.cell}_{job.cell.factor}"


def _scan_tile(task: tuple[Path, TileJob, str]) -> tiles.Findings | str:
    """What a tile holds, or why it cannot be read."""
    try:
        return tiles.inspect(*task[:2])
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
    written = _write_samples(settings, kept, partial, workers, say)
    _write_reports(settings, kept, dropped, removed, partial)
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
    except (OSError, ValueError):
        record = {}
    if record.get("content") != content:
        raise ValueError(f"another dataset is in the way: {folder}; move it or delete it")
    with (folder / CHECKSUM_FILE).open(newline="") as file:
        for row in csv.DictReader(file):
            path = folder / f"sample_{row['sample_index']}.h5"
            if not path.is_file() or file_digest(path) != row["blake2b"]:
                raise ValueError(
                    f"{path} is missing or was changed since the conversion; delete the folder "
                    f"{folder} to convert again"
                )


def _write_samples(
    settings: Settings, kept: Sequence[_Kept], folder: Path, workers: int, say: Say | None
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
            yield _WriteTask(settings, tile, folder, finished)

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
    centre = np.array(tree.centre(kept.job.cell))
    cut = tiles.pieces(settings.tree, kept.job, kept.names, plan, settings.tile_px)
    for (number, path), arrays in zip(paths.items(), cut, strict=True):
        if number not in done:
            write_sample(path, arrays, plan.timestamps, plan.masks, centre, settings.storage)
            done[number] = file_digest(path)
    return done


def _write_reports(
    settings: Settings,
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
            centres.append(tree.centre(cell))
    write_tables(folder, settings.modalities, rows, np.array(centres, np.float64), settings.storage)
    write_csv(folder / TILES_FILE, ("sample_index", "crs", "col", "row", "subtile"), places)
    lost = [(tile, "", reason) for tile, reason in dropped.items()]
    write_csv(folder / DROPPED_FILE, ("tile", "modality", "reason"), [*lost, *removed])
