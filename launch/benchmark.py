"""Measures inference of encoders: tokens, samples and area per second, memory, and what fits.

    python -m launch.benchmark --model_size=nano --batch_size=8 --benchmark_interval_s=5
    python -m launch.benchmark --sweep_keys=batch,patch            named sweeps, one at a time
    python -m launch.benchmark --sweep='{"batch_size": [1, 8]}'    own values
    python -m launch.benchmark --sweep_keys=batch,image --cross_product

Every run parameter can also be set by the environment variable of its name in capitals. Inputs are
random, all tokens are online. Each run is one JSON line in <work_dir>/<group>/results.jsonl.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from olmoearth_jax import commands, modalities
from olmoearth_jax.evals.models import embed_tokens
from olmoearth_jax.files import append_json
from olmoearth_jax.model import latent_mim
from olmoearth_jax.model.config import official_model
from olmoearth_jax.model.frozen import Call, FrozenEncoder
from olmoearth_jax.model.pooling import Pooling
from olmoearth_jax.proposals import known

WARM_UP = 5
MODALITIES = ("sentinel2_l2a", "sentinel1", "landsat")


@dataclasses.dataclass(frozen=True)
class Run:
    """Parameters of one measurement."""

    model_size: str = "base"
    version: str = "v1"
    use_s1: bool = False
    use_s2: bool = True
    use_landsat: bool = False
    image_size: int = 64
    patch_size: int = 4
    num_timesteps: int = 12
    batch_size: int = 128
    bf16: bool = True
    benchmark_interval_s: float = 180.0
    min_batches_per_interval: int = 10

    @property
    def modalities(self) -> tuple[str, ...]:
        used = (self.use_s2, self.use_s1, self.use_landsat)
        return tuple(m for m, on in zip(MODALITIES, used, strict=True) if on)

    @property
    def name(self) -> str:
        """Size, device and settings joined by `_`; absent switches are left out."""
        flags_on = {"bf16": self.bf16, "s1": self.use_s1, "s2": self.use_s2, "ls": self.use_landsat}
        sizes = {
            "is": self.image_size, "ps": self.patch_size,
            "ts": self.num_timesteps, "bs": self.batch_size,
        }  # fmt: skip
        parts = [self.model_size, jax.default_backend(), *(k for k, on in flags_on.items() if on)]
        return "_".join(parts + [f"{k}{v}" for k, v in sizes.items()])

    def check(self) -> None:
        """Raises ValueError for settings that cannot be run."""
        if not self.modalities:
            raise ValueError("switch on at least one of use_s1, use_s2, use_landsat")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"patch_size {self.patch_size} does not divide image_size {self.image_size}"
            )


SWEEPS: dict[str, dict[str, list[Any]]] = {
    "batch": {"batch_size": [2**i for i in range(14)]},
    "image": {"image_size": [2**i for i in range(8)]},
    "patch": {"patch_size": [1, 2, 4, 8]},
    "time": {"num_timesteps": [1, 2, 4, 6, 8, 12]},
    "use_s1": {"use_s1": [True, False]},
    "use_s2": {"use_s2": [True, False]},
    "use_landsat": {"use_landsat": [True, False]},
    "bf16": {"bf16": [True, False]},
    "model_size": {"model_size": ["nano", "tiny", "base", "large"]},
}
SWEEPS["all"] = {k: v for sweep in list(SWEEPS.values()) for k, v in sweep.items()}

FLAGS = flags.FlagValues()
"""This program's own flags; other programs have flags of the same names."""

_bool, _list, _string = commands.definers(FLAGS, "bool list string")

_FIELDS = {f.name: type(f.default) for f in dataclasses.fields(Run)}
_PARAMETERS = {
    name: _string(f"{name}", None, f"Run parameter ({kind.__name__}).")
    for name, kind in _FIELDS.items()
}
_KEYS = _list("sweep_keys", None, f"Named sweeps: {', '.join(SWEEPS)}.")
_SWEEP = _string("sweep", None, "JSON object: run parameter -> list of values.")
_CROSS = _bool("cross_product", False, "All combinations instead of one at a time.")
_GROUP = _string("sweep_group_name", "benchmark", "Names the results' folder.")
_WORK = _string("work_dir", "local_output", "Where results are written.")


def parse(name: str, text: Any) -> Any:
    """A run parameter from text.

    Raises:
      ValueError: unknown parameter or unreadable value.
    """
    kind = _FIELDS[known("run parameter", name, _FIELDS)]
    if kind is bool:
        low = str(text).lower()
        if low not in ("true", "false", "1", "0"):
            raise ValueError(f"{name} must be true or false, got {text!r}")
        return low in ("true", "1")
    try:
        return kind(text)
    except ValueError as e:
        raise ValueError(f"{name} must be a {kind.__name__}, got {text!r}") from e


