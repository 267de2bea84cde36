"""The first pass of a conversion: what every tile holds, found once and kept for later runs."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from olmoearth_jax.data import blocks
from olmoearth_jax.data.blocks import Place
from olmoearth_jax.data.checksums import text_digest
from olmoearth_jax.data.convert import tiles
from olmoearth_jax.data.convert.settings import Settings
from olmoearth_jax.data.convert.sources import Say, Source
from olmoearth_jax.data.convert.tree import TileJob
from olmoearth_jax.data.durable import read_json
from olmoearth_jax.data.errors import ReadError
from olmoearth_jax.data.pool import Workers
from olmoearth_jax.data.progress import Progress
from olmoearth_jax.data.work_list import WorkList

STATE_DIR = ".h5_conversion"
_AGAIN = ".again.json"
"""End of the names of markers whose tiles that could not be used are looked at again."""

Signed = tuple[TileJob, str]
Known = Mapping[tuple[str, str], Mapping[str, Any]]


def scan(
    settings: Settings,
    source: Source,
    jobs: Sequence[TileJob],
    pool: Workers,
    say: Say | None,
    check_units: bool,
    at: Place,
    retry: bool,
) -> tuple[dict[str, Any], dict[str, str]]:
    """Looks at all tiles together with other workers, and waits until that is done.

    Args:
      settings, source, jobs: of the conversion.
      pool: processes of this worker.
      say: is told progress and what is odd.
      check_units: hold values to what is possible.
      at: this worker's place.
      retry: look again at tiles that could not be used in an earlier run; not while others rely on
        what was found.

    Returns:
      (per tile its signature and findings by `key`, problems of tiles that cannot be used); the
      same in every worker.
    """
    digest = settings.scan_digest()
    folder = settings.output_dir / STATE_DIR / digest
    units = _units([(job, source.signature(job)) for job in jobs], check_units)
    work = WorkList(folder, folder, digest, list(units))
    if retry and not blocks.at_work(folder):
        _look_again(work)
    known = _known(folder / "done", check_units)

    def unseen(unit: str) -> list[Signed]:
        return [(j, s) for j, s in units[unit] if (key(j), s) not in known]

    missing = [unit for unit in units if work.marker(unit) is None]
    progress = Progress(sum(len(unseen(unit)) for unit in missing), "tiles scanned", say)

    def do(unit: str) -> tuple[Mapping[str, Any], Sequence[str]]:
        found: dict[str, Any] = {key(j): known.get((key(j), s)) for j, s in units[unit]}
        tasks = [(source, j, s, check_units) for j, s in unseen(unit)]
        for (_, job, signature, _), result in pool.run(_scan_tile, tasks):
            if not isinstance(result, str):
                result = {"signature": signature, **dataclasses.asdict(result)}
            found[key(job)] = result
            progress.step()
        return {"tiles": found}, ()

    held: list[Any] = [None]
    while not all(held):  # a marker may be taken away by a worker that looks again
        blocks.run(work, do, dataclasses.replace(at, wait=True), say=say)
        held = [work.marker(unit) for unit in units]
    if not blocks.at_work(folder):
        _remove_outdated(work)
    return _gather(jobs, held, say)


def _gather(
    jobs: Sequence[TileJob], held: Sequence[Mapping[str, Any]], say: Say | None
) -> tuple[dict[str, Any], dict[str, str]]:
    found = {name: record for marker in held for name, record in marker["tiles"].items()}
    cells = {key(job): str(job.cell) for job in jobs}
    scans = {name: record for name, record in found.items() if not isinstance(record, str)}
    problems = {cells[n]: record for n, record in found.items() if isinstance(record, str)}
    if say:
        _warn(jobs, scans, say)
    return scans, dict(sorted(problems.items()))


def key(job: TileJob) -> str:
    """Names a tile among all of a conversion."""
    return f"{job.cell}_{job.cell.factor}"


def _units(signed: Sequence[Signed], check_units: bool) -> dict[str, Sequence[Signed]]:
    """Blocks of tiles by number and what their findings depend on."""
    return {
        f"{name}.{text_digest([[(key(j), s) for j, s in part], check_units])}": part
        for name, part in blocks.split(signed).items()
    }


def _look_again(work: WorkList[Path]) -> None:
    """Undoes blocks with tiles that could not be used; what was found of others stays known."""
    done = work.folder / "done"
    for unit in work.units:
        path = done / f"{unit}.json"
        if any(isinstance(r, str) for r in _tiles_of(path).values()):
            with contextlib.suppress(FileNotFoundError):  # another worker that begins does the same
                os.replace(path, done / f"{unit}{_AGAIN}")


def _remove_outdated(work: WorkList[Path]) -> None:
    """Removes markers of blocks that are no longer of the plan."""
    names = {f"{unit}.json" for unit in work.units}
    for path in (work.folder / "done").glob("*.json"):
        if path.name not in names:
            path.unlink(missing_ok=True)


def _known(done: Path, check_units: bool) -> Known:
    """Findings of earlier runs by tile and signature."""
    out: dict[tuple[str, str], Mapping[str, Any]] = {}
    for path in sorted(done.glob("*.json")):
        for name, record in _tiles_of(path).items():
            if isinstance(record, dict) and (record.get("checked") or not check_units):
                out.setdefault((name, record["signature"]), record)
    return out


def _tiles_of(path: Path) -> Mapping[str, Any]:
    held = (read_json(path) or {}).get("tiles")
    return held if isinstance(held, dict) else {}


def _warn(jobs: Sequence[TileJob], scans: Mapping[str, Any], say: Say) -> None:
    """Says once per modality what is odd about the values of some tiles."""
    odd: dict[str, list[tuple[TileJob, str]]] = {}
    for job in jobs:
        for name, text in scans.get(key(job), {}).get("unusual", {}).items():
            odd.setdefault(name, []).append((job, text))
    for name, tiles_of in odd.items():
        (first, text), count = tiles_of[0], sum(name in job.dates for job in jobs)
        say(f"warning: {len(tiles_of)} of {count} tiles, such as {first.cell}: {text}")


def _scan_tile(task: tuple[Source, TileJob, str, bool]) -> tiles.Findings | str:
    """What a tile holds, or why it cannot be used."""
    source, job, _, check_units = task
    try:
        return tiles.inspect(source, job, check_units)
    except ReadError as e:
        return str(e)
