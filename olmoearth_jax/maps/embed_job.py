"""The job of an archive: what its values depend on, its plan, and what lies on disk of it."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from olmoearth_jax.data import durable, work_list
from olmoearth_jax.data.durable import AnyFile
from olmoearth_jax.data.remote import output_place
from olmoearth_jax.inference import domain, quantize
from olmoearth_jax.inference.model import PretrainedModel
from olmoearth_jax.interop import config_json, weights
from olmoearth_jax.interop.weights import CONFIG_FILE, LICENSE_URL
from olmoearth_jax.maps import area, conventions, plan, stac, store
from olmoearth_jax.maps.imagery import Imagery, list_rasters
from olmoearth_jax.maps.lattice import Grid, Lattice, zone_of
from olmoearth_jax.model.config import ModelConfig, official_model
from olmoearth_jax.model.searchlight import WINDOW_PX
from olmoearth_jax.outputs import SOFTWARE
from olmoearth_jax.proposals import known

POOLINGS = ("spatial", "location", "student")
PIXEL = 10.0
_READER_BYTES = 256 << 20
"""Of a process that reads, beside its blocks."""
DECIDES = (
    "model_digest", "pooling", "pooling_type", "patch_size", "location_size", "tile", "overlap",
    "dtype", "quantization", "normalize", "scale", "offset", "periods", "timesteps", "inputs",
    "bands", "area", "token", "shard_side", "chunk", "extent", "store_version",
)  # fmt: skip
"""Members of job.json that determine values; they make its digest."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What is embedded, and how; the flags of `launch.embed`."""

    model: str
    inputs: str
    output: str
    area: str | None = None
    years: Sequence[str] = ()
    periods: Sequence[str] = ()
    name: str | None = None
    modality: str | None = None
    bands: Sequence[str] = ()
    assets: Sequence[str] = ()
    s2_offset: int | None = None
    step: str = "month"
    check_units: bool = True
    patch_size: int = 4
    pooling: str = "spatial"
    pooling_type: str = "mean"
    location_size: int | None = None
    searchlight: bool = False
    tile: int | None = None
    overlap: int | None = None
    block: int = 256
    batch_size: int = 16
    readers: int = 1
    dtype: str = "int8"
    quantization: str | None = None
    normalize: str | None = None
    scale: float | None = None
    offset: float | None = None
    shard_side: int | None = None
    chunk: int = 64
    extent: str = "region"

    @property
    def pixels(self) -> int:
        """Pixels per side of a token."""
        return self.location_size or self.patch_size


@dataclasses.dataclass(frozen=True)
class Layout:
    """Sizes that follow from the options and the model.

    Attributes:
      dimensions: D.
      widths: Matryoshka widths, descending; none for most.
      tile, overlap: of a tile in pixels.
      rule: of the values.
      lattice: of the shards.
    """

    dimensions: int
    widths: tuple[int, ...]
    tile: int
    overlap: int
    rule: quantize.Rule
    lattice: Lattice

    @property
    def core(self) -> int:
        """Pixels that a tile keeps."""
        return self.tile - self.overlap

    @property
    def halo(self) -> int:
        return self.overlap // 2


