"""Other ways to compute a training micro-step, each one change against what training does."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from olmoearth_jax.config import ExperimentConfig
from olmoearth_jax.losses import Objective
from olmoearth_jax.mesh import make_mesh
from olmoearth_jax.modalities import closest
from olmoearth_jax.model.variants import ALL, TODAY, Variant
from olmoearth_jax.stream.engine import Group, Prepared
from olmoearth_jax.stream.ladder import cheapest, fitting_rungs
from olmoearth_jax.stream.stream_shape import Rung, StreamSpec
from olmoearth_jax.train import assemble, build, estimate, probe
from olmoearth_jax.train.step import TrainProgram

from .micro_step import padded_tokens, program_bytes, random_pixels, real_flops

MOST_TIME, LARGEST = "most_time", "largest"
"""The two micro-steps: of the rung that an official mix spends most time in, and of the largest of
the others."""

GROUPS = 4
"""Groups of a pass: what the largest micro-batch holds."""


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to compute a micro-step."""

    name: str
    variant: Variant = TODAY
    """How the blocks are computed."""
    groups: int = 1
    """Groups of a micro-step: as many samples more, each group with a loss of its own."""
    attention: str | None = None
    """Kernels of the attention; None: those of the config."""
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """XLA's options."""
    both: bool = True
    """Timed on both micro-steps, not just on that of `MOST_TIME`."""

    def settings(self) -> dict[str, Any]:
        """What differs from today's."""
        changed = {k: v for k, v in dataclasses.asdict(self.variant).items() if v != _TODAY[k]}
        more = {"groups": self.groups} if self.groups > 1 else {}
        named = {} if self.attention is None else {"attention": self.attention}
        return changed | more | named | dict(self.options)


_TODAY = dataclasses.asdict(TODAY)

_LEAN = Variant(narrow=True, joined=True, norm_once=True, turn_again=True, open_again=True)


def _with(name: str, **options: Any) -> Arm:
    return Arm(name, options={f"xla_gpu_{k}": v for k, v in options.items()}, both=False)


BASELINE = Arm("today")

ARMS = (
    BASELINE,
    Arm("rotations_again", Variant(turn_again=True)),
    Arm("unrolled_all", Variant(unroll=ALL)),
    Arm("lean", _LEAN),
    Arm("narrow_stream", Variant(narrow=True)),
    Arm("two_groups", groups=2),
    Arm("joined_projections", Variant(joined=True)),
    Arm("norm_once", Variant(norm_once=True)),
    Arm("lean_unrolled_all", dataclasses.replace(_LEAN, unroll=ALL, open_again=False), both=False),
    Arm("four_groups", groups=4, both=False),
    _with("slices_fused", enable_dynamic_slice_fusion=True),
    _with("loop_doubled", enable_while_loop_unrolling="WHILE_LOOP_UNROLLING_DOUBLE_BUFFER"),
    Arm("hidden_kept", Variant(keep_hidden=True), both=False),
    Arm("open_again", Variant(open_again=True), both=False),
    Arm("unrolled_2", Variant(unroll=2), both=False),
    Arm("unrolled_4", Variant(unroll=4), both=False),
    _with("cublaslt", enable_cublaslt=True),
    _with("triton_any", triton_gemm_any=True),
    _with("no_autotuning", autotune_level=0),
    _with("cudnn_norm", enable_cudnn_layer_norm=True),
    _with("latency_hiding", enable_latency_hiding_scheduler=True),
    Arm("plain_attention", attention="xla", both=False),
)
"""In order of worth: what is compiled first, where there is not time for all."""


def chosen(names: Sequence[str] | None, flag: str) -> list[Arm]:
    """The arms of these names and today's, in order of worth; all without names.

    Raises:
      ValueError: there is no such arm; `flag` is where it was named.
    """
    known = [arm.name for arm in ARMS]
    for name in names or ():
        if name not in known:
            raise ValueError(f"{flag}: no arm {name!r}; {closest(name, known)}")
    return [arm for arm in ARMS if names is None or arm is BASELINE or arm.name in names]


def short(error: BaseException) -> str:
    """An error's class and the first line of what it says."""
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first[:200]}"


