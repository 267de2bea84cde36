"""Gets everything ready before the expensive machines start: data checked, programs compiled.

    python -m launch.prep --config=configs/base.py --run_name=NAME [--config.<path>=<value> ...]

Checks a part of the dataset's files, writes the index to the run's folder, compiles every step
program into the compilation cache, and reads one group of each shape. A later `launch.train` with
the same settings on the same kind and number of devices starts without compiling. Exits 2 if the
dataset has errors.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from absl import flags

from olmoearth_jax.config import ExperimentConfig
from olmoearth_jax.data.group import Group
from olmoearth_jax.data.index import DatasetIndex
from olmoearth_jax.data.pipeline import TrainStream
from olmoearth_jax.data.verify import verify
from olmoearth_jax.files import replacing, write_atomically
from olmoearth_jax.masks import MISSING_TOKEN
from olmoearth_jax.modalities import MISSING
from olmoearth_jax.train import devices
from olmoearth_jax.train.step import TrainProgram

from . import _app

if TYPE_CHECKING:
    from olmoearth_jax.train.build import Training

_FILES = flags.DEFINE_integer("check_files", 64, "Files to check; 0 checks none.", lower_bound=0)
_COMPILE = flags.DEFINE_bool("compile", True, "Compile the step programs.")

_SEARCH = 20_000
"""Groups that are looked through, without reading them, for one of each shape."""

_Say = Callable[[str], None]


def check_files(folder: Path, count: int, say: _Say) -> None:
    """Checks some files of a dataset.

    Raises:
      UserError: they have errors; the first ones are named.
    """
    report = verify(folder, 0, count, say)
    for line in report.warnings:
        say(f"warning: {line}")
    if report.errors:
        more = f"; and {len(report.errors) - 5} more" if len(report.errors) > 5 else ""
        raise _app.UserError(
            "; ".join(report.errors[:5]) + more + " (tools.verify_dataset checks all files)"
        )


def write_index(folder: Path, index: DatasetIndex, stream: TrainStream) -> Path:
    """Writes which samples the run uses; returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "dataset_index.npy") as scratch, scratch.open("wb") as file:
        np.save(file, np.concatenate([p.numbers for p in index.parts]))
    about = {
        "samples": len(index),
        "steps_per_epoch": stream.steps_per_epoch,
        "tile_px": index.tile_px,
        "fingerprint": index.fingerprint,
        "modalities": list(index.modalities),
        "folders": {str(p.folder): len(p.numbers) for p in index.parts},
        "timesteps_per_grid": stream.timesteps,
    }
    path = folder / "dataset_index.json"
    write_atomically(path, json.dumps(about, indent=1) + "\n")
    return path


def empty_group(group: Group) -> Group:
    """A copy of a group in which every sample is a hole, so that it fits any program."""
    out = dict(group)
    out["ok"] = np.zeros_like(group["ok"])
    out["data"] = {n: np.full_like(a, MISSING) for n, a in group["data"].items()}
    for key in ("mask_a", "mask_b"):
        if key in group:
            out[key] = {n: np.full_like(m, MISSING_TOKEN) for n, m in group[key].items()}
    return out


def one_of_each_shape(stream: TrainStream) -> Iterator[tuple[int, tuple[int, int]]]:
    """(group number, (patch size, grid)) of the first group of each shape."""
    seen = set()
    for step in range(_SEARCH // stream.groups_per_step):
        for i, (patch, grid, _) in enumerate(stream.shapes(step)):
            if (patch, grid) not in seen:
                seen.add((patch, grid))
                yield step * stream.groups_per_step + i, (patch, grid)


def _compile_all(program: TrainProgram, stream: TrainStream, say: _Say) -> None:
    """Compiles every step program and every per-shape program."""
    state = program.init_state()
    engine: Any = program.engine
    shapes = list(one_of_each_shape(stream))
    first = empty_group(stream.group(0))
    groups = [first] * stream.groups_per_step
    program.compile_all(state, groups)
    say(f"all {len(engine.ladder)} step programs are ready")
    program.step(state, groups, 1)  # the update
    state = program.init_state()
    for done, (number, shape) in enumerate(shapes, start=1):
        for prepared in engine.prepare([stream.group(number)] * engine.spec.groups):
            jax.block_until_ready(prepared.inputs)  # the programs that make patches of this shape
            program.warm_up(prepared, state)
        if done % 10 == 0 or done == len(shapes):
            say(f"{done} of {len(shapes)} shapes read (last: patch {shape[0]}, grid {shape[1]})")


def _compile_validation(config: ExperimentConfig, training: Training, say: _Say) -> None:
    """Compiles what the loss of the samples for validation needs."""
    from olmoearth_jax.train.validation import Validation

    held = Validation(config, training.program, training.stream.steps_per_epoch)
    count = held.warm_up(training.program.init_state())
    say(f"all {count} programs of the validation are ready")


def main(config: ExperimentConfig) -> int:
    """Exit code 0; raises ValueError for what the user can mend."""
    from olmoearth_jax.train.build import build_index, build_stream, build_training

    def say(line: str) -> None:
        if jax.process_index() == 0:
            print(line, flush=True)

    begun = time.perf_counter()
    index = build_index(config)
    if _FILES.value:
        for part in index.parts:
            if isinstance(part.folder, Path):  # a remote one is checked where it lies
                check_files(part.folder, _FILES.value, say)
    stream = build_stream(config, index)
    say(f"index of {len(index)} samples: {write_index(config.run_folder, index, stream)}")
    if _COMPILE.value:
        cache = devices.use_compilation_cache(config.compile.cache_dir)
        if cache is None:
            off = config.compile.cache_dir == ""
            why = "is off (compile.cache_dir is '')" if off else "cannot be written to"
            raise _app.UserError(
                f"the compilation cache {why}, so compiled programs would be lost; set another "
                "folder as compile.cache_dir, or use --nocompile"
            )
        say(f"compilation cache: {cache}")
        training = build_training(config, say=say)
        _compile_all(training.program, training.stream, say)
        if config.dataset.validation_fraction:
            _compile_validation(config, training, say)
    say(f"ready after {time.perf_counter() - begun:.0f} s")
    return 0


if __name__ == "__main__":
    _app.run(main)