def plan(default: Run, sweep: Mapping[str, Sequence[Any]], cross: bool) -> list[Run]:
    """Runs of a sweep: one parameter changed at a time and the defaults last, or all products."""
    sweep = {k: [parse(k, v) for v in values] for k, values in sweep.items()}
    if cross:
        products = itertools.product(*sweep.values())
        return [dataclasses.replace(default, **dict(zip(sweep, v, strict=True))) for v in products]
    runs = [dataclasses.replace(default, **{k: v}) for k, vs in sweep.items() for v in vs]
    return list(dict.fromkeys([*(r for r in runs if r != default), default]))


def measure(run: Run) -> dict[str, Any]:
    """Times the encoder of a run until both its interval and its batch count are reached."""
    run.check()
    dtype = jnp.bfloat16 if run.bf16 else jnp.float32
    config = official_model(run.model_size, run.version, run.modalities)
    model = FrozenEncoder(config, latent_mim.initial_params(config), dtype)
    rng = np.random.default_rng(0)
    shape = (run.batch_size, run.image_size, run.image_size, run.num_timesteps)
    data, masks, tokens = {}, {}, 0
    for name in run.modalities:
        bands = modalities.get(name).num_bands
        data[name] = jnp.asarray(rng.standard_normal((*shape, bands), dtype=np.float32))
        masks[name] = jnp.zeros((*shape, len(model.slots.of(name))), jnp.int8)
        grid = run.image_size // run.patch_size
        tokens += run.batch_size * grid**2 * run.num_timesteps * len(model.slots.of(name))
    timestamps = jnp.ones((run.batch_size, run.num_timesteps, 3), jnp.int32)

    call = Call(model.graph, run.patch_size, Pooling(), fast=True, slots=model.slots)

    def once() -> None:
        jax.block_until_ready(embed_tokens(call, model.params, data, masks, timestamps))

    for _ in range(WARM_UP):
        once()
    times: list[float] = []
    begun = time.perf_counter()
    while (
        time.perf_counter() - begun < run.benchmark_interval_s
        or len(times) < run.min_batches_per_interval
    ):
        start = time.perf_counter()
        once()
        times.append(time.perf_counter() - start)
    return _figures(run, np.array(times), tokens)


def _out_of_memory(error: Exception) -> bool:
    said = any(text in str(error) for text in ("RESOURCE_EXHAUSTED", "Out of memory"))
    return isinstance(error, MemoryError) or said


def _figures(run: Run, times: np.ndarray, tokens: int) -> dict[str, Any]:
    total, side_km = float(times.sum()), run.image_size * 10 / 1000
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    samples = run.batch_size * len(times) / total
    return {
        "oom_occurred": 0,
        "num_batches": len(times),
        "num_tokens_per_batch": tokens,
        "per_batch_token_rate": float(np.mean(tokens / times)),
        "mean_batch_token_rate": tokens * len(times) / total,
        "mean_batch_time": total / len(times),
        "samples_per_second": samples,
        "pixels_per_second": samples * run.image_size**2,
        "square_km_per_second": samples * side_km**2,
        "gpu_name": device.device_kind,
        "peak_memory_bytes": stats.get("peak_bytes_in_use"),
        "peak_host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def default_run() -> Run:
    """Defaults, then environment variables, then flags."""
    given = {n: os.environ[n.upper()] for n in _FIELDS if os.environ.get(n.upper())}
    given |= {n: f.value for n, f in _PARAMETERS.items() if f.value is not None}
    return Run(**{n: parse(n, v) for n, v in given.items()})


def wanted_sweep() -> dict[str, Sequence[Any]]:
    """The sweep that the flags name.

    Raises:
      ValueError: two sweeps, an unknown name, or malformed JSON.
    """
    if _KEYS.value and _SWEEP.value:
        raise ValueError("give --sweep_keys or --sweep, not both")
    if _SWEEP.value:
        try:
            sweep = json.loads(_SWEEP.value)
        except json.JSONDecodeError as e:
            raise ValueError(f"--sweep is not a JSON object: {e}") from e
        if not isinstance(sweep, dict) or not all(isinstance(v, list) for v in sweep.values()):
            raise ValueError("--sweep must be a JSON object of lists")
        return sweep
    out: dict[str, Sequence[Any]] = {}
    for key in _KEYS.value or ():
        out |= SWEEPS[known("sweep", key, SWEEPS)]
    return out


def execute() -> int:
    """Runs everything; the failure of one run does not stop the others."""
    runs = plan(default_run(), wanted_sweep(), _CROSS.value)
    folder = Path(_WORK.value) / _GROUP.value
    folder.mkdir(parents=True, exist_ok=True)
    failed = 0
    for run in runs:
        try:
            figures = measure(run)
        except (ValueError, MemoryError, jax.errors.JaxRuntimeError) as e:
            if not _out_of_memory(e):
                print(f"error: {run.name}: {e}", file=sys.stderr)
                failed += 1
                continue
            figures = {"oom_occurred": 1}
        item = {"name": run.name, **dataclasses.asdict(run), **figures}
        commands.say(json.dumps(item))
        append_json(folder / "results.jsonl", item)
    return 1 if failed else 0


if __name__ == "__main__":
    commands.run_alone(execute, FLAGS, (ValueError,), commands.USER_ERROR)