def scaled(rung: Rung, times: int) -> Rung:
    """The capacities for so many groups where `rung` holds one: the same share is padding."""
    return Rung(
        patches=tuple(n * times for n in rung.patches),
        sparse=tuple(n * times for n in rung.sparse),
        enc=rung.enc * times,
        dec=rung.dec * times,
        rows=tuple(tuple(c._replace(rows=c.rows * times) for c in plan) for plan in rung.rows),
        loc=rung.loc * times,
    )


@dataclasses.dataclass
class Bench:
    """What all arms share: config, stream, state, and per micro-step its rung and groups."""

    config: ExperimentConfig
    objective: Objective
    spec: StreamSpec
    rungs: dict[str, Rung]
    groups: dict[str, list[Group]]
    mesh: Any
    trainable: Any
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """XLA's options of every arm."""
    state: Any = None
    """Parameters, target, optimiser's state; made by the first program."""
    zeros: TrainProgram | None = None
    """The program whose empty sums all others start from."""

    @classmethod
    def build(
        cls, config: ExperimentConfig, draws: int, seed: int, options: Mapping[str, Any]
    ) -> Bench:
        """Sizes the ladder, picks the two rungs and draws groups that fill them."""
        mesh, objective = make_mesh(), build.build_objective(config)
        timesteps = estimate.most_timesteps(config)
        spec = build.stream_of(config, timesteps, mesh.size, objective)
        complete = [probe.complete(spec.modalities)]
        ladder = build.size_ladder(config, spec, timesteps, complete)
        chosen, masks = _choose(config, spec, ladder, timesteps, draws, seed)
        groups = {name: [_painted(config, g, seed + n) for n, g in enumerate(found)]
                  for name, found in masks.items()}  # fmt: skip
        trainable = assemble.trainable_leaves(config.model, objective.pools, objective)
        return cls(config, objective, spec, chosen, groups, mesh, trainable, options)

    def program(self, arm: Arm, rungs: Sequence[Rung]) -> TrainProgram:
        """The training program of an arm over these rungs (of one group)."""
        k = arm.groups
        spec = dataclasses.replace(self.spec, samples=self.spec.samples * k, groups=k)
        ladder = [scaled(rung, k) for rung in rungs]
        engine = assemble.stream_engine(self.config, spec, ladder, self.objective, self.mesh)
        attention = arm.attention or engine.forward.attention
        engine.forward = dataclasses.replace(
            engine.forward, variant=arm.variant, attention=attention
        )
        options = {**self.options, **arm.options}
        program = TrainProgram(
            self.config, engine, self.mesh, self.trainable, 1000, compiler_options=options
        )
        if self.zeros is None:
            self.state, self.zeros = program.init_state(), program
            program._zeros(self.state, engine.prepare(self.groups[MOST_TIME][:k])[0])
        program.programs["zeros"] = self.zeros.programs["zeros"]
        program._total_shardings = self.zeros._total_shardings
        return program


def _choose(config, spec, ladder, timesteps, draws: int, seed: int):
    """({micro-step: rung}, {micro-step: groups without pixels}) of an official mix."""
    strategies = build.masking_strategies(config)
    shapes = build.likely_shapes(config, timesteps, draws)
    complete = [probe.complete(spec.modalities)]
    found: dict[int, list[Group]] = {}
    for counts, need in probe.simulate(spec, complete, strategies, shapes, seed + 1, draws):
        number = cheapest(fitting_rungs(ladder, need))
        found.setdefault(number, []).append(counts[0].group)

    def cost(number: int) -> float:
        return estimate.forward_flops(config, padded_tokens(ladder[number], spec))

    most = max(found, key=lambda number: cost(number) * len(found[number]))
    others = [n for n in found if n != most] or [most]
    largest = max(others, key=cost)
    named = {MOST_TIME: most, LARGEST: largest}
    rungs = {name: ladder[number] for name, number in named.items()}
    # Where a mix has too few of a rung, some come again.
    groups = {
        name: [found[number][i % len(found[number])] for i in range(GROUPS)]
        for name, number in named.items()
    }
    return rungs, groups


