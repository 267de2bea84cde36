"""Embeds a region for one or many periods into an archive that Zarr, xarray and QGIS tools read.

    python -m launch.embed --model=OlmoEarth-v1_3-Base --pooling=student --patch_size=1 \\
        --inputs=imagery.csv --area=region.geojson --years=2023,2024 --output=/data/region
    python -m launch.embed ...same flags... --shard=3 --of=64       one of 64 workers
    python -m launch.embed ...same flags... --engine=ray --actors=8   a GPU each
    python -m launch.embed ...same flags... --plan_only             sizes and memory, no model
    python -m launch.embed ...same flags... --years=2023,2024,2025 --extend     a later year, too
    python -m launch.embed ...same flags... --extent=zone --area=more.geojson --extend    more area

--inputs is a CSV or JSON list of GeoTIFFs with the columns path, date, modality, bands, and if need
be offset, scale, nodata, resample (refuse, nearest, bilinear) and period; or a folder of them with
--name='{modality}_{date}_{tile}.tif'; or STAC: an item collection, a collection or catalogue with
links to items, a folder of items, a stac-geoparquet file. All but folders may be URLs. Rasters may
overlap and lie in several UTM zones, on pixels of 10 m that are counted from E = N = 0. --area is
GeoJSON, GeoParquet or .gpkg of polygons; by default what the rasters cover. Tokens outside of it
have no embedding.

The same command again goes on where it was stopped. Workers need not know of each other: any number
may be started, in any order, and killed. Read the result with olmoearth_jax.open_archive(OUTPUT),
see it with tools.archive. Exit codes: 0 nothing is left to do here, 1 some shards failed, 2 a
mistake in the flags or inputs, 75 stopped by SIGTERM.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from absl import flags

from olmoearth_jax import commands
from olmoearth_jax.data import work_list, worker_place
from olmoearth_jax.data.durable import AnyFile, modified
from olmoearth_jax.data.progress import duration
from olmoearth_jax.data.remote import output_place
from olmoearth_jax.maps import embed_growth, embed_job, plan, store
from olmoearth_jax.maps.embed_job import Job, Options

from . import _flags, _image_flags

if TYPE_CHECKING:
    from olmoearth_jax.maps.embed_shards import ShardWorker

FLAGS = flags.FlagValues()
"""This program's own flags; other programs have flags of the same names."""


_bool, _enum, _float, _integer, _list, _string = commands.definers(
    FLAGS, "bool enum float integer list string"
)

_image_flags.define_images(FLAGS)
_string("model", None, "Folder or published name.")
_string("output", None, "Folder of the archive, or a URL of s3:// or gs://.")
_string("area", None, "Polygons to embed; default: what the rasters cover.")
_integer("patch_size", 4, "Side of a patch in pixels of 10 m.", lower_bound=1)
_enum("pooling", "spatial", embed_job.POOLINGS, "How patches become embeddings.")
_enum("pooling_type", "mean", ["mean", "max"], "How tokens are pooled.")
_integer("location_size", None, "Pixels per location (v1.3).", lower_bound=1)
_bool("searchlight", False, "Every location in the middle of its own window (v1.3).")
_integer("tile", None, "Side of a tile in pixels, about 80 by default.", lower_bound=1)
_integer("overlap", None, "Pixels that tiles share, about 16 by default.", lower_bound=0)
_integer("block", 256, "Tokens per side that are read at once.", lower_bound=1)
_integer("batch_size", 16, "Tiles per call.", lower_bound=1)
_integer("readers", 1, "Processes that read rasters; 1: a thread of this.", lower_bound=0)
_string("dtype", "int8", "int8, float16 or float32.")
_string("quantization", None, "signed_power, per_pixel_scale or linear.")
_enum("normalize", None, ["l2", "none"], "Follows the quantization by default.")
_float("scale", None, "Of --quantization=linear: value = q * scale + offset.")
_float("offset", None, "Of --quantization=linear.")
_integer("shard_side", None, "Tokens per side of a shard.", lower_bound=1)
_integer("chunk", 64, "Tokens per side of a chunk.", lower_bound=1)
_enum("extent", "region", plan.EXTENTS, "Arrays span the plan, or their whole zone.")
_bool("extend", False, "Append later periods, or area if --extent=zone.")
_integer("shard", None, "Number of this worker, from 0.")
_integer("of", None, "How many workers there are.")
_bool("steal", True, "Take the shards of others when the own ones are done.")
_bool("wait", False, "Wait for shards that others hold.")
_enum("engine", None, ["ray"], "Actors of Ray instead of this process.")
_integer("actors", None, "How many actors; default one.", lower_bound=1)
_float("gpus_per_actor", None, "1 where there are GPUs.", lower_bound=0.0)
_string("ray_address", None, "Of a cluster of Ray ('auto'); default: this machine alone.")
_integer("attempts", 3, "Times that a shard is tried.", lower_bound=1)
_integer("device", None, "Number of the device to use.", lower_bound=0)
_bool("plan_only", False, "Print the plan and stop.")


