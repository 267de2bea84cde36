"""Looks into an archive of embeddings: how far it is, what it shows, and what is alike in it.

    python -m tools.archive status  DIR               how far it is; exit code 0 complete, 3 not yet
    python -m tools.archive verify  DIR               every object against its marker
    python -m tools.archive index   DIR               index.parquet and collection.json (STAC) in it
    python -m tools.archive preview DIR               colours: preview.zarr and preview/*.tif in it
    python -m tools.archive export  DIR --bbox=-58,-25,-57.9,-24.9 --year=2024 --width=64 \\
        --output=small.tif
    python -m tools.archive sample  DIR --points=plots.geojson --years=2023,2024 \\
        --output=plots.parquet
    python -m tools.archive search  DIR --point=-57.5,-24.2 --year=2024 --output=similar
    python -m tools.archive search  DIR --area=field.geojson --year=2024 --output=similar
    python -m tools.archive cluster DIR --year=2024 --k=12 --output=clusters.tif
    python -m tools.archive change  DIR --years=2023,2024 --output=change.tif

DIR is the folder that launch.embed wrote. Maps are GeoTIFFs (COG) on the native grid, one file per
UTM zone. An archive that is not complete is used as far as it is, and the missing shards counted.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from absl import logging as absl_logging

from olmoearth_jax import commands, outputs
from olmoearth_jax.data.durable import AnyFile
from olmoearth_jax.data.remote import place_of
from olmoearth_jax.maps import archive as archives
from olmoearth_jax.maps import archive_check, cogs, extract
from olmoearth_jax.modalities import closest

FLAGS = flags.FlagValues()
"""This program's own flags; other programs have flags of the same names."""

_bool, _enum, _float, _integer, _list, _string = commands.definers(
    FLAGS, "bool enum float integer list string"
)

_string("output", None, "File to write.")
_string("year", None, "Year or period; may be left out if there is one.")
_list("years", [], "Years or periods.")
_list("bbox", None, "West, south, east, north in degrees.")
_list("point", [], "Longitude and latitude of one place, or of several in a row.")
_string("points", None, "GeoJSON of points, or CSV with lon and lat.")
_string("area", None, "Polygon that shows what to look for.")
_integer("width", None, "Use the first bands only.", lower_bound=1)
_enum("dtype", "stored", extract.DTYPES, "Type of exported values.")
_integer("top", 100, "How many places.", lower_bound=1)
_float("min_distance", 200.0, "Metres between them.", lower_bound=0)
_integer("k", 12, "How many clusters.")
_integer("seed", 0, "Of the clusters.")
_bool("complete", False, "Refuse an archive that is not complete.")
_bool("overwrite", False, "Replace files that are not of this program.")

_UNFINISHED = 3
"""Exit code of `status` while shards are missing."""


def _status(folder: AnyFile) -> int:
    lines, complete = archive_check.status(folder)
    print("\n".join(lines))
    return 0 if complete else _UNFINISHED


def _verify(folder: AnyFile) -> int:
    lines, well = archive_check.verify(folder)
    print("\n".join(lines))
    return 0 if well else 1


def _index(folder: AnyFile) -> int:
    return _written(archive_check.write_index(folder))


def _preview(folder: AnyFile) -> int:
    from olmoearth_jax.maps import preview

    if not isinstance(folder, Path):
        raise ValueError(f"preview writes maps beside the archive: copy {folder} to this machine")

    def tell(unit: str, record: Mapping[str, Any]) -> None:
        print(f"{unit}: {record['valid']} embeddings", flush=True)

    made, found = preview.write(_open(folder), folder, tell)
    for unit, error in found.failed.items():
        print(f"failed: {unit}: {error}", file=sys.stderr)
    if found.busy:
        print(f"others work on {len(found.busy)} shards; start again for the maps")
    _written(made)
    return 1 if found.failed else 0


def _export(folder: AnyFile) -> int:
    archive, output = _opened(folder, (".tif", ".tiff"))
    box = None if FLAGS.bbox is None else _numbers("bbox", FLAGS.bbox, 4)
    made = extract.export(archive, box, _period(archive), output, FLAGS.width, FLAGS.dtype)
    return _written(made)


def _sample(folder: AnyFile) -> int:
    archive, output = _opened(folder, (".parquet",))
    if not FLAGS.points:
        raise ValueError("give --points")
    periods = FLAGS.years or ([FLAGS.year] if FLAGS.year else [])
    valid, rows = extract.sample(archive, Path(FLAGS.points), periods, output, FLAGS.width)
    print(f"{valid} of {rows} rows have an embedding")
    return _written([output])


def _search(folder: AnyFile) -> int:
    archive, output = _opened(folder, ())
    period = _period(archive)
    if bool(FLAGS.point) == bool(FLAGS.area):
        raise ValueError("give --point=LON,LAT or --area=FILE (one of them)")
    places = None
    if FLAGS.point:
        if len(FLAGS.point) % 2:
            raise ValueError("--point is LON,LAT, or several such pairs in a row")
        flat = _numbers("point", FLAGS.point, len(FLAGS.point))
        places = [flat[k : k + 2] for k in range(0, len(flat), 2)]
    area = Path(FLAGS.area) if FLAGS.area else None
    made = extract.search(
        archive, places, area, period, output, FLAGS.width, FLAGS.top, FLAGS.min_distance
    )
    return _written(made)


