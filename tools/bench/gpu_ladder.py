"""Everything a GPU is to be asked about training speed, in order of worth, within minutes.

    python -m tools.bench.gpu_ladder --minutes=9

Two micro-steps of v1.2 Base are drawn from an official mix of complete samples: one of the step
program that most time is spent in, and one of the largest. Each arm (`tools.bench.arms`) is one
change in how they are computed. All programs are compiled first, in threads; what is not ready by
--compile_s is left out. Then each arm is timed in turns with what training does today, on the same
inputs. Then: whole steps with packing and transfer, and the kernels with the most time, of today's
computation and of the best arm; the first step with an empty compilation cache and with a full one;
and, if at least four minutes are left, 500 steps in bfloat16 and in float32.

One JSON line per arm and per question, as soon as it is known. Without an accelerator a tiny model
stands for v1.2 Base. Only files of this repository are read.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from olmoearth_jax import commands, overrides
from olmoearth_jax.config import ExperimentConfig
from olmoearth_jax.config_files import load_file
from olmoearth_jax.train import assemble, cards, devices
from olmoearth_jax.train.metrics import read_metrics

from .arms import (
    ARMS,
    BASELINE,
    MOST_TIME,
    Bench,
    Trial,
    in_turns,
    samples_and_flops,
    trials,
)
from .kernels import top_kernels
from .micro_step import config_path, matrix_rate
from .whole_steps import WholeSteps, first_step

flags.declare_key_flag("config")
_MINUTES = flags.DEFINE_float("minutes", 9.0, "Time for everything.", lower_bound=0.5)
_COMPILE = flags.DEFINE_float("compile_s", 240.0, "Seconds of that for compiling the arms.")
_ARMS = flags.DEFINE_list("arms", None, "Only these arms (today is always one).")
_TURNS = flags.DEFINE_float("turn_s", 2.5, "Seconds of turns per arm and micro-step.")
_DRAWS = flags.DEFINE_integer("draws", 96, "Micro-steps of the mix.", lower_bound=1)
_THREADS = flags.DEFINE_integer("compile_threads", None, "Programs compiled at a time.")
_FIRST_RUNGS = flags.DEFINE_integer(
    "first_step_rungs", 3, "Programs of the first step's ladder.", lower_bound=2
)
_SEED = flags.DEFINE_integer("ladder_seed", 0, "Seed of draws, pixels and masks.")
_STAGE = flags.DEFINE_enum(
    "stage", None, ["arms", "cold", "warm", "precision"], "Internal: one stage, in this process."
)
_END = flags.DEFINE_float("end", None, "Internal: when the stage must be done (time.time).")

_BASE = "configs/base.py:version=v1_2"
_TINY = "configs/nano.py:version=v1_2,smoke"
_MICRO_BATCH = 32
_TINY_CHANGES = {
    "common.training_modalities": ["sentinel2_l2a", "openstreetmap_raster"],
    "model.encoder_config.embedding_size": 64,
    "model.decoder_config.decoder_embedding_size": 64,
    "model.decoder_config.depth": 2,
    "data_loader.sampled_hw_p_list": [1, 2],
    "ladder.max_rungs": 4,
}
_CPU_OPTIONS = {"xla_backend_optimization_level": 0}
"""On a CPU the arms are tried, not judged: half of the time of a compilation is saved."""
_PRECISION_S = 240.0
"""What 500 steps of either type may need, and so must be left."""


def _say(**fields: Any) -> None:
    print(json.dumps({"benchmark": "gpu_ladder", **fields}), flush=True)


def on_cpu() -> bool:
    """Whether there is no accelerator."""
    return jax.default_backend() == "cpu"


def ladder_config() -> ExperimentConfig:
    """The model that is measured: --config, or v1.2 Base, or a tiny one on a CPU."""
    if on_cpu() and flags.FLAGS["config"].value is None:
        return overrides.apply_values(load_file(_TINY), _TINY_CHANGES)
    config = load_file(config_path(_BASE))
    size = min(_MICRO_BATCH, config.train_module.rank_microbatch_size)
    return overrides.apply_values(config, {"train_module.rank_microbatch_size": size})


def _threads() -> int:
    cores = os.cpu_count() or 1
    return _THREADS.value or max(2, min(12, cores - 2))


def compile_all(jobs: list[Trial], bench: Bench, until: float) -> None:
    """Compiles in threads what is ready by `until`, in order.

    What could not be ready in time, judged by the slowest so far, is not begun: a compilation
    cannot be ended, and would disturb the timing.
    """
    waiting: queue.SimpleQueue[Trial] = queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)
    slowest = [0.0]

    def work() -> None:
        while time.time() + slowest[0] < until:
            try:
                job = waiting.get_nowait()
            except queue.Empty:
                return
            job.compile(bench)
            slowest[0] = max(slowest[0], job.compile_s)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(_threads())]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, until - time.time()))


def nominal_tflops() -> float | None:
    """The devices' rate of bfloat16 products by their vendor, or None."""
    return cards.rate_of(jax.devices()[0].device_kind, jax.device_count())


