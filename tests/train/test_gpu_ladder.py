"""The benchmark of other ways to compute a training step: what it compares, and in what time."""

import json
import subprocess
import sys
import time
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from olmoearth_jax import losses
from olmoearth_jax.config import ExperimentConfig
from olmoearth_jax.mesh import make_mesh
from olmoearth_jax.model import latent_mim
from olmoearth_jax.stream.forward import Objective
from olmoearth_jax.stream.ladder import build_ladder
from olmoearth_jax.stream.token_counts import count_tokens, needs
from olmoearth_jax.train import cards
from olmoearth_jax.train.assemble import stream_engine
from tests.engines.compare import evaluate, random_params
from tests.stream.builders import make_group, make_spec, small_model
from tools.bench import arms, gpu_ladder

NAMES = ("sentinel2_l2a", "worldcover")


def test_arms_are_told_apart():
    names = [arm.name for arm in arms.ARMS]
    assert len(set(names)) == len(names) and arms.ARMS[0] is arms.BASELINE
    settings = [json.dumps(arm.settings(), sort_keys=True) for arm in arms.ARMS]
    assert len(set(settings)) == len(settings) and settings[0] == "{}"
    # About twenty programs, as many as a quarter of an hour allows.
    assert 20 <= len(list(arms.trials(arms.ARMS))) <= 36


def test_xla_knows_the_options():
    traced = jax.jit(lambda x: x + 1).lower(jnp.zeros(2))
    for arm in arms.ARMS:
        traced.compile(dict(arm.options))


def test_more_groups_at_a_time_are_the_same_step():
    rng = np.random.default_rng(0)
    config = small_model(NAMES)
    first, strategy = make_group(rng, 2, 2, 2, first=0, names=NAMES)
    second, _ = make_group(rng, 2, 1, 2, first=2, names=NAMES)
    groups = [first, second]
    spec = make_spec(config, strategy, 2)
    found = [needs([count_tokens(g, spec)], np.zeros(2, int), spec, 1) for g in groups]
    (rung, *_) = build_ladder(spec, found, 1)
    term = cast(losses.TokenLoss, losses.build(_loss()))
    objective = Objective(term, losses.InfoNCE(0.1, 0.1))
    settings = ExperimentConfig(model=config, precision="float32")
    mesh = make_mesh(devices=jax.devices()[:1])
    params = random_params(config, 0)
    target = latent_mim.target_params(random_params(config, 1))
    results = []
    for times in (1, 2):
        wide = make_spec(config, strategy, 2 * times, groups=times)
        ladder = [arms.scaled(rung, times)]
        engine = stream_engine(settings, wide, ladder, objective, mesh)
        assert len(engine.prepare(groups)) == 2 // times
        results.append(evaluate(engine, groups, params, target))
    (one, _, grads), (both, _, wide_grads) = ((r[0][0], r[0][1], r[1]) for r in results)
    assert both == pytest.approx(one, rel=1e-6)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(wide_grads), strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=2e-5 * max(1e-3, np.abs(a).max()))


def _loss():
    return {"type": "modality_patch_discrimination_new", "tau": 0.1}


class _Job:
    """Takes so long to compile."""

    def __init__(self, seconds: float):
        self.seconds, self.compile_s, self.done = seconds, 0.0, False

    def compile(self, bench):
        begun = time.perf_counter()
        time.sleep(self.seconds)
        self.compile_s, self.done = time.perf_counter() - begun, True


def test_what_cannot_be_ready_is_not_begun(monkeypatch):
    monkeypatch.setattr(gpu_ladder, "_threads", lambda: 2)
    jobs = [_Job(0.3) for _ in range(20)]
    begun = time.time()
    gpu_ladder.compile_all(jobs, None, begun + 1.0)  # pyright: ignore[reportArgumentType]
    assert time.time() - begun < 1.2
    done = [job.done for job in jobs]
    assert done == sorted(done, reverse=True) and 2 <= sum(done) <= 6


def test_one_that_hangs_holds_nothing_up(monkeypatch):
    monkeypatch.setattr(gpu_ladder, "_threads", lambda: 2)
    jobs = [_Job(30.0), _Job(0.1), _Job(0.1)]
    begun = time.time()
    gpu_ladder.compile_all(jobs, None, begun + 1.0)  # pyright: ignore[reportArgumentType]
    assert time.time() - begun < 1.5
    assert [job.done for job in jobs] == [False, True, True]


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA A100 80GB PCIe", "a100-80"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA A10G", "a10g"),
        ("NVIDIA L4", "l4"),
        # Slower, or not known: no share of a rate they do not have.
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA L40", None),
        ("cpu", None),
        ("TPU v4", None),
    ],
)
def test_cards_by_what_drivers_call_them(kind, name):
    assert cards.card_of(kind) == name


def test_every_card_has_a_driver_name():
    assert set(cards._KINDS.values()) == set(cards.CARDS)


@pytest.mark.slow
def test_the_ladder_runs_without_an_accelerator():
    command = [sys.executable, "-m", "tools.bench.gpu_ladder", "--minutes=20", "--turn_s=0.1"]
    command += ["--compile_s=600", "--arms=rotations_again,two_groups"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1300)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert not [line for line in lines if "error" in line]
    compiled, *rest = lines
    assert compiled["stage"] == "compiled" and compiled["left_out"] == []
    told = {line["arm"]: line for line in rest if line["stage"] == "arm"}
    assert set(told) == {"today", "rotations_again", "two_groups"}
    for line in told.values():
        assert line["loss"] == pytest.approx(line["baseline_loss"], rel=1e-5)
        assert line["seconds"] > 0 and line["memory_gb"] > 0 and line["samples_per_s"] > 0
    stages = [line["stage"] for line in rest]
    assert {"whole_steps", "kernels", "first_step_cold", "first_step_warm", "done"} <= set(stages)
