"""Embeds rasters, arrays or H5 samples with a pretrained model, into files.

    python -m tools.embed --model=OlmoEarth-v1_2-Nano --input=s2.tif --dates=2024-06-15 \\
        --output=map.tif --patch_size=4
    python -m tools.embed --model=models/nano --input=images.json --output=map.tif --dtype=int8
    python -m tools.embed --model=local_output/run --input=h5_folder --output=embeddings.npz

--input is one of
  * GeoTIFFs on one grid, separated by commas. Bands are named by the rasters' descriptions or by
    --bands, dates come from --dates, the modality from the band names or --modality. The bands of
    an image may be spread over files; a file may hold several timesteps;
  * a manifest of GeoTIFFs: JSON, a list of {"path", "date", "modality", "bands"}, or CSV with these
    columns (bands separated by spaces). All but path may be left out as above; scale, offset and
    nodata replace what the file says. Rasters of the same date are one timestep; give every
    modality of a month the same date, such as 2024-06;
  * a folder of GeoTIFFs with --name='{modality}_{date}_{tile}.tif', the form of their names;
  * a folder of H5 samples, or one .h5 file;
  * an .npz file with arrays as `Sample.from_arrays` takes them, by modality, with the integers
    `timestamps` or texts `dates`, and `bands_<modality>` where bands are not in the models' order.

Rasters of one band and date are put together: the first valid value counts. Rasters become a Cloud
Optimized GeoTIFF on the token grid, with a STAC item of the same name; the rest an .npz or
.safetensors file with `embeddings`, `valid` and the samples' `ids`.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

import olmoearth_jax
from olmoearth_jax import Sample, commands, modalities, outputs
from olmoearth_jax.data import npy_file, timesteps, values
from olmoearth_jax.data.h5 import open_sample
from olmoearth_jax.data.progress import Progress
from olmoearth_jax.data.raster_units import check_files
from olmoearth_jax.data.rasters import (
    Raster,
    Stack,
    Window,
    read_folder,
    read_manifest,
    scaled,
    spread_bands,
)
from olmoearth_jax.files import replacing
from olmoearth_jax.inference import domain, quantize
from olmoearth_jax.inference.model import POOLINGS, PretrainedModel, load_pretrained
from olmoearth_jax.inference.sample import NAN_PIXELS
from olmoearth_jax.interop.weights import LICENSE_URL
from olmoearth_jax.maps import cogs
from olmoearth_jax.model.searchlight import WINDOW_PX
from olmoearth_jax.proposals import known

_OVERVIEW = 256  # pixels per side that the units are judged by


@dataclasses.dataclass(frozen=True)
class Options:
    """The flags, see `define_flags`."""

    model: str
    input: Sequence[str]
    output: str
    patch_size: int = 4
    pooling: str = "spatial"
    pooling_type: str = "mean"
    location_size: int | None = None
    dtype: str = "float32"
    quantization: str = "linear"
    tile: int | None = None
    overlap: int | None = None
    searchlight: bool = False
    batch_size: int = 16
    bands: Sequence[str] | None = None
    modality: str | None = None
    dates: Sequence[str] | None = None
    name: str | None = None
    nan_pixels: str = "mask"
    check_units: bool = True
    any_pixel_size: bool = False
    over: str = "refuse"
    overwrite: bool = False

    @property
    def step(self) -> int:
        """Pixels per embedding."""
        return self.location_size or self.patch_size


def define_flags() -> None:
    """Defines one flag for each member of `Options`."""
    flags.DEFINE_string("model", None, "Folder or published name.", required=True)
    flags.DEFINE_list("input", None, "What to embed, see above.", required=True)
    flags.DEFINE_string("output", None, "File to write.", required=True)
    flags.DEFINE_integer("patch_size", 4, "Side of a patch in pixels of 10 m.", lower_bound=1)
    flags.DEFINE_string("pooling", "spatial", f"One of {', '.join(POOLINGS)}.")
    flags.DEFINE_enum("pooling_type", "mean", ["mean", "max"], "How tokens are pooled.")
    flags.DEFINE_integer("location_size", None, "Pixels per location (v1.3).", lower_bound=1)
    flags.DEFINE_enum("dtype", "float32", ["float32", "int8"], "Type of the file's values.")
    flags.DEFINE_enum("quantization", "linear", quantize.QUANTIZATIONS,
                      "Rule of int8: 'linear' (scale and offset per band) or 'power' (s = q / "
                      "127.5, x = s * |s|, which clips beyond 1).")  # fmt: skip
    flags.DEFINE_integer("tile", None, "Side of a tile in pixels, about 64 by default.",
                         lower_bound=1)  # fmt: skip
    flags.DEFINE_integer("overlap", None, "Pixels that tiles share, about 16 by default.",
                         lower_bound=0)  # fmt: skip
    flags.DEFINE_bool("searchlight", False,
                      "Let every location see its own window, without seams (v1.3).")  # fmt: skip
    flags.DEFINE_integer("batch_size", 16, "Tiles or samples per call.", lower_bound=1)
    flags.DEFINE_list("bands", None, "Names of a raster's bands, in its order.")
    flags.DEFINE_string("modality", None, "Modality of the rasters.")
    flags.DEFINE_list("dates", None, "Date of each raster, or of each timestep of each.")
    flags.DEFINE_bool("overwrite", False, "Replace a file that is not of this program.")
    flags.DEFINE_string("name", None, "Form of the names of a folder's rasters, with the fields "
                        "{modality}, {date}, {band} and others.")  # fmt: skip
    flags.DEFINE_enum("nan_pixels", "mask", NAN_PIXELS, "What single missing pixels do.")
    flags.DEFINE_bool("check_units", True, "Stop at values that look like another unit.")
    flags.DEFINE_bool("any_pixel_size", False, "Take pixels of another size than 10 m.")
    most = modalities.MAX_TIMESTEPS
    flags.DEFINE_enum("over", "refuse", ["refuse", "select"],
                      f"Rasters of more than {most} dates: refuse them, or select per calendar "
                      "month the date nearest its middle.")  # fmt: skip


def _tags_of(o: Options, model: PretrainedModel, names: Sequence[str]) -> dict[str, str]:
    """What a reader of the file must know about its values."""
    names = [n for n in names if n in model.modalities]
    ranges = {n: [list(map(float, r)) for r in model.ranges[n]] for n in names}
    return {
        "MODEL": model.name,
        "MODEL_VERSION": model.version,
        "MODEL_DIGEST": model.digest,
        "MODALITIES": ",".join(names),
        "NORMALIZATION": json.dumps({"raw values that become 0 and 1": ranges}),
        "PATCH_SIZE": str(o.patch_size),
        "LOCATION_SIZE": str(o.step),
        "POOLING": o.pooling,
        "POOLING_TYPE": o.pooling_type,
        "SEARCHLIGHT": str(o.searchlight).lower(),
        "SOFTWARE": f"olmoearth-jax {olmoearth_jax.__version__}",
        "LICENSE": LICENSE_URL,
    }


def embed(
    o: Options, model: PretrainedModel, samples: Sequence[Sample]
) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings of samples of equal size, and which of them show any data.

    Returns:
      float32 [B, ...] (0 without data; of width 0 if no sample has any) and bool [B], or
      [B, h, w] where there is a grid.
    """
    grid, patch, size = o.pooling != "instance", o.patch_size, o.location_size
    ready = model.prepare(samples, patch)
    visible = ready.visible
    rows = np.flatnonzero(visible.any((1, 2)))
    factor = patch // size if size else 1
    valid: Any = visible.repeat(factor, 1).repeat(factor, 2) if grid else visible.any((1, 2))
    if not len(rows):
        return np.zeros((*valid.shape, 0), np.float32), valid
    if o.searchlight:
        parts = (ready.rows([i]) for i in rows)
        got = np.stack([model.embed_domain(p, patch, size, o.pooling) for p in parts])
    else:
        got = model.embed(ready.rows(rows), patch, o.pooling, o.pooling_type, location_size=size)
    out = np.zeros((len(samples), *got.shape[1:]), np.float32)
    out[rows] = got
    return out.reshape(*valid.shape, -1), valid


