"""A small real training program: linear regression by momentum descent, for tests of the loop.

Run as a script it trains in a process of its own: ``python train_toy.py '{"run_dir": ...}'``.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from olmoearth_jax.checkpoints.checkpoint import RunInfo
from olmoearth_jax.config import CommonConfig, Duration, ExperimentConfig, ProfileConfig
from olmoearth_jax.platforms import HostMissing
from olmoearth_jax.train.loop import Extras, Summary, train
from olmoearth_jax.train.metrics import read_metrics, without_timing
from olmoearth_jax.train.signals import Abandoned

INPUTS, OUTPUTS = 16, 8


def hang(where: str) -> None:
    """Says so, and returns after an hour."""
    print(f"in {where}", flush=True)
    time.sleep(3600)


@dataclasses.dataclass
class ToyReport:
    metrics: dict[str, jax.Array]
    host: dict[str, float]
    bad_ids: list[str]


class ToyProgram:
    """Weights spread over the devices; the state is donated, as in real training."""

    def __init__(
        self,
        width: int = OUTPUTS,
        step_seconds: float = 0.0,
        slow_step: int | None = None,
    ):
        self.width, self.step_seconds, self.slow_step = width, step_seconds, slow_step
        self.mesh = Mesh(np.array(jax.devices()), ("data",))
        self.compile_count = 0

    def _shapes(self) -> dict[str, Any]:
        def leaf(*shape):
            spec = PartitionSpec("data") if shape and shape[0] % len(jax.devices()) == 0 else None
            sharding = NamedSharding(self.mesh, spec or PartitionSpec())
            return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)

        params = {"dense": {"kernel": leaf(INPUTS, self.width), "bias": leaf(self.width)}}
        moments = {"dense": {"kernel": leaf(INPUTS, self.width), "bias": None}}
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        count = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
        target = {"projection": leaf(4, 2)}
        opt_state = {"momentum": moments, "count": count}
        return {"params": params, "target": target, "opt_state": opt_state, "step": count}

    def abstract_state(self):
        return self._shapes()

    def init_state(self):
        rng = np.random.Generator(np.random.Philox(7))

        def make(like):
            value = rng.normal(size=like.shape) if like.dtype == jnp.float32 else np.zeros(())
            return jax.device_put(np.asarray(value, like.dtype), like.sharding)

        return jax.tree.map(make, self._shapes())

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
    def _update(self, state, x, y):
        def loss(params):
            return jnp.mean((x @ params["dense"]["kernel"] + params["dense"]["bias"] - y) ** 2)

        value, grads = jax.value_and_grad(loss)(state["params"])
        good = jnp.isfinite(value)
        momentum = state["opt_state"]["momentum"]["dense"]["kernel"]
        new = 0.9 * momentum + grads["dense"]["kernel"]
        dense = state["params"]["dense"]
        stepped = {
            "kernel": dense["kernel"] - 0.05 * new,
            "bias": dense["bias"] - 0.05 * grads["dense"]["bias"],
        }
        pick = functools.partial(jax.tree.map, lambda a, b: jnp.where(good, a, b))
        count = state["opt_state"]["count"] + good
        return {
            "params": {"dense": pick(stepped, dense)},
            "target": state["target"],
            "opt_state": {
                "momentum": {"dense": {"kernel": pick(new, momentum), "bias": None}},
                "count": count,
            },
            "step": state["step"] + 1,
        }, {"train/loss": value, "train/good_micro_steps": good.astype(jnp.int32)}

    def step(self, state, groups, step, gate=lambda: None):
        self.compile_count = 1
        if step == self.slow_step:
            hang("program")
        time.sleep(self.step_seconds)
        gate()
        x, y = groups[0]["x"], groups[0]["y"][:, : self.width]
        state, metrics = self._update(state, x, y)
        host = {"samples": float(len(x)), "encoded_tokens": 3.0 * len(x), "padded_share": 0.25}
        return state, ToyReport(metrics, host, groups[0]["bad"])


class ToyStream:
    """Batches that are pure functions of the step."""

    steps_per_epoch = 7

    def __init__(self, nan_steps=(), hang_at: int | None = None):
        self.nan_steps, self.hang_at = nan_steps, hang_at

    def batches(self, start_step: int, stop_step: int) -> Iterator[list[dict[str, Any]]]:
        for step in range(start_step + 1, stop_step + 1):
            if step == self.hang_at:
                hang("stream")
            rng = np.random.Generator(np.random.Philox(key=[3, step]))
            x = rng.normal(size=(4, INPUTS)).astype(np.float32)
            y = rng.normal(size=(4, OUTPUTS)).astype(np.float32)
            bad = step in self.nan_steps
            yield [{"x": x * np.nan if bad else x, "y": y, "bad": [f"sample_{step}"] * bad}]


class ToyEvaluation:
    """Evaluates every few steps, slowly if asked, and listens to the stop question."""

    def __init__(self, interval: int, seconds: float = 0.0):
        self.interval, self.seconds, self.steps = interval, seconds, []

    def due(self, step: int) -> bool:
        return step % self.interval == 0

    def __call__(self, state, step, stop):
        until = time.monotonic() + self.seconds
        print("in evaluation", flush=True)
        while time.monotonic() < until:
            time.sleep(0.02)
            if stop():
                return None
        self.steps.append(step)
        return {"eval/norm": float(jnp.sum(state["params"]["dense"]["kernel"] ** 2))}


def config(run_dir: Path, max_steps: int = 20, **changes: Any) -> ExperimentConfig:
    """Settings of a toy run; keyword arguments are those of the trainer and its callbacks."""
    cfg = ExperimentConfig(common=CommonConfig(save_folder=str(run_dir)))
    cfg.trainer.max_duration = Duration(max_steps, "steps")
    given = {"metrics_collect_interval": 3, "save_interval": 10, "ephemeral_save_interval": 4}
    callbacks = cfg.trainer.callbacks
    callbacks.tensorboard.enabled = changes.pop("tensorboard", False)
    if steps := changes.pop("hard_stop", None):
        cfg.trainer.hard_stop = Duration(steps, "steps")
    if steps := changes.pop("profile_steps", None):
        cfg.trainer.profile = ProfileConfig(True, *steps)
    for name, value in (given | changes).items():
        (part,) = (p for p in (cfg.trainer, callbacks.checkpointer) if hasattr(p, name))
        setattr(part, name, value)
    return cfg


def info(**changes: Any) -> RunInfo:
    written = {"model": {"width": OUTPUTS}, "trainer": {"save_interval": 10}}
    about: dict[str, Any] = {
        "config": written,
        "normalization": {"sentinel2": [1.0, 2.0]},
        "dataset_fingerprint": "abc",
        "dataset_content": "def",
        "steps_per_epoch": ToyStream.steps_per_epoch,
    }
    return RunInfo(**about | changes)


def run(run_dir: Path, max_steps: int = 20, *, program=None, stream=None, **changes) -> Summary:
    """Trains the toy; keyword arguments change its settings, what is known of it, or extras."""

    def taken(kind: type) -> dict[str, Any]:
        names = {f.name for f in dataclasses.fields(kind)} & set(changes)
        return {name: changes.pop(name) for name in names}

    about = info(**taken(RunInfo))
    extras = Extras(**{"say": changes.pop("lines", []).append} | taken(Extras))
    return train(
        program or ToyProgram(),
        stream or ToyStream(),
        config(run_dir, max_steps, **changes),
        about,
        extras,
    )


def lines_of(run_dir: Path) -> list[dict[str, Any]]:
    """What a run wrote into metrics.jsonl, timing aside."""
    return [without_timing(record) for record in read_metrics(run_dir)]


def from_flags(arguments: list[str]) -> dict[str, Any]:
    """Settings from the flags that tools.kill_test gives to launch.train, and --steps."""
    given = dict(argument.lstrip("-").split("=", 1) for argument in arguments)
    place = {"coordinator_address": given["coordinator"]}
    place |= {name: int(given[name]) for name in ("num_processes", "process_id")}
    return {
        "run_dir": given["config.common.save_folder"],
        "max_steps": int(given["steps"]),
        "metrics_collect_interval": 1,
        "program": {"step_seconds": 0.02},
        "distributed": place,
    }


def main() -> int:
    """Trains in this process with settings from a JSON argument; prints the summary."""
    settings = json.loads(sys.argv[1]) if sys.argv[1][0] == "{" else from_flags(sys.argv[1:])
    if hosts := settings.pop("distributed", None):
        jax.distributed.initialize(**hosts)
    program = ToyProgram(**settings.pop("program", {}))
    stream = ToyStream(**settings.pop("stream", {}))
    evaluation = ToyEvaluation(*every) if (every := settings.pop("evaluate", None)) else None
    run_dir, max_steps = Path(settings.pop("run_dir")), settings.pop("max_steps")
    try:
        summary = run(
            run_dir, max_steps, program=program, stream=stream, evaluation=evaluation, say=None,
            **settings,
        )  # fmt: skip
    except Abandoned:
        print("abandoned", flush=True)
        return 0
    except HostMissing as error:
        print(error, flush=True)
        return 3
    print(json.dumps(dataclasses.asdict(summary)), flush=True)
    if hosts:
        jax.distributed.shutdown()
    return 0 if summary.saved else 1


if __name__ == "__main__":
    os._exit(main())  # as launch.train does: a stuck reader thread must not keep the process alive
