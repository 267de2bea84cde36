"""Measures embedding of image chips on this machine; prints one JSON line.

    python -m tools.bench.inference --model=nano --version=v1 --chips=256

The line holds the settings, the device, seconds (on a shared machine look at those of the CPU,
which other work does not lengthen much), chips and tokens per second. With
--compare_torch the PyTorch package olmoearth-pretrain-minimal, if installed, embeds the same chips
with the same weights in the same run, and the ratio of the times and the largest difference of the
embeddings are added. Weights are random unless --weights names some.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import app, flags
from absl import logging as absl_logging

from olmoearth_jax import commands
from olmoearth_jax.inference.model import PretrainedModel, load_weights
from olmoearth_jax.inference.prepare import prepare
from olmoearth_jax.inference.sample import Sample
from olmoearth_jax.interop import checkpoints
from olmoearth_jax.modalities import get
from olmoearth_jax.model import latent_mim
from olmoearth_jax.model.config import official_model

_MODEL = flags.DEFINE_string("model", "nano", "Size of the model.")
_VERSION = flags.DEFINE_string("version", "v1", "Version of the model.")
_WEIGHTS = flags.DEFINE_string("weights", None, "Folder or name of weights, instead of random.")
_CHIPS = flags.DEFINE_integer("chips", 256, "Chips to embed.", lower_bound=1)
_SIZE = flags.DEFINE_integer("image_size", 64, "Side of a chip in pixels.", lower_bound=1)
_STEPS = flags.DEFINE_integer("timesteps", 12, "Timesteps of a chip.", lower_bound=1)
_PATCH = flags.DEFINE_integer("patch_size", 8, "Patch size.", lower_bound=1)
_BATCH = flags.DEFINE_integer("batch_size", None, "Chips per call; chosen by default.")
_POOLING = flags.DEFINE_string("pooling", "instance", "'instance' or 'spatial'.")
_DTYPE = flags.DEFINE_string("dtype", None, "float32 or bfloat16.")
_TORCH = flags.DEFINE_bool("compare_torch", False, "Also time the PyTorch package.")
_TORCH_BATCH = flags.DEFINE_integer("torch_batch_size", None, "Its chips per call; as ours.")


def chips(count: int, size: int, steps: int) -> Sample:
    """Random Sentinel-2 chips in raw units, one image a month."""
    rng = np.random.Generator(np.random.Philox(0))
    x = rng.integers(200, 4000, (count, size, size, steps, 12), dtype=np.int16)
    dates = [f"{2021 + i // 12}-{i % 12 + 1:02d}-15" for i in range(steps)]
    name = "sentinel2_l2a"
    return Sample.from_arrays({name: x}, dates, bands={name: get(name).bands})


def _timed(call: Callable[[Sample], np.ndarray], sample: Sample) -> tuple[float, float, np.ndarray]:
    """(seconds, seconds of all CPU cores together, what the call gave)."""
    start, cpu = time.perf_counter(), time.process_time()
    out = call(sample)
    return time.perf_counter() - start, time.process_time() - cpu, out


def torch_embed(
    loaded: checkpoints.Weights, model: PretrainedModel, patch_size: int, batch: int, pooling: str
) -> Callable[[Sample], np.ndarray]:
    """The same embedding by the PyTorch package, from an exported folder.

    Raises:
      ValueError: the package is not installed.
    """
    try:
        import torch  # pyright: ignore[reportMissingImports]
        from olmoearth_pretrain_minimal import (  # pyright: ignore[reportMissingImports]
            load_model_from_path,
        )
        from olmoearth_pretrain_minimal.olmoearth_pretrain_v1.utils import (  # pyright: ignore[reportMissingImports]
            datatypes,
        )
    except ImportError as e:
        raise ValueError(f"--compare_torch needs olmoearth-pretrain-minimal ({e})") from None
    with tempfile.TemporaryDirectory() as folder:
        checkpoints.to_reference(loaded, folder)
        reference: Any = load_model_from_path(folder)
        encoder = reference.encoder.eval()
    name = "sentinel2_l2a"

    def call(sample: Sample) -> np.ndarray:
        ready = prepare(sample, (name,), patch_size, model.rules)
        sets, out = len(model.slots.of(name)), []
        for start in range(0, sample.batch_size, batch):
            x = torch.from_numpy(ready.data[name][start : start + batch])
            masked = datatypes.MaskedOlmoEarthSample(
                timestamps=torch.from_numpy(ready.timestamps[start : start + batch]).long(),
                sentinel2_l2a=x,
                sentinel2_l2a_mask=torch.zeros(*x.shape[:-1], sets),
            )
            with torch.inference_mode():
                tokens = encoder(masked, fast_pass=True, patch_size=patch_size)
            grid = tokens["tokens_and_masks"].sentinel2_l2a
            axes = (1, 2, 3, 4) if pooling == "instance" else (3, 4)
            out.append(grid.mean(axes).numpy())
        return np.concatenate(out)

    return call


def measure() -> dict[str, Any]:
    """Runs as the flags say; the figures by name."""
    if _WEIGHTS.value:
        loaded = load_weights(_WEIGHTS.value)
    else:
        config = official_model(_MODEL.value, _VERSION.value)
        loaded = checkpoints.Weights(config, latent_mim.initial_params(config), None, {}, ())
    model = PretrainedModel(loaded, _WEIGHTS.value or _MODEL.value, _DTYPE.value)
    sample = chips(_CHIPS.value, _SIZE.value, _STEPS.value)
    patch_size, pooling = _PATCH.value, _POOLING.value

    def ours(some: Sample) -> np.ndarray:
        return model.embed(some, patch_size, pooling, batch_size=_BATCH.value)  # pyright: ignore[reportArgumentType]

    first, _, _ = _timed(ours, sample.rows(0, min(_CHIPS.value, 64)))
    seconds, cpu, got = _timed(ours, sample)
    sets = len(model.slots.of("sentinel2_l2a"))
    tokens = (_SIZE.value // patch_size) ** 2 * _STEPS.value * sets
    result = {
        "bench": "inference", "model": model.name, "version": model.version,
        "chips": _CHIPS.value, "image_size": _SIZE.value, "timesteps": _STEPS.value,
        "patch_size": patch_size, "pooling": pooling, "dtype": model.dtype.name,
        "device": jax.devices()[0].device_kind, "cpus": os.cpu_count(),
        "first_call_s": round(first, 3), "seconds": round(seconds, 3), "cpu_seconds": round(cpu, 3),
        "chips_per_s": round(_CHIPS.value / seconds, 3),
        "tokens_per_s": round(_CHIPS.value * tokens / seconds),
    }  # fmt: skip
    if _TORCH.value:
        batch = _TORCH_BATCH.value or _BATCH.value or max(1, 16_384 // tokens)
        theirs = torch_embed(loaded, model, patch_size, batch, pooling)
        theirs(sample.rows(0, min(batch, _CHIPS.value)))
        other, other_cpu, expected = _timed(theirs, sample)
        difference = np.abs(got - expected).max() / np.abs(expected).max()
        result |= {
            "torch_seconds": round(other, 3), "torch_cpu_seconds": round(other_cpu, 3),
            "ratio": round(seconds / other, 3),
            "torch_batch_size": batch, "largest_relative_difference": float(f"{difference:.2g}"),
        }  # fmt: skip
    return result


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    absl_logging.set_verbosity(absl_logging.ERROR)
    try:
        print(json.dumps(measure()))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    commands.run(main)
