"""The catalogue of an archive: a STAC item per done shard in index.parquet, and a collection."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from olmoearth_jax.data.raster_file import transform_points
from olmoearth_jax.files import replacing
from olmoearth_jax.maps import embed_job, work_list
from olmoearth_jax.maps.archive import Archive, open_archive
from olmoearth_jax.maps.cogs import PROJECTION, STAC_VERSION
from olmoearth_jax.maps.lattice import LONLAT, Lattice, crs_of
from olmoearth_jax.maps.plan import Shard, shard_of
from olmoearth_jax.maps.store import NAME

_ROWS = 10_000
"""Items that are held before they are written."""


def write(output: Path) -> list[Path]:
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
    work, archive = embed_job.read_plan(output), open_archive(output)
    schema = _schema(pyarrow)
    path, bounds, held = output / "index.parquet", [], []
    with replacing(path) as scratch:
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
    work_list.write_durably(collection, json.dumps(_collection(archive, bounds), indent=1))
    return [path, collection]


def _items(work: work_list.WorkList, archive: Archive) -> Iterator[dict[str, Any]]:
    import shapely

    lattice = Lattice(archive.attrs["geoemb:gsd"], archive.zone(archive.zones[0]).side)
    spans = _spans(archive)
    for unit in work.units:
        marker = work.marker(unit)
        if marker is None:
            continue
        shard = shard_of(unit)
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
