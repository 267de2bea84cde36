"""Reading one sample file: header first, then only the pixels asked for (spec/data.md section 4.7).

Every problem with a file, from a truncated copy to a wrong shape, becomes a `ReadError` that names
the file and what is wrong with it.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

import h5py
import hdf5plugin  # noqa: F401  (registers the zstd and lz4 filters)
import numpy as np

from olmoearth_jax import modalities as registry
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

    Args:
      path: file name, for messages.
      file: the open HDF5 file.
      wanted: dataset names to look for; others are ignored.
    """

    def __init__(self, path: str | AnyPath, file: h5py.File, wanted: Sequence[str]):
        self.path, self._file = str(path), file
        self._sets: dict[str, h5py.Dataset] = {}
        for name in wanted:
            if name in file:
                self._sets[name] = self._dataset(name)
        self.header = self._read_header(wanted)

    def _dataset(self, name: str) -> h5py.Dataset:
        found = self._file[name]
        if not isinstance(found, h5py.Dataset):
            raise ReadError(self.path, f"{name!r} is a group, not an array")
        return found

    def _read_header(self, wanted: Sequence[str]) -> Header:
        if "timestamps" not in self._file:
            raise ReadError(self.path, "has no 'timestamps'")
        stamps = self._dataset("timestamps")[()]
        if stamps.dtype.kind not in "iu" or stamps.ndim != 2 or stamps.shape[1] != 3:
            raise ReadError(
                self.path,
                f"'timestamps' must be whole numbers [timesteps, 3], got "
                f"{stamps.dtype} {stamps.shape}",
            )
        masks = {}
        if MASK_GROUP in self._file:
            group = self._file[MASK_GROUP]
            if not isinstance(group, h5py.Group):
                raise ReadError(self.path, f"{MASK_GROUP!r} is an array, not a group")
            for name in wanted:
                if name in group:
                    masks[name] = self._mask(name, len(stamps))
        shapes = {name: tuple(d.shape) for name, d in self._sets.items()}
        return Header(stamps.astype(np.int32), masks, shapes, self._tile_px(shapes))

    def _mask(self, name: str, rows: int) -> np.ndarray:
        mask = self._dataset(f"{MASK_GROUP}/{name}")[()]
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
        for name in shapes:
            modality = registry.get(name)
            if self._sets[name].dtype.kind not in "iuf":
                raise ReadError(
                    self.path, f"{name!r} must hold numbers, got {self._sets[name].dtype}"
                )
            if modality.spatial:
                factor = modality.image_factor
                own = shapes[name][0] / factor if len(shapes[name]) == 4 else 0
                side = own if side is None else side
                expected = (int(side * factor), int(side * factor))
            else:
                expected = ()
            self._check_shape(name, shapes[name], expected)
        return None if side is None else int(side)

    def _check_shape(self, name: str, shape: tuple[int, ...], sides: tuple[int, ...]) -> None:
        modality = registry.get(name)
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

    def read(
        self,
        name: str,
        rows: slice | None = None,
        cols: slice | None = None,
        steps: slice | None = None,
    ) -> np.ndarray:
        """A part of an array in its stored dtype: pixels [rows, cols] and timesteps `steps`.

        Slices are in the array's own pixels; None means everything. Only the chunks touched are
        decoded.

        Raises:
          ReadError: damaged data, or values that are not finite.
        """
        full = slice(None)
        kind = registry.get(name).kind
        index: tuple = {
            "space_time": (rows or full, cols or full, steps or full),
            "space_only": (rows or full, cols or full),
            "time_only": (steps or full,),
            "static": (),
        }[kind]
        with translate_errors(self.path):
            values = self._sets[name][index]
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise ReadError(self.path, f"{name!r} holds values that are not finite")
        return values


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
