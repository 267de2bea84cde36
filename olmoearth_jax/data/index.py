"""Which samples of a data set are used: filtering, subsampling, identity.

Figures and rules: spec/data.md section 5.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from olmoearth_jax import modalities as registry
from olmoearth_jax.data import npy_file
from olmoearth_jax.data.errors import ReadError
from olmoearth_jax.data.h5 import nominal_tile_px, open_sample
from olmoearth_jax.data.holdout import held_out
from olmoearth_jax.data.remote import AnyPath, location
from olmoearth_jax.files import check_file
from olmoearth_jax.modalities import IMAGE_TILE_PX

Split = Literal["train", "validation"]
"""A side of the map; without a validation fraction all of it is for training."""

FINGERPRINT_VERSION = "v0.1"
METADATA_FILE = "sample_metadata.csv"
LATLON_FILE = "latlon_distribution.npy"


@dataclasses.dataclass(frozen=True)
class Part:
    """The samples taken from one folder: int64 file numbers, and their side in 10 m pixels."""

    folder: AnyPath
    numbers: np.ndarray
    tile_px: int


@dataclasses.dataclass(frozen=True)
class DatasetIndex:
    """The samples of one or several folders, addressed by one running index.

    Attributes:
      parts: the folders.
      modalities: training modalities in sample order.
      fingerprint: hex digest of where the data set is, as the reference computes it.
      content: hex digest of what it is, wherever it lies, and of what was chosen of it.
      latlon: float64 [samples, 2] tile centres in degrees, or None if a folder has none.
    """

    parts: tuple[Part, ...]
    modalities: tuple[str, ...]
    fingerprint: str
    content: str
    latlon: np.ndarray | None

    def __len__(self) -> int:
        return sum(len(p.numbers) for p in self.parts)

    @property
    def tile_px(self) -> int:
        """Side of the smallest tiles, which bounds the crops."""
        return min(p.tile_px for p in self.parts)

    def locate(self, index: int) -> tuple[AnyPath, int]:
        """(file, file number) of the sample at `index`; negative indices count from the end.

        Raises:
          IndexError: out of range.
        """
        size = len(self)
        if not -size <= index < size:
            raise IndexError(f"index {index} is out of range for {size} samples")
        index %= size
        for part in self.parts:
            if index < len(part.numbers):
                number = int(part.numbers[index])
                return part.folder / f"sample_{number}.h5", number
            index -= len(part.numbers)
        raise AssertionError("unreachable")


def prepare(
    h5py_dir: str | AnyPath,
    modalities: Sequence[str],
    *,
    filter_idx_file: str | Path | None = None,
    dataset_percentage: float = 1.0,
    seed: int = 0,
    validation_fraction: float = 0.0,
    part: Split = "train",
) -> DatasetIndex:
    """Builds the index of one folder (or URL) of sample files.

    Keeps samples that hold at least one of the trained space-time modalities (a modality without
    CSV column counts as absent everywhere), then those whose numbers stand in the .npy file
    `filter_idx_file`, then a random share of them in drawn order, then those of one `part` of the
    map (see `holdout`).

    Raises:
      ValueError: missing or empty folder, malformed files, or nothing left.
    """
    folder, names = location(h5py_dir), trained_names(modalities)
    numbers = chosen_numbers(
        folder,
        names,
        filter_idx_file=filter_idx_file,
        dataset_percentage=dataset_percentage,
        seed=seed,
        validation_fraction=validation_fraction,
        part=part,
    )
    taken = Part(folder, numbers, _tile_px(folder, numbers, names))
    return DatasetIndex(
        (taken,),
        names,
        fingerprint(folder, filter_idx_file),
        _content_digest(taken, names),
        _latlon(folder, numbers),
    )


def trained_names(modalities: Sequence[str]) -> tuple[str, ...]:
    """Names of trained modalities in the order of samples.

    Raises:
      ValueError: none, an unknown one, or ndvi without what it is computed from.
    """
    names = registry.in_sample_order(registry.resolve(modalities))
    if not names:
        raise ValueError("no training modality is given")
    if "ndvi" in names and "sentinel2_l2a" not in names:
        raise ValueError("ndvi is computed from sentinel2_l2a, so train on that as well")
    return names


def chosen_numbers(
    folder: AnyPath,
    names: Sequence[str],
    *,
    filter_idx_file: str | Path | None = None,
    dataset_percentage: float = 1.0,
    seed: int = 0,
    validation_fraction: float = 0.0,
    part: Split = "train",
) -> np.ndarray:
    """int64 numbers of the samples that `prepare` keeps, in its order; no sample is opened.

    Args:
      folder: with its table, sample_metadata.csv.
      names: as `trained_names` gives them.
      filter_idx_file, dataset_percentage, seed, validation_fraction, part: as for `prepare`.

    Raises:
      ValueError: as `prepare`.
    """
    if not 0 < dataset_percentage <= 1:
        raise ValueError(
            f"dataset_percentage must be above 0 and at most 1, got {dataset_percentage}"
        )
    numbers = _with_data(folder, names)
    if not len(numbers):
        raise ValueError(
            f"no sample of {folder} holds any of the trained space-time modalities "
            f"({', '.join(names)})"
        )
    if filter_idx_file is not None:
        wanted = _load_array(location(filter_idx_file))
        if wanted.dtype.kind not in "iu":
            raise ValueError(
                f"filter_idx_file {filter_idx_file} must hold whole numbers, got {wanted.dtype}"
            )
        numbers = np.intersect1d(numbers, wanted)
        if not len(numbers):
            raise ValueError(f"filter_idx_file {filter_idx_file} leaves no sample of {folder}")
    if dataset_percentage < 1:
        count = math.floor(len(numbers) * dataset_percentage)
        if count == 0:
            raise ValueError(
                f"dataset_percentage {dataset_percentage} of {len(numbers)} samples leaves none"
            )
        rng = np.random.Generator(np.random.PCG64(seed))
        numbers = rng.choice(numbers, size=count, replace=False)
    numbers = numbers.astype(np.int64)
    if validation_fraction == 0:
        return numbers if part == "train" else numbers[:0]
    return _of_part(folder, numbers, validation_fraction, seed, part)


def _of_part(
    folder: AnyPath, numbers: np.ndarray, fraction: float, seed: int, part: Split
) -> np.ndarray:
    """The samples of one side of the split."""
    latlon = _latlon(folder, numbers)
    if latlon is None:
        raise ValueError(
            f"dataset.validation_fraction needs {folder / LATLON_FILE}, which says where the "
            "samples lie; tools.convert_to_h5 writes it"
        )
    mine = held_out(latlon, fraction, seed) == (part == "validation")
    if not mine.any():
        raise ValueError(
            f"dataset.validation_fraction {fraction} leaves no sample of {folder} for {part}: it "
            "is a fraction of blocks of 0.1 degrees, of which there are few; take another "
            "fraction or dataset.seed"
        )
    return numbers[mine]


def concat(indices: Sequence[DatasetIndex]) -> DatasetIndex:
    """Joins data sets end to end.

    Raises:
      ValueError: none given, or they train on different modalities.
    """
    if not indices:
        raise ValueError("no dataset to join")
    for other in indices[1:]:
        if other.modalities != indices[0].modalities:
            raise ValueError(
                f"datasets to be joined must train on the same modalities, got "
                f"{', '.join(indices[0].modalities)} and {', '.join(other.modalities)}"
            )
    text = "".join(i.fingerprint for i in indices)
    held = "".join(i.content for i in indices)
    centres = [i.latlon for i in indices if i.latlon is not None]
    return DatasetIndex(
        tuple(p for i in indices for p in i.parts),
        indices[0].modalities,
        hashlib.sha256(text.encode()).hexdigest(),
        hashlib.sha256(held.encode()).hexdigest(),
        np.concatenate(centres) if len(centres) == len(indices) else None,
    )


def fingerprint(
    h5py_dir: str | AnyPath,
    filter_idx_file: str | Path | None = None,
    dtype_text: str = "<class 'numpy.float32'>",
) -> str:
    """sha256 hex digest of a data set's path, modalities and size, as the reference computes it."""
    folder = location(h5py_dir)
    # Only three multi-word names are put together again, as in the reference.
    words = folder.parent.name
    for name in ("sentinel2_l2a", "openstreetmap_raster", "naip_10"):
        words = words.replace(name, name.replace("_", "-"))
    names = sorted([*(w.replace("-", "_") for w in words.split("_")), "latlon"])
    text = (
        f"tile_path={folder.parent.parent.parent!s},supported_modalities={names},"
        f"sample_size={folder.name},dtype={dtype_text}"
    )
    if filter_idx_file is not None:
        text += f",filter_idx_file={filter_idx_file}"
    return hashlib.sha256(text.encode()).hexdigest()


