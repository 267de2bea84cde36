"""Speed of the data stream.

  python -m tools.bench.data_loader --h5py_dir=DIR --num_workers=4

Reads groups with the official settings and prints one JSON line: settings, samples per second, CPU
time per sample, peak memory, and where one process spends its time. With --compare_reference the
PyTorch reference reads the same files with the same shapes in turn. That needs the packages that
`tools.bench.reference_step` lists, and two that the reference's dataset imports:

  pip install torchvision cartopy
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from absl import app, flags

from olmoearth_jax import commands
from olmoearth_jax.configlib.official import official
from olmoearth_jax.data import group, h5, subset
from olmoearth_jax.data.index import DatasetIndex, prepare
from olmoearth_jax.data.pipeline import TrainStream
from olmoearth_jax.modalities import (
    OFFICIAL_DECODE_ONLY,
    OFFICIAL_MODALITIES,
)
from olmoearth_jax.train.build import masking_strategies

from .torch_loader import ReferenceLoader

STAGES: tuple[tuple[str, Any, str], ...] = (
    ("open", h5, "_open"),
    ("header", h5.SampleFile, "__init__"),
    ("decode", h5.SampleFile, "read"),
    ("normalize", subset, "normalize"),
    ("mask", group.GroupMaker, "_masks"),
    ("allocate", group, "empty_arrays"),
)
"""(stage, owner, attribute) of the functions that are timed."""


def official_masking(version: str) -> dict[str, Any]:
    """Settings of the version's masking strategy."""
    shares = {"encode_ratio": 0.5, "decode_ratio": 0.5}
    maps: dict[str, Any] = {"only_decode_modalities": list(OFFICIAL_DECODE_ONLY)}
    if version == "v1":
        extra = {"allow_encoding_decoding_same_bandset": True}
        return {"type": "modality_cross_random", **shares, **maps, **extra}
    return {"type": "random_time_with_decode", **shares, **maps, "random_ratio": 0.5}


def compare(h5py_dir: Path, version: str, size: int, groups: int) -> dict[str, float]:
    """CPU milliseconds per sample of both loaders, same files and shapes, in turn, one process."""
    stream = make_stream(prepare(h5py_dir, OFFICIAL_MODALITIES), version, size, 0, 1)
    reference = ReferenceLoader(h5py_dir, OFFICIAL_MODALITIES, official_masking(version))
    spent = {"ours": 0.0, "reference": 0.0}
    for number in range(groups + 1):
        patch, grid, _ = stream.shape(number)
        before = time.process_time()
        group = stream.group(number)
        between = time.process_time()
        reference.group(group["index"], patch, grid)
        if number:  # the first group warms both up
            spent["ours"] += between - before
            spent["reference"] += time.process_time() - between
    found = {f"{k}_cpu_ms_per_sample": 1e3 * v / (groups * size) for k, v in spent.items()}
    return found | {"ours_over_reference": spent["ours"] / spent["reference"]}


def make_stream(
    index: DatasetIndex, version: str, group_size: int, workers: int, prefetch: int
) -> TrainStream:
    """A stream of one group per step, with official settings but for the batch size."""
    config = official("base", version)
    config.train_module.rank_microbatch_size = group_size
    loader = config.data_loader
    loader.global_batch_size = loader.samples_per_shape = group_size
    loader.num_workers, loader.prefetch_factor = workers, prefetch
    return TrainStream(index, config, masking_strategies(config))


def profile_stages(stream: TrainStream, groups: int, group_size: int) -> dict[str, float]:
    """CPU milliseconds per sample by stage, in this process; 'other' is the rest."""
    stream.group(0)
    spent = {stage: 0.0 for stage, _, _ in STAGES}

    def timed(stage: str, function):
        def call(*args, **kwargs):
            start = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                spent[stage] += time.process_time() - start

        return call

    with contextlib.ExitStack() as stack:
        for stage, owner, name in STAGES:
            wrapped = timed(stage, getattr(owner, name))
            stack.enter_context(mock.patch.object(owner, name, wrapped))
        start = time.process_time()
        for number in range(1, groups + 1):
            stream.group(number)
        total = time.process_time() - start
    spent["other"] = total - sum(spent.values())
    return {k: round(1e3 * v / (groups * group_size), 3) for k, v in spent.items()}


