"""Measures mean and spread of every band of a dataset (spec/data.md section 2).

  python -m tools.compute_norm_stats --h5py_dir=DIR --output=stats.json [--estimate_from=10000]

Every modality in the dataset's table is measured, on raw values of whole tiles. By default only
series with all twelve timesteps count, as in the published statistics; --partial_series takes the
rest as well. The result does not depend on the number of workers. `var` in the output is the sum of
squared deviations, as in the published files; `std` is what it says. `records` holds the figures in
the form of a modality record.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from olmoearth_jax import __version__, commands, outputs
from olmoearth_jax import modalities as registry
from olmoearth_jax.data.draws import rng
from olmoearth_jax.data.h5 import open_sample
from olmoearth_jax.data.index import read_metadata
from olmoearth_jax.data.pool import WorkerDied, default_workers, run_tasks
from olmoearth_jax.data.progress import Progress
from olmoearth_jax.data.stats import StreamingStats
from olmoearth_jax.files import write_atomically
from olmoearth_jax.modalities import MAX_TIMESTEPS, MISSING

_Bands = dict[str, list[StreamingStats]]


@dataclasses.dataclass(frozen=True)
class _Task:
    path: Path
    names: tuple[str, ...]
    partial: bool


def _measure_file(task: _Task) -> _Bands:
    """Statistics of one file per modality and band; modalities with gaps are left out.

    Raises:
      ReadError: damaged file.
    """
    out: _Bands = {}
    with open_sample(task.path, task.names) as file:
        for name, shape in file.header.shapes.items():
            kind = registry.get(name).kind
            whole = kind != "space_time" or shape[2] >= MAX_TIMESTEPS
            if not whole and not task.partial:
                continue
            values = file.read(name)
            if values.dtype.kind in "fi" and (values == MISSING).any():
                continue
            out[name] = []
            for band in range(values.shape[-1]):
                out[name].append(StreamingStats())
                out[name][-1].update(values[..., band])
    return out


def compute(
    folder: Path,
    estimate_from: int | None = None,
    seed: int = 0,
    partial: bool = False,
    workers: int = 0,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Statistics of a dataset.

    Args:
      folder: of the sample files.
      estimate_from: samples to draw, None for all.
      seed: of that draw.
      partial: whether series that lack timesteps count.
      workers: processes; 0 for this one.
      say: takes progress lines.

    Raises:
      ValueError: no dataset, or a damaged file.
    """
    header, table = read_metadata(folder)
    numbers = np.sort(table[:, header.index("sample_index")])
    total = len(numbers)
    if estimate_from is not None and estimate_from < total:
        draw = rng(seed, "statistics")
        numbers = np.sort(draw.choice(numbers, estimate_from, replace=False))
    known = [n for n in header if n in registry.names() and n != "latlon"]
    tasks = [_Task(folder / f"sample_{n}.h5", tuple(known), partial) for n in numbers]
    merged, waiting, turn = {}, {}, 0
    progress = Progress(len(tasks), "files", say)
    place = {task.path: i for i, task in enumerate(tasks)}
    for task, found in run_tasks(_measure_file, tasks, workers):
        waiting[place[task.path]] = found
        while turn in waiting:  # merged in order of number, whoever is faster
            _merge(merged, waiting.pop(turn))
            turn += 1
        progress.step()
    return _document(folder, merged, total, len(numbers))


def _merge(into: _Bands, found: _Bands) -> None:
    for name, bands in found.items():
        own = into.setdefault(name, [StreamingStats() for _ in bands])
        for mine, its in zip(own, bands, strict=True):
            mine.merge(its)


def _document(folder: Path, merged: _Bands, total: int, sampled: int) -> dict[str, Any]:
    out: dict[str, Any] = {}
    records = {}
    for name in registry.in_sample_order(merged):
        stats, bands = merged[name], registry.get(name).bands
        out[name] = {
            band: {"mean": s.mean, "var": s.m2, "std": s.std, "count": s.count}
            for band, s in zip(bands, stats, strict=True)
        }
        records[name] = {
            "computed": {"mean": [s.mean for s in stats], "std": [s.std for s in stats]}
        }
    return {
        **out,
        "total_n": total,
        "sampled_n": sampled,
        "tile_path": str(folder.parent.parent.parent),
        "records": records,
    }


def _define_flags() -> None:
    flags.DEFINE_string("h5py_dir", None, "Dataset folder.", required=True)
    flags.DEFINE_string("output", None, "JSON file to write; default: print.")
    flags.DEFINE_bool("overwrite", False, "Replace a file that is not of this program.")
    flags.DEFINE_integer("estimate_from", None, "Samples to draw; default: all.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Seed of the draw.")
    flags.DEFINE_bool("partial_series", False, "Count series that lack timesteps.")
    flags.DEFINE_string("modality_file", None, "JSON file of further modality records.")
    flags.DEFINE_integer("num_workers", None, "Worker processes; default: all cores but one.")


def main() -> None:
    given = flags.FLAGS
    workers = default_workers() if given.num_workers is None else given.num_workers
    output = Path(given.output) if given.output else None
    if output is not None:
        outputs.check(output, overwrite=given.overwrite)
    if given.modality_file:
        registry.register_file(given.modality_file)
    result = compute(
        Path(given.h5py_dir),
        given.estimate_from,
        given.seed,
        given.partial_series,
        workers,
        lambda line: print(line, file=sys.stderr, flush=True),
    )
    text = json.dumps({"software": f"{outputs.MARK} {__version__}", **result}, indent=1)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(output, text + "\n")
    else:
        print(text)


if __name__ == "__main__":
    _define_flags()
    commands.run_alone(main, refusals=(ValueError, OSError, WorkerDied))
