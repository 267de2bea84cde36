"""How far an archive is, and whether its objects are what their markers say."""

from __future__ import annotations

import collections
import hashlib
import json
from pathlib import Path

from olmoearth_jax.maps import embed_job, work_list

STATES = ("done", "empty", "claimed", "failed", "planned")


def status(output: Path) -> tuple[list[str], bool]:
    """(lines to print, whether nothing is missing).

    Raises:
      ValueError: no archive of ours.
    """
    work = embed_job.read_plan(output)
    counts: collections.Counter[str] = collections.Counter()
    by_period: dict[str, collections.Counter[str]] = {}
    errors = []
    for unit in work.units:
        state = work.state(unit)
        counts[state] += 1
        by_period.setdefault(unit.split("/")[1], collections.Counter())[state] += 1
        if state == "failed" and len(errors) < 10:
            errors.append(f"failed: {unit}: {(work.failure(unit) or {}).get('error')}")
    total, missing = len(work.units), len(work.units) - counts["done"] - counts["empty"]
    lines = [f"{total - missing} of {total} shards done: " + _told(counts)]
    if len(by_period) > 1:
        lines += [f"  {name}: {_told(found)}" for name, found in sorted(by_period.items())]
    return [*lines, *errors], not missing


def _told(counts: collections.Counter[str]) -> str:
    return ", ".join(f"{counts[s]} {s}" for s in STATES if counts[s])


def missing(output: Path) -> int:
    """Number of planned shards that are not done; 0 for stores without a job folder."""
    if not (output / "job" / "plan.jsonl").is_file():
        return 0
    work = embed_job.read_plan(output)
    return sum(work.marker(unit) is None for unit in work.units)


def write_report(output: Path) -> Path:
    """Writes job/report.json, sums over the markers; its path.

    Raises:
      ValueError: no archive of ours.
    """
    work = embed_job.read_plan(output)
    told = {"shards": len(work.units), "done": 0, "empty": 0, "valid": 0, "nodata": 0,
            "clipped": 0, "bytes": 0, "largest": 0.0, "seconds": 0.0}  # fmt: skip
    for unit in work.units:
        marker = work.marker(unit)
        if marker is None:
            continue
        told["done" if marker.get("valid") else "empty"] += 1
        for name in ("valid", "nodata", "clipped", "seconds"):
            told[name] += marker.get(name, 0)
        told["largest"] = max(told["largest"], marker.get("largest", 0.0))
        told["bytes"] += sum(size for size, _ in marker["objects"].values())
    told["seconds"] = round(told["seconds"], 3)
    path = work.folder / "report.json"
    text = json.dumps({**told, "job_digest": work.digest}, indent=1) + "\n"
    work_list.write_durably(path, text)
    return path


def verify(output: Path) -> tuple[list[str], bool]:
    """(lines to print, whether all is well): every object against the marker that names it.

    Raises:
      ValueError: no archive of ours.
    """
    work, wrong, count, size = embed_job.read_plan(output), [], 0, 0
    for unit in work.units:
        held = work_list.read_json(work.folder / "done" / f"{unit}.json")
        if held is None:
            continue
        if not work.is_ours(held):
            wrong.append(f"{unit}: its marker is of another job")
            continue
        for key, (length, digest) in held.get("objects", {}).items():
            path = work.objects / key
            if not path.is_file():
                wrong.append(f"{unit}: {path} is missing")
                continue
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != digest or path.stat().st_size != length:
                wrong.append(f"{unit}: {path} is not what was written")
            count, size = count + 1, size + length
    lines = [f"{count} objects ({size / 1e6:.1f} MB) compared with their markers"]
    if wrong:
        lines += [*wrong[:50], f"{len(wrong)} are damaged: delete their markers below "
                  f"{work.folder / 'done'} and start launch.embed again"]  # fmt: skip
    return lines, not wrong
