"""The result of a search as files: scores as a map, the best places as points."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from olmoearth_jax.files import write_atomically
from olmoearth_jax.maps import area, cogs, extract, similar
from olmoearth_jax.maps.archive import Archive, Zone


def write(
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
                    files[number], crs=zone.crs, transform=zone.transform, shape=zone.shape,
                    dtype="float32", names=["cosine"], nodata=np.nan,
                    tags=extract.tags_of(archive, period),
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
    text = json.dumps({"type": "FeatureCollection", "features": features}, indent=1)
    write_atomically(places, text)
    return [*files.values(), places]
