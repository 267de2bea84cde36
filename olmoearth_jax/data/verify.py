"""Checks of a dataset, file by file and in its tables, before it is trained on."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from olmoearth_jax import modalities as registry
from olmoearth_jax.data import blocks, chunk_index, quality
from olmoearth_jax.data.blocks import ALONE, Place
from olmoearth_jax.data.checksums import file_digest, text_digest
from olmoearth_jax.data.errors import ReadError
from olmoearth_jax.data.h5 import open_sample
from olmoearth_jax.data.h5_writer import write_csv
from olmoearth_jax.data.hdf5_file import every_array, open_hdf5
from olmoearth_jax.data.index import LATLON_FILE, read_centres, read_metadata
from olmoearth_jax.data.pool import Workers, run_tasks
from olmoearth_jax.data.progress import Progress
from olmoearth_jax.data.work_list import WorkList, write_durably
from olmoearth_jax.files import check_file, replacing


@dataclasses.dataclass(frozen=True)
class FileReport:
    """What one file holds.

    Attributes:
      problems: sentences about it.
      digest: of the file; '' if it cannot be read.
      content: of all its arrays but latlon.
      latlon: as stored, or None.
      values: per modality.
    """

    problems: list[str]
    digest: str = ""
    content: str = ""
    latlon: tuple[float, ...] | None = None
    values: dict[str, quality.Values] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON can hold it, without loss."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {**plain, "values": {n: v.to_json() for n, v in self.values.items()}}

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> FileReport:
        """What `to_json` gave."""
        place = None if plain["latlon"] is None else tuple(plain["latlon"])
        found = {n: quality.Values.from_json(v) for n, v in plain["values"].items()}
        return cls(plain["problems"], plain["digest"], plain["content"], place, found)


@dataclasses.dataclass
class Report:
    """What a dataset holds: errors, warnings, values per modality, checksum per sample number."""

    errors: list[str] = dataclasses.field(default_factory=list)
    warnings: list[str] = dataclasses.field(default_factory=list)
    values: dict[str, quality.Values] = dataclasses.field(default_factory=dict)
    digests: dict[int, str] = dataclasses.field(default_factory=dict)


def inspect(path: Path) -> FileReport:
    """Opens and decodes one file."""
    names = tuple(n for n in registry.names() if n not in registry.DERIVED)
    content = hashlib.blake2b(digest_size=16)
    try:
        with open_sample(path, names) as file:  # first, as it refuses what is no file
            header = file.header
            arrays = {n: file.read(n) for n in header.shapes}
        with open_hdf5(path) as file:
            every_array(file)  # arrays that training does not read are copied and published too
        digest, problem = file_digest(path), chunk_index.disagreement(path)
    except ReadError as e:
        return FileReport([f"{path.name}: {e.problem}"])
    except OSError as e:
        return FileReport([f"{path.name}: {e.strerror}"])
    problems = []
    if problem:
        problems.append(f"was changed after its index was written, which names {problem}")
    latlon = arrays.pop("latlon", None)
    content.update(header.timestamps.tobytes())
    for name, array in arrays.items():
        content.update(name.encode() + np.ascontiguousarray(array).tobytes())
    varying = {n: a.shape[2] for n, a in arrays.items() if registry.get(n).kind == "space_time"}
    problems += quality.time_problems(header.timestamps, header.masks, varying)
    if header.tile_px is None:
        problems.append("holds no modality with extent")
    if latlon is None:
        problems.append("has no latlon")
    elif not (abs(latlon[0]) <= 90 and abs(latlon[1]) <= 180):
        problems.append(f"has the impossible place {latlon.tolist()} (latitude, longitude)")
    return FileReport(
        [f"{path.name}: {p}" for p in problems],
        digest,
        content.hexdigest(),
        None if latlon is None else tuple(latlon.tolist()),
        {n: quality.Values.of(n, a) for n, a in arrays.items()},
    )


def verify(
    folder: Path,
    workers: int = 0,
    max_files: int | None = None,
    say: Callable[[str], None] | None = None,
    state: Path | None = None,
    at: Place = ALONE,
) -> Report:
    """Checks a dataset, or `max_files` of its files spread evenly.

    Args:
      folder: of the dataset.
      workers: processes, 0 for this one.
      max_files: as above.
      say: is told progress.
      state: folder that several workers share; what one has found of a file as it is now is not
        looked for again. The report is the same without.
      at: this worker's place among them.

    Raises:
      ValueError: no dataset folder, or a malformed metadata table.
      OthersAtWork: other workers hold the rest of the files.
      OSError: the state cannot be written.
    """
    header, table = read_metadata(folder)
    table = table[np.argsort(table[:, header.index("sample_index")])]
    report = Report()
    _check_tables(folder, header, table, report)
    if max_files is not None and max_files < len(table):
        table = table[np.linspace(0, len(table) - 1, max_files).astype(int)]
    rows = {int(r[header.index("sample_index")]): r for r in table}
    paths = [folder / f"sample_{n}.h5" for n in sorted(rows)]
    if state is None:
        found = _inspected(paths, workers, say)
    else:
        found = _shared(folder, paths, workers, say, state, at)
    centres = _centres(folder)
    usable = centres is not None and centres.ndim == 2 and centres.shape[1] == 2
    collected = _Collector(header, rows, centres if usable else None, report)
    # in order of number, so that any worker count gives one report
    for number, result in zip(sorted(rows), found, strict=True):
        collected.add(number, result)
    collected.judge_values()
    return report


def _inspected(
    paths: Sequence[Path], workers: int, say: Callable[[str], None] | None
) -> Iterator[FileReport]:
    """What the files hold, in their order."""
    progress, turn = Progress(len(paths), "files", say), 0
    waiting: dict[Path, FileReport] = {}
    for path, result in run_tasks(inspect, paths, workers):
        waiting[path] = result
        progress.step()
        while turn < len(paths) and paths[turn] in waiting:
            yield waiting.pop(paths[turn])
            turn += 1


def _shared(
    folder: Path,
    paths: Sequence[Path],
    workers: int,
    say: Callable[[str], None] | None,
    state: Path,
    at: Place,
) -> Iterator[FileReport]:
    """As `_inspected`, when this worker and others have looked at all."""
    digest = text_digest([str(folder.absolute()), registry.user_records()])
    parts = {
        f"{name}.{text_digest([_signature(p) for p in part])}": part
        for name, part in blocks.split(paths).items()
    }
    work = WorkList(state / digest, state / digest, digest, list(parts))
    todo = sum(len(part) for unit, part in parts.items() if work.marker(unit) is None)
    progress = Progress(todo, "files", say)
    with Workers(workers) as pool:

        def do(unit: str) -> tuple[Mapping[str, Any], Sequence[str]]:
            found: dict[str, Any] = {path.name: None for path in parts[unit]}
            for path, result in pool.run(inspect, parts[unit]):
                found[path.name] = result.to_json()
                progress.step()
            # Not in the marker, which every worker reads again and again.
            write_durably(work.objects / _found(unit), json.dumps(found))
            return {}, [_found(unit)]

        blocks.run(work, do, at, say=say)
    for unit in parts:
        held = json.loads((work.objects / _found(unit)).read_text(encoding="utf-8"))
        yield from (FileReport.from_json(plain) for plain in held.values())


def _found(unit: str) -> str:
    return f"found/{unit}.json"


def _signature(path: Path) -> list[Any]:
    """Changes when a file does."""
    try:
        status = path.stat()
    except OSError:
        return [path.name]
    return [path.name, status.st_size, status.st_mtime_ns]


@dataclasses.dataclass
class _Collector:
    """Adds what files hold to a report; keeps no file's report but that of all together.

    Attributes:
      header, rows, centres: of the dataset's tables.
      report: to be added to.
      first: number of the first file by content.
      odd: per (modality, suspicion) how many files raise it, and the first of them.
    """

    header: list[str]
    rows: dict[int, np.ndarray]
    centres: np.ndarray | None
    report: Report
    first: dict[str, int] = dataclasses.field(default_factory=dict)
    odd: dict[tuple[str, str], tuple[int, int]] = dataclasses.field(default_factory=dict)

    def add(self, number: int, result: FileReport) -> None:
        """Adds one file."""
        report = self.report
        report.errors += result.problems
        if not result.digest:
            return
        report.digests[number] = result.digest
        same = self.first.setdefault(result.content, number)
        if same != number:
            report.errors.append(f"sample_{number}.h5 holds the same as sample_{same}.h5")
        row = dict(zip(self.header, self.rows[number], strict=True))
        _check_row(number, row, result, self.centres, report)
        for name, values in result.values.items():
            for text in quality.suspicions(name, values):
                count, example = self.odd.get((name, text), (0, number))
                self.odd[name, text] = count + 1, example
            if name in report.values:
                report.values[name].merge(values)
            else:
                report.values[name] = values

    def judge_values(self) -> None:
        """Adds what is odd about the values of single files and of all together."""
        report = self.report
        for name, seen in report.values.items():
            for text in quality.suspicions(name, seen):
                self.odd.setdefault((name, text), (seen.files, 0))
            unusual = quality.fills(name, seen) + quality.far_means(name, seen)
            report.warnings += [f"{name}: {text}" for text in unusual]
            if len(seen.dtypes) > 1:
                report.warnings.append(f"{name}: stored as {', '.join(sorted(seen.dtypes))}")
        for (name, text), (count, example) in sorted(self.odd.items()):
            total = report.values[name].files
            part = f" ({count} of {total} files, such as sample_{example}.h5)"
            report.errors.append(f"{name}: {text}{part if count < total else ''}")


def _centres(folder: Path) -> np.ndarray | None:
    with contextlib.suppress(ValueError):
        return read_centres(folder / LATLON_FILE)
    return None


def _check_tables(folder: Path, header: list[str], table: np.ndarray, report: Report) -> None:
    count = len(table)
    if folder.name.isdigit() and int(folder.name) != count:
        report.errors.append(f"{folder.name} samples by its name, {count} in its table")
    numbers = set(table[:, header.index("sample_index")].tolist())
    stored = {p.name for p in folder.glob("sample_*.h5")}
    extra = sorted(stored - {f"sample_{n}.h5" for n in numbers})
    if extra:
        report.warnings.append(f"{len(extra)} files are in no table, for example {extra[0]}")
    unknown = [h for h in header if h != "sample_index" and h not in registry.all_names()]
    if unknown:
        report.warnings.append(f"columns of no known modality: {', '.join(unknown)}")
    centres = _centres(folder)
    if centres is None:
        report.errors.append(f"{LATLON_FILE} is missing or cannot be read")
    elif centres.shape != (count, 2):
        report.errors.append(f"{LATLON_FILE} has shape {centres.shape}, expected ({count}, 2)")


def _check_row(
    number: int,
    row: Mapping[str, Any],
    result: FileReport,
    centres: np.ndarray | None,
    report: Report,
) -> None:
    for name, present in row.items():
        if name in registry.all_names() and bool(present) != (name in result.values):
            stored = "lacks it" if present else "holds it"
            report.errors.append(
                f"sample_{number}.h5: the table says {name}={present}, it {stored}"
            )
    if centres is None or result.latlon is None or number >= len(centres):
        return
    if not np.allclose(centres[number], result.latlon, atol=1e-4):
        report.errors.append(f"sample_{number}.h5: {LATLON_FILE} gives another place")


def read_manifest(path: Path) -> dict[int, str]:
    """The checksums of a manifest by sample number.

    Raises:
      ValueError: the manifest cannot be read.
    """
    try:
        check_file(path)
        with path.open(newline="") as file:
            return {int(r["sample_index"]): r["blake2b"] for r in csv.DictReader(file)}
    except KeyError as e:
        raise ValueError(f"{path} is no manifest of checksums: it has no column {e}") from None
    except (OSError, ValueError, TypeError, csv.Error) as e:
        raise ValueError(f"manifest {path} cannot be read: {e!r}") from e


def compare_manifest(
    name: str, recorded: Mapping[int, str], digests: dict[int, str], folder: Path | None = None
) -> list[str]:
    """Differences between the checksums of a manifest called `name` and what was found.

    Args:
      name: of the manifest.
      recorded: its checksums.
      digests: those of the files.
      folder: of the dataset, to tell of files that the manifest knows and the folder lacks.
    """
    out = []
    if folder is not None:
        gone = [n for n in recorded if not (folder / f"sample_{n}.h5").exists()]
        if gone:
            out.append(f"{len(gone)} files of {name} are gone, such as sample_{min(gone)}.h5")
    return out + [
        f"sample_{n}.h5 has changed since {name} was written"
        if n in recorded
        else f"sample_{n}.h5 is not in {name}"
        for n, digest in digests.items()
        if recorded.get(n) != digest
    ]


def write_manifest(path: Path, digests: dict[int, str]) -> None:
    """Writes the checksums."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        write_csv(temporary, ("sample_index", "blake2b"), list(digests.items()))


def table_lines(report: Report) -> list[str]:
    """What each modality holds, as lines of text."""
    out = [f"{'modality':<24} {'files':>7} {'dtype':<9} {'min':>11} {'max':>11}  normalised mean"]
    for name, seen in report.values.items():
        if seen.lo is None or seen.hi is None:
            continue
        mean = seen.normalized_mean(name)
        text = "-" if mean is None else f"{mean.min():.2f} to {mean.max():.2f}"
        dtype = "/".join(sorted(seen.dtypes))
        out.append(
            f"{name:<24} {seen.files:>7} {dtype:<9} {seen.lo.min():>11.5g} {seen.hi.max():>11.5g}"
            f"  {text}"
        )
    return out
