"""Reading one sample file: header first, then only the pixels asked for (spec/data.md section 4.7).

Every problem with a file, from a truncated copy to a wrong shape, becomes a `ReadError` that names
the file and what is wrong with it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence

import h5py
import hdf5plugin  # noqa: F401  (registers the zstd and lz4 filters)
import numpy as np

from olmoearth_jax import modalities as registry
from olmoearth_jax.data import zstd
from olmoearth_jax.data.remote import AnyPath, RemotePath

MASK_GROUP = "missing_timesteps_masks"


class ReadError(ValueError):
    """A sample file is missing, damaged, or not of the published form."""

    def __init__(self, path: str | AnyPath, problem: str):
        super().__init__(str(path), problem)
        self.path, self.problem = str(path), problem

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}"


@dataclasses.dataclass(frozen=True)
class Header:
    """What a file holds, without its pixels.

    Attributes:
      timestamps: int32 [t, 3] (day 1-31, month 0-11, year).
      masks: per modality with a mask, bool [t], true where it has that timestep.
      shapes: array shape per modality present in the file.
      tile_px: side of the sample in 10 m pixels; None without spatial modality.
    """

    timestamps: np.ndarray
    masks: dict[str, np.ndarray]
    shapes: dict[str, tuple[int, ...]]
    tile_px: int | None


def stored_names(modalities: Sequence[str]) -> tuple[str, ...]:
    """Datasets that samples of `modalities` are made from (derived ones map to their source)."""
    out = [m for m in modalities if m not in ("worldcover_onehot", "ndvi")]
    if "worldcover_onehot" in modalities and "worldcover" not in out:
        out.append("worldcover")
    return registry.in_sample_order(out)


class SampleFile:
    """An open sample file; use `open_sample`.

    Works on h5py's low-level objects: the high-level ones cost as much time as small arrays do.

    Args:
      path: file name, for messages.
      file: the open HDF5 file.
      wanted: dataset names to look for; others are ignored.
    """

    def __init__(self, path: str | AnyPath, file: h5py.File, wanted: Sequence[str]):
        self.path = str(path)
        root = h5py.h5g.open(file.id, b"/")
        stored = {name.decode() for name in root}
        self._sets = {n: self._open(root, n) for n in wanted if n in stored}
        if "timestamps" not in stored:
            raise ReadError(self.path, "has no 'timestamps'")
        stamps = _everything(self._open(root, "timestamps"))
        if stamps.dtype.kind not in "iu" or stamps.ndim != 2 or stamps.shape[1] != 3:
            raise ReadError(
                self.path,
                f"'timestamps' must be whole numbers [timesteps, 3], got "
                f"{stamps.dtype} {stamps.shape}",
            )
        masks = {}
        if MASK_GROUP in stored:
            if _is_array(root, MASK_GROUP):
                raise ReadError(self.path, f"{MASK_GROUP!r} is an array, not a group")
            group = h5py.h5g.open(root, MASK_GROUP.encode())
            held = set(group)
            names = [n for n in wanted if n.encode() in held]
            masks = {n: self._mask(group, n, len(stamps)) for n in names}
        shapes = {n: d.shape for n, d in self._sets.items()}
        self.header = Header(stamps.astype(np.int32), masks, shapes, self._tile_px(shapes))

    def _open(self, group: h5py.h5g.GroupID, name: str) -> h5py.h5d.DatasetID:
        if not _is_array(group, name):
            raise ReadError(self.path, f"{name!r} is a group, not an array")
        return h5py.h5d.open(group, name.encode())

    def _mask(self, group: h5py.h5g.GroupID, name: str, rows: int) -> np.ndarray:
        mask = _everything(self._open(group, name))
        if mask.shape != (rows,) or mask.dtype.kind not in "biu":
            raise ReadError(
                self.path,
                f"the timestep mask of {name!r} must be true/false [{rows}], "
                f"got {mask.dtype} {mask.shape}",
            )
        return mask.astype(bool)

    def _tile_px(self, shapes: dict[str, tuple[int, ...]]) -> int | None:
        """The side in 10 m pixels, after checking every array's shape and dtype."""
        side = None
        for name, shape in shapes.items():
            modality, dtype = registry.get(name), self._sets[name].dtype
            if dtype.kind not in "biuf":
                raise ReadError(self.path, f"{name!r} must hold numbers, got {dtype}")
            sides: tuple[int, ...] = ()
            if modality.spatial:
                factor = modality.image_factor
                if side is None:
                    side = shape[0] / factor if len(shape) == 4 else 0
                sides = (int(side * factor), int(side * factor))
            bands = modality.num_bands
            form = {
                "space_time": (*sides, None, bands),
                "space_only": (*sides, 1, bands),
                "time_only": (None, bands),
                "static": (bands,),
            }[modality.kind]
            fits = len(shape) == len(form) and all(
                n > 0 and w in (None, n) for n, w in zip(shape, form, strict=True)
            )
            if not fits:
                text = ", ".join("t" if w is None else str(w) for w in form)
                raise ReadError(self.path, f"{name!r} has shape {shape}, expected ({text})")
        return None if side is None else int(side)

    def read(
        self,
        name: str,
        rows: slice | None = None,
        cols: slice | None = None,
        steps: slice | None = None,
    ) -> np.ndarray:
        """A part of an array in its stored dtype: pixels [rows, cols] and timesteps `steps`.

        Slices are in the array's own pixels; None means everything. Only the chunks touched are
        decoded, and of a zstd chunk only the bytes up to the last row.

        Raises:
          ReadError: damaged data, or values that are not finite.
        """
        source = self._sets[name]
        wanted = {
            "space_time": (rows, cols, steps, None),
            "space_only": (rows, cols, None, None),
            "time_only": (steps, None),
            "static": (None,),
        }[registry.get(name).kind]
        window = tuple(
            slice(0, n) if w is None else slice(*w.indices(n)[:2])
            for w, n in zip(wanted, source.shape, strict=True)
        )
        with translate_errors(self.path):
            values = _window(source, window)
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise ReadError(self.path, f"{name!r} holds values that are not finite")
        return values


