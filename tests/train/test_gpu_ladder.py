"""The benchmark of other ways to compute a training step: what it compares, and in what time."""

import dataclasses
import json
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

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
from tools.bench import absent_gpu, arms, gpu_ladder, whole_steps

NAMES = ("sentinel2_l2a", "worldcover")


@pytest.fixture(autouse=True)
def _flags():
    flags.FLAGS.mark_as_parsed()


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

    @property
    def known(self):
        return self.done

    def compile(self, bench):
        begun = time.perf_counter()
        time.sleep(self.seconds)
        self.compile_s, self.done = time.perf_counter() - begun, True


def test_what_cannot_be_ready_is_not_begun(monkeypatch):
    monkeypatch.setattr(gpu_ladder, "_threads", lambda: 2)
    jobs = [_Job(0.3) for _ in range(20)]
    begun = time.time()
    gpu_ladder.compile_all(jobs, None, begun + 1.0, begun + 1.0)  # pyright: ignore[reportArgumentType]
    assert time.time() - begun < 1.2
    done = [job.done for job in jobs]
    assert done == sorted(done, reverse=True) and 2 <= sum(done) <= 6


def test_one_that_hangs_holds_nothing_up(monkeypatch):
    monkeypatch.setattr(gpu_ladder, "_threads", lambda: 2)
    jobs = [_Job(30.0), _Job(0.1), _Job(0.1)]
    begun = time.time()
    gpu_ladder.compile_all(jobs, None, begun + 1.0, begun + 1.0)  # pyright: ignore[reportArgumentType]
    assert time.time() - begun < 1.5
    assert [job.done for job in jobs] == [False, True, True]


def test_the_first_is_waited_for(monkeypatch):
    monkeypatch.setattr(gpu_ladder, "_threads", lambda: 2)
    jobs = [_Job(0.8), _Job(30.0)]
    begun = time.time()
    gpu_ladder.compile_all(jobs, None, begun + 0.2, begun + 5.0)  # pyright: ignore[reportArgumentType]
    assert jobs[0].done and time.time() - begun < 2.0


def test_unknown_arms_are_told_by_both_programs(monkeypatch):
    assert [a.name for a in arms.chosen(["lean"], "--arms")] == ["today", "lean"]
    assert arms.chosen(None, "--arms") == list(arms.ARMS)
    with pytest.raises(ValueError, match=r"--arms: no arm 'leen'.*lean"):
        arms.chosen(["today", "leen"], "--arms")
    with flagsaver.flagsaver(absent_arms=["leen"]), pytest.raises(ValueError, match="absent_arms"):
        absent_gpu.main()


class _Silent(RuntimeError):
    """Says nothing, as some errors of XLA do."""

    def __init__(self):
        super().__init__()


class _Bench:
    """No program can be made of it."""

    rungs = dict.fromkeys((arms.MOST_TIME, arms.LARGEST))

    def program(self, arm, rungs):
        raise _Silent


@pytest.mark.parametrize("error", [_Silent(), ValueError("\n"), ValueError("a\nb")])
def test_an_error_is_one_line_whatever_it_says(error):
    assert arms.short(error) in ("_Silent: ", "ValueError: ", "ValueError: a")


def test_an_arm_that_fails_without_a_word_is_known():
    trial = arms.Trial(arms.BASELINE, arms.MOST_TIME)
    trial.compile(_Bench())  # pyright: ignore[reportArgumentType]
    assert trial.known and trial.error.startswith("_Silent")


@dataclasses.dataclass
class _Trial:
    """Stands for a compiled arm; `broken` names what fails."""

    arm: arms.Arm
    step: str
    broken: str = ""
    error: str = ""
    compile_s: float = 1.0
    inputs: list = dataclasses.field(default_factory=list)

    def load(self, bench):
        if self.broken == "load":
            raise _Silent

    def memory_gb(self):
        if self.broken == "memory":
            raise _Silent
        return 1.0


def _lines(capsys):
    def refuse(text):
        raise AssertionError(f"no JSON: {text}")

    out = capsys.readouterr().out.splitlines()
    return [json.loads(line, parse_constant=refuse) for line in out]


def _timed(monkeypatch, trials, end=60.0):
    def turns(trial, base, bench, seconds):
        ratio = 0.5 if trial.arm.name == "lean" else 1.0
        return {"seconds": ratio, "ratio": ratio, "loss": float("nan")}

    monkeypatch.setattr(gpu_ladder, "in_turns", turns)
    monkeypatch.setattr(gpu_ladder, "samples_and_flops", lambda bench, step: (4, 1e12))
    return gpu_ladder.time_arms(trials, cast(arms.Bench, None), 1e12, time.time() + end)


@pytest.mark.parametrize("broken", ["load", "memory"])
def test_an_arm_that_cannot_run_does_not_end_the_others(monkeypatch, capsys, broken):
    by_name = {arm.name: arm for arm in arms.ARMS}
    most = arms.MOST_TIME
    trials = [_Trial(arms.BASELINE, most), _Trial(arms.BASELINE, arms.LARGEST, "load")]
    trials += [_Trial(by_name["norm_once"], most, broken), _Trial(by_name["lean"], most)]
    with flagsaver.flagsaver(turn_s=0.0):
        found = _timed(monkeypatch, trials)
    assert [t.arm.name for t in found] == ["today", "lean"]
    largest, *lines = _lines(capsys)
    assert largest["micro_step"] == arms.LARGEST and "_Silent" in largest["error"]
    told = {line["arm"]: line for line in lines}
    assert list(told) == ["today", "norm_once", "lean"]
    assert "_Silent" in told["norm_once"]["error"]
    assert told["lean"]["ratio"] == 0.5 and told["lean"]["loss"] is None