def _painted(config: ExperimentConfig, group: Group, seed: int) -> Group:
    """The group with random pixels of a patch size that fits a tile."""
    grid, size = int(group["grid"]), len(group["position"])
    loader = config.data_loader
    sizes = [p for p in range(loader.min_patch_size, loader.max_patch_size + 1) if p * grid <= 256]
    patch = sizes[seed % len(sizes)]
    steps = group["timestamps"].shape[1]
    return {**group, **random_pixels(config, grid, steps, patch, size, seed)}


@dataclasses.dataclass
class Trial:
    """An arm on one of the micro-steps."""

    arm: Arm
    step: str
    """`MOST_TIME` or `LARGEST`."""
    program: TrainProgram | None = None
    compile_s: float = 0.0
    error: str = ""
    inputs: list[tuple] = dataclasses.field(default_factory=list)

    def compile(self, bench: Bench) -> None:
        """Makes the program; what goes wrong is kept as `error`."""
        begun = time.perf_counter()
        try:
            program = bench.program(self.arm, [bench.rungs[self.step]])
            first = self._prepared(bench, program)[0]
            program.warm_up(first, bench.state)
            self.program = program
        except Exception as e:  # one arm that does not compile must not end the others
            self.error = short(e)
        self.compile_s = time.perf_counter() - begun

    @property
    def known(self) -> bool:
        """Whether it is compiled, or known not to compile."""
        return self.program is not None or bool(self.error)

    def _prepared(self, bench: Bench, program: TrainProgram) -> list[Prepared]:
        return list(program.engine.prepare(bench.groups[self.step]))

    @property
    def compiled(self) -> Any:
        """The compiled micro-step."""
        assert self.program is not None
        return next(p for key, p in self.program.programs.items() if isinstance(key, Rung))

    def load(self, bench: Bench) -> None:
        """Moves the inputs of a pass to the device."""
        assert self.program is not None
        self.inputs = [prepared.inputs for prepared in self._prepared(bench, self.program)]
        jax.block_until_ready(self.inputs)

    def one_pass(self, bench: Bench) -> Any:
        """All groups' micro-steps; their sums, once they are there."""
        assert bench.zeros is not None
        state, key, total = bench.state, jax.random.key(0), bench.zeros.programs["zeros"]()
        for inputs in self.inputs:
            total = self.compiled(state["params"], state["target"], total, inputs, key)
        return jax.block_until_ready(total)

    def memory_gb(self) -> float:
        """What the program needs, its arguments included."""
        return program_bytes(self.compiled) / 1e9


def trials(arms: Sequence[Arm], both: bool = True) -> Iterator[Trial]:
    """Every arm on its micro-steps, in order; not `both`: on the largest only today's."""
    for arm in arms:
        yield Trial(arm, MOST_TIME)
        if arm is BASELINE or (arm.both and both):
            yield Trial(arm, LARGEST)


def samples_and_flops(bench: Bench, step: str) -> tuple[int, float]:
    """(samples, training operations on real tokens) of a pass."""
    groups = bench.groups[step]
    samples = sum(len(g["position"]) for g in groups)
    return samples, real_flops(bench.config, bench.spec, groups)


def in_turns(trial: Trial, base: Trial, bench: Bench, seconds: float) -> dict[str, Any]:
    """Times an arm and the baseline in turns: medians of a pass, their ratio, the loss of each."""
    own = trial.one_pass(bench)
    other = base.one_pass(bench)
    times: list[tuple[float, float]] = []
    until = time.perf_counter() + seconds
    while len(times) < 3 or (time.perf_counter() < until and len(times) < 50):
        times.append((_seconds(trial, bench), _seconds(base, bench)))
    ours, theirs = np.array(times).T
    return {
        "seconds": float(np.median(ours)),
        "baseline_seconds": float(np.median(theirs)),
        "ratio": float(np.median(ours / theirs)),
        "turns": len(times),
        "loss": _loss(own),
        "baseline_loss": _loss(other),
    }


def _loss(total: Any) -> float:
    return float(total["loss"]) / max(float(total["good"]), 1.0)


def _seconds(trial: Trial, bench: Bench) -> float:
    begun = time.perf_counter()
    trial.one_pass(bench)
    return time.perf_counter() - begun