def _is_array(group: h5py.h5g.GroupID, name: str) -> bool:
    return h5py.h5g.get_objinfo(group, name.encode()).type == h5py.h5g.DATASET


def _everything(source: h5py.h5d.DatasetID) -> np.ndarray:
    out = np.empty(source.shape, source.dtype)
    if out.size:
        source.read(h5py.h5s.ALL, h5py.h5s.ALL, out)
    return out


def _window(source: h5py.h5d.DatasetID, window: tuple[slice, ...]) -> np.ndarray:
    """The part `window` of an array, in memory of its own."""
    shape = tuple(max(0, w.stop - w.start) for w in window)
    if 0 in shape:
        return np.empty(shape, source.dtype)
    frame = _only_frame(source)
    if frame is not None:
        rows = (window[0].stop, *source.shape[1:])
        data = zstd.beginning(frame, math.prod(rows) * source.dtype.itemsize)
        return data.view(source.dtype).reshape(rows)[window].copy()
    out = np.empty(shape, source.dtype)
    space = source.get_space()
    space.select_hyperslab(tuple(w.start for w in window), shape)
    source.read(h5py.h5s.create_simple(shape), space, out)
    return out


def _only_frame(source: h5py.h5d.DatasetID) -> bytes | None:
    """The compressed bytes of an array that is one zstd chunk as a whole, else None."""
    layout = source.get_create_plist()
    if (
        not zstd.available()
        or layout.get_layout() != h5py.h5d.CHUNKED
        or layout.get_chunk() != source.shape
        or [layout.get_filter(i)[0] for i in range(layout.get_nfilters())] != [zstd.FILTER_ID]
        or not source.get_num_chunks()
    ):
        return None
    skipped, frame = source.read_direct_chunk((0,) * len(source.shape))
    return None if skipped else frame


@contextlib.contextmanager
def open_sample(path: str | AnyPath, modalities: Sequence[str]) -> Iterator[SampleFile]:
    """Opens a sample file and checks its header.

    Args:
      path: the .h5 file; a remote one is fetched whole.
      modalities: training modalities; the file may lack any of them.

    Raises:
      ReadError: missing or damaged file, or arrays of the wrong form.
    """
    with translate_errors(path):
        source = path.open("rb") if isinstance(path, RemotePath) else path
        file = h5py.File(source, "r", locking=False)
    try:
        with translate_errors(path):
            sample = SampleFile(path, file, stored_names(modalities))
        yield sample
    finally:
        file.close()


@contextlib.contextmanager
def translate_errors(path: str | AnyPath) -> Iterator[None]:
    """Turns whatever goes wrong while reading `path` into a `ReadError` that names it."""
    try:
        yield
    except ReadError:
        raise
    except FileNotFoundError:
        raise ReadError(path, "file does not exist") from None
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as e:
        raise ReadError(path, f"cannot be read, it may be damaged or incomplete ({e})") from e


def nominal_tile_px(folder: str | AnyPath) -> int | None:
    """Tile side that a published folder name states ('..._128_x_4'), or None."""
    for part in reversed(str(folder).split("/")):
        pieces = part.split("_")
        if part.startswith("h5py_data") and len(pieces) >= 3 and pieces[-2] == "x":
            with contextlib.suppress(ValueError):
                side = int(pieces[-3])
                if side > 0:
                    return side
    return None