def _content_digest(part: Part, names: Sequence[str]) -> str:
    """sha256 hex digest of what is trained on: the folder's table, the trained modalities, the
    chosen samples in their order, and the side of the tiles. Where the folder lies has no part in
    it, nor do the pixels: `tools.verify_dataset` looks at those."""
    digest = hashlib.sha256((part.folder / METADATA_FILE).read_bytes())
    about = f"{','.join(names)};{len(part.numbers)};{part.tile_px};"
    digest.update(about.encode() + part.numbers.astype("<i8").tobytes())
    return digest.hexdigest()


def directory_name(
    names: Sequence[str],
    num_samples: int,
    *,
    tile_px: int = IMAGE_TILE_PX,
    compression: str | None = None,
    level: int | None = None,
    shuffle: bool | None = None,
    required: Sequence[str] = (),
) -> str:
    """Folder of a converted data set, relative to its tile folder (spec/data.md section 4.5)."""
    how = f"_{compression}" if compression else ""
    how += f"_{level}" if level is not None else ""
    how += "_shuffle" if shuffle is not None else ""
    pieces = max(1, IMAGE_TILE_PX // tile_px) ** 2
    what = "_".join(sorted(names))
    if required:
        what += "_required_" + "_".join(sorted(required))
    head = f"h5py_data_w_missing_timesteps{how}_{tile_px}_x_{pieces}"
    return f"{head}/{what}/{num_samples}"


def _check_folder(folder: AnyPath) -> None:
    try:
        there, complete = folder.is_dir(), (folder / METADATA_FILE).is_file()
    except OSError as e:
        raise ValueError(f"cannot look into the dataset folder {folder}: {e}") from e
    if not there:
        raise ValueError(f"dataset folder does not exist: {folder}")
    if not complete:
        found = [p for d in ("*", "*/*/*", "*/*") for p in folder.glob(f"{d}/{METADATA_FILE}")]
        # Hidden folders are unfinished, or litter of other systems.
        inside = [p for p in found if not any(x[0] == "." for x in p.parts[len(folder.parts) :])]
        hint = f"; did you mean {min(map(str, (p.parent for p in inside)))}?" if inside else ""
        raise ValueError(f"{folder} is not a dataset folder: it has no {METADATA_FILE}{hint}")


def _with_data(folder: AnyPath, names: Sequence[str]) -> np.ndarray:
    """Ascending numbers of the samples that hold a trained space-time modality."""
    header, table = read_metadata(folder)
    numbers = table[:, header.index("sample_index")]
    varying = [
        n for n in names if registry.get(n).kind == "space_time" and registry.get(n).from_csv
    ]
    if not varying:
        return np.sort(numbers)
    columns = [header.index(n) for n in varying if n in header]
    return np.sort(numbers[table[:, columns].sum(axis=1) > 0])


def read_metadata(folder: AnyPath) -> tuple[list[str], np.ndarray]:
    """(column names, int64 [samples, columns]) of a dataset's sample_metadata.csv.

    Raises:
      ValueError: no dataset folder, or a malformed or empty table.
    """
    _check_folder(folder)
    path = folder / METADATA_FILE
    try:
        with path.open() as f:
            header = [n.strip() for n in f.readline().removeprefix("\ufeff").split(",")]
            rows = f.read().splitlines()
        # loadtxt warns about an empty table instead of returning one
        table: np.ndarray = np.zeros((0, len(header)), np.int64)
        if rows:
            table = np.loadtxt(rows, delimiter=",", dtype=np.int64, ndmin=2)
    except (OSError, UnicodeDecodeError) as e:
        raise ValueError(f"cannot read {path}: {e}") from e
    except ValueError as e:
        raise ValueError(f"{path} is not a table of whole numbers: {e}") from e
    if "sample_index" not in header:
        raise ValueError(f"{path} has no column 'sample_index'; columns: {', '.join(header)}")
    if len(table) == 0:
        raise ValueError(f"dataset is empty: {path} lists no samples")
    if table.shape[1] != len(header):
        raise ValueError(f"{path} has {len(header)} column names but {table.shape[1]} columns")
    numbers = table[:, header.index("sample_index")]
    if numbers.min() < 0 or len(np.unique(numbers)) != len(numbers):
        raise ValueError(f"{path}: sample_index must be distinct whole numbers from 0")
    return header, table


def _load_array(path: AnyPath) -> np.ndarray:
    try:
        if isinstance(path, Path):
            check_file(path)
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            return npy_file.array(file, size)
    except (OSError, ValueError, EOFError, MemoryError) as e:
        raise ValueError(f"cannot read {path} as a NumPy array: {e}") from e


def _tile_px(folder: AnyPath, numbers: np.ndarray, names: Sequence[str]) -> int:
    """The folder name's tile side, else that of the first few samples that can be read."""
    side = nominal_tile_px(folder)
    if side is not None:
        return side
    problem = ""
    for number in np.sort(numbers)[:8]:
        try:
            with open_sample(folder / f"sample_{number}.h5", names) as file:
                if file.header.tile_px is not None:
                    return file.header.tile_px
        except ReadError as e:
            problem = str(e)
    raise ValueError(f"cannot tell the tile size of {folder} from its name or files; {problem}")


def read_centres(path: AnyPath) -> np.ndarray:
    """The numbers of a dataset's latlon_distribution.npy, of any shape.

    Raises:
      ValueError: it cannot be read, or holds something else.
    """
    table = _load_array(path)
    if table.dtype.kind not in "iuf":
        raise ValueError(f"{path} must hold degrees, got {table.dtype}")
    return table


def _latlon(folder: AnyPath, numbers: np.ndarray) -> np.ndarray | None:
    path = folder / LATLON_FILE
    if not path.is_file():
        return None
    table = read_centres(path)
    if table.ndim != 2 or table.shape[1] != 2 or len(table) <= numbers.max():
        raise ValueError(
            f"{path} must hold [samples, 2] degrees for {numbers.max() + 1} samples, "
            f"got {table.shape}"
        )
    return table[numbers].astype(np.float64)
