"""Writing sample files and their folder in the published layout (spec/data.md sections 4.5-4.7)."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin
import numpy as np

from olmoearth_jax.data.h5 import MASK_GROUP
from olmoearth_jax.data.index import LATLON_FILE, METADATA_FILE, directory_name
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
      chunk_px: side of the chunks along the first two axes of spatial arrays, in their own
        pixels; None stores each array as one chunk, as published.
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
        for what, size in (("side", self.chunk_px), ("timesteps", self.chunk_steps)):
            if size is not None and size < 1:
                raise ValueError(f"chunk {what} must be positive, got {size}")
        if self.compression == "none" and (self.chunk_px or self.chunk_steps):
            raise ValueError("chunks need a compression: gzip, zstd or lz4")

    def options(self, shape: tuple[int, ...]) -> dict[str, Any]:
        """Arguments of h5py's create_dataset for an array of `shape`."""
        if self.compression == "none":
            return {}
        chunks = shape
        if len(shape) == 4:
            side, steps = self.chunk_px or max(shape[:2]), self.chunk_steps or shape[2]
            chunks = (min(side, shape[0]), min(side, shape[1]), min(steps, shape[2]), shape[3])
        out: dict[str, Any] = {"chunks": chunks}
        if self.compression == "zstd":
            return {**out, **hdf5plugin.Zstd(clevel=self.level or 0)}
        if self.compression == "lz4":
            return {**out, **hdf5plugin.LZ4(nbytes=0)}
        return {
            **out,
            "compression": "gzip",
            "compression_opts": 4 if self.level is None else self.level,
            "shuffle": bool(self.shuffle),
        }

    def settings(self) -> dict[str, Any]:
        """Content of compression_settings.json."""
        return {
            "compression": None if self.compression == "none" else self.compression,
            "compression_opts": self.level if self.compression != "none" else None,
            "shuffle": self.shuffle,
        }


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
      ValueError: float16 arrays, which cannot hold the fill value.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with h5py.File(temporary, "w") as file:
            root = {
                **arrays,
                "timestamps": timestamps,
                "latlon": np.asarray(latlon, np.float32),
            }
            for name in sorted(root):
                array = np.ascontiguousarray(root[name])
                if array.dtype == np.float16:
                    raise ValueError(f"{name}: float16 cannot hold the fill value -99999")
                file.create_dataset(name, data=array, **storage.options(array.shape))
            if masks:
                group = file.create_group(MASK_GROUP)
                for name in sorted(masks):
                    group.create_dataset(name, data=np.asarray(masks[name], bool))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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
    with (folder / METADATA_FILE).open("w", newline="") as f:
        table = csv.writer(f, lineterminator="\n")
        table.writerow(["sample_index", *names])
        table.writerows(rows)
    np.save(folder / LATLON_FILE, centres)
    (folder / SETTINGS_FILE).write_text(json.dumps(storage.settings(), indent=2))


class DatasetWriter:
    """Collects sample files in a temporary folder and gives it its published name at the end.

    Use as a context manager: leaving it without an error renames the folder to its final place;
    after an error nothing is left behind.

    Args:
      output_dir: tile folder in which the data set's folder is made.
      names: modalities of the data set, in the order of the CSV's columns.
      num_samples: samples that will be written.
      tile_px: side of a sample.
      storage: how arrays are stored.

    Raises:
      ValueError: the data set's folder exists already.
    """

    def __init__(
        self,
        output_dir: Path,
        names: Sequence[str],
        num_samples: int,
        tile_px: int,
        storage: Storage,
    ):
        settings = storage.settings()
        relative = directory_name(
            names,
            num_samples,
            tile_px=tile_px,
            compression=settings["compression"],
            level=settings["compression_opts"],
            shuffle=settings["shuffle"],
        )
        self.final = Path(output_dir) / relative
        if self.final.exists():
            raise ValueError(f"the dataset folder exists already: {self.final}")
        self._names, self._storage = tuple(names), storage
        self._folder = self.final.with_name(f".{self.final.name}.{os.getpid()}.tmp")
        self._rows: list[list[int]] = []
        self._centres: list[np.ndarray] = []

    def __enter__(self) -> DatasetWriter:
        self._folder.mkdir(parents=True)
        return self

    def add(
        self,
        arrays: Mapping[str, np.ndarray],
        timestamps: np.ndarray,
        masks: Mapping[str, np.ndarray],
        latlon: np.ndarray,
    ) -> None:
        """Writes the next sample; see `write_sample`."""
        number = len(self._rows)
        path = self._folder / f"sample_{number}.h5"
        write_sample(path, arrays, timestamps, masks, latlon, self._storage)
        self._rows.append([number, *(int(n in arrays) for n in self._names)])
        self._centres.append(np.asarray(latlon, np.float64))

    def __exit__(self, kind, error, trace) -> None:
        if kind is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            return
        centres = np.stack(self._centres)
        write_tables(self._folder, self._names, self._rows, centres, self._storage)
        os.replace(self._folder, self.final)
