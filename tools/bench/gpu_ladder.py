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
import traceback
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from absl import flags

from olmoearth_jax import commands, overrides
from olmoearth_jax.config import ExperimentConfig
from olmoearth_jax.config_files import load_file
from olmoearth_jax.files import json_plain
from olmoearth_jax.train import assemble, cards, devices
from olmoearth_jax.train.metrics import read_metrics

from .arms import (
    BASELINE,
    MOST_TIME,
    Bench,
    Trial,
    chosen,
    in_turns,
    samples_and_flops,
    short,
    trials,
)
from .kernels import top_kernels
from .micro_step import config_path, matrix_rate
from .whole_steps import WholeSteps, first_step

flags.declare_key_flag("config")
_MINUTES = flags.DEFINE_float("minutes", 9.0, "Time for everything.", lower_bound=0.5)
_COMPILE = flags.DEFINE_float(
    "compile_s", 240.0, "Seconds of that for compiling the arms.", lower_bound=1.0
)
_ARMS = flags.DEFINE_list("arms", None, "Only these arms (today is always one).")
_TURNS = flags.DEFINE_float(
    "turn_s", 2.5, "Seconds of turns per arm and micro-step.", lower_bound=0.0
)
_DRAWS = flags.DEFINE_integer("draws", 96, "Micro-steps of the mix.", lower_bound=1)
_THREADS = flags.DEFINE_integer(
    "compile_threads", None, "Programs compiled at a time.", lower_bound=1
)
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
_SHORTEST_S = 5.0
"""With less time than that no stage is begun."""
_PRECISION_S = 240.0
"""What 500 steps of either type may need, and so must be left."""


_KEPT_S, _KEPT_SHARE = 30.0, 0.15
"""What is kept of the arms' time for whole steps and kernels: so many seconds, or that share."""


def _say(**fields: Any) -> None:
    # A loss that is not finite must not make a line that other readers of JSON refuse.
    print(json.dumps(json_plain({"benchmark": "gpu_ladder", **fields})), flush=True)


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


def compile_all(jobs: list[Trial], bench: Bench, until: float, last: float) -> None:
    """Compiles in threads what is ready by `until`, in order.

    What could not be ready in time, judged by the slowest so far, is not begun: a compilation
    cannot be ended, and would disturb the timing. The first job, without which there is nothing
    to time, is waited for until `last`.
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
    while not jobs[0].known and time.time() < last:
        time.sleep(0.1)


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
        memory = trial.memory_gb()
    except Exception as e:  # out of memory, say: the next arm may do
        return {"error": short(e), "compile_s": trial.compile_s}
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
        "memory_gb": memory,
        "compile_s": trial.compile_s,
    }


def arms_stage(end: float) -> None:
    """Compiles and times the arms, then whole steps and kernels."""
    clock = Clock()
    config = ladder_config()
    rate = matrix_rate(assemble.compute_dtype(config))
    bench = Bench.build(config, _DRAWS.value, _SEED.value, _CPU_OPTIONS if on_cpu() else {})
    bench.program(BASELINE, [bench.rungs[MOST_TIME]])  # makes the state that all share
    jobs, steps = list(trials(chosen(_ARMS.value, "--arms"), both=not on_cpu())), WholeSteps(bench)
    prepared = clock.lap()
    update = threading.Thread(target=steps.compile_update, daemon=True)
    update.start()
    left = end - time.time()
    until, last = time.time() + min(_COMPILE.value, 0.6 * left), time.time() + 0.8 * left
    compile_all(jobs, bench, until, last)
    ready = [t for t in jobs if t.known]
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
    kept = min(_KEPT_S, _KEPT_SHARE * (end - time.time()))
    found = time_arms(ready, bench, rate, end - kept)
    if found:
        update.join(max(0.0, end - kept - time.time()))
    for trial in found:
        _part("whole_steps", trial, end, lambda trial: steps.measure(trial))
    if found:
        _part("kernels", found[-1], end, lambda trial: {"top": _kernels(trial, bench)})


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
    base = _loaded([t for t in ready if t.arm is BASELINE], bench)
    if MOST_TIME not in base:
        _say(stage="arms", error="today's computation was not ready", device=_kind())
        return []
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


def _loaded(today: list[Trial], bench: Bench) -> dict[str, Trial]:
    """Today's trials that can run, by micro-step; tells of the others."""
    found = {}
    for trial in today:
        try:
            if not trial.error:
                trial.load(bench)
                found[trial.step] = trial
        except Exception as e:  # out of memory, say: the other may do
            trial.error, trial.inputs = short(e), []
        if trial.error:
            _say(stage="arms", micro_step=trial.step, error=trial.error, device=_kind())
    return found


