"""Reading one sample file: header first, then only the pixels asked for (spec/data.md section 4.7).

Every problem with a file, from a truncated copy to a wrong shape, becomes a `ReadError` that names
the file and what is wrong with it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from olmoearth_jax import modalities as registry
from olmoearth_jax.data.chunk_index import open_indexed
from olmoearth_jax.data.errors import ReadError, translate_errors
from olmoearth_jax.data.hdf5_file import (
    Hdf5File,
    check_mask,
    check_timestamps,
    open_file,
    open_regular,
)
from olmoearth_jax.data.remote import AnyPath, RemotePath
from olmoearth_jax.data.timesteps import DATE_RANGE
from olmoearth_jax.modalities import MAX_TIMESTEPS

_FIRST_DATE, _LAST_DATE = np.array(DATE_RANGE).T


class Arrays(Protocol):
    """What a sample is read from: `Hdf5File` or `IndexedFile`."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    @property
    def dtypes(self) -> Mapping[str, np.dtype]: ...

    @property
    def timestamps(self) -> np.ndarray: ...

    @property
    def masks(self) -> Mapping[str, np.ndarray]: ...

    def window(self, name: str, window: tuple[slice, ...]) -> np.ndarray: ...


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
    return registry.in_sample_order(registry.DERIVED.get(m, m) for m in modalities)


class SampleFile:
    """An open sample file; use `open_sample`.

    Args:
      path: file name, for messages.
      arrays: its content.
      wanted: dataset names to look for; others are ignored.
    """

    def __init__(self, path: str | AnyPath, arrays: Arrays, wanted: Sequence[str]):
        self.path = f"{path}"
        self._arrays = arrays
        stamps = arrays.timestamps
        check_timestamps(self.path, stamps.dtype, stamps.shape)
        self._check_dates(stamps)
        masks = {n: self._mask(n, len(stamps)) for n in wanted if n in arrays.masks}
        shapes = {n: arrays.shapes[n] for n in wanted if n in arrays.shapes}
        side = self._tile_px(shapes)
        for name, mask in masks.items():
            held = shapes[name][-2] if name in shapes and len(shapes[name]) == 4 else None
            # Published files may hold more timesteps than their mask: the surplus is dropped.
            if held is not None and held < int(mask.sum()):
                raise ReadError(
                    self.path,
                    f"{name!r} holds {held} timesteps, but its mask has {int(mask.sum())}; they "
                    "would be put on wrong dates",
                )
        self.header = Header(stamps.astype(np.int32), masks, shapes, side)

    def _check_dates(self, stamps: np.ndarray) -> None:
        fits = (stamps >= _FIRST_DATE) & (stamps <= _LAST_DATE)
        if not fits.all():
            wrong = ~fits.all(axis=1)
            day, month, year = stamps[wrong][0].tolist()
            raise ReadError(
                self.path,
                f"has the impossible date (day {day}, month {month} of 0-11, year {year})",
            )

    def _mask(self, name: str, rows: int) -> np.ndarray:
        mask = self._arrays.masks[name]
        check_mask(self.path, name, mask.dtype, mask.shape, rows)
        return mask.astype(bool)

    def _tile_px(self, shapes: dict[str, tuple[int, ...]]) -> int | None:
        """The side in 10 m pixels, after checking every array's shape and dtype."""
        side = None
        most = max(len(self._arrays.timestamps), MAX_TIMESTEPS)
        for name, shape in shapes.items():
            modality, dtype = registry.get(name), self._arrays.dtypes[name]
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
            if modality.multitemporal and shape[-2] > most:
                raise ReadError(
                    self.path, f"{name!r} holds {shape[-2]} timesteps, the file has {most}"
                )
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
        decoded.

        Raises:
          ReadError: damaged data, or values that are not finite.
        """
        wanted = {
            "space_time": (rows, cols, steps, None),
            "space_only": (rows, cols, None, None),
            "time_only": (steps, None),
            "static": (None,),
        }[registry.get(name).kind]
        window = tuple(
            slice(0, n) if w is None else slice(*w.indices(n)[:2])
            for w, n in zip(wanted, self.header.shapes[name], strict=True)
        )
        with translate_errors(self.path):
            values = self._arrays.window(name, window)
        if values.dtype.kind == "f":
            self._check_finite(name, values)
        return values

    def _check_finite(self, name: str, values: np.ndarray) -> None:
        if not np.isfinite(values).all():
            raise ReadError(self.path, f"{name!r} holds values that are not finite")
        if values.dtype.itemsize > 4 and (np.abs(values) > np.finfo(np.float32).max).any():
            raise ReadError(self.path, f"{name!r} holds values too large for float32")


@contextlib.contextmanager
def open_sample(path: str | AnyPath, modalities: Sequence[str]) -> Iterator[SampleFile]:
    """Opens a sample file and checks its header.

    Args:
      path: the .h5 file; a remote one is fetched whole.
      modalities: training modalities; the file may lack any of them.

    Raises:
      ReadError: missing or damaged file, or arrays of the wrong form.
    """
    wanted = stored_names(modalities)
    with contextlib.ExitStack() as stack:
        with translate_errors(path):
            sample = SampleFile(path, _open(path, wanted, stack), wanted)
        yield sample


def _open(path: str | AnyPath, wanted: Sequence[str], stack: contextlib.ExitStack) -> Arrays:
    if isinstance(path, RemotePath):
        source = path.open("rb")
    else:
        source = Path(path)
        descriptor = open_regular(source)
        indexed = None
        try:
            indexed = open_indexed(descriptor)
        finally:
            if indexed is None:
                os.close(descriptor)
        if indexed is not None:
            stack.callback(os.close, descriptor)
            return indexed
    file, held = open_file(source)
    stack.callback((held or file).close)
    return Hdf5File(f"{path}", file, wanted)


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
