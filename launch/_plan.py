"""What a run needs and takes, in the order in which people ask: the head of `launch.dry_run`."""

from __future__ import annotations

import dataclasses
from typing import Any

from olmoearth_jax.config import ExperimentConfig
from olmoearth_jax.mesh import mesh_sizes
from olmoearth_jax.model.versions import version_of
from olmoearth_jax.stream.stream_shape import Rung, StreamSpec
from olmoearth_jax.train import build, cards, estimate
from olmoearth_jax.train.loop import stop_step

from . import _samples

MEMORY_FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that is computed of a config before it runs."""

    cfg: ExperimentConfig
    devices: int
    samples: _samples.Samples
    timesteps: dict[int, int]
    spec: StreamSpec
    ladder: tuple[Rung, ...]
    tokens: estimate.Tokens

    @property
    def half(self) -> bool:
        """Products in bfloat16: 'auto' is that on the cards that are planned for."""
        return self.cfg.precision != "float32"

    def memory_rows(self, cfg: ExperimentConfig | None = None) -> list[tuple[str, float]]:
        """(what, bytes) of the largest usual program on a device, of this or another config."""
        cfg = cfg or self.cfg
        _, fsdp = mesh_sizes(cfg.mesh.data, cfg.mesh.fsdp, self.devices)
        usual = self.ladder[max(len(self.ladder) - 2, 0)]
        return estimate.memory_rows(cfg, self.spec, usual, self.half, fsdp)

    @property
    def memory(self) -> float:
        return sum(size for _, size in self.memory_rows())

    @property
    def steps(self) -> int | None:
        """Steps of the run, if they are known."""
        trainer, steps = self.cfg.trainer, self.samples.steps_per_epoch(self.cfg)
        durations = (trainer.max_duration, trainer.hard_stop)
        if steps is None and any(d is not None and d.unit == "epochs" for d in durations):
            return None
        return stop_step(trainer, steps or 1)


def plan(cfg: ExperimentConfig, devices: int, samples: _samples.Samples) -> Plan:
    """Sizes the programs of a run, by drawing masks.

    Raises:
      ValueError: the devices do not fit the config.
    """
    timesteps, most = estimate.grid_timesteps(cfg), estimate.most_timesteps(cfg)
    spec = build.stream_of(cfg, most, devices, build.build_objective(cfg))
    ladder = build.size_ladder(cfg, spec, most, [])
    tokens = estimate.simulate_tokens(cfg, timesteps)
    return Plan(cfg, devices, samples, timesteps, spec, ladder, tokens)


def summary(made: Plan, card: str | None) -> list[str]:
    """The lines that answer: does it fit, how long does it take, what does it need?

    Args:
      made: the plan.
      card: name in `cards.CARDS`; None asks which of them fit, and tells the time of the one
        that rates were measured on.
    """
    cfg = made.cfg
    trained = sum(n for _, n in estimate.parameter_rows(cfg))
    size = cfg.model.encoder_config
    lines = ["summary"]
    lines.append(
        row("model", f"{version_of(cfg.model)}, {size.depth} blocks of {size.embedding_size}, "
            f"{trained:,} parameters trained")
    )  # fmt: skip
    lines += [row("steps of the run", _steps(made))]
    lines.append(row("memory per device", f"{_gib(made.memory)} (estimate, "
                     f"{made.devices} device{'s' * (made.devices > 1)})"))  # fmt: skip
    lines += _fits(made, card) if card else _cards(made)
    chosen = card or cards.MEASURED_CARD
    lines += _time(made, chosen)
    if card and cards.fit(card, made.memory) == "no":
        lines += ["", f"to make it fit {card}", *_advice(made, card)]
    return lines


def _steps(made: Plan) -> str:
    batch = made.cfg.data_loader.global_batch_size
    if made.steps is None:
        unit = made.cfg.trainer.max_duration.value
        return f"{unit} epochs of a dataset of unknown size, {batch} samples a step"
    return f"{made.steps:,} of {batch} samples"


def _cards(made: Plan) -> list[str]:
    found: dict[str, list[str]] = {"yes": [], "set": [], "no": []}
    for name in cards.CARDS:
        found[cards.fit(name, made.memory)].append(name)
    lines = [row("fits", ", ".join(found["yes"]) or "none of the cards known here")]
    if found["set"]:
        lines.append(row(f"with {MEMORY_FRACTION}=0.92", ", ".join(found["set"])))
    if found["no"]:
        lines.append(row("does not fit", ", ".join(found["no"]) + " (--card=NAME says what does)"))
    return lines


def _fits(made: Plan, card: str) -> list[str]:
    held = cards.CARDS[card].memory_gib
    said = {
        "yes": f"yes, {_gib(made.memory)} of {held:g} GiB",
        "set": f"only with {MEMORY_FRACTION}=0.92 in the environment: {_gib(made.memory)} of "
        f"{held:g} GiB, of which JAX takes three quarters by itself",
        "no": f"no: {_gib(made.memory)}, and the card has {held:g} GiB",
    }[cards.fit(card, made.memory)]
    return [row(f"fits {card}", said)]


def _time(made: Plan, card: str) -> list[str]:
    cfg = made.cfg
    batch, views = cfg.data_loader.global_batch_size, cfg.data_loader.num_masked_views
    flops = estimate.step_flops(cfg, made.spec, made.tokens) / batch
    official = (
        version_of(cfg.model) == "v1_2" and cfg.model.encoder_config.embedding_size == 768
        and cfg.model.encoder_config.depth == 12 and views == 2 and cfg.remat == "none"
    )  # fmt: skip
    rate = cards.speed(card, flops, official)
    slow, fast = (batch / (r * made.devices) for r in (rate.low, rate.high))
    where = f"{made.devices} x {card}"
    lines = [row(f"samples per second, {where}", _span(
        rate.low * made.devices, rate.high * made.devices, "{:,.0f}"))]  # fmt: skip
    lines.append(row("seconds per step", _span(fast, slow, "{:.2g}")))
    if made.steps is not None:
        hours = [made.steps * s / 3600 for s in (fast, slow)]
        lines.append(row("hours of training", _span(hours[0], hours[1], "{:,.3g}")))
        lines.append(
            row(
                "hours x devices",
                _span(hours[0] * made.devices, hours[1] * made.devices, "{:,.3g}"),
            )
        )
    cores = [rate.high * s for s in cards.READER_CORES_S]
    lines.append(row("cores that read, per device", f"about {cores[0]:.0f}, or {cores[1]:.0f} for "
                     "rechunked files"))  # fmt: skip
    if rate.measured and made.devices == 1:
        lines.append("  (measured: docs/performance.md)")
    else:
        lines.append(
            f"  (scaled, not measured: from {cards.MEASURED_SAMPLES_PER_S:g} samples/s of "
            f"{cards.MEASURED_MODEL} on one {cards.MEASURED_CARD}, by operations, by rates of "
            "products\n  and of memory, and by devices as if they lost nothing; small models use a "
            "card less well)"
        )
    return lines


def _advice(made: Plan, card: str) -> list[str]:
    """Single changes, each with the memory that it leaves, those that fit first."""
    tried: list[tuple[str, float]] = []
    for remat in ("dots", "block"):
        if made.cfg.remat == "none" or (made.cfg.remat, remat) == ("dots", "block"):
            changed = dataclasses.replace(made.cfg, remat=remat)
            tried.append((f"--config.remat={remat}", _total(made, changed)))
    fsdp = made.devices
    if fsdp > 1 and made.cfg.mesh.fsdp == 1:
        mesh = dataclasses.replace(made.cfg.mesh, data=1, fsdp=fsdp)
        tried.append((f"--config.mesh.data=1 --config.mesh.fsdp={fsdp}",
                      _total(made, dataclasses.replace(made.cfg, mesh=mesh))))  # fmt: skip
    group = made.cfg.train_module.rank_microbatch_size
    if group % 2 == 0 and group > 2:
        # All but the state goes with the samples that are at work at a time.
        state = sum(size for what, size in made.memory_rows() if _is_state(what))
        half = state + (made.memory - state) / 2
        tried.append((
            f"--config.train_module.rank_microbatch_size={group // 2} "
            "(fewer negatives: another loss)", half,
        ))  # fmt: skip
    limit = cards.LARGEST_SHARE * cards.CARDS[card].memory_gib * cards.GIB
    fits = [(text, size) for text, size in tried if size <= limit]
    lines = [f"  {text}: about {_gib(size)}" for text, size in fits]
    if not lines and tried:
        lines = ["  no single change is enough; these help, alone or together:"]
        lines += [f"  {text}: about {_gib(size)}" for text, size in tried]
    larger = [n for n in cards.CARDS if cards.fit(n, made.memory) != "no"]
    return [*lines, f"  or a larger card: {', '.join(larger)}"] if larger else lines


def _is_state(what: str) -> bool:
    return what.startswith(("parameters", "target (float32)"))


def _total(made: Plan, cfg: ExperimentConfig) -> float:
    return sum(size for _, size in made.memory_rows(cfg))


def _span(low: float, high: float, form: str) -> str:
    first, last = form.format(low), form.format(high)
    return first if first == last else f"{first} to {last}"


def _gib(size: float) -> str:
    return f"{size / cards.GIB:.1f} GiB"


def row(name: str, value: Any) -> str:
    """A line of the report."""
    return f"  {name:<46} {value}"
