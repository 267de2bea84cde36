"""GeoBench v2 tortilla files -> one .npz per sample (spec/evals.md section 13.6).

A tortilla begins with two magic bytes and the place of its footer, a Parquet table with one row per
item: where its bytes lie, their format, and what is known of it. A sample is a tortilla within the
tortilla, whose items are GeoTIFFs. Needs pyarrow and rasterio.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from olmoearth_jax import outputs

MAGIC = (b"#y", b"WX")
HEADER = struct.Struct("<2sQQ")
SPLITS = {"train": "train", "validation": "valid", "val": "valid", "test": "test"}
TREES = (
    "Abies", "Acer", "Alnus", "Betula", "Cleared", "Fagus", "Fraxinus", "Larix", "Picea", "Pinus",
    "Populus", "Prunus", "Pseudotsuga", "Quercus", "Tilia",
)  # fmt: skip
LAND_COVER = (
    "Urban fabric", "Industrial or commercial units", "Arable land", "Permanent crops", "Pastures",
    "Complex cultivation patterns",
    "Land principally occupied by agriculture, with significant areas of natural vegetation",
    "Agro-forestry areas", "Broad-leaved forest", "Coniferous forest", "Mixed forest",
    "Natural grassland and sparsely vegetated areas",
    "Moors, heathland and sclerophyllous vegetation", "Transitional woodland, shrub",
    "Beaches, dunes, sands", "Inland wetlands", "Coastal wetlands", "Inland waters",
    "Marine waters",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the parts of a sample are.

    Attributes:
      images: array name -> number of its item, or the modality whose first item it is.
      label: number of the item with the label raster, or the column that lists class names.
      classes: the names in that column, in class order.
      shift: added to the raster's classes.
      top: larger raster values become this one before the shift.
      absent: raster value that becomes -1.
      fill: image value that becomes 0.
    """

    images: dict[str, int | str]
    label: int | str
    classes: tuple[str, ...] = ()
    shift: int = 0
    top: int | None = None
    absent: int | None = None
    fill: float | None = None


LAYOUTS = {
    "benv2": Layout({"image_s1": 0, "image_s2": 1}, "labels", LAND_COVER),
    "biomassters": Layout({"image_s1": "S1", "image_s2": "S2"}, -1, fill=-9999),
    "burn_scars": Layout({"image": 0}, 1),
    "caffe": Layout({"image": 0}, 1),
    "cloudsen12": Layout({"image": 0}, 1),
    "flair2": Layout({"image": 0}, 1, shift=-1, top=13),
    "fotw": Layout({"image": 0}, 3),
    "kuro_siwo": Layout(
        {"image_pre_1": 0, "image_pre_2": 1, "image_post": 2, "image_dem": 3}, 4, absent=3
    ),
    "spacenet2": Layout({"image_worldview": 0, "image_pan": 1}, 2, shift=1),
    "spacenet7": Layout({"image": 0}, 1, shift=1),
    "treesatai": Layout({"image_s2": 2}, "species_labels", TREES),
}
"""The published order of items and numbering of classes, by data set."""


def read_footer(path: Path, start: int = 0) -> list[dict[str, Any]]:
    """Rows of the tortilla that begins at byte `start` of a file; offsets are the file's.

    Raises:
      ValueError: no tortilla begins there, or pyarrow is absent.
    """
    try:
        import pyarrow  # pyright: ignore[reportMissingImports]
        import pyarrow.parquet  # pyright: ignore[reportMissingImports]
    except ImportError as e:
        raise ValueError("reading tortilla files needs pyarrow: pip install pyarrow") from e
    with open(path, "rb") as f:
        f.seek(start)
        head = f.read(HEADER.size)
        if len(head) < HEADER.size or head[:2] not in MAGIC:
            raise ValueError(f"{path} is no tortilla file (at byte {start})")
        _, offset, length = HEADER.unpack(head)
        f.seek(start + offset)
        footer = f.read(length)
    try:
        rows = pyarrow.parquet.read_table(pyarrow.BufferReader(footer)).to_pylist()
    except pyarrow.ArrowInvalid as e:
        raise ValueError(f"the table of {path} (at byte {start}) cannot be read: {e}") from e
    for row in rows:
        row["tortilla:offset"] += start
    return rows


