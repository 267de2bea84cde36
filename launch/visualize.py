"""Pictures of samples as training sees them, and a map of where the samples lie.

    python -m launch.visualize --config=configs/base.py --run_name=NAME [--samples=8]
        [--indices=12,345] [--config.<path>=<value> ...]

Writes PNG files to the run folder's visualizations/ (or --output_dir): per sample its series, its
maps with legends, what is available when, the crop that is drawn for it in the first epoch (red),
and the token masks of each view; and sample_map.png. Needs matplotlib (extra 'viz').
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from absl import flags

from olmoearth_jax import outputs
from olmoearth_jax.config import ExperimentConfig
from olmoearth_jax.data.draws import rng
from olmoearth_jax.data.group import Group
from olmoearth_jax.data.h5 import open_sample
from olmoearth_jax.data.index import DatasetIndex
from olmoearth_jax.data.pipeline import TrainStream
from olmoearth_jax.data.subset import draw_offsets, read_sample
from olmoearth_jax.modalities import MAX_TIMESTEPS
from olmoearth_jax.outputs import MARK

from . import _app, _pictures

_SAMPLES = flags.DEFINE_integer("samples", 8, "Samples to draw, in training order.", lower_bound=1)
_INDICES = flags.DEFINE_list("indices", [], "Sample numbers to draw instead.")
_app.define_overwrite()
_OUTPUT = flags.DEFINE_string("output_dir", None, "Folder of the pictures.")


def positions_of(
    wanted: list[str], count: int, index: DatasetIndex, stream: TrainStream
) -> list[int]:
    """Positions in the first epoch of the samples to draw.

    Raises:
      UserError: a number that is not one, or of a sample that the first epoch does not read.
    """
    order = stream.order(1)
    if not wanted:
        return list(range(min(count, len(order))))
    numbers = np.array([index.locate(int(i))[1] for i in order])
    out = []
    for text in wanted:
        if not text.strip().isdigit():
            raise _app.UserError(f"--indices takes sample numbers, got {text!r}")
        places = np.flatnonzero(numbers == int(text))
        if not len(places):
            raise _app.UserError(
                f"sample {text} is not read in the first epoch: it is filtered out, or belongs to "
                f"the tail that fills no batch"
            )
        out.append(int(places[0]))
    return out


def picture(position: int, group: Group, index: DatasetIndex, stream: TrainStream):
    """What the sheet of the sample at `position` of the first epoch shows.

    Raises:
      ReadError: the file is damaged.
    """
    member = int(np.flatnonzero(group["position"] == position)[0])
    at = int(stream.order(1)[position])
    path, number = index.locate(at)
    names = index.modalities
    patch, grid = int(group["patch_size"]), int(group["grid"])
    steps = stream.timesteps[grid]
    with open_sample(path, names) as file:
        whole = read_sample(file, names, None, MAX_TIMESTEPS, lambda _: (0, 0, 0), normalized=False)
        choose = draw_offsets(rng(stream.seed, "crop", 1, position))
        window = read_sample(file, names, patch * grid, steps, choose).window
    place = ""
    if index.latlon is not None:
        lat, lon = index.latlon[at].tolist()
        place = f" at {abs(lat):.3f} {'NS'[lat < 0]}, {abs(lon):.3f} {'EW'[lon < 0]}"
    first = window.start_t
    crop = (window.row, window.col, window.side, first, first + steps)
    stamps = whole.timestamps.tolist()
    dates = [datetime.date(y, m + 1, d).isoformat() for d, m, y in stamps[: whole.length]]
    dates += ["(none)"] * (MAX_TIMESTEPS - len(dates))
    masks = {}
    for key, view in (("mask_a", "view A"), ("mask_b", "view B")):
        if key in group:
            masks[view] = {n: m[member] for n, m in group[key].items()}
    hole = "" if group["ok"][member] else ", left out of training"
    title = f"sample {number}{place}: patch size {patch}, {grid} x {grid} patches{hole}"
    shown = None if stream.config.dataset.apply_cutmix else crop
    return number, _pictures.Picture(title, whole.arrays, dates, shown, masks)


def files_of(
    folder: Path, positions: list[int], index: DatasetIndex, stream: TrainStream
) -> list[Path]:
    """The files that `draw` writes."""
    order = stream.order(1)
    numbers = [index.locate(int(order[position]))[1] for position in positions]
    maps = [] if index.latlon is None else ["sample_map.png"]
    return [folder / name for name in [*(f"sample_{n}.png" for n in numbers), *maps]]


def draw(
    folder: Path, positions: list[int], index: DatasetIndex, stream: TrainStream
) -> Iterator[Path]:
    """Writes the sheets of these positions and the sample map, and yields their files."""
    for position in positions:
        group = stream.group(position // stream.group_size)
        number, content = picture(position, group, index, stream)
        figure = _pictures.sheet(content, stream.tokenization)
        path = folder / f"sample_{number}.png"
        figure.savefig(path, dpi=100, metadata={"Software": MARK})
        yield path
    if index.latlon is not None:
        figure = _pictures.sample_map(index.latlon, f"{len(index)} samples")
        figure.savefig(folder / "sample_map.png", dpi=100, metadata={"Software": MARK})
        yield folder / "sample_map.png"


def main(config: ExperimentConfig) -> int:
    """Exit code 0; raises ValueError for what the user can mend."""
    from olmoearth_jax.train.build import build_index, build_stream

    try:
        import matplotlib  # noqa: F401
    except ImportError as e:
        raise _app.UserError("pictures need matplotlib: install the extra 'viz'") from e
    index = build_index(config)
    loader = config.data_loader
    loader.num_workers = 0
    if len(index) < loader.global_batch_size:
        size = min(len(index), config.train_module.rank_microbatch_size)
        print(f"the dataset fills no batch of {loader.global_batch_size}: drawn in one of {size}")
        loader.global_batch_size = loader.samples_per_shape = size
        config.train_module.rank_microbatch_size = size
    stream = build_stream(config, index)
    folder = Path(_OUTPUT.value) if _OUTPUT.value else config.run_folder / "visualizations"
    positions = positions_of(_INDICES.value, _SAMPLES.value, index, stream)
    for path in files_of(folder, positions, index, stream):
        outputs.check(path, overwrite=flags.FLAGS.overwrite)
    folder.mkdir(parents=True, exist_ok=True)
    for path in draw(folder, positions, index, stream):
        print(path, flush=True)
    return 0


if __name__ == "__main__":
    _app.run(main)