def options() -> Options:
    """The options of the command line.

    Raises:
      ValueError: a flag that is needed is missing.
    """
    for name in ("model", "inputs", "output"):
        _flags.needed(FLAGS, name)
    given: dict[str, Any] = {f.name: FLAGS[f.name].value for f in dataclasses.fields(Options)}
    return Options(**given)


def describe(job: Job) -> list[str]:
    """What the job will do."""
    layout, rule = job.layout, job.layout.rule
    side, count = layout.lattice.side, len(job.shards)
    itemsize = {"int8": 1, "float16": 2, "float32": 4}[rule.dtype]
    raw = count * layout.dimensions * side**2 * itemsize
    zones = ", ".join(f"{g.name} {g.shape[0]} x {g.shape[1]}" for g in job.grids.values())
    periods = ", ".join(
        f"{p.name} ({len(job.imagery.steps[p.name])} timesteps)" for p in job.imagery.periods
    )
    tokens = f"{side} x {side} tokens of {layout.lattice.token:g} m"
    form = f"{layout.dimensions} bands, {rule.dtype} {rule.method}".strip()
    return [
        f"{count} shards of {tokens}, {form}",
        f"zones: {zones}; periods: {periods}",
        f"at most {raw / 1e9:.2f} GB before compression, "
        f"{count * (side * job.options.pixels // layout.core) ** 2} tiles of {layout.tile} pixels",
        f"memory per worker: the model and at most {embed_job.memory_of(job) / 2**30:.1f} GiB",
        *job.notes,
    ]


def embed(o: Options) -> int:
    """Does this worker's share; the exit code.

    Raises:
      ValueError: flags or inputs that cannot be used.
    """
    try:
        with work_list.stopping():
            return _embed(o)
    except work_list.Stopped:
        _say("stopped; the same command goes on")
        return work_list.STOPPED


def _embed(o: Options) -> int:
    _image_flags.keep_memory_flat()
    index, count = worker_place.place_of(FLAGS.shard, FLAGS.of)
    if not FLAGS.plan_only:
        output_place(o.output)
        store.zarr_library()
    config = embed_job.config_of(o.model)
    if FLAGS.plan_only and config is not None:
        _say(*describe(embed_job.make_job(o, config)))
        return 0
    if config is not None:
        embed_job.layout_of(o, config)  # settings that do not fit are told before weights are read
    if FLAGS.engine == "ray" and not FLAGS.plan_only:
        return _by_ray(o)
    opened = _open(o, _say)
    if opened is None:
        return 0
    work, worker = opened
    with worker:
        found = work.run(
            worker, index, count, steal=FLAGS.steal, wait=FLAGS.wait,
            attempts=FLAGS.attempts, say=_teller(len(work.units)),
        )  # fmt: skip
    return _end(o, found)


