"""Writing the Zarr store of an archive: its metadata once, then whole shards.

Metadata are written when the job is made and never again. A shard is one object of each array; zarr
replaces each by a rename. A reader trusts `coverage`, which is written last and removed first.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import time
import uuid
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from olmoearth_jax.data import work_list
from olmoearth_jax.inference.quantize import Rule
from olmoearth_jax.maps import conventions
from olmoearth_jax.maps.lattice import Grid
from olmoearth_jax.maps.plan import Period, Shard

NAME = "embeddings.zarr"
NOT_PROCESSED = 255
MOST_COVERAGE = 254
_AXIS_CHUNK = 65_536


def zarr_library() -> Any:
    """The zarr package.

    Raises:
      ValueError: it is not installed.
    """
    try:
        import zarr
        import zarr.codecs
    except ImportError:
        raise ValueError("archives need the 'zarr' extra: pip install 'olmoearth-jax[zarr]'"
                         ) from None  # fmt: skip
    return zarr


@dataclasses.dataclass(frozen=True)
class Form:
    """What the arrays of all zones share.

    Attributes:
      dimensions: D.
      rule: of the values.
      periods: ascending.
      side: tokens per side of a shard (S).
      chunk: tokens per side of a chunk.
      bands: bands of a chunk.
      attrs: of the root group.
    """

    dimensions: int
    rule: Rule
    periods: Sequence[Period]
    side: int
    chunk: int
    bands: int
    attrs: Mapping[str, Any]


def band_chunk(dimensions: int, widths: Sequence[int] = ()) -> int:
    """Bands of a chunk: the smallest Matryoshka width, else 64 if it divides D, else D."""
    if widths:
        return min(widths)
    return 64 if dimensions % 64 == 0 else dimensions


def make_store(path: Path, form: Form, grids: Mapping[int, Grid]) -> None:
    """Makes the store with all metadata and coordinates, unless it is there.

    It appears under its name as a whole.
    """
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        _write_metadata(scratch, form, grids)
        for file in scratch.rglob("*"):
            if file.is_file():
                work_list.sync_file(file)
            else:
                work_list.sync_folder(file)
        with contextlib.suppress(OSError):  # another worker was first: theirs is the same
            os.rename(scratch, path)
        if not path.exists():
            raise OSError(f"{path} could not be made")
        work_list.sync_folder(path.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    for left in path.parent.glob(f".{path.name}.*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > work_list.LEFTOVER_S:
                shutil.rmtree(left, ignore_errors=True)


def extend_store(path: Path, form: Form, grids: Mapping[int, Grid]) -> None:
    """Gives a store that is there the metadata and coordinates of more periods or zones.

    Values stay as they are. The consolidated metadata, which readers go by, come last.

    Raises:
      OSError: it cannot be written.
    """
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        _write_metadata(scratch, form, grids)
        for folder in [p for p in scratch.iterdir() if p.is_dir() and not (path / p.name).exists()]:
            os.rename(folder, path / folder.name)  # a zone that was not there appears whole
        files = sorted(p for p in scratch.rglob("*") if p.is_file())
        top = scratch / "zarr.json"
        for file in [*(f for f in files if f != top), top]:
            work_list.sync_file(file)
            os.replace(file, path / file.relative_to(scratch))
        for folder in {path / f.relative_to(scratch).parent for f in files}:
            work_list.sync_folder(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def digest_there(path: Path) -> str | None:
    """The digest of the job that a store was made by, '' if it says none; None without a store."""
    if not path.exists():
        return None
    held = (work_list.read_json(path / "zarr.json") or {}).get("attributes")
    return str(held.get("olmoearth:job_digest", "")) if isinstance(held, dict) else ""


def grids_there(path: Path) -> dict[str, tuple[list[float], list[int]]]:
    """(transform, shape) of each zone group of a store."""
    root = zarr_library().open_group(path, mode="r", zarr_format=3)
    return {
        name: (list(group.attrs["spatial:transform"]), list(group.attrs["spatial:shape"]))
        for name, group in root.groups()
    }


def _write_metadata(path: Path, form: Form, grids: Mapping[int, Grid]) -> None:
    zarr = zarr_library()
    root = zarr.open_group(path, mode="w", zarr_format=3, attributes=dict(form.attrs))
    for zone in sorted(grids):
        grid = grids[zone]
        attrs = conventions.zone_attributes(dict(form.attrs), grid, form.periods)
        _write_zone(zarr, root.create_group(grid.name, attributes=attrs), form, grid)
    with warnings.catch_warnings():
        # Consolidated metadata are no part of the Zarr v3 standard yet, but readers want them.
        warnings.filterwarnings("ignore", message="Consolidated metadata", category=UserWarning)
        zarr.consolidate_metadata(root.store)


def _write_zone(zarr: Any, group: Any, form: Form, grid: Grid) -> None:
    steps, (height, width) = len(form.periods), grid.shape
    s, c, attrs = form.side, form.chunk, conventions.array_attributes(grid)
    zstd = zarr.codecs.ZstdCodec(level=3, checksum=False)

    def on_grid(name: str, dtype: str, fill: Any, bands: tuple[int, int] | None = None) -> None:
        lead = (steps, bands[0]) if bands else (steps,)
        inner, outer = ((1, bands[1]), (1, bands[0])) if bands else ((1,), (1,))
        names = ("time", "band", "y", "x") if bands else ("time", "y", "x")
        group.create_array(
            name, shape=(*lead, height, width), chunks=(*inner, c, c), shards=(*outer, s, s),
            dtype=dtype, fill_value=fill, compressors=zstd, dimension_names=names,
            attributes=attrs,
        )  # fmt: skip

    def axis(name: str, values: np.ndarray, more: dict[str, Any] | None = None) -> None:
        array = group.create_array(
            name, shape=values.shape, chunks=(min(len(values), _AXIS_CHUNK),), dtype=values.dtype,
            fill_value=0, compressors=zstd, dimension_names=(name,), attributes=more or {},
        )  # fmt: skip
        array[:] = values

    on_grid("embeddings", form.rule.dtype, form.rule.fill, (form.dimensions, form.bands))
    if form.rule.method == "per_pixel_scale":
        on_grid("scales", "float32", float("inf"))
    on_grid("coverage", "uint8", NOT_PROCESSED)
    axis("time", *_times(form.periods))
    axis("band", np.arange(form.dimensions, dtype=np.int32))
    y, x = grid.centres()
    axis("y", y)
    axis("x", x)
    group.create_array(
        "spatial_ref", shape=(), dtype="int32", fill_value=0,
        compressors=zarr.codecs.ZstdCodec(level=0, checksum=False),
        attributes=conventions.crs_attributes(grid),
    )  # fmt: skip


def _times(periods: Sequence[Period]) -> tuple[np.ndarray, dict[str, Any]]:
    if all(p.is_year for p in periods):
        return np.array([int(p.name) for p in periods], np.int32), {}
    days = np.array([p.days[0] for p in periods], "datetime64[D]").astype(np.int64)
    return days, {"units": "days since 1970-01-01", "calendar": "proleptic_gregorian"}


class Writer:
    """Writes shards into a store that is there; for one process."""

    def __init__(self, path: Path, form: Form, grids: Mapping[int, Grid]):
        self._zarr, self._path, self._form, self._grids = zarr_library(), path, form, grids
        self._steps = {p.name: t for t, p in enumerate(form.periods)}
        self._open: dict[str, Any] = {}

    def _place(self, shard: Shard) -> tuple[str, int, int, int]:
        grid = self._grids[shard.zone]
        return grid.name, self._steps[shard.period], shard.row - grid.top, shard.col - grid.left

    def key(self, shard: Shard, array: str) -> str:
        """Key of the object of a shard in an array."""
        group, step, row, col = self._place(shard)
        lead = f"{step}/0" if array == "embeddings" else str(step)
        return f"{group}/{array}/c/{lead}/{row}/{col}"

    def clear(self, shard: Shard) -> None:
        """Takes back the coverage of a shard, so that no reader trusts it, and old leftovers."""
        for array in ("embeddings", "scales", "coverage"):
            work_list.remove_old((self._path / self.key(shard, array)).parent, "*.partial")
        (self._path / self.key(shard, "coverage")).unlink(missing_ok=True)

    def write(
        self, shard: Shard, values: np.ndarray, scales: np.ndarray | None, coverage: np.ndarray
    ) -> list[str]:
        """Writes a whole shard, coverage last; the keys of the objects that it has.

        Args:
          values: [D, S, S] as stored.
          scales: float32 [S, S] of per_pixel_scale, else None.
          coverage: uint8 [S, S].
        """
        parts = [("embeddings", values), ("coverage", coverage)]
        if scales is not None:
            parts.insert(0, ("scales", scales))
        keys = []
        for name, x in parts:
            group, step, row, col = self._place(shard)
            s = self._form.side
            where = np.s_[step, ..., row * s : (row + 1) * s, col * s : (col + 1) * s]
            self._array(f"{group}/{name}")[where] = x
            key = self.key(shard, name)
            # What holds nothing but fill values is not stored.
            if (self._path / key).is_file():
                keys.append(key)
        return keys

    def _array(self, name: str) -> Any:
        if name not in self._open:
            self._open[name] = self._zarr.open_array(self._path / name, mode="r+", zarr_format=3)
        return self._open[name]
