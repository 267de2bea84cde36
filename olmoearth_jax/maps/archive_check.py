"""How far an archive is, whether its objects are what their markers say, and its catalogue: a STAC
item per done shard in index.parquet, and a collection."""

from __future__ import annotations

import collections
import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from olmoearth_jax.data import durable, work_list
from olmoearth_jax.data.crs import transform_points
from olmoearth_jax.data.durable import AnyFile
from olmoearth_jax.data.remote import ObjectPath
from olmoearth_jax.files import replacing
from olmoearth_jax.maps import embed_job
from olmoearth_jax.maps.archive import Archive, open_archive
from olmoearth_jax.maps.cogs import PROJECTION, STAC_VERSION
from olmoearth_jax.maps.lattice import LONLAT, Lattice, crs_of
from olmoearth_jax.maps.plan import Shard, shard_of
from olmoearth_jax.maps.store import NAME

_ROWS = 10_000
"""Items that are held before they are written."""
STATES = ("done", "empty", "claimed", "failed", "planned")


def status(output: AnyFile) -> tuple[list[str], bool]:
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


def missing(output: AnyFile) -> int:
    """Number of planned shards that are not done; 0 for stores without a job folder.

    Args:
      output: folder of an archive, or its store.
    """
    output = output.parent if (output / "zarr.json").is_file() else output
    if not (output / "job" / "plan.jsonl").is_file():
        return 0
    work = embed_job.read_plan(output)
    return sum(work.marker(unit) is None for unit in work.units)


def write_report(output: AnyFile) -> AnyFile:
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
    durable.write_durably(path, text)
    return path


def verify(output: AnyFile) -> tuple[list[str], bool]:
    """(lines to print, whether all is well): every object against the marker that names it.

    Raises:
      ValueError: no archive of ours.
    """
    work, wrong, count, size = embed_job.read_plan(output), [], 0, 0
    for unit in work.units:
        held = durable.read_json(work.folder / "done" / f"{unit}.json")
        if held is None:
            continue
        if not work.is_ours(held):
            wrong.append(f"{unit}: its marker is of another job")
            continue
        objects = work_list.objects_of(held)
        if objects is None:
            wrong.append(f"{unit}: its marker is damaged")
            continue
        for key, (length, digest) in objects.items():
            path = work.objects / key
            if not path.is_file():
                wrong.append(f"{unit}: {path} is missing")
                continue
            if durable.size_of(path) != length or durable.digest_of_file(path) != digest:
                wrong.append(f"{unit}: {path} is not what was written")
            count, size = count + 1, size + length
    lines = [f"{count} objects ({size / 1e6:.1f} MB) compared with their markers"]
    if wrong:
        lines += [*wrong[:50], f"{len(wrong)} are damaged: delete their markers below "
                  f"{work.folder / 'done'} and start launch.embed again"]  # fmt: skip
    return lines, not wrong


