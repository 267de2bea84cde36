"""Writing the Zarr store of an archive: its metadata once, then whole shards.

Metadata are written when the job is made and never again. A shard is one object of each array; zarr
replaces each by a rename. A reader trusts `coverage`, which is written last and removed first.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import tempfile
import time
import uuid
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from olmoearth_jax.data import durable
from olmoearth_jax.data.durable import AnyFile
from olmoearth_jax.data.remote import ObjectPath
from olmoearth_jax.inference.quantize import Rule
from olmoearth_jax.maps import conventions
from olmoearth_jax.maps.lattice import Grid
from olmoearth_jax.maps.plan import Period, Shard

NAME = "embeddings.zarr"
NOT_PROCESSED = 255
MOST_COVERAGE = 254
_COVERAGE = ("uint8", NOT_PROCESSED)
_AXIS_CHUNK = 65_536
_ROOT = "zarr.json"


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


def make_store(path: AnyFile, form: Form, grids: Mapping[int, Grid]) -> None:
    """Makes the store with all metadata and coordinates, unless it is there.

    It appears under its name as a whole; in an object store, which renames nothing, it is one from
    when its root is there.
    """
    if isinstance(path, ObjectPath):
        if not (path / _ROOT).is_file():
            _put_metadata(path, form, grids)
        return
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        _write_metadata(scratch, form, grids)
        for file in scratch.rglob("*"):
            if file.is_file():
                durable.sync_file(file)
            else:
                durable.sync_folder(file)
        with contextlib.suppress(OSError):  # another worker was first: theirs is the same
            os.rename(scratch, path)
        if not path.exists():
            raise OSError(f"{path} could not be made")
        durable.sync_folder(path.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    for left in path.parent.glob(f".{path.name}.*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > durable.LEFTOVER_S:
                shutil.rmtree(left, ignore_errors=True)


def extend_store(path: AnyFile, form: Form, grids: Mapping[int, Grid]) -> None:
    """Gives a store that is there the metadata and coordinates of more periods or zones.

    Values stay as they are. The consolidated metadata, which readers go by, come last.

    Raises:
      OSError: it cannot be written.
    """
    if isinstance(path, ObjectPath):
        return _put_metadata(path, form, grids)
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        _write_metadata(scratch, form, grids)
        for folder in [p for p in scratch.iterdir() if p.is_dir() and not (path / p.name).exists()]:
            os.rename(folder, path / folder.name)  # a zone that was not there appears whole
        files = _root_last(scratch)
        for file in files:
            durable.sync_file(file)
            os.replace(file, path / file.relative_to(scratch))
        for folder in {path / f.relative_to(scratch).parent for f in files}:
            durable.sync_folder(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _put_metadata(path: ObjectPath, form: Form, grids: Mapping[int, Grid]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        _write_metadata(Path(folder), form, grids)
        for file in _root_last(Path(folder)):
            (path / file.relative_to(folder).as_posix()).write(file.read_bytes())


def _root_last(folder: Path) -> list[Path]:
    """The files below a store, that which makes it one at the end."""
    root = folder / _ROOT
    return [*sorted(p for p in folder.rglob("*") if p.is_file() and p != root), root]


def digest_there(path: AnyFile) -> str | None:
    """The digest of the job that a store was made by, '' if it says none; None without a store."""
    root = path / _ROOT
    if not (path.exists() if isinstance(path, Path) else root.is_file()):
        return None
    held = (durable.read_json(root) or {}).get("attributes")
    return str(held.get("olmoearth:job_digest", "")) if isinstance(held, dict) else ""


def grids_there(path: AnyFile) -> dict[str, tuple[list[float], list[int]]]:
    """(transform, shape) of each zone group of a store."""
    root = zarr_library().open_group(str(path), mode="r", zarr_format=3)
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


def _gridded(form: Form) -> dict[str, tuple[str, Any]]:
    """(type, fill value) of the arrays on a zone's grid, in the order of their writing."""
    out: dict[str, tuple[str, Any]] = {}
    if form.rule.method == "per_pixel_scale":
        out["scales"] = ("float32", float("inf"))
    return out | {"embeddings": (form.rule.dtype, form.rule.fill), "coverage": _COVERAGE}