def _open(o: Options, say: Callable[..., object]) -> tuple[work_list.WorkList, ShardWorker] | None:
    """Loads the model and opens the job; None after --plan_only."""
    model = _load(o)
    job = embed_job.make_job(o, model.config, model.modalities)
    say(*describe(job))
    if FLAGS.plan_only:
        return None
    if o.check_units:
        told = len(job.imagery.notes)
        job.imagery.check_units()
        for note in job.imagery.notes[told:]:
            say(note)
    if FLAGS.extend:
        embed_growth.extend(job, model)
    work, form = embed_job.open_job(job, model)
    # The job is told by the sizes of its inputs; what keeps its size is told by its time at least.
    changed = job.imagery.changed_since(modified(job.folder / "job.json"))
    if changed:
        say(
            f"warning: {len(changed)} rasters such as {changed[0]} were written after this archive "
            "was begun; if their values are others, take another --output"
        )
    from olmoearth_jax.maps.embed_shards import ShardWorker

    return work, ShardWorker(job, model, form)


def open_in_actor(
    arguments: list[str], say: Callable[..., object]
) -> tuple[work_list.WorkList, Callable[[str], Any]]:
    """The list of work of a command line, and what works on a unit; `say` takes the job's lines.

    Raises:
      ValueError: flags or inputs that cannot be used.
    """
    FLAGS(["embed", *arguments])
    _image_flags.keep_memory_flat()
    opened = _open(options(), say)
    assert opened is not None
    return opened


def _by_ray(o: Options) -> int:
    from . import _ray

    if FLAGS.shard is not None:
        raise ValueError("--shard and --of are of workers; --engine=ray has --actors")
    given = [FLAGS[n].serialize() for n in FLAGS if FLAGS[n].present and n != "engine"]
    module = __spec__.name if __name__ == "__main__" else __name__
    found = _ray.run(
        f"{module}:open_in_actor", given, FLAGS.actors or 1, FLAGS.gpus_per_actor,
        FLAGS.ray_address, FLAGS.attempts, _say,
    )  # fmt: skip
    return _end(o, found)


def _end(o: Options, found: work_list.Outcome) -> int:
    for unit, error in found.failed.items():
        print(f"failed: {unit}: {error}", file=sys.stderr)
    if found.failed:
        _say(
            f"{len(found.failed)} shards failed {FLAGS.attempts} times: mend their inputs and "
            f"start again with --attempts={2 * FLAGS.attempts}"
        )
        return 1
    if found.busy:
        _say(f"nothing left to do here; others work on {len(found.busy)} shards")
    elif FLAGS.steal:
        _index(output_place(o.output))
        _say(f"complete: {o.output}")
    else:
        _say("this worker's own shards are done")
    return 0


def _index(output: AnyFile) -> None:
    """Catalogue and report, made by whoever finds the job complete; readers do not need them."""
    from olmoearth_jax.maps import archive_check

    if not (output / "job" / "report.json").is_file():
        archive_check.write_report(output)

    if (output / "index.parquet").is_file() and (output / "collection.json").is_file():
        return
    try:
        archive_check.write_index(output)
    except ValueError as e:
        _say(f"no catalogue: {e}")


def _teller(total: int) -> Callable[[str, Mapping[str, Any]], None]:
    begun, done = time.monotonic(), 0

    def tell(unit: str, record: Mapping[str, Any]) -> None:
        nonlocal done
        done += 1
        each = (time.monotonic() - begun) / done
        _say(
            f"{unit}: {record['valid']} embeddings in {duration(record['seconds'])} "
            f"(all {total} shards by this worker alone: {duration(each * total)})"
        )

    return tell


def _load(o: Options) -> Any:
    from olmoearth_jax.inference.model import load_pretrained

    _flags.take_device(FLAGS.device)
    model = load_pretrained(o.model)
    model.check_locations(o.pooling, o.patch_size, o.location_size)
    return model


def _say(*lines: str) -> None:
    print("\n".join(lines), flush=True)


def main(rest: list[str]) -> int:
    """The exit code of the program."""
    return _flags.guarded(lambda: embed(options()), rest)


if __name__ == "__main__":
    commands.run(main, FLAGS)