def test_why_there_is_nothing_to_compare_with_is_told(monkeypatch, capsys):
    trials = [_Trial(arms.BASELINE, arms.MOST_TIME, error="XlaRuntimeError: no kernel")]
    assert _timed(monkeypatch, trials) == []
    assert "no kernel" in _lines(capsys)[0]["error"]


def test_one_part_that_fails_or_is_late_does_not_end_the_next(capsys):
    trial = cast(arms.Trial, _Trial(arms.BASELINE, arms.MOST_TIME))

    def fails(trial):
        raise _Silent

    gpu_ladder._part("whole_steps", trial, time.time() + 60, fails)
    gpu_ladder._part("whole_steps", trial, time.time() + 1, fails)
    gpu_ladder._part("kernels", trial, time.time() + 60, lambda trial: {"top": []})
    failed, late, kernels = _lines(capsys)
    assert "_Silent" in failed["error"] and late["left_out"] and kernels["top"] == []


def test_steps_that_fail_leave_a_whole_state():
    bench: Any = types.SimpleNamespace(
        state={"params": jnp.zeros(2)},
        zeros=types.SimpleNamespace(init_state=lambda: {"params": jnp.ones(2)}),
        groups={arms.MOST_TIME: []},
    )
    steps = whole_steps.WholeSteps(bench)
    with pytest.raises(ValueError, match="no update: it was not ready"):
        steps.measure(cast(arms.Trial, None))
    steps.compile_update()  # there is no program: an error of a thread nobody sees
    with pytest.raises(ValueError, match="no update: "):
        steps.measure(cast(arms.Trial, None))

    def update(state, total, lr):
        state["params"].delete()
        raise RuntimeError("RESOURCE_EXHAUSTED")

    steps.update = update
    trial: Any = types.SimpleNamespace(
        program=types.SimpleNamespace(programs={}), load=lambda b: None, one_pass=lambda b: None
    )
    with pytest.raises(RuntimeError, match="RESOURCE"):
        steps.measure(trial)
    assert float(bench.state["params"].sum()) == 2.0


def _train(folder_of, code):
    """A stand-in for the process of a run: writes 150 losses, then ends or is ended."""

    def run(command, timeout, **more):
        (folder,) = [c.partition("save_folder=")[2] for c in command if "save_folder=" in c]
        folder_of.append(timeout)
        lines = "".join(f'{{"step": {n}, "train/loss": 2.0}}\n' for n in range(1, 151))
        Path(folder, "metrics.jsonl").write_text(lines)
        if code is None:
            raise subprocess.TimeoutExpired(command, timeout)
        return subprocess.CompletedProcess(command, code, "", "")

    return run


@pytest.mark.parametrize("code", [None, 1, 0])
def test_a_run_that_ends_early_is_told_so_far_and_the_other_still_runs(monkeypatch, capsys, code):
    allowed = []
    monkeypatch.setattr(gpu_ladder, "on_cpu", lambda: False)
    monkeypatch.setattr(gpu_ladder.subprocess, "run", _train(allowed, code))
    gpu_ladder.precision_stage(time.time() + 100)
    lines = _lines(capsys)
    assert [line["precision"] for line in lines] == ["bfloat16", "float32"]
    for line in lines:
        assert line["mean_loss"] == {"steps_1_to_100": 2.0, "steps_101_to_150": 2.0}
        assert ("error" in line) == (code != 0)
    assert 45 < allowed[0] <= 50 and 90 < allowed[1] <= 100


def test_a_warm_start_is_not_told_of_a_cache_that_is_not_full(monkeypatch, capsys):
    begun = []

    def run(command, **more):
        begun.extend(c for c in command if c.startswith("--stage"))
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(gpu_ladder.subprocess, "run", run)
    with flagsaver.flagsaver(minutes=1.0):
        gpu_ladder.main()
    assert begun == ["--stage=arms", "--stage=cold"]
    assert [line["stage"] for line in _lines(capsys)] == ["arms", "cold", "warm", "done"]
    assert not gpu_ladder._run_stage("arms", time.time() + 1)
    assert _lines(capsys)[0]["left_out"] == "no time left" and len(begun) == 2


@pytest.mark.parametrize("error", [ValueError("a word"), RuntimeError("two"), None])
def test_a_stage_ends_whatever_is_still_being_compiled(monkeypatch, error):
    def stage(name):
        if error is not None:
            raise error

    codes = []
    monkeypatch.setattr(gpu_ladder, "first_stage", stage)
    monkeypatch.setattr(gpu_ladder.os, "_exit", codes.append)
    gpu_ladder._stage_alone("cold")
    assert codes == [int(error is not None)]


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


def test_a_missing_plugin_is_told(monkeypatch):
    def none(*args, **kwargs):
        raise RuntimeError("Unknown backend cuda")

    monkeypatch.setattr(absent_gpu.topologies, "get_topology_desc", none)
    with pytest.raises(ValueError, match=r"Unknown backend cuda.*pip install"):
        absent_gpu.absent_device()


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
