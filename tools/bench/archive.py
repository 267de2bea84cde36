"""Measures how much of an archive's time is not the encoder; prints one JSON line.

    python -m tools.bench.archive --model=small --patch_size=4 --side=512

Synthetic Sentinel-2 images are embedded into an archive in a temporary folder three times: as
launch.embed does it, with an encoder that gives zeros (what remains is reading, preparing,
quantising and writing), and by the encoder alone on tiles that are ready. `host_share` is the CPU
time of the second over that of the third, `rate` the wall time of the third over that of the first.
Weights are random.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags
from absl import logging as absl_logging

from olmoearth_jax import commands
from olmoearth_jax.data.crs import library as rasterio_library
from olmoearth_jax.inference.model import PretrainedModel
from olmoearth_jax.inference.prepare import ModelInput
from olmoearth_jax.interop import checkpoints
from olmoearth_jax.maps import embed_job
from olmoearth_jax.maps.embed_shards import ShardWorker
from olmoearth_jax.modalities import get
from olmoearth_jax.model import latent_mim
from olmoearth_jax.model.config import official_model

_MODEL = flags.DEFINE_string("model", "nano", "Size of the model.")
_VERSION = flags.DEFINE_string("version", "v1_2", "Version of the model.")
_SIDE = flags.DEFINE_integer("side", 256, "Side of the images in pixels: one shard.", 64)
_STEPS = flags.DEFINE_integer("timesteps", 12, "Images of a year.", lower_bound=1, upper_bound=12)
_PATCH = flags.DEFINE_integer("patch_size", 4, "Patch size.", lower_bound=1)
_BATCH = flags.DEFINE_integer("batch_size", 16, "Tiles per call.", lower_bound=1)

NAME = "sentinel2_l2a"


def write_images(folder: Path, side: int, steps: int) -> Path:
    """Random GeoTIFFs on the lattice, one a month; the manifest."""
    rasterio = rasterio_library()
    rng, rows = np.random.Generator(np.random.Philox(0)), ["path,date,modality"]
    metres = 10 * side
    east, north = (round(v / metres) * metres for v in (500_000, 5_000_000))
    form: Any = {
        "driver": "GTiff", "count": 12, "height": side, "width": side, "dtype": "uint16",
        "crs": "EPSG:32632", "tiled": True, "compress": "deflate",
        "transform": rasterio.Affine(10, 0, east, 0, -10, north),
    }  # fmt: skip
    for month in range(1, steps + 1):
        coarse = rng.integers(200, 4000, (12, side // 8 + 1, side // 8 + 1))
        x = coarse.repeat(8, 1).repeat(8, 2)[:, :side, :side]
        x = x + rng.integers(0, 99, x.shape)
        path = folder / f"{month:02d}.tif"
        with rasterio.open(path, "w", **form) as file:
            file.write(x.astype(np.uint16))
            file.descriptions = get(NAME).bands
        rows.append(f"{path.name},2024-{month:02d}-15,{NAME}")
    manifest = folder / "imagery.csv"
    manifest.write_text("\n".join(rows) + "\n")
    return manifest


class Idle(ShardWorker):
    """Does everything but the encoder's work; keeps what it would have encoded last.

    Attributes:
      tiles: how many tiles there were.
      calls: how many calls of the encoder.
      ready: of the largest call.
    """

    tiles, calls = 0, 0
    ready: ModelInput | None = None

    def _encode(self, ready: ModelInput) -> np.ndarray:
        self.tiles, self.calls = self.tiles + len(ready.timestamps), self.calls + 1
        if self.ready is None or len(ready.timestamps) > len(self.ready.timestamps):
            self.ready = ready
        core, width = self._core, self._form.dimensions
        return np.full((len(ready.timestamps), core, core, width), 0.1, np.float32)


def _timed(call: Callable[[], Any]) -> tuple[float, float]:
    """(seconds, seconds of all CPU cores together)."""
    start, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - start, time.process_time() - cpu


def measure(folder: Path) -> dict[str, Any]:
    """Runs as the flags say; the figures by name."""
    config = official_model(_MODEL.value, _VERSION.value)
    weights = checkpoints.Weights(config, latent_mim.initial_params(config), None, {}, ())
    model = PretrainedModel(weights, _MODEL.value)
    manifest = write_images(folder, _SIDE.value, _STEPS.value)
    options = embed_job.Options(
        _MODEL.value, str(manifest), str(folder / "out"), years=["2024"], patch_size=_PATCH.value,
        batch_size=_BATCH.value, shard_side=_SIDE.value // _PATCH.value,
    )  # fmt: skip
    job = embed_job.make_job(options, config, model.modalities)
    made = []

    def worker(kind: type[ShardWorker], name: str) -> ShardWorker:
        given = dataclasses.replace(options, output=str(folder / name))
        own = dataclasses.replace(job, options=given)
        work, form = embed_job.open_job(own, model)
        made.append(work)
        return kind(own, model, form)

    idle = worker(Idle, "idle")
    assert isinstance(idle, Idle)
    host_s, host_cpu = _timed(lambda: made[-1].run(idle))
    ready, calls = idle.ready, idle.calls
    assert ready is not None
    rows = ready.rows(np.minimum(np.arange(_BATCH.value), len(ready.timestamps) - 1))

    def encode() -> None:
        for _ in range(calls):
            model.embed(rows, _PATCH.value, "spatial")

    first, _ = _timed(lambda: model.embed(rows, _PATCH.value, "spatial"))
    encoder_s, encoder_cpu = _timed(encode)
    whole = worker(ShardWorker, "whole")
    whole_s, whole_cpu = _timed(lambda: made[-1].run(whole))
    return {
        "bench": "archive", "model": _MODEL.value, "version": model.version, "side": _SIDE.value,
        "timesteps": _STEPS.value, "patch_size": _PATCH.value, "batch_size": _BATCH.value,
        "tile": job.layout.tile, "overlap": job.layout.overlap, "tiles": idle.tiles,
        "device": jax.devices()[0].device_kind, "cpus": os.cpu_count(),
        "first_call_s": round(first, 3), "host_s": round(host_s, 3),
        "host_cpu_s": round(host_cpu, 3), "encoder_s": round(encoder_s, 3),
        "encoder_cpu_s": round(encoder_cpu, 3), "whole_s": round(whole_s, 3),
        "whole_cpu_s": round(whole_cpu, 3), "host_share": round(host_cpu / encoder_cpu, 4),
        "rate": round(encoder_s / whole_s, 4), "tiles_per_s": round(idle.tiles / whole_s, 3),
    }  # fmt: skip


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    absl_logging.set_verbosity(absl_logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(Path(folder))))


if __name__ == "__main__":
    commands.run(main)
