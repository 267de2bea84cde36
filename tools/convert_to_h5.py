"""Converts a tree of GeoTIFFs and CSVs to the sample files that training reads.

  python -m tools.convert_to_h5 --tile_path=TREE [--tile_size=128] [--compression=zstd] ...

Run the same command again after an interruption, or on other machines at the same time (--shard,
--of): they share the work. Tiles that make no sample are listed with the reason in dropped.csv.
Prints the dataset's folder last.
docs/data.md describes the tree.
"""

from __future__ import annotations

import logging
from pathlib import Path

from absl import flags

from olmoearth_jax import commands
from olmoearth_jax import modalities as registry
from olmoearth_jax.data.convert import Conversion, Settings, convert
from olmoearth_jax.data.convert.settings import GRIDS, OVER
from olmoearth_jax.data.h5_writer import COMPRESSIONS, Storage
from olmoearth_jax.data.pool import WorkerDied, default_workers
from olmoearth_jax.modalities import MAX_TIMESTEPS

from . import _workers

_SHOWN = 20
"""Notes that are printed; all of them are in the dataset's notes.csv."""


def _define_flags() -> None:
    flags.DEFINE_string("tile_path", None, "Folder of the GeoTIFFs and CSVs.", required=True)
    flags.DEFINE_string("output_dir", None, "Folder for the dataset; default: --tile_path.")
    flags.DEFINE_list(
        "supported_modality_names", [], "Modalities to convert; default: all with a CSV."
    )
    flags.DEFINE_list("required_modality_names", [], "Drop tiles that lack one of these.")
    flags.DEFINE_integer("tile_size", 128, "Side of a sample in 10 m pixels; divides 256.")
    flags.DEFINE_enum("compression", "zstd", COMPRESSIONS, "How arrays are compressed.")
    flags.DEFINE_integer(
        "compression_opts", None, "Level of gzip or zstd; default 3 for zstd, 4 for gzip."
    )
    flags.DEFINE_bool("shuffle", None, "Shuffle bytes before compression (gzip only).")
    flags.DEFINE_integer("chunk_hw", None, "Side of chunks in pixels; default: whole arrays.")
    flags.DEFINE_integer("chunk_t", None, "Timesteps per chunk; default: all.")
    flags.DEFINE_bool(
        "keep_unmatched_timesteps",
        False,
        "Keep timesteps on dates that the longest series lacks, as the reference does.",
    )
    flags.DEFINE_integer(
        "min_timesteps",
        MAX_TIMESTEPS,
        "Drop tiles whose longest series has fewer; readers pad what is missing.",
        lower_bound=1,
        upper_bound=MAX_TIMESTEPS,
    )
    flags.DEFINE_enum(
        "over",
        "refuse",
        OVER,
        f"Tiles of more than {MAX_TIMESTEPS} timesteps: drop them, or select per calendar month "
        "the date nearest its middle.",
    )
    flags.DEFINE_string(
        "name",
        "",
        "Form of the names of GeoTIFFs, such as {modality}_{date}_{tile}.tif, where --tile_path is "
        "a folder of them without CSVs.",
    )
    flags.DEFINE_enum(
        "grid",
        "tile",
        GRIDS,
        "How such files are cut: at multiples of the tile size in their CRS, or from their corner.",
    )
    flags.DEFINE_bool("skip_unreadable", False, "Drop tiles with unreadable files and go on.")
    flags.DEFINE_bool("check_units", True, "Stop at values that cannot be, or in another unit.")
    flags.DEFINE_string("modality_file", None, "JSON file of further modality records.")
    flags.DEFINE_integer("num_workers", None, "Worker processes; default: cores less reserved.")
    flags.DEFINE_integer("reserved_cores", 1, "Cores to leave free.", lower_bound=0)
    _workers.define_flags()
    flags.adopt_module_key_flags(_workers)


def run(given: flags.FlagValues) -> Conversion:
    """The conversion of a command line.

    Raises:
      ValueError, OSError, OthersAtWork, WorkerDied: as `convert`.
    """
    if given.modality_file:
        registry.register_file(given.modality_file)
    level = given.compression_opts
    if level is None and given.compression in ("zstd", "gzip"):
        level = 3 if given.compression == "zstd" else 4
    tree = Path(given.tile_path)
    settings = Settings(
        tree=tree,
        output_dir=Path(given.output_dir or tree),
        modalities=registry.resolve(given.supported_modality_names),
        required=registry.resolve(given.required_modality_names),
        tile_px=given.tile_size,
        storage=Storage(given.compression, level, given.shuffle, given.chunk_hw, given.chunk_t),
        keep_unmatched=given.keep_unmatched_timesteps,
        min_timesteps=given.min_timesteps,
        over=given.over,
        name=given.name,
        grid=given.grid,
    )
    workers = given.num_workers
    if workers is None:
        workers = default_workers(given.reserved_cores)
    return convert(
        settings,
        workers,
        commands.say,
        given.skip_unreadable,
        given.check_units,
        _workers.place(given),
    )


def main() -> None:
    logging.getLogger("rasterio").setLevel(logging.CRITICAL)  # errors name the file themselves
    try:
        done = run(flags.FLAGS)
    except ImportError as e:
        raise ValueError(f"{e}; install the extra 'geo' (rasterio)") from None
    for tile, reason in done.dropped.items():
        print(f"dropped {tile}: {reason}")
    for tile, name, reason in done.removed:
        print(f"left out {name} of {tile}: {reason}")
    for tile, name, text in done.notes[:_SHOWN]:
        print(f"{name} of {tile} {text}")
    if len(done.notes) > _SHOWN:
        print(f"{len(done.notes) - _SHOWN} more such notes are in notes.csv")
    print(f"{done.samples} samples ({done.written} written now), {len(done.dropped)} tiles dropped")
    print(done.folder)


if __name__ == "__main__":
    _define_flags()
    commands.run_alone(lambda: _workers.share(main), refusals=(ValueError, OSError, WorkerDied))