def measure(stream: TrainStream, groups: int, group_size: int) -> dict[str, float]:
    """Samples per second, CPU time and memory of `groups` groups after the first."""
    batches = stream.batches(0, groups + 1)
    before = time.monotonic()
    next(batches)
    start = time.monotonic()
    # CPU time counts from the start: workers read ahead before the first group arrives.
    cpu = _cpu()
    samples = sum(len(part["ok"]) for step in batches for part in step)
    wall = time.monotonic() - start
    total = samples + group_size
    return {
        "samples_per_second": round(samples / wall, 2),
        "first_group_seconds": round(start - before, 2),
        "cpu_ms_per_sample": round(1e3 * (_cpu() - cpu) / total, 2),
        "peak_rss_mb": round(_rss(resource.RUSAGE_SELF), 1),
        "peak_rss_worker_mb": round(_rss(resource.RUSAGE_CHILDREN), 1),
    }


def _cpu() -> float:
    """CPU seconds of this process and its finished children."""
    own, children = (
        resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def _rss(who: int) -> float:
    """Peak resident memory in MB."""
    return resource.getrusage(who).ru_maxrss / (1 << (20 if sys.platform == "darwin" else 10))


def run(h5py_dir: Path, version: str, group_size: int, groups: int, workers: int, prefetch: int):
    """All settings and figures of one benchmark as one dict."""
    index = prepare(h5py_dir, OFFICIAL_MODALITIES)
    result: dict[str, Any] = {
        "benchmark": "data_loader",
        "device": f"{platform.machine()}, {os.cpu_count()} cores",
        "load_average": round(os.getloadavg()[0], 2),
        "version": version,
        "samples": len(index),
        "tile_px": index.tile_px,
        "group_size": group_size,
        "groups": groups,
        "num_workers": workers,
        "prefetch": prefetch,
    }
    stream = make_stream(index, version, group_size, workers, prefetch)
    result.update(measure(stream, groups, group_size))
    local = make_stream(index, version, group_size, 0, prefetch)
    result["stage_cpu_ms_per_sample"] = profile_stages(local, min(groups, 10), group_size)
    return result


def _define_flags() -> None:
    flags.DEFINE_string("h5py_dir", None, "Dataset folder; default: synthetic data made for this.")
    flags.DEFINE_integer("num_samples", 64, "Samples of the synthetic data.", lower_bound=1)
    flags.DEFINE_bool("compare_reference", False, "Time the PyTorch reference on --h5py_dir too.")
    flags.DEFINE_enum("version", "v1", ("v1", "v1_1", "v1_2"), "Masking and tokenization.")
    flags.DEFINE_integer("group_size", 32, "Samples per group.", lower_bound=1)
    flags.DEFINE_integer("groups", 20, "Groups to read.", lower_bound=1)
    flags.DEFINE_integer("num_workers", 2, "Reader processes.", lower_bound=0)
    flags.DEFINE_integer("prefetch", 2, "Groups each worker prepares ahead.", lower_bound=1)


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    given = flags.FLAGS
    shape = (given.version, given.group_size, given.groups, given.num_workers, given.prefetch)
    try:
        if given.h5py_dir:
            result = run(Path(given.h5py_dir), *shape)
            if given.compare_reference:
                result["paired"] = compare(Path(given.h5py_dir), *shape[:3])
        else:
            from ..make_synthetic_dataset import make_dataset

            with tempfile.TemporaryDirectory() as folder:
                result = run(make_dataset(folder, given.num_samples), *shape)
    except ValueError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(1)
    print(json.dumps(result))


if __name__ == "__main__":
    _define_flags()
    commands.run(main)