def figures(trial: Trial, base: Trial, bench: Bench, rate: float) -> dict[str, Any]:
    """What one micro-step of an arm took; `error` if it could not run."""
    if trial.error:
        return {"error": trial.error, "compile_s": trial.compile_s}
    try:
        if trial is not base:
            trial.load(bench)
        found = in_turns(trial, base, bench, _TURNS.value)
    except Exception as e:  # out of memory, say: the next arm may do
        return {"error": _short(e)}
    finally:
        if trial is not base:
            trial.inputs = []
    samples, flops = samples_and_flops(bench, trial.step)
    per_s, nominal = flops / found["seconds"], nominal_tflops()
    return {
        "samples_per_s": samples / found["seconds"],
        "share_of_measured_rate": per_s / rate,
        "share_of_nominal_rate": None if nominal is None else per_s / 1e12 / nominal,
        **found,
        "memory_gb": trial.memory_gb(),
        "compile_s": trial.compile_s,
    }


def _chosen() -> list[Any]:
    names = [a.name for a in ARMS]
    wanted = names if _ARMS.value is None else [BASELINE.name, *_ARMS.value]
    if unknown := [name for name in wanted if name not in names]:
        raise ValueError(f"no arm {unknown[0]!r}; known: {', '.join(names)}")
    return [a for a in ARMS if a.name in wanted]


def arms_stage(end: float) -> None:
    """Compiles and times the arms, then whole steps and kernels."""
    clock = Clock()
    config = ladder_config()
    rate = matrix_rate(assemble.compute_dtype(config))
    bench = Bench.build(config, _DRAWS.value, _SEED.value, _CPU_OPTIONS if on_cpu() else {})
    bench.program(BASELINE, [bench.rungs[MOST_TIME]])  # makes the state that all share
    jobs, steps = list(trials(_chosen(), both=not on_cpu())), WholeSteps(bench)
    prepared = clock.lap()
    update = threading.Thread(target=steps.compile_update, daemon=True)
    update.start()
    until = time.time() + min(_COMPILE.value, 0.6 * (end - time.time()))
    compile_all(jobs, bench, until)
    ready = [t for t in jobs if t.program is not None or t.error]
    _say(
        stage="compiled", device=_kind(), config=config.common.recipe, versions=_versions(),
        dtype=np.dtype(assemble.compute_dtype(config)).name,
        micro_batch=config.train_module.rank_microbatch_size,
        micro_steps={name: _about(bench, name) for name in bench.rungs},
        measured_rate_tflops=rate / 1e12, nominal_tflops=nominal_tflops(),
        prepared_s=prepared, compiled_s=clock.lap(), programs=len(ready),
        options=dict(bench.options),
        left_out=[f"{t.arm.name}/{t.step}" for t in jobs if t not in ready],
    )  # fmt: skip
    found = time_arms(ready, bench, rate, end)
    update.join(max(0.0, end - time.time()))
    for trial in found:
        if steps.update is not None and time.time() < end - 5:
            _whole(trial, steps)
    if found and time.time() < end - 5:
        best = found[-1]
        _say(stage="kernels", arm=best.arm.name, device=_kind(), top=_kernels(best, bench))


class Clock:
    """Seconds since it was last asked."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap."""
        now = time.perf_counter()
        self._last, passed = now, now - self._last
        return passed


def _kind() -> str:
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"


def _about(bench: Bench, name: str) -> dict[str, Any]:
    """Shapes of a micro-step's groups, and what its step program holds."""
    rung = bench.rungs[name]
    shapes = sorted({(int(g["grid"]), g["timestamps"].shape[1]) for g in bench.groups[name]})
    return {"grids_and_timesteps": shapes, "encoded": rung.enc, "decoded": rung.dec}


def _versions() -> dict[str, str]:
    client = getattr(jax.devices()[0].client, "platform_version", "")
    found = {name: metadata.version(name) for name in ("jax", "jaxlib")}
    driver = Path("/proc/driver/nvidia/version")
    if driver.exists():
        found["driver"] = driver.read_text().partition("\n")[0]
    return {**found, "platform": client[:200], "XLA_FLAGS": os.environ.get("XLA_FLAGS", "")}


