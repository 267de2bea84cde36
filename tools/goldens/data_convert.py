"""Goldens of the conversion: the recorded GeoTIFF tree against the reference's sample files.

Samples are matched by tile and piece, for the reference numbers tiles in an order of its own.
"""

from __future__ import annotations

import csv
import functools
import itertools
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from olmoearth_jax.data.convert import Conversion, Settings, convert
from olmoearth_jax.data.convert.run import TILES_FILE
from olmoearth_jax.data.h5 import nominal_tile_px
from olmoearth_jax.data.h5_writer import SETTINGS_FILE, Storage
from olmoearth_jax.data.index import LATLON_FILE, METADATA_FILE

from .common import Case, Checks, Result, load_json, skipped

_FOLDERS: list[tempfile.TemporaryDirectory] = []
"""Converted trees; deleted at exit."""


def cases(folder: Path) -> Iterator[Case]:
    """One case per recorded dataset for its tables, and one per sample of it."""
    try:
        import rasterio  # noqa: F401
    except ImportError:
        yield skipped("geotiff_tree", "rasterio is not installed (extra 'geo')")
        return
    listed = load_json(folder / "h5_sample_map.json")
    dirs = load_json(folder / "manifest.json")["h5_dirs"]
    for key, relative in dirs.items():
        if relative not in listed:
            continue
        reference = folder / relative
        yield Case(f"geotiff_tree/{key}", functools.partial(_tables, folder, reference))
        for record in listed[relative]:
            name = f"h5_sample_map/{key}/{record['sample']}"
            yield Case(name, functools.partial(_sample, folder, reference, record))
    if dirs.get("zstd") in listed and _is_whole(folder / dirs["zstd"], listed[dirs["zstd"]]):
        yield Case("geotiff_tree/unmatched", functools.partial(_unmatched, folder))


def _is_whole(reference: Path, records: Sequence[Any]) -> bool:
    """Whether the tree holds every tile of the reference's dataset, as its name counts them."""
    return len(records) == int(reference.name)


def _settings(folder: Path, reference: Path, output: Path, keep: bool = True) -> Settings:
    """The settings that a recorded dataset was made with, told by its files."""
    stored = load_json(reference / SETTINGS_FILE)
    storage = Storage(
        stored["compression"] or "none", stored["compression_opts"], stored["shuffle"]
    )
    names = tuple(_metadata(reference)[0][1:])
    tile_px = nominal_tile_px(reference)
    assert tile_px is not None
    required = _required(names, reference.parent.name)
    return Settings(folder / "geotiff_tree", output, names, required, tile_px, storage, keep)


def _required(names: Sequence[str], text: str) -> tuple[str, ...]:
    _, _, wanted = text.partition("_required_")
    for count in range(len(names) + 1):
        for chosen in itertools.combinations(sorted(names), count):
            if "_".join(chosen) == wanted:
                return chosen
    raise ValueError(f"cannot tell the required modalities of the golden {text}")


def _metadata(folder: Path) -> list[list[str]]:
    with (folder / METADATA_FILE).open(newline="") as file:
        return list(csv.reader(file))


@functools.lru_cache(maxsize=4)
def _converted(folder: Path, reference: Path, keep: bool = True) -> Conversion:
    temporary = tempfile.TemporaryDirectory()
    _FOLDERS.append(temporary)
    return convert(_settings(folder, reference, Path(temporary.name), keep))


@functools.lru_cache(maxsize=4)
def _numbers(folder: Path) -> dict[tuple[str, ...], int]:
    """Our sample number by (crs, col, row, piece)."""
    with (folder / TILES_FILE).open(newline="") as file:
        return {tuple(row[1:]): int(row[0]) for row in list(csv.reader(file))[1:]}


def _place(record: dict[str, Any]) -> tuple[str, ...]:
    return tuple(str(record[k]) for k in ("crs", "col", "row", "subtile"))


def _tables(folder: Path, reference: Path) -> Result:
    checks = Checks()
    ours = _converted(folder, reference).folder
    settings = (ours / SETTINGS_FILE).read_text(), (reference / SETTINGS_FILE).read_text()
    checks.equal("compression settings", *settings)
    numbers = _numbers(ours)
    records = load_json(folder / "h5_sample_map.json")["/".join(reference.parts[-4:])]
    whole = _is_whole(reference, records)
    checks.equal("folder", ours.parts[-3:-1], reference.parts[-3:-1])
    if whole:
        checks.equal("samples by name", ours.name, reference.name)
        checks.equal("pieces", sorted(map(_place, records)), sorted(numbers))
    mine, theirs = _metadata(ours), _metadata(reference)
    checks.equal("columns", mine[0], theirs[0])
    centres = np.load(ours / LATLON_FILE), np.load(reference / LATLON_FILE)
    checks.equal("centres", [c.dtype for c in centres], [np.dtype(np.float64)] * 2)
    if whole:
        checks.equal("centres", centres[0].shape, centres[1].shape)
    for record in records:
        own, other = numbers[_place(record)], record["sample"]
        checks.equal(f"row {other}", mine[1 + own][1:], theirs[1 + other][1:])
        checks.array(f"centre {other}", centres[0][own], centres[1][other], atol=1e-8)
    return checks.result()


def _sample(folder: Path, reference: Path, record: dict[str, Any]) -> Result:
    checks = Checks()
    ours = _converted(folder, reference).folder
    number = _numbers(ours)[_place(record)]
    with (
        h5py.File(ours / f"sample_{number}.h5") as mine,
        h5py.File(reference / f"sample_{record['sample']}.h5") as theirs,
    ):
        expected, got = _datasets(theirs), _datasets(mine)
        checks.equal("datasets", sorted(got), sorted(expected))
        for name in sorted(set(expected) & set(got)):
            a, b = got[name], expected[name]
            checks.equal(f"{name} dtype", a.dtype, b.dtype)
            checks.equal(f"{name} chunks", a.chunks, b.chunks)
            checks.equal(f"{name} filters", _filters(a), _filters(b))
            # Logarithms and map projections differ in the last bit between libraries.
            rtol = 1e-6 if name in ("sentinel1", "latlon") else 0.0
            checks.array(name, a[()], b[()], rtol=rtol)
    return checks.result("exact; 1e-06 |ref| for dB and degrees")


def _datasets(file: h5py.File) -> dict[str, h5py.Dataset]:
    out: dict[str, h5py.Dataset] = {}

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            out[name] = item

    file.visititems(visit)
    return out


def _filters(dataset: h5py.Dataset) -> list[int]:
    created = dataset.id.get_create_plist()
    return [created.get_filter(i)[0] for i in range(created.get_nfilters())]


def _unmatched(folder: Path) -> Result:
    """Our own rule: a timestep on a date of its own is left out instead of shifting the rest."""
    checks = Checks()
    key = "zstd"
    reference = folder / load_json(folder / "manifest.json")["h5_dirs"][key]
    kept, dropped = (_converted(folder, reference, keep).folder for keep in (True, False))
    changed = 0
    for number in _numbers(kept).values():
        with (
            h5py.File(kept / f"sample_{number}.h5") as a,
            h5py.File(dropped / f"sample_{number}.h5") as b,
        ):
            series, fixed = _datasets(a), _datasets(b)
            checks.equal("datasets", sorted(fixed), sorted(series))
            for name, dataset in series.items():
                if name.startswith("missing_timesteps_masks/"):
                    modality = name.split("/")[1]
                    checks.equal("stored steps", fixed[modality].shape[2], int(dataset[()].sum()))
                    changed += fixed[modality].shape != series[modality].shape
    checks.true("no stray date in the golden", changed)
    return checks.result()