def _tile_sizes(o: Options, model: PretrainedModel) -> tuple[int, int]:
    """(tile, overlap) in pixels, as given or by default whole patches."""
    patch = o.patch_size
    halo, core = -(-8 // patch) * patch, -(-48 // patch) * patch
    if o.searchlight:
        halo = domain.safe_halo(model.config.encoder_config, patch, WINDOW_PX)
        core = -(-256 // patch) * patch
    overlap = 2 * halo if o.overlap is None else o.overlap
    return o.tile or overlap + core, overlap


def _sample_of(o: Options, stack: Stack, window: Window, check: bool = False) -> Sample:
    """The sample of a window of a stack; with `check`, units are looked at."""
    return Sample.from_arrays(
        window.arrays, stack.dates or None, bands=window.bands, nan_pixels=o.nan_pixels,
        check_units=check,
    )  # fmt: skip


def check_values(o: Options, stack: Stack) -> None:
    """Looks at the values of the whole area, thinned out.

    Raises:
      ValueError: see `Sample.from_arrays`.
    """
    height, width = stack.shape
    thinned = stack.read(slice(0, height), slice(0, width), _OVERVIEW)
    check_files(stack, thinned)
    try:
        _sample_of(dataclasses.replace(o, nan_pixels="mask"), stack, thinned, check=True)
    except ValueError as e:
        raise ValueError(values.for_rasters(str(e))) from None


def _embed_rasters(o: Options, model: PretrainedModel, stack: Stack, output: Path) -> list[str]:
    """Writes the map of a stack of rasters; returns the lines to print."""
    patch, step = o.patch_size, o.step
    whole = [side // patch * patch for side in stack.shape]
    if not all(whole):
        raise ValueError(f"rasters of {stack.shape} pixels are smaller than a patch of {patch}")
    tile, overlap = _tile_sizes(o, model)
    rows, cols = (domain.tiles_of(side, tile, overlap, patch) for side in whole)
    if o.check_units:
        check_values(o, stack)
    progress = Progress(len(rows) * len(cols), "tiles", _say)

    def results() -> Iterator[tuple[domain.Crop, domain.Crop, np.ndarray, np.ndarray]]:
        places = iter([(row, col) for row in rows for col in cols])
        while part := list(itertools.islice(places, o.batch_size)):
            samples = [
                _sample_of(o, stack, stack.read(slice(y.start, y.stop), slice(x.start, x.stop)))
                for y, x in part
            ]
            for (row, col), x, seen in zip(part, *embed(o, model, samples), strict=True):
                if seen.any():
                    yield row, col, x, seen
            progress.step(len(part))

    found = results()
    first = next(found, None)
    if first is None:
        raise ValueError("the rasters hold no data that the model takes")
    # The map covers all pixels; where they are no whole patch it has no data.
    shape = [-(-side // step) for side in stack.shape]
    tags = _tags_of(o, model, stack.names) | {"DATES": ",".join(stack.dates)}
    names = [f"e{i:03d}" for i in range(first[2].shape[-1])]
    form = {
        "height": shape[0], "width": shape[1], "dtype": o.dtype, "crs": stack.crs,
        "transform": scaled(stack.transform, step),
    }  # fmt: skip
    with cogs.open_map(output, form, names, tags, stack.dates, o.quantization) as writer:
        for row, col, x, seen in itertools.chain([first], found):
            inner = row.inner(step), col.inner(step)
            writer.write(row.kept(step).start, col.kept(step).start, x[inner], seen[inner])
    left = [side - w for side, w in zip(stack.shape, whole, strict=True)]
    notes = list(stack.notes)
    if any(left):
        notes.append(
            f"no embedding for {left[0]} pixels at the bottom and {left[1]} pixels at the right, "
            f"which make no whole patch of {patch}"
        )
    written = f"written: {output} ({shape[0]} x {shape[1]}), {output.with_suffix('.json')}"
    return [written, *notes]


def _h5_files(folder: Path) -> list[Path]:
    """The sample files of a folder, in the order of their numbers."""
    found = (p for p in folder.glob("*.h5") if not p.name.startswith("."))
    return sorted(found, key=lambda p: (len(p.name), p.name))


def _h5_samples(o: Options, names: Sequence[str], source: Path) -> Iterator[tuple[str, Sample]]:
    """(id, sample) of every H5 file of a folder, or of one file.

    Raises:
      ValueError: there is none, or one cannot be read.
    """
    files = [source] if source.is_file() else _h5_files(source)
    for path in files:
        with open_sample(path, names) as file:
            axis = timesteps.time_axis(file.header.timestamps, file.header.masks)
            arrays = {}
            for name in file.header.shapes:
                x = file.read(name)
                if modalities.get(name).multitemporal:
                    mask = file.header.masks.get(name, np.ones(len(file.header.timestamps), bool))
                    x = timesteps.scatter(x, mask, len(mask))
                    x = x[..., axis.first : axis.first + axis.length, :]
                arrays[name] = x
        try:
            yield path.stem, Sample.from_arrays(
                arrays, timestamps=axis.timestamps[: axis.length], nan_pixels=o.nan_pixels,
                bands={n: modalities.get(n).bands for n in arrays}, check_units=o.check_units,
            )  # fmt: skip
        except ValueError as e:
            raise ValueError(f"{path}: {e}") from None


def _array_samples(o: Options, source: Path) -> Iterator[tuple[str, Sample]]:
    """(row number, sample) of every sample of an .npz file of arrays.

    Raises:
      ValueError: it cannot be read, or its arrays are not those of a sample.
    """
    try:
        held = npy_file.read(source)
        if not isinstance(held, dict):
            raise ValueError("it holds a single array")
    except (OSError, ValueError) as e:
        raise ValueError(f"{source} cannot be read as an .npz file of arrays: {e}") from None
    names = [k for k in held if k not in ("dates", "timestamps") and not k.startswith("bands_")]
    own = {n: modalities.get(n).bands for n in names}
    sample = Sample.from_arrays(
        {n: held[n] for n in names}, held.get("dates"), timestamps=held.get("timestamps"),
        bands={n: held[f"bands_{n}"].tolist() if f"bands_{n}" in held else own[n] for n in own},
        nan_pixels=o.nan_pixels, check_units=o.check_units,
    )  # fmt: skip
    for row in range(sample.batch_size):
        yield str(row), sample.rows(row, row + 1)


def _embed_samples(
    o: Options,
    model: PretrainedModel,
    samples: Iterable[tuple[str, Sample]],
    output: Path,
    total: int = 0,
) -> list[str]:
    """Writes the embeddings of samples; returns the lines to print.

    Progress is shown where it is known how many there are in `total`.

    Raises:
      ValueError: samples of different sizes, whose grids do not fit one array.
    """
    done: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    waiting: dict[Any, list[tuple[str, Sample]]] = {}
    progress = Progress(total, "samples", _say if total else None)

    def run(group: list[tuple[str, Sample]]) -> None:
        values, valid = embed(o, model, [s for _, s in group])
        done.update((name, (x, v)) for (name, _), x, v in zip(group, values, valid, strict=True))
        progress.step(len(group))

    order = []
    for name, sample in samples:
        order.append(name)
        group = waiting.setdefault((sample.image_size, sample.timestamps.shape[1]), [])
        group.append((name, sample))
        if len(group) == o.batch_size:
            run(group)
            group.clear()
    for group in filter(None, waiting.values()):
        run(group)
    width = max(x.shape[-1] for x, _ in done.values())
    if not width:
        raise ValueError("the samples hold no data that the model takes")
    if len({v.shape for _, v in done.values()}) > 1:
        raise ValueError("the samples differ in size; embed each size alone, or --pooling=instance")
    values = np.stack(
        [x if x.shape[-1] else np.zeros((*v.shape, width), np.float32)
         for x, v in (done[name] for name in order)]
    )  # fmt: skip
    valid = np.stack([done[name][1] for name in order])
    tags, arrays = _tags_of(o, model, model.modalities), {}
    values[~valid] = np.nan
    if o.dtype == "int8":
        rule = quantize.Quantizer(values[valid].min(0), values[valid].max(0), o.quantization)
        values, tags["QUANTIZATION"] = rule(values), rule.rule
        if rule.kind == "linear":
            arrays |= {"scale": rule.scale.astype("f4"), "offset": rule.offset.astype("f4")}
    _write_arrays(output, {"embeddings": values, "valid": valid, **arrays}, order, tags)
    return [f"written: {output} {list(values.shape)}"]


def _write_arrays(
    output: Path, arrays: dict[str, np.ndarray], ids: list[str], tags: dict[str, str]
) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    with replacing(output) as scratch, scratch.open("wb") as file:
        if output.suffix == ".npz":
            texts: dict[str, Any] = {k.lower(): np.array(v) for k, v in tags.items()}
            np.savez(file, ids=np.array(ids), **arrays, **texts)
        else:
            from safetensors.numpy import save

            arrays = arrays | {"valid": arrays["valid"].astype(np.uint8)}
            file.write(save(arrays, {**tags, "ids": json.dumps(ids)}))


def _rasters(o: Options) -> tuple[list[Raster], list[str]]:
    """(the rasters that --input names with what the flags say of them, sentences to print)."""
    paths, notes = [Path(text).expanduser() for text in o.input], []
    if o.name:
        found, others = read_folder(paths[0], o.name)
        if others:
            shown = ", ".join(others[:5]) + (" ..." if len(others) > 5 else "")
            notes = [f"{len(others)} files are not named like {o.name}: {shown}"]
    elif len(paths) == 1 and paths[0].suffix.lower() in (".json", ".csv"):
        found = read_manifest(paths[0])
    else:
        found = [Raster(str(path)) for path in paths]
    for raster in found:
        raster.modality = raster.modality or o.modality or ""
    if o.bands:
        spread_bands(found, o.bands)
    return found, notes


def run(o: Options) -> list[str]:
    """Embeds as the options say; the lines to print.

    Raises:
      ValueError: unusable input, told before the model runs wherever that can be known.
    """
    known("pooling", o.pooling, POOLINGS)
    inputs, output = o.input, Path(o.output).expanduser()
    source = Path(inputs[0]).expanduser()
    if o.name and not (len(inputs) == 1 and source.is_dir()):
        raise ValueError("--name goes with one folder of rasters as --input")
    single = len(inputs) == 1 and (source.is_dir() or source.suffix in (".h5", ".npz"))
    single = single and not o.name
    if single and source.is_dir() and not _h5_files(source):
        raise ValueError(f"the folder {source} holds no .h5 files; for GeoTIFFs give --name")
    for flag in ("bands", "modality", "dates", "tile", "overlap") if single else ():
        if getattr(o, flag) is not None:
            raise ValueError(f"--{flag} goes with rasters; {source} says it itself or needs none")
    wanted = (".npz", ".safetensors") if single else (".tif", ".tiff")
    if output.suffix not in wanted:
        raise ValueError(f"the output of this input must end in {' or '.join(wanted)}")
    for path in inputs:
        if not path or not Path(path).expanduser().exists():
            raise ValueError(f"there is no file {path!r}")
    if o.pooling == "instance" and not single:
        raise ValueError("pooling 'instance' makes no map; take 'spatial'")
    if o.searchlight and o.pooling not in domain.OUTPUTS:
        raise ValueError("--searchlight goes with --pooling=student or location")
    if single:
        read = _h5_files(source) if source.is_dir() else [source]
        outputs.check(output, [*read, *_model_files(o)], o.overwrite)
        model = _load(o)
        found = (
            _array_samples(o, source)
            if source.suffix == ".npz"
            else _h5_samples(o, model.modalities, source)
        )
        total = len(_h5_files(source)) if source.is_dir() else 0
        return _embed_samples(o, model, found, output, total)
    rasters, notes = _rasters(o)
    held = [source, *(Path(raster.path) for raster in rasters), *_model_files(o)]
    written = (output, output.with_suffix(".json"))
    for path in written:
        outputs.check(path, held, o.overwrite)
    with Stack(rasters, o.any_pixel_size, o.dates or (), o.over) as stack:
        for path in written:  # what virtual rasters are made of is known now
            outputs.check(path, map(Path, stack.files), o.overwrite)
        return _embed_rasters(o, _load(o), stack, output) + notes


def _model_files(o: Options) -> list[Path]:
    """The files of a model that is given as a folder."""
    folder = Path(o.model).expanduser()
    return [path for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _load(o: Options) -> PretrainedModel:
    model = load_pretrained(o.model)
    model.check_locations(o.pooling, o.patch_size, o.location_size)
    return model


def main() -> None:
    given = flags.FLAGS.flag_values_dict()
    try:
        lines = run(Options(**{f.name: given[f.name] for f in dataclasses.fields(Options)}))
    except (ValueError, OSError) as error:
        raise ValueError(str(error).replace(values.HOW_TO_SETTLE, values.FLAG_TO_SETTLE)) from None
    print("\n".join(lines))


if __name__ == "__main__":
    define_flags()
    commands.run_alone(main, quiet=True)