def _cluster(folder: AnyFile) -> int:
    from olmoearth_jax.maps import compare

    archive, output = _opened(folder, (".tif", ".tiff"))
    period = _period(archive)
    return _written(compare.cluster(archive, period, output, FLAGS.k, FLAGS.seed, FLAGS.width))


def _change(folder: AnyFile) -> int:
    from olmoearth_jax.maps import compare

    archive, output = _opened(folder, (".tif", ".tiff"))
    return _written(compare.change(archive, FLAGS.years, output, FLAGS.width))


VERBS: dict[str, Callable[[AnyFile], int]] = {
    "status": _status, "verify": _verify, "index": _index, "preview": _preview, "export": _export,
    "sample": _sample, "search": _search, "cluster": _cluster, "change": _change,
}  # fmt: skip

_FILE = ("output", "overwrite", "complete")
USES: dict[str, tuple[str, ...]] = {
    "status": (), "verify": (), "index": (), "preview": ("complete",),
    "export": ("year", "bbox", "width", "dtype", *_FILE),
    "sample": ("points", "year", "years", "width", *_FILE),
    "search": ("point", "area", "year", "width", "top", "min_distance", *_FILE),
    "cluster": ("year", "k", "seed", "width", *_FILE),
    "change": ("years", "width", *_FILE),
}  # fmt: skip
"""The flags that each verb goes by."""
_ALL = {name for names in USES.values() for name in names}


def _open(folder: AnyFile) -> archives.Archive:
    """The archive; says how many shards are missing.

    Raises:
      ValueError: there is none, or it is not complete and must be.
    """
    archive, left = archives.open_archive(str(folder)), archive_check.missing(folder)
    if left and FLAGS.complete:
        raise ValueError(f"{folder} is not complete: {left} shards are missing")
    if left:
        print(f"warning: {left} shards are missing; they are nodata here", file=sys.stderr)
    if FLAGS.width and archive.widths and FLAGS.width not in archive.widths:
        known = ", ".join(map(str, archive.widths))
        print(f"warning: the model was trained for the widths {known}, not {FLAGS.width}",
              file=sys.stderr)  # fmt: skip
    return archive


def _period(archive: archives.Archive) -> Any:
    if FLAGS.year is None and len(archive.periods) > 1:
        raise ValueError(f"give --year, one of {', '.join(map(str, archive.periods))}")
    return archive.periods[archive.step_of(FLAGS.year) if FLAGS.year else 0]


def _opened(folder: AnyFile, suffixes: tuple[str, ...]) -> tuple[archives.Archive, Path]:
    """The archive, and --output, which must end so; nothing of a user's lies in its place."""
    archive = _open(folder)
    if not FLAGS.output:
        raise ValueError("give --output")
    path = Path(FLAGS.output).expanduser()
    if suffixes and path.suffix not in suffixes:
        raise ValueError(f"--output must end in {' or '.join(suffixes)}")
    first = path if suffixes else path.with_name(f"{path.name}.tif")
    made = (
        {first} if ".parquet" in suffixes else {first, *cogs.named(first, archive.zones).values()}
    )
    if not suffixes:
        made.add(path.with_name(f"{path.name}.geojson"))
    inputs = [Path(given).expanduser() for given in (FLAGS.points, FLAGS.area) if given]
    for file in sorted(made):
        outputs.check(file, inputs, FLAGS.overwrite)
    return archive, path


def _check_flags(verb: str) -> None:
    """Raises ValueError for a flag that a verb has no use for."""
    for name in FLAGS:
        if FLAGS[name].present and name in _ALL and name not in USES[verb]:
            known = ", ".join(f"--{n}" for n in USES[verb]) or "no flags"
            raise ValueError(f"--{name} does not go with {verb}, which takes {known}")


def _numbers(flag: str, texts: list[str], count: int) -> list[float]:
    try:
        out = [float(t) for t in texts]
    except ValueError:
        out = []
    if len(out) != count:
        raise ValueError(f"--{flag} takes {count} numbers separated by commas")
    return out


def _written(paths: Sequence[AnyFile]) -> int:
    for path in paths:
        print(f"written: {path}")
    return 0


def main(argv: list[str]) -> int:
    """The exit code of the program."""
    absl_logging.set_verbosity(absl_logging.ERROR)
    try:
        given = argv[1:]
        if not given or given[0] not in VERBS:
            told = closest(given[0], VERBS) if given else f"known: {', '.join(VERBS)}"
            raise ValueError(f"say what to do, as in `tools.archive status DIR`; {told}")
        if len(given) != 2:
            raise ValueError(f"give the folder of one archive: tools.archive {given[0]} DIR")
        _check_flags(given[0])
        return VERBS[given[0]](place_of(given[1]))
    except (ValueError, OSError, json.JSONDecodeError) as e:
        print(f"error: {e}", file=sys.stderr, flush=True)
        return commands.USER_ERROR


if __name__ == "__main__":
    commands.run(main, FLAGS)