def read_image(path: Path, row: dict[str, Any]) -> np.ndarray:
    """The GeoTIFF of an item, [C, H, W]."""
    import rasterio

    with open(path, "rb") as f:
        f.seek(row["tortilla:offset"])
        data = f.read(row["tortilla:length"])
    with rasterio.MemoryFile(data) as memory, memory.open() as source:
        return source.read()


def read_sample(path: Path, start: int, name: str) -> dict[str, np.ndarray]:
    """Images [C, H, W] and label of the sample that begins at byte `start`."""
    layout, rows = LAYOUTS[name], read_footer(path, start)
    kinds = [row.get("modality") for row in rows]
    out = {}
    for key, item in layout.images.items():
        image = read_image(path, rows[kinds.index(item) if isinstance(item, str) else item])
        out[key] = image if layout.fill is None else np.where(image == layout.fill, 0, image)
    if isinstance(layout.label, str):
        held = rows[0][layout.label]
        unknown = [c for c in held if c not in layout.classes]
        if unknown:
            raise ValueError(f"{path.name}: unknown class {unknown[0]!r}")
        label = np.array([c in held for c in layout.classes], np.int64)
    else:
        label = read_image(path, rows[layout.label])[0]
    if layout.top is not None:
        label = np.minimum(label.astype(np.int64), layout.top)
    if layout.absent is not None:
        label = np.where(label == layout.absent, -1, label.astype(np.int64))
    if layout.shift:
        label = label.astype(np.int64) + layout.shift
    return {**out, "label": label}


def samples(paths: list[Path]) -> Iterator[tuple[str, Path, int]]:
    """Split, file and first byte of every sample."""
    for path in paths:
        for row in read_footer(path):
            split = str(row.get("tortilla:data_split"))
            if split not in SPLITS:
                raise ValueError(f"{path.name} has a sample of an unknown split {split!r}")
            yield SPLITS[split], path, row["tortilla:offset"]


def _unfinished(folder: Path) -> Path:
    """Where the samples of a folder lie until all are there: a reader takes what it finds."""
    return folder.with_name(f".{folder.name}.partial")


def _publish(folder: Path, count: int) -> None:
    """Puts `count` samples into their folder, and removes those of a larger conversion before."""
    folder.mkdir(exist_ok=True)
    for path in folder.glob("*.npz"):
        if path.stem.isdecimal() and int(path.stem) >= count:
            path.unlink()
    for path in _unfinished(folder).iterdir():
        os.replace(path, folder / path.name)
    _unfinished(folder).rmdir()


def convert(source: Path, target: Path, overwrite: bool = False) -> dict[str, int]:
    """Unpacks `<source>/geobench_<name>*.tortilla` into `<target>/<name>/<split>/<i>.npz`.

    Returns:
      Samples per data set and split, as 'name/split' -> count.

    Raises:
      ValueError: no file of a known data set, or a damaged one; without `overwrite`, a target that
        holds other files.
    """
    counts: dict[str, int] = {}
    for name in LAYOUTS:
        paths = sorted([*source.glob(f"**/geobench_{name}.*"), *source.glob(f"**/{name}.tortilla")])
        for split, path, start in samples([p for p in paths if p.suffix in (".tortilla", ".taco")]):
            if not any(key.startswith(f"{name}/") for key in counts):
                outputs.claim(target / name, overwrite)
            number = counts.get(f"{name}/{split}", 0)
            folder = _unfinished(target / name / split)
            if not number:
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
            arrays: dict[str, Any] = dict(read_sample(path, start, name))
            np.savez(folder / f"{number}.npz", **arrays)
            counts[f"{name}/{split}"] = number + 1
        for key in (k for k in counts if k.startswith(f"{name}/")):
            _publish(target / key, counts[key])
    if not counts:
        raise ValueError(
            f"{source} holds no geobench_<name>.tortilla of {', '.join(LAYOUTS)} with samples"
        )
    return counts