def time_arms(ready: list[Trial], bench: Bench, rate: float, end: float) -> list[Trial]:
    """Prints a line per arm; gives today's trial and, if there is one, that of a better arm."""
    base = {t.step: t for t in ready if t.arm is BASELINE and not t.error}
    if MOST_TIME not in base:
        _say(stage="arms", error="today's computation was not ready", device=_kind())
        return []
    for trial in base.values():
        trial.load(bench)
    best, ratio, late = base[MOST_TIME], 1.0, []
    for arm in dict.fromkeys(t.arm.name for t in ready):
        own = [t for t in ready if t.arm.name == arm and t.step in base]
        if not own or time.time() > end - 2 * len(own) * _TURNS.value:
            late.append(arm)
            continue
        found = {t.step: figures(t, base[t.step], bench, rate) for t in own}
        first = found.pop(MOST_TIME, {})
        settings = own[0].arm.settings()
        _say(stage="arm", arm=arm, settings=settings, device=_kind(), **first, **found)
        if first.get("ratio", 1.0) < ratio and own[0].arm.groups == 1:
            best, ratio = own[0], first["ratio"]
    if late:
        _say(stage="arms", not_timed=late, device=_kind())
    today = base[MOST_TIME]
    return [today] if best is today else [today, best]


def _whole(trial: Trial, steps: WholeSteps) -> None:
    try:
        found = steps.measure(trial)
    except Exception as e:  # out of memory, say: the kernels can still be told
        found = {"error": _short(e)}
    _say(stage="whole_steps", arm=trial.arm.name, device=_kind(), **found)


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"


def _kernels(trial: Trial, bench: Bench) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        trial.load(bench)
        with jax.profiler.trace(folder):
            trial.one_pass(bench)
        return top_kernels(folder, 25)


def first_stage(name: str) -> None:
    """The first step of a process, with whatever the compilation cache holds."""
    devices.use_compilation_cache()
    config = ladder_config()
    found = first_step(config, _FIRST_RUNGS.value, _SEED.value)
    _say(stage=f"first_step_{name}", device=_kind(), **found)


def precision_stage(end: float) -> None:
    """500 steps of nano on the packaged sample, in bfloat16 and in float32."""
    if on_cpu():
        _say(stage="precision", left_out="needs an accelerator")
        return
    for precision in ("bfloat16", "float32"):
        with tempfile.TemporaryDirectory() as folder:
            given = {"precision": precision, "common.save_folder": folder,
                     "trainer.max_duration.value": 500,
                     "trainer.callbacks.tensorboard.enabled": False}  # fmt: skip
            command = [sys.executable, "-m", "launch.train", f"--config={_TINY}", "--run_name=run"]
            command += [f"--config.{k}={v}" for k, v in given.items()]
            left = end - time.time()
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=left)
            except subprocess.TimeoutExpired:
                _say(stage="precision", precision=precision, error=f"not done in {left:.0f} s")
                return
            if done.returncode:
                _say(stage="precision", precision=precision, error=done.stderr[-300:])
                return
            lines = read_metrics(next(Path(folder).rglob("metrics.jsonl")))
            losses = [line["train/loss"] for line in lines if "train/loss" in line]
            means = {f"steps_{n}_to_{n + 99}": float(np.mean(losses[n - 1 : n + 99]))
                     for n in range(1, len(losses), 100)}  # fmt: skip
            _say(stage="precision", precision=precision, steps=len(losses), mean_loss=means)


def _run_stage(name: str, end: float, cache: str | None = None) -> None:
    """One stage in a process of its own, ended at `end`."""
    left = end - time.time()
    env = {**os.environ}
    env.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    if name == "precision":  # the runs are processes of their own, beside this one
        env["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    if cache is not None:
        env["JAX_COMPILATION_CACHE_DIR"] = cache
    passed = [_COMPILE, _ARMS, _TURNS, _DRAWS, _THREADS, _FIRST_RUNGS, _SEED]
    holders = [*passed, flags.FLAGS["config"]]
    own = [
        flags.FLAGS[h.name].serialize() for h in holders if flags.FLAGS[h.name].value is not None
    ]
    module = __spec__.name if __spec__ is not None else "tools.bench.gpu_ladder"
    command = [sys.executable, "-m", module, f"--stage={name}", f"--end={end}", *own]
    try:
        code = subprocess.run(command, env=env, timeout=max(left, 1.0) + 5).returncode
    except subprocess.TimeoutExpired:
        _say(stage=name, error=f"not done in {left:.0f} s")
        return
    if code:
        _say(stage=name, error=f"ended with code {code}; see its message above")


def main(_argv: list[str]) -> None:
    if _STAGE.value is not None:
        end = _END.value or time.time() + 60 * _MINUTES.value
        if _STAGE.value == "arms":
            arms_stage(end)
        elif _STAGE.value == "precision":
            precision_stage(end)
        else:
            first_stage(_STAGE.value)
        # Compilations that nobody waits for any more would hold up the end of the process.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    begun = time.time()
    end = begun + 60 * _MINUTES.value
    _run_stage("arms", begun + 0.75 * (end - begun))
    with tempfile.TemporaryDirectory() as cache:
        _run_stage("cold", end - 0.15 * (end - time.time()), cache)
        _run_stage("warm", end, cache)
    if end - time.time() > _PRECISION_S:
        _run_stage("precision", end)
    _say(stage="done", seconds=time.time() - begun)


if __name__ == "__main__":
    commands.run(main)