def _part(stage: str, trial: Trial, end: float, measure: Callable[[Trial], dict]) -> None:
    """Prints the line of one more thing to know of an arm, or why there is none."""
    if time.time() > end - 5:
        found: dict[str, Any] = {"left_out": "no time left"}
    else:
        try:
            found = measure(trial)
        except Exception as e:  # out of memory, say: what comes next can still be told
            found = {"error": short(e)}
    _say(stage=stage, arm=trial.arm.name, device=_kind(), **found)


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

    def told(found: dict[str, Any]) -> None:
        _say(stage=f"first_step_{name}", device=_kind(), **found)

    first_step(config, _FIRST_RUNGS.value, _SEED.value, told)


def precision_stage(end: float) -> None:
    """500 steps of nano on the packaged sample, in bfloat16 and in float32."""
    if on_cpu():
        _say(stage="precision", left_out="needs an accelerator")
        return
    for others, precision in ((1, "bfloat16"), (0, "float32")):
        _say(stage="precision", precision=precision, **_losses(precision, end, others))


def _losses(precision: str, end: float, others: int) -> dict[str, Any]:
    """Mean losses of a run in this precision; of what it reached, if it does not end well.

    Args:
      end: when all must be done.
      others: runs that are still to come, for which as much time each is left.
    """
    left = max(0.0, end - time.time()) / (others + 1)
    with tempfile.TemporaryDirectory() as folder:
        given = {"precision": precision, "common.save_folder": folder,
                 "trainer.max_duration.value": 500,
                 "trainer.callbacks.tensorboard.enabled": False}  # fmt: skip
        train = commands.installed("launch.train")
        command = [sys.executable, "-m", train, f"--config={_TINY}", "--run_name=run"]
        command += [f"--config.{k}={v}" for k, v in given.items()]
        found: dict[str, Any] = {}
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=left)
            if done.returncode:
                found["error"] = done.stderr[-300:] or f"ended with code {done.returncode}"
        except subprocess.TimeoutExpired:
            found["error"] = f"not done in {left:.0f} s"
        lines = [r for path in Path(folder).rglob("metrics.jsonl") for r in read_metrics(path)]
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    means = {f"steps_{n}_to_{min(n + 99, len(losses))}": float(np.mean(losses[n - 1 : n + 99]))
             for n in range(1, len(losses) + 1, 100)}  # fmt: skip
    return {"steps": len(losses), "mean_loss": means, **found}


def _run_stage(name: str, end: float, cache: str | None = None) -> bool:
    """One stage in a process of its own, ended at `end`; whether it came to its own end."""
    left = end - time.time()
    if left < _SHORTEST_S:
        _say(stage=name, left_out="no time left")
        return False
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
        code = subprocess.run(command, env=env, timeout=left + 5).returncode
    except subprocess.TimeoutExpired:
        _say(stage=name, error=f"not done in {left:.0f} s")
        return False
    if code:
        _say(stage=name, error=f"ended with code {code}; see its message above")
    return not code


def main() -> None:
    if _STAGE.value is not None:
        _stage_alone(_STAGE.value)
    chosen(_ARMS.value, "--arms")  # an unknown arm is told at once
    begun = time.time()
    end = begun + 60 * _MINUTES.value
    _run_stage("arms", begun + 0.75 * (end - begun))
    with tempfile.TemporaryDirectory() as cache:
        if _run_stage("cold", end - 0.15 * (end - time.time()), cache):
            _run_stage("warm", end, cache)
        else:
            _say(stage="warm", left_out="the cache is not full")
    if end - time.time() > _PRECISION_S:
        _run_stage("precision", end)
    _say(stage="done", seconds=time.time() - begun)


def _stage_alone(name: str) -> NoReturn:
    """One stage, with which this process ends.

    Compilations that nobody waits for any more would hold up its end, after a mistake, too.
    """
    end, code = _END.value or time.time() + 60 * _MINUTES.value, 1
    try:
        if name == "arms":
            arms_stage(end)
        elif name == "precision":
            precision_stage(end)
        else:
            first_stage(name)
        code = 0
    except (ValueError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
    except Exception:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    commands.run_alone(main)
