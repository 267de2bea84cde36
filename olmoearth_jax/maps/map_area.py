"""The polygons that a map stays within."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from olmoearth_jax.maps.area import DENSE, project, read_area, shapely_library
from olmoearth_jax.maps.lattice import LONLAT
from olmoearth_jax.maps.scenes import Scene


def digest_of(path: Path) -> str:
    """SHA-256 of the file of an area.

    Raises:
      ValueError: there is none.
    """
    if not path.expanduser().is_file():
        raise ValueError(f"there is no file {path} for --area")
    return hashlib.sha256(path.expanduser().read_bytes()).hexdigest()


class Area:
    """An area on the grids of some scenes."""

    def __init__(self, path: Path, scenes: Sequence[Scene]):
        """Reads and projects it.

        Raises:
          ValueError: no polygons, or no scene that they touch; shows where both lie.
        """
        shapely, whole = shapely_library(), read_area(path.expanduser())
        self._grids, self._shapes = [s.stack for s in scenes], []
        for scene in scenes:
            t: Any = scene.stack.transform
            height, width = scene.stack.shape
            box = shapely.box(t.c, t.f + t.e * height, t.c + t.a * width, t.f)
            mine = project(shapely.segmentize(whole, DENSE), LONLAT, scene.stack.crs)
            self._shapes.append(mine if mine.intersection(box).area > 0 else None)
        if not any(s is not None for s in self._shapes):
            stack = scenes[0].stack
            x, y = scenes[0].lonlat([0, stack.shape[0]], [0, stack.shape[1]])
            raise ValueError(
                f"no raster touches the area {path}: it lies within {_box(*whole.bounds)}, the "
                f"rasters within {_box(min(x), min(y), max(x), max(y))} (west, south, east, north)"
            )

    def touches(self, scene: int, rows: slice, cols: slice) -> bool:
        """Whether it touches a part of the map."""
        shape = self._shapes[scene]
        if shape is None:
            return False
        t: Any = self._grids[scene].transform
        box = shapely_library().box(
            t.c + t.a * cols.start, t.f + t.e * rows.stop, t.c + t.a * cols.stop,
            t.f + t.e * rows.start,
        )  # fmt: skip
        return bool(shape.intersects(box))

    def mask(self, scene: int, rows: slice, cols: slice) -> np.ndarray:
        """bool [H, W] of a part of the map: the pixels that it touches."""
        import rasterio.features

        t: Any = self._grids[scene].transform
        corner = type(t)(t.a, 0.0, t.c + t.a * cols.start, 0.0, t.e, t.f + t.e * rows.start)
        size = rows.stop - rows.start, cols.stop - cols.start
        found: Any = rasterio.features.rasterize(
            [(self._shapes[scene], 1)], out_shape=size, transform=corner, fill=0,
            all_touched=True, dtype="uint8",
        )  # fmt: skip
        return found > 0


def _box(*bounds: Any) -> str:
    return ", ".join(f"{float(b):.4f}" for b in bounds)
