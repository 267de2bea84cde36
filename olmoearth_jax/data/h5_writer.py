"""Writing sample files and their tables in the published layout (spec/data.md sections 4.5-4.7)."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin
import numpy as np

from olmoearth_jax.data import chunk_index
from olmoearth_jax.data.hdf5_file import MASK_GROUP
from olmoearth_jax.data.index import LATLON_FILE, METADATA_FILE, directory_name
from olmoearth_jax.files import replacing
from olmoearth_jax.modalities import closest

COMPRESSIONS = ("none", "gzip", "zstd", "lz4")
SETTINGS_FILE = "compression_settings.json"


@dataclasses.dataclass(frozen=True)
class Storage:
    """How arrays are stored.

    Attributes:
      compression: 'none', 'gzip', 'zstd' or 'lz4'.
      level: of gzip or zstd; zstd needs one.
      shuffle: byte shuffling, honoured with gzip only; part of the folder's name if not None.
      chunk_px: side of the chunks of spatial arrays, in their own pixels; None stores each array
        as one chunk, as published.
      chunk_steps: timesteps per chunk of series with extent; None for all.
    """

    compression: str = "zstd"
    level: int | None = 3
    shuffle: bool | None = None
    chunk_px: int | None = None
    chunk_steps: int | None = None

    def __post_init__(self) -> None:
        if self.compression not in COMPRESSIONS:
            raise ValueError(
                f"unknown compression {self.compression!r}; "
                f"{closest(self.compression, COMPRESSIONS)}"
            )
        if self.compression == "zstd" and self.level is None:
            raise ValueError("zstd compression needs a level, for example 3")
        least, most = {"gzip": (0, 9), "zstd": (1, 22)}.get(self.compression, (0, 0))
        if most and self.level is not None and not least <= self.level <= most:
            raise ValueError(
                f"the level of {self.compression} must lie in {least}..{most}, got {self.level}"
            )
        for what, size in (("side", self.chunk_px), ("timesteps", self.chunk_steps)):
            if size is not None and size < 1:
                raise ValueError(f"chunk {what} must be positive, got {size}")
        if self.compression == "none" and (self.chunk_px or self.chunk_steps):
            raise ValueError("chunks need a compression: gzip, zstd or lz4")

    @property
    def indexed(self) -> bool:
        """Whether files get an index of their chunks."""
        return self.compression == "zstd" and bool(self.chunk_px or self.chunk_steps)

    def options(self, shape: tuple[int, ...]) -> dict[str, Any]:
        """Arguments of h5py's create_dataset for an array of `shape`."""
        if self.compression == "none":
            return {}
        chunks = shape
        if len(shape) == 4:
            wanted = (self.chunk_px, self.chunk_px, self.chunk_steps, None)
            chunks = tuple(min(w or n, n) for w, n in zip(wanted, shape, strict=True))
        if self.compression == "zstd":
            return {"chunks": chunks, **hdf5plugin.Zstd(clevel=self.level or 0)}
        if self.compression == "lz4":
            return {"chunks": chunks, **hdf5plugin.LZ4(nbytes=0)}
        level = 4 if self.level is None else self.level
        how = {"compression": "gzip", "compression_opts": level, "shuffle": bool(self.shuffle)}
        return {"chunks": chunks, **how}

    def settings(self) -> dict[str, Any]:
        """Content of compression_settings.json."""
        plain = self.compression == "none"
        return {
            "compression": None if plain else self.compression,
            "compression_opts": None if plain else self.level,
            "shuffle": self.shuffle,
        }

    def folder(
        self, names: Sequence[str], samples: int, tile_px: int, required: Sequence[str] = ()
    ) -> str:
        """Folder of a dataset stored like this, relative to its tile folder."""
        how = self.settings()
        return directory_name(
            names,
            samples,
            tile_px=tile_px,
            compression=how["compression"],
            level=how["compression_opts"],
            shuffle=how["shuffle"],
            required=required,
        )


def write_sample(
    path: Path,
    arrays: Mapping[str, np.ndarray],
    timestamps: np.ndarray,
    masks: Mapping[str, np.ndarray],
    latlon: np.ndarray,
    storage: Storage,
) -> None:
    """Writes one sample file; an interrupted write leaves no file of that name.

    Args:
      path: file to write.
      arrays: per modality, in stored dtype, holding only the timesteps it has.
      timestamps: whole numbers [t, 3] (day 1-31, month 0-11, year).
      masks: per space-time modality bool [t], true where it has that timestep.
      latlon: [lat, lon] in degrees.
      storage: how to store.

    Raises:
      ValueError: float16 arrays, which cannot hold the fill value, or arrays that hold nothing.
    """
    root = {**arrays, "timestamps": timestamps, "latlon": np.asarray(latlon, np.float32)}
    for name, array in root.items():
        if array.dtype == np.float16:
            raise ValueError(f"{name}: float16 cannot hold the fill value -99999")
        if not array.size:
            raise ValueError(
                f"{name} has shape {array.shape} and holds nothing; leave out what a sample lacks"
            )
    masked = {f"{MASK_GROUP}/{n}": np.asarray(m, bool) for n, m in masks.items()}
    with replacing(path) as temporary:
        write_arrays(temporary, {**root, **masked}, storage)


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], storage: Storage) -> None:
    """Writes a sample file: plain where a name is in a group (the masks), else as `storage` says.

    Files in small zstd chunks get an index (see `chunk_index`).
    """
    options = {n: {} if "/" in n else storage.options(a.shape) for n, a in arrays.items()}
    block = 0
    if storage.indexed:
        forms = {n: (arrays[n].shape, how["chunks"]) for n, how in options.items() if how}
        block = chunk_index.block_size(forms)
    with h5py.File(path, "w", userblock_size=block) as file:
        for name in sorted(arrays):
            file.create_dataset(name, data=_in_order(arrays[name]), **options[name])
    if storage.indexed:
        chunk_index.write(path)


def _in_order(x: np.ndarray) -> np.ndarray:
    """The array in C order.

    Of pictures that are views [H, W, T, C] of [T, C, H, W] a row at a time: its planes are gathered
    first, which takes a quarter of the time that NumPy takes for all axes at once.
    """
    if x.ndim != 4 or x.flags.c_contiguous or x.strides[1] != x.itemsize:
        return np.ascontiguousarray(x)
    out = np.empty(x.shape, x.dtype)
    for row, made in zip(x, out, strict=True):
        made[:] = np.ascontiguousarray(row.transpose(1, 2, 0)).transpose(2, 0, 1)
    return out


def write_tables(
    folder: Path,
    names: Sequence[str],
    rows: Sequence[Sequence[int]],
    centres: np.ndarray,
    storage: Storage,
) -> None:
    """Writes the files beside the samples: metadata, tile centres and compression settings.

    Args:
      folder: of the samples.
      names: modalities, in the order of the columns.
      rows: per sample its number and 1 or 0 per modality.
      centres: float64 [samples, 2], (lat, lon).
      storage: how the samples are stored.
    """
    write_csv(folder / METADATA_FILE, ("sample_index", *names), rows)
    np.save(folder / LATLON_FILE, centres)
    (folder / SETTINGS_FILE).write_text(json.dumps(storage.settings(), indent=2))


def write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Writes a table."""
    with path.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(header)
        table.writerows(rows)