def write_index(output: AnyFile) -> list[AnyFile]:
    """Writes index.parquet and collection.json beside a store; the files.

    Raises:
      ValueError: no archive of ours, nothing done, or pyarrow is missing.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError("index.parquet needs the 'geo' extra: pip install 'olmoearth-jax[geo]'"
                         ) from None  # fmt: skip
    work, archive = embed_job.read_plan(output), open_archive(str(output))
    schema = _schema(pyarrow)
    path, bounds, held = output / "index.parquet", [], []
    with _replacing(path) as scratch:
        with pyarrow.parquet.ParquetWriter(scratch, schema) as file:
            for item in _items(work, archive):
                held.append(item)
                box = [item["bbox"][k] for k in ("xmin", "ymin", "xmax", "ymax")]
                bounds = [f(a, b) for f, a, b in zip((min, min, max, max), bounds or box, box,
                                                     strict=True)]  # fmt: skip
                if len(held) == _ROWS:
                    file.write_table(pyarrow.Table.from_pylist(held, schema))
                    held = []
            file.write_table(pyarrow.Table.from_pylist(held, schema))
        if not bounds:
            raise ValueError(f"{output} has no finished shard yet")
    collection = output / "collection.json"
    durable.write_durably(collection, json.dumps(_collection(archive, bounds), indent=1))
    return [path, collection]


@contextlib.contextmanager
def _replacing(path: AnyFile) -> Iterator[Path]:
    """A file of this machine whose content `path` gets."""
    if not isinstance(path, ObjectPath):
        with replacing(path) as scratch:
            yield scratch
        return
    with tempfile.TemporaryDirectory() as folder:
        yield (scratch := Path(folder, path.name))
        path.write(scratch.read_bytes())


def _items(work: work_list.WorkList, archive: Archive) -> Iterator[dict[str, Any]]:
    import shapely

    zone = archive.zone(archive.zones[0])
    lattice = Lattice(zone.transform[0], zone.side)
    spans = _spans(archive)
    for unit in work.units:
        marker = work.marker(unit)
        if marker is None:
            continue
        shard = shard_of(unit)
        if shard.period not in spans:
            raise ValueError(f"the plan names {unit}, whose period is not in {archive.path}")
        ring = _outline(shard, lattice)
        shape = shapely.Polygon(ring)
        west, south, east, north = shape.bounds
        first, last = spans[shard.period]
        yield {
            "type": "Feature", "stac_version": STAC_VERSION, "stac_extensions": [PROJECTION],
            "id": unit, "collection": "embeddings", "geometry": shapely.to_wkb(shape),
            "bbox": {"xmin": west, "ymin": south, "xmax": east, "ymax": north},
            "start_datetime": f"{first}T00:00:00Z", "end_datetime": f"{last}T23:59:59Z",
            "proj:code": crs_of(shard.zone), "proj:shape": [lattice.side] * 2,
            "proj:transform": lattice.place(shard.row, shard.col),
            "olmoearth:valid": int(marker.get("valid", 0)),
            "olmoearth:nodata": int(marker.get("nodata", 0)),
            "assets": {"embeddings": {"href": f"./{NAME}/utm{shard.zone:02d}/embeddings",
                                      "type": "application/vnd.zarr; version=3"}},
        }  # fmt: skip


def _spans(archive: Archive) -> dict[str, list[str]]:
    import zarr

    group = zarr.open_group(archive.path, mode="r", zarr_format=3)
    days: Any = group[f"utm{archive.zones[0]:02d}"].attrs["olmoearth:periods"]
    return {str(name): list(span) for name, span in zip(archive.periods, days, strict=True)}


def _outline(shard: Shard, lattice: Lattice) -> list[tuple[float, float]]:
    """The corners of a shard in degrees; one that crosses 180 degrees stays on its zone's side."""
    west, south, east, north = lattice.box(shard.row, shard.col)
    xs, ys = [west, east, east, west, west], [south, south, north, north, south]
    lon, lat = transform_points(crs_of(shard.zone), LONLAT, xs, ys)
    lon = [x - 360 if shard.zone == 1 and x > 90 else x for x in lon.tolist()]
    lon = [x + 360 if shard.zone == 60 and x < -90 else x for x in lon]
    return list(zip([min(max(x, -180.0), 180.0) for x in lon], lat.tolist(), strict=True))


def _schema(pyarrow: Any) -> Any:
    text, number = pyarrow.string(), pyarrow.float64()
    box = pyarrow.struct([(k, number) for k in ("xmin", "ymin", "xmax", "ymax")])
    asset = pyarrow.struct([("href", text), ("type", text)])
    fields = [
        ("type", text), ("stac_version", text), ("stac_extensions", pyarrow.list_(text)),
        ("id", text), ("collection", text), ("geometry", pyarrow.binary()), ("bbox", box),
        ("start_datetime", text), ("end_datetime", text), ("proj:code", text),
        ("proj:shape", pyarrow.list_(pyarrow.int64())), ("proj:transform", pyarrow.list_(number)),
        ("olmoearth:valid", pyarrow.int64()), ("olmoearth:nodata", pyarrow.int64()),
        ("assets", pyarrow.struct([("embeddings", asset)])),
    ]  # fmt: skip
    geo = {
        "version": "1.1.0", "primary_column": "geometry",
        "columns": {"geometry": {"encoding": "WKB", "geometry_types": ["Polygon"]}},
    }  # fmt: skip
    return pyarrow.schema(fields, metadata={"geo": json.dumps(geo)})


def _collection(archive: Archive, bounds: list[float]) -> dict[str, Any]:
    spans = list(_spans(archive).values())
    attrs = archive.attrs
    return {
        "type": "Collection", "stac_version": STAC_VERSION, "id": "embeddings",
        "description": f"Embeddings of {attrs.get('geoemb:model')}", "license": "other",
        "extent": {
            "spatial": {"bbox": [bounds]},
            "temporal": {"interval": [[f"{spans[0][0]}T00:00:00Z", f"{spans[-1][1]}T23:59:59Z"]]},
        },
        "links": [
            {"rel": "license", "href": str(attrs.get("olmoearth:license", ""))},
            {"rel": "items", "href": "./index.parquet", "type": "application/vnd.apache.parquet"},
        ],
        "assets": {
            "zarr": {"href": f"./{NAME}", "type": "application/vnd.zarr; version=3",
                     "roles": ["data"]},
        },
        "software": attrs.get("geoemb:build_version"),
    }  # fmt: skip