def _create(into: Any, name: str, form: Form, size: tuple[int, int, int], more: Any) -> Any:
    """Makes an array of a zone's grid.

    Args:
      into: has zarr's create_array.
      size: steps, rows and columns.
      more: further arguments of it.
    """
    (dtype, fill), (steps, height, width) = _gridded(form)[name], size
    s, c, bands = form.side, form.chunk, [form.dimensions] * (name == "embeddings")
    return into.create_array(
        shape=(steps, *bands, height, width), shards=(1, *bands, s, s),
        chunks=(1, *[form.bands][: len(bands)], c, c), dtype=dtype, fill_value=fill,
        compressors=zarr_library().codecs.ZstdCodec(level=3, checksum=False), **more,
    )  # fmt: skip


def _write_zone(zarr: Any, group: Any, form: Form, grid: Grid) -> None:
    attrs, size = conventions.array_attributes(grid), (len(form.periods), *grid.shape)
    zstd = zarr.codecs.ZstdCodec(level=3, checksum=False)
    for name in _gridded(form):
        dims = ("time", *["band"] * (name == "embeddings"), "y", "x")
        more = {"name": name, "dimension_names": dims, "attributes": attrs}
        _create(group, name, form, size, more)

    def axis(name: str, values: np.ndarray, more: dict[str, Any] | None = None) -> None:
        array = group.create_array(
            name, shape=values.shape, chunks=(min(len(values), _AXIS_CHUNK),), dtype=values.dtype,
            fill_value=0, compressors=zstd, dimension_names=(name,), attributes=more or {},
        )  # fmt: skip
        array[:] = values

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

    def __init__(self, path: AnyFile, form: Form, grids: Mapping[int, Grid]):
        self._path, self._form, self._grids = path, form, grids
        self._steps = {p.name: t for t, p in enumerate(form.periods)}
        self._encoders = {name: _Encoder(name, form) for name in _gridded(form)}

    def key(self, shard: Shard, array: str) -> str:
        """Key of the object of a shard in an array."""
        grid, step = self._grids[shard.zone], self._steps[shard.period]
        lead = f"{step}/0" if array == "embeddings" else str(step)
        return f"{grid.name}/{array}/c/{lead}/{shard.row - grid.top}/{shard.col - grid.left}"

    def clear(self, shard: Shard) -> None:
        """Takes back the coverage of a shard, so that no reader trusts it, and old leftovers."""
        for array in self._encoders:
            durable.remove_old((self._path / self.key(shard, array)).parent, "*.partial")
        (self._path / self.key(shard, "coverage")).unlink(missing_ok=True)

    def write(
        self, shard: Shard, values: np.ndarray, scales: np.ndarray | None, coverage: np.ndarray
    ) -> list[str]:
        """Writes a whole shard, coverage last; the keys of the objects that it has.

        Nothing of what stood there before is read: it may be damaged.

        Args:
          values: [D, S, S] as stored.
          scales: float32 [S, S] of per_pixel_scale, else None.
          coverage: uint8 [S, S].
        """
        parts, keys = {"scales": scales, "embeddings": values, "coverage": coverage}, []
        for name, encode in self._encoders.items():
            content, key = encode(parts[name]), self.key(shard, name)
            if content is None:
                (self._path / key).unlink(missing_ok=True)
                continue
            _put(self._path / key, content)
            keys.append(key)
        return keys


class _Encoder:
    """Makes the bytes of shards of an array."""

    def __init__(self, name: str, form: Form):
        storage = zarr_library().storage
        self._held: dict[str, Any] = {}
        more = {"store": storage.MemoryStore(self._held)}
        self._array = _create(zarr_library(), name, form, (1, form.side, form.side), more)

    def __call__(self, values: Any) -> np.ndarray | None:
        """uint8 bytes of a shard's values; None of one with nothing but fill values."""
        self._array[0] = values
        (found,) = [self._held.pop(k) for k in [*self._held] if k.startswith("c/")] or [None]
        return None if found is None else found.as_numpy_array()


def _put(path: AnyFile, content: np.ndarray) -> None:
    """Replaces an object, or makes it, at once."""
    if isinstance(path, ObjectPath):
        return path.write(content.tobytes())
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with scratch.open("wb") as file:
            file.write(content.data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