def layout_of(o: Options, config: ModelConfig) -> Layout:
    """Sizes and rules of an archive.

    Raises:
      ValueError: sizes or choices that do not go together; the nearest that do are named.
    """
    known("pooling", o.pooling, POOLINGS)
    encoder, widths = config.encoder_config, ()
    pooler = encoder.attention_pooler_config
    least, most = encoder.min_patch_size, encoder.max_patch_size
    if not least <= o.patch_size <= most:
        raise ValueError(f"patch_size must be {least}..{most} for this model, not {o.patch_size}")
    dimensions = encoder.output_embedding_size or encoder.embedding_size
    if o.pooling != "spatial":
        if pooler is None:
            raise ValueError(
                f"pooling {o.pooling!r} needs an attention pooler, which only models of v1.3 "
                "have; take 'spatial'"
            )
        dimensions = pooler.pooler_dim
        if o.pooling == "student":
            if not pooler.student_dims:
                raise ValueError("this model has no student embeddings; take --pooling=location")
            widths = tuple(sorted(pooler.student_dims, reverse=True))
            dimensions = widths[0]
    elif o.searchlight:
        raise ValueError("--searchlight goes with --pooling=student or location")
    elif o.location_size is not None:
        raise ValueError("--location_size goes with --pooling=location or student")
    if o.location_size is not None and o.patch_size % o.location_size:
        raise ValueError(
            f"a location_size of {o.location_size} does not divide the patch size {o.patch_size}"
        )
    rule = quantize.rule_of(o.dtype, o.quantization, o.normalize, o.scale, o.offset,
                            o.pooling == "student")  # fmt: skip
    tile, overlap = _tile_of(o, config)
    itemsize = {"int8": 1, "float16": 2, "float32": 4}[rule.dtype]
    side = o.shard_side or plan.side_of(dimensions, itemsize)
    core = tile - overlap
    if core % o.pixels or core < 1:
        raise ValueError(f"a tile's core of {core} pixels is not whole tokens of {o.pixels}")
    if not o.shard_side:
        # A core that is no power of two needs a multiple of its own.
        fits = math.lcm(o.chunk, core // o.pixels)
        side = max(1, side // fits) * fits
    plan.check_sides(side, o.chunk, core // o.pixels)
    return Layout(dimensions, widths, tile, overlap, rule, Lattice(PIXEL * o.pixels, side))


def _tile_of(o: Options, config: ModelConfig) -> tuple[int, int]:
    """(tile, overlap) in pixels; by default a core that halves down to a patch."""
    patch, most = o.patch_size, 64
    halo = -(-8 // patch) * patch
    if o.searchlight:
        most = 256
        halo = domain.safe_halo(config.encoder_config, patch, WINDOW_PX)
        if o.overlap is not None and o.overlap < 2 * halo:
            raise ValueError(
                f"--searchlight leaves no trace of tiles from an --overlap of {2 * halo} on, not "
                f"{o.overlap}"
            )
    overlap = 2 * halo if o.overlap is None else o.overlap
    core = patch
    while 2 * core <= most:
        core *= 2
    tile = o.tile or overlap + core
    domain.tiles_of(4 * tile, tile, overlap, patch)  # says what does not fit
    return tile, overlap


def config_of(model: str) -> ModelConfig | None:
    """The config of a model that need not be loaded for it; None if it must be."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        path = folder / CONFIG_FILE
        return config_json.read(path) if path.is_file() and not _is_run(folder) else None
    known = weights.published_name(model)
    if known is None:
        return None
    _, version, size = known.split("-")
    try:
        return official_model(size.lower(), version)
    except ValueError:
        return None


def _is_run(folder: Path) -> bool:
    return any((folder / part).is_dir() for part in ("checkpoints", "meta"))


@dataclasses.dataclass(frozen=True)
class Job:
    """An archive to be: everything but the model.

    Attributes:
      options, layout: see there.
      imagery: the rasters.
      zones: zone -> area in its CRS; tokens outside have no embedding.
      shards: the plan.
      grids: zone -> the grid of its arrays.
      area_digest: of the area's outline.
      notes: sentences to print.
    """

    options: Options
    layout: Layout
    imagery: Imagery
    zones: dict[int, Any]
    shards: list[plan.Shard]
    grids: dict[int, Grid]
    area_digest: str
    notes: list[str]

    @functools.cached_property
    def output(self) -> AnyFile:
        """Where the archive lies: a folder, or a URL of an object store."""
        return output_place(self.options.output)

    @property
    def store(self) -> AnyFile:
        return self.output / store.NAME

    @property
    def folder(self) -> AnyFile:
        return self.output / "job"


def make_job(o: Options, config: ModelConfig, names: Sequence[str] | None = None) -> Job:
    """Looks at the inputs and plans the work; nothing is written.

    Args:
      o: the options.
      config: of the model.
      names: modalities that the model takes; None: not known yet.

    Raises:
      ValueError: inputs or settings that cannot be used.
    """
    layout = layout_of(o, config)
    rasters, notes = list_rasters(
        o.inputs, o.name, o.modality, o.bands, stac.Options(o.assets, o.s2_offset)
    )
    imagery = Imagery(rasters, plan.periods_of(o.years, o.periods), o.step)
    if names is not None:
        imagery.keep(names)
    shape = area.read_area(Path(o.area).expanduser()) if o.area else None
    if shape is not None:
        zones = area.by_zone(shape)
        digest = hashlib.sha256(area.shapely_library().to_wkb(shape.normalize())).hexdigest()
    else:
        zones, digest = imagery.area(), ""
    lattice = layout.lattice

    def seen(zone: int, period: plan.Period, box: tuple[float, float, float, float]) -> bool:
        return bool(imagery.touching(zone, period.name, box))

    shards = plan.make(zones, lattice, imagery.periods, seen)
    _check_touched(shape, zones, imagery, shards)
    for zone in zones:
        if all(s.zone != zone for s in shards):
            notes.append(
                f"no raster lies on the lattice of zone {zone}, which holds a part of the area; "
                "resample 'nearest' in the manifest brings others to it"
            )
    grids = plan.grids_of(shards, lattice, o.extent)
    return Job(o, layout, imagery, zones, shards, grids, digest, [*notes, *imagery.notes])


def _check_touched(
    shape: Any, zones: dict[int, Any], imagery: Imagery, shards: list[plan.Shard]
) -> None:
    """Raises ValueError for a period whose rasters show nothing of the area, or cannot be used.

    A shard is large: that a raster and the area touch the same one does not mean that they meet.
    """
    for period in imagery.periods:
        sources = imagery.sources(period.name)
        boxes = [s.lonlat for s in sources]
        met = shape is None or any(shape.intersects(area.of_box(b)) for b in boxes)
        if met and any(s.period == period.name for s in shards):
            continue
        lattices = {s.placed.zone for s in sources}
        if met and not any(s.asks for s in sources) and not lattices & zones.keys():
            there = " and ".join(map(str, sorted(filter(None, lattices))))
            middles = {zone_of((west + east) / 2) for west, _, east, _ in boxes}
            here = " and ".join(map(str, sorted(zones or middles)))
            raise ValueError(
                f"the rasters of the period {period.name} lie on the lattice of zone {there}, but "
                f"their longitudes are of zone {here}: give resample 'nearest' in the manifest"
            )
        held = [f(b[k] for b in boxes) for f, k in ((min, 0), (min, 1), (max, 2), (max, 3))]
        shown = ", ".join(f"{v:.4f}" for v in held)
        wanted = "what they cover"
        if shape is not None:
            wanted = "the area of " + ", ".join(f"{v:.4f}" for v in shape.bounds)
        raise ValueError(
            f"no raster of the period {period.name} touches {wanted}: the rasters reach over "
            f"{shown} (west, south, east, north)"
        )


def members_of(job: Job, model: PretrainedModel) -> dict[str, Any]:
    """What job.json holds."""
    o, layout, rule = job.options, job.layout, job.layout.rule
    return {
        "model_digest": model.digest, "pooling": o.pooling,
        "pooling_type": _kind_of(o),
        "patch_size": o.patch_size, "location_size": o.pixels, "tile": layout.tile,
        "overlap": layout.overlap, "dtype": rule.dtype, "quantization": rule.method,
        "normalize": rule.normalize, "scale": rule.scale, "offset": rule.offset,
        "periods": {p.name: p.days for p in job.imagery.periods}, "timesteps": job.imagery.steps,
        "inputs": {f"{k:06d}": row for k, row in enumerate(job.imagery.rows())},
        "bands": job.imagery.bands, "area": job.area_digest, "token": layout.lattice.token,
        "shard_side": layout.lattice.side, "chunk": o.chunk, "extent": o.extent,
        "store_version": conventions.STORE_VERSION,
        "software": _software(), "model": model.name, "options": _given(o),
    }  # fmt: skip


def _kind_of(o: Options) -> str:
    if o.searchlight:
        return "searchlight"
    return o.pooling_type if o.pooling == "spatial" else ""


def _given(o: Options) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(o).items()}


def _software() -> str:
    return SOFTWARE


def form_of(job: Job, model: PretrainedModel, digest: str) -> store.Form:
    """The form of the store."""
    o, layout = job.options, job.layout
    published = weights.published_name(o.model)
    url = f"https://huggingface.co/{weights.OWNER}/{published}"
    names = list(job.imagery.bands)
    provenance = {
        "model_digest": model.digest, "job_digest": digest, "patch_size": o.patch_size,
        "location_size": o.pixels, "pooling": o.pooling, "normalize": layout.rule.normalize,
        "modalities": names, "dequantize": layout.rule.formula, "license": LICENSE_URL,
    }  # fmt: skip
    if o.searchlight:
        provenance["searchlight"] = True
    elif _kind_of(o) not in ("", "mean"):
        provenance["pooling_type"] = _kind_of(o)
    attrs = conventions.root_attributes(
        layout.rule, layout.dimensions, layout.lattice.token,
        url if published else f"urn:sha256:{model.digest}", names, _software(), layout.widths,
        provenance,
    )  # fmt: skip
    bands = store.band_chunk(layout.dimensions, layout.widths)
    return store.Form(layout.dimensions, layout.rule, job.imagery.periods, layout.lattice.side,
                      o.chunk, bands, attrs)  # fmt: skip


def open_job(job: Job, model: PretrainedModel) -> tuple[work_list.WorkList, store.Form]:
    """Writes what describes the job, unless it is there; its work list and the store's form.

    Raises:
      ValueError: the output holds another job; the members that differ are named.
      OSError: it cannot be written.
    """
    members, path = members_of(job, model), job.folder / "job.json"
    digest = work_list.digest_of({name: members[name] for name in DECIDES})
    if not path.is_file() and store.digest_there(job.store) not in (None, digest):
        raise ValueError(
            f"{job.store} holds the embeddings of another job, whose folder {job.folder} is gone: "
            "give another --output"
        )
    work_list.open_job(path, members, DECIDES)
    if job.options.extent == "zone":
        keep_outline(job, digest)
    earlier = _earlier(path)
    form = form_of(job, model, digest)
    lines, path = plan_lines(job), job.folder / "plan.jsonl"
    if not path.is_file() or path.read_text(encoding="utf-8") != lines:
        durable.write_durably(path, lines)
    store.make_store(job.store, form, job.grids)
    units = [s.id for s in job.shards]
    return _list_of(job.output, digest, units, earlier), form


def _list_of(
    output: AnyFile, digest: str, units: Sequence[str], earlier: Sequence[str]
) -> work_list.WorkList[Any]:
    place: Any = output  # both of its folders are of one kind
    return work_list.WorkList(place / "job", place / store.NAME, digest, units, earlier)


def outline_path(folder: AnyFile, digest: str) -> AnyFile:
    """The file that holds the area of a job, for archives whose area may grow."""
    return folder / f"area_{digest[:16]}.json"


def keep_outline(job: Job, digest: str) -> None:
    """Writes the area of a job: zone -> hexadecimal WKB of its part in the zone's CRS."""
    to_wkb = area.shapely_library().to_wkb
    held = {str(zone): to_wkb(shape, hex=True) for zone, shape in job.zones.items()}
    path = outline_path(job.folder, digest)
    if not path.is_file():
        durable.write_durably(path, json.dumps(held) + "\n")


def plan_lines(job: Job) -> str:
    """The content of plan.jsonl."""
    return "".join(json.dumps({"id": s.id}) + "\n" for s in job.shards)


def read_plan(output: AnyFile) -> work_list.WorkList:
    """The work list of an archive that was begun.

    Raises:
      ValueError: there is none, or its plan is damaged.
    """
    held = durable.read_json(output / "job" / "job.json")
    path = output / "job" / "plan.jsonl"
    if held is None or not path.is_file():
        raise ValueError(f"{output} is no archive that launch.embed made: it has no job folder")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        units = [plan.shard_of(json.loads(line)["id"]).id for line in lines]
    except (ValueError, KeyError, TypeError) as e:
        told = f"there is no {e}" if isinstance(e, KeyError) else e
        raise ValueError(f"{path} is damaged: {told}") from None
    digest, earlier = str(held.get("job_digest")), _earlier(output / "job" / "job.json")
    return _list_of(output, digest, units, earlier)


def _earlier(path: AnyFile) -> list[str]:
    """The digests of the jobs that the one of a job.json grew from.

    Raises:
      ValueError: it is damaged.
    """
    held = (durable.read_json(path) or {}).get("extends", [])
    if not isinstance(held, list) or not all(isinstance(d, str) for d in held):
        raise ValueError(f"{path} is damaged: its extends are no list of digests")
    return held


def memory_of(job: Job) -> int:
    """Bytes of host memory that a worker needs beside the model's weights, at most."""
    o, layout = job.options, job.layout
    side = layout.lattice.side
    raw = layout.dimensions * side**2 * {"int8": 1, "float16": 2, "float32": 4}[layout.rule.dtype]
    steps = max(len(s) for s in job.imagery.steps.values()) or 1
    bands = sum(len(b) for b in job.imagery.bands.values())
    block = (min(o.block, side) * o.pixels + 2 * layout.halo) ** 2 * steps * bands * 4
    readers = o.readers if o.readers > 1 else 0
    return int(1.5 * 2**30 + 2.6 * raw + 3 * block + readers * (_READER_BYTES + 4 * block))
