"""Archives that grow: by later periods, and by area where their arrays span whole zones.

What was done stays done, but for shards in which the new area or new rasters change something.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np

from olmoearth_jax.data import durable, work_list
from olmoearth_jax.inference.model import PretrainedModel
from olmoearth_jax.maps import area, embed_job, store
from olmoearth_jax.maps.embed_job import DECIDES, PIXEL, Job
from olmoearth_jax.maps.plan import Shard, shard_of


def extend(job: Job, model: PretrainedModel) -> None:
    """Appends the later periods, or the area, of a job to the archive that is there.

    What is there must be the same job but for these. A kill on the way leaves the archive as it
    was, with room for more: the same again goes on. Nothing is done a second time.

    Raises:
      ValueError: there is no archive, it differs otherwise, or somebody works on it.
      OSError: it cannot be written.
    """
    path = job.folder / "job.json"
    held = durable.read_json(path)
    if held is None:
        raise ValueError(f"{job.output} holds no archive that could grow: leave out --extend")
    members = json.loads(json.dumps(embed_job.members_of(job, model)))
    digest = work_list.digest_of({name: members[name] for name in DECIDES})
    if held.get("job_digest") == digest:
        return
    rows = _check_growth(job, path, held, members)
    work = embed_job.read_plan(job.output)
    again = list(_changed(job, work, rows)) if job.options.extent == "zone" else []
    busy = work.claimed()
    if busy:
        raise ValueError(
            f"{len(busy)} shards of {job.output} are being worked on: stop the workers, or wait "
            "ten minutes after they were killed, and start again with --extend"
        )
    for unit in again:
        work.undo(unit)
    store.extend_store(job.store, embed_job.form_of(job, model, digest), job.grids)
    durable.write_durably(job.folder / "plan.jsonl", embed_job.plan_lines(job))
    for name in ("index.parquet", "collection.json", "job/report.json"):
        (job.output / name).unlink(missing_ok=True)  # made again when all is complete
    if job.options.extent == "zone":
        embed_job.keep_outline(job, digest)
    grown = {**members, "job_digest": digest, "extends": [*work.earlier, work.digest]}
    durable.write_durably(path, json.dumps(grown, indent=1, sort_keys=True) + "\n")


def _check_growth(
    job: Job, path: durable.AnyFile, held: dict[str, Any], members: dict[str, Any]
) -> set[tuple[str, int]]:
    """(period, place in it) of the rasters of old periods that are new."""
    old, new = held["periods"], members["periods"]
    lost = [name for name in old if name not in new]
    early = [n for n in new if n not in old and new[n][0] <= max(days[1] for days in old.values())]
    if lost or early:
        raise ValueError(
            f"--extend appends later periods: name those that are there ({', '.join(sorted(old))}) "
            f"and later ones, not {', '.join(sorted(new))}"
        )
    rows = [row for row in members["inputs"].values() if row["period"] in old]
    grows, added = held.get("extent") == members["extent"] == "zone", set()
    if grows:
        rows, added = _without_new(list(held["inputs"].values()), rows)
    same = {
        **members, "periods": {n: new[n] for n in old},
        "timesteps": {n: members["timesteps"][n] for n in old},
        "inputs": {f"{k:06d}": row for k, row in enumerate(rows)},
        "area": held.get("area") if grows else members["area"],
    }  # fmt: skip
    if any(held.get(name) != same[name] for name in DECIDES):
        raise work_list.another_job(path, held, same, DECIDES)
    places = {g.name: (g.transform, list(g.shape)) for g in job.grids.values()}
    there = store.grids_there(job.store)
    if places != there and not (grows and places.items() >= there.items()):
        raise ValueError(
            f"the new periods reach beyond the arrays of {job.output}, which span what was planned "
            "at first: give an --area that lies within, or another --output; archives made with "
            "--extent=zone have room for a whole zone"
        )
    return added


def _without_new(old: list[Any], new: list[Any]) -> tuple[list[Any], set[tuple[str, int]]]:
    """(the rows that were there, (period, place in it) of the others) of a list that grew."""
    kept, added, at, places = [], set(), 0, dict.fromkeys((r["period"] for r in new), 0)
    for row in new:
        period = row["period"]
        if at < len(old) and row == old[at]:
            kept, at = [*kept, row], at + 1
        else:
            added.add((period, places[period]))
        places[period] += 1
    # What was changed or left out makes no job that grew: the differences are to be seen.
    return (kept, added) if at == len(old) else (new, set())


def _changed(job: Job, work: work_list.WorkList, added: set[tuple[str, int]]) -> Iterator[str]:
    """The shards that were planned before and have other tokens or rasters now.

    Raises:
      ValueError: the old area is not known, or reaches beyond the new one.
    """
    shapely, lattice = area.shapely_library(), job.layout.lattice
    held = durable.read_json(embed_job.outline_path(job.folder, work.digest)) or {}
    try:
        before = {int(zone): shapely.from_wkb(text) for zone, text in held.items()}
    except (ValueError, TypeError, shapely.errors.ShapelyError):
        before = {}
    if not {f"utm{zone:02d}" for zone in before} >= {unit.partition("/")[0] for unit in work.units}:
        raise ValueError(
            f"{job.output} does not say which area it was made of, so it cannot grow: give another "
            "--output"
        )
    margin = job.layout.halo * PIXEL
    for unit in work.units:
        shard = shard_of(unit)
        places = {at for period, at in added if period == shard.period}
        west, south, east, north = lattice.box(shard.row, shard.col)
        box = (west - margin, south - margin, east + margin, north + margin)
        touched = set(job.imagery.places(shard.zone, shard.period, box).tolist())
        if not _same_tokens(job, before, shard) or places & touched:
            yield unit


def _same_tokens(job: Job, before: dict[int, Any], shard: Shard) -> bool:
    lattice, now = job.layout.lattice, job.zones.get(shard.zone)
    if now is not None and now.equals_exact(before[shard.zone]):
        return True
    old = area.tokens_in(before[shard.zone], lattice, shard.row, shard.col)
    new = np.zeros_like(old)
    if now is not None:
        new = area.tokens_in(now, lattice, shard.row, shard.col)
    if (old & ~new).any():
        raise ValueError(
            f"--extend appends area: the new one leaves out a part of what {job.output} was made "
            f"of, in the shard {shard.id}"
        )
    return bool((old == new).all())
