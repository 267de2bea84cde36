"""Parts of an archive as files of others: maps for QGIS and GDAL, tables of points, what a search
found."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from olmoearth_jax.data.crs import same_crs
from olmoearth_jax.files import write_atomically
from olmoearth_jax.inference.quantize import NO_VALUE
from olmoearth_jax.maps import area, cogs, similar, vectors
from olmoearth_jax.maps.archive import Archive, Zone
from olmoearth_jax.maps.lattice import LONLAT, on_earth
from olmoearth_jax.maps.store import NOT_PROCESSED
from olmoearth_jax.outputs import SOFTWARE

DTYPES = ("stored", "float32")


def tags_of(archive: Archive, period: Any) -> dict[str, str]:
    """What a reader of a map of an archive must know."""
    attrs = archive.attrs
    kept = ("model_digest", "job_digest", "patch_size", "location_size", "pooling", "normalize")
    out = {k.upper(): str(attrs[f"olmoearth:{k}"]) for k in kept if f"olmoearth:{k}" in attrs}
    return {
        "SOFTWARE": SOFTWARE,
        "MODEL": str(attrs.get("geoemb:model", "")), "PERIOD": str(period), **out,
    }  # fmt: skip


def export(
    archive: Archive,
    bbox: Sequence[float] | None,
    period: Any,
    output: Path,
    width: int | None = None,
    dtype: str = "stored",
) -> list[Path]:
    """Writes embeddings as COGs on the native grid, one per zone.

    Args:
      archive: to read.
      bbox: west, south, east, north in degrees; None for all.
      period: one of its periods.
      output: the file; its zone is added to the name where there are several.
      width: the first bands only.
      dtype: 'stored' or 'float32'. Values that need the scale of each pixel become float32.

    Raises:
      ValueError: a box, period or width that the archive has not.
    """
    step, d = archive.step_of(period), archive.width_of(width)
    if bbox is None:
        windows = [(z, *z.span) for z in map(archive.zone, archive.zones)]
    else:
        windows = archive.windows(bbox)
    stored = dtype == "stored" and archive.rule.method != "per_pixel_scale"
    kind = archive.rule.dtype if stored else "float32"
    kind = "float32" if kind == "float16" else kind
    files = cogs.named(output, [zone.number for zone, _, _ in windows])
    rule = archive.rule
    scale = (rule.scale, rule.offset) if kind == "int8" and rule.method == "linear" else None
    for zone, rows, cols in windows:
        tags = tags_of(archive, period)
        if kind == "int8":
            tags["QUANTIZATION"] = rule.formula
        with cogs.writing(
            files[zone.number], crs=zone.crs, transform=zone.place(rows, cols),
            shape=(rows.stop - rows.start, cols.stop - cols.start), dtype=kind,
            names=[f"e{i:03d}" for i in range(d)], tags=tags, rule=scale,
            nodata=NO_VALUE if kind == "int8" else np.nan,
        ) as file:  # fmt: skip
            for r, c in pieces(zone, rows, cols):
                x, seen = _values(archive, zone, step, r, c, d, kind)
                if seen:
                    file.put(r.start - rows.start, c.start - cols.start, np.moveaxis(x, -1, 0))
    return list(files.values())


def _values(
    archive: Archive, zone: Zone, step: int, rows: slice, cols: slice, width: int, kind: str
) -> tuple[np.ndarray, bool]:
    if kind != "int8":
        x, valid = archive.window(zone, step, rows, cols, width)
        return x, bool(valid.any())
    q, _, coverage = archive.stored(zone, step, rows, cols, width)
    valid = (coverage > 0) & (coverage < NOT_PROCESSED)
    if not valid.any():
        return q, False
    return np.where(valid[..., None], q, np.int8(NO_VALUE)), True


def form_of(zone: Zone) -> dict[str, Any]:
    """What `cogs.writing` takes of the grid of a zone, whose rows and columns `put` takes then."""
    rows, cols = zone.span
    return {
        "crs": zone.crs, "transform": zone.place(rows, cols), "corner": (rows.start, cols.start),
        "shape": (rows.stop - rows.start, cols.stop - cols.start),
    }  # fmt: skip


def pieces(zone: Zone, rows: slice, cols: slice) -> Iterator[tuple[slice, slice]]:
    """The parts of a window that lie in one stripe of a shard each."""
    for r, c in zone.parts():
        y = slice(max(r.start, rows.start), min(r.stop, rows.stop))
        x = slice(max(c.start, cols.start), min(c.stop, cols.stop))
        if y.start < y.stop and x.start < x.stop:
            yield y, x


def read_points(path: Path) -> tuple[np.ndarray, dict[str, list[Any]]]:
    """(float [N, 2] of lon and lat, columns) of the points of a file; see `vectors.read`.

    Raises:
      ValueError: it cannot be read, or holds something else than points.
    """
    table = vectors.read(path)
    if not table.shapes:
        raise ValueError(f"{path} holds no points")
    for number, shape in enumerate(table.shapes, 1):
        if shape is None or shape.is_empty or shape.geom_type != "Point":
            kind = "empty" if shape is None or shape.is_empty else f"a {shape.geom_type}"
            raise ValueError(f"{path}: feature {number} is {kind}, but points are needed")
    shapes = table.shapes
    if not same_crs(table.crs, LONLAT):
        shapes = vectors.project(np.array(shapes, object), table.crs, LONLAT)
    lonlat = vectors.shapely_library().get_coordinates(shapes)
    odd = np.flatnonzero(~on_earth(lonlat))
    if len(odd):
        lon, lat = lonlat[odd[0]]
        raise ValueError(f"{path}: feature {odd[0] + 1} lies at {lon:g}, {lat:g}, which are no "
                         "longitude and latitude: name its CRS in the file")  # fmt: skip
    names = list(dict.fromkeys(name for row in table.rows for name in row))
    return lonlat, {n: [row.get(n) for row in table.rows] for n in names}


def sample(
    archive: Archive, points: Path, periods: Sequence[Any], output: Path, width: int | None = None
) -> tuple[int, int]:
    """Writes the embeddings at points as Parquet, a row per point and period; (valid, rows).

    Columns: those of the points, then lon, lat, zone, row, col (of the token that answers, -1 for
    none), period, valid, and `embedding`, a list of float32 that is null where there is none.

    Raises:
      ValueError: points, periods or a width that do not fit; pyarrow is missing.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError("Parquet needs the 'geo' extra: pip install 'olmoearth-jax[geo]'"
                         ) from None  # fmt: skip
    lonlat, columns = read_points(points)
    names = [archive.periods[archive.step_of(p)] for p in (periods or archive.periods)]
    values, valid, places = archive.locate(lonlat, names, width)
    each = len(names)
    table: dict[str, Any] = {
        name: pyarrow.array(_alike(held)).take(np.repeat(np.arange(len(held)), each))
        for name, held in columns.items()
    }
    for k, name in enumerate(("lon", "lat")):
        table[name] = lonlat[:, k].repeat(each)
    for k, name in enumerate(("zone", "row", "col")):
        table[name] = places[:, k].repeat(each)
    table["period"] = [str(n) for n in names] * len(lonlat)
    table["valid"] = valid.reshape(-1)
    flat, seen = values.reshape(-1, values.shape[-1]), valid.reshape(-1)
    kind = pyarrow.list_(pyarrow.float32())
    table["embedding"] = pyarrow.array(
        [x if ok else None for x, ok in zip(flat, seen, strict=True)], kind
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    from olmoearth_jax.files import replacing

    made = pyarrow.table(table).replace_schema_metadata(
        {k.lower(): v for k, v in tags_of(archive, ",".join(map(str, names))).items()}
    )
    with replacing(output) as scratch:
        pyarrow.parquet.write_table(made, scratch)
    return int(seen.sum()), len(seen)


def _alike(held: list[Any]) -> list[Any]:
    """Values of one type, as texts where they are of several."""
    kinds = {type(v) for v in held if v is not None}
    plain = kinds <= {int, float} or len(kinds) <= 1 and not kinds & {dict, list}
    return held if plain else [None if v is None else json.dumps(v) for v in held]


def search(
    archive: Archive,
    points: list[list[float]] | None,
    shape: Path | None,
    period: Any,
    output: Path,
    width: int | None = None,
    top: int = 100,
    min_distance: float = 200.0,
) -> list[Path]:
    """Writes OUTPUT.tif (one per zone) and OUTPUT.geojson; the files.

    Args:
      archive: to look through.
      points: (lon, lat) that show what to look for, or None.
      shape: file of a polygon that does, if there are no points.
      period, width: see `similar`.
      output: names of the files without their ends.
      top, min_distance: of the places.

    Raises:
      ValueError: no embedding there, or a period or width that the archive has not.
    """
    if points is not None:
        query = similar.query_of_points(archive, points, period, width)
    else:
        assert shape is not None
        query = similar.query_of_shape(archive, area.read_area(shape), period, width)
    files = cogs.named(output.with_name(f"{output.name}.tif"), archive.zones)
    with contextlib.ExitStack() as stack:
        writers = {}
        for number in archive.zones:
            zone = archive.zone(number)
            writers[number] = stack.enter_context(
                cogs.writing(
                    files[number], **form_of(zone),
                    dtype="float32", names=["cosine"], nodata=np.nan,
                    tags=tags_of(archive, period),
                )
            )  # fmt: skip

        def put(zone: Zone, rows: slice, cols: slice, score: np.ndarray) -> None:
            writers[zone.number].put(rows.start, cols.start, score[None])

        found = similar.search(archive, query, period, top, min_distance, put)
    features = [
        {"type": "Feature", "geometry": {"type": "Point", "coordinates": [p["lon"], p["lat"]]},
         "properties": p} for p in found
    ]  # fmt: skip
    places = output.with_name(f"{output.name}.geojson")
    held = {"type": "FeatureCollection", "software": SOFTWARE, "features": features}
    text = json.dumps(held, indent=1)
    write_atomically(places, text)
    return [*files.values(), places]
