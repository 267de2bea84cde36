"""Builds and checks everything that needs neither data nor devices, and prints what it finds.

    python -m launch.dry_run --config=configs/base.py --run_name=check [--config.<path>=<value> ...]
    python -m launch.dry_run --config=configs/large.py --devices=8 --card=a100-40

First whether it fits, how long it takes and what to change if it does not fit; then the parameter
table, tokens and FLOPs per step, a memory estimate per device, and the shapes that will be
compiled. Exits 0, or 2 with every problem listed.
"""

from __future__ import annotations

import sys

from absl import flags

from olmoearth_jax import check
from olmoearth_jax.config import ConfigError, ExperimentConfig
from olmoearth_jax.mesh import mesh_sizes
from olmoearth_jax.modalities import closest
from olmoearth_jax.train import cards, estimate
from olmoearth_jax.train.loop import max_steps, stop_step
from olmoearth_jax.train.optimizer import warmup_steps

from . import _app, _plan, _samples
from ._plan import row

_DEVICES = flags.DEFINE_integer(
    "devices", None, "Devices to plan for; default: those of config.mesh, or 1."
)
_CARD = flags.DEFINE_string(
    "card", None, f"Accelerator that it must fit: {', '.join(cards.CARDS)}."
)
_FULL = flags.DEFINE_bool("full", False, "Print every setting of the run too.")


def planned_devices(cfg: ExperimentConfig, given: int | None) -> int:
    """Devices that the numbers are for.

    Raises:
      UserError: fewer than one.
    """
    if given is None:
        return max(cfg.mesh.data, 1) * max(cfg.mesh.fsdp, 1)
    if given < 1:
        raise _app.UserError(f"--devices must be at least 1, got {given}")
    return given


def report(
    cfg: ExperimentConfig, devices: int, samples: _samples.Samples, card: str | None = None
) -> list[str]:
    """The lines that are printed."""
    made = _plan.plan(cfg, devices, samples)
    lines = _plan.summary(made, card)
    lines += ["", "parameters", *_parameters(cfg)]
    lines += ["", "step", *_step(made)]
    grids = ", ".join(f"{g}x{g}: {t}" for g, t in made.timesteps.items())
    lines += ["", "crops", row("timesteps per grid", grids)]
    lines += ["", "memory per device (estimate, largest usual program)"]
    lines += [row(what, _bytes(size)) for what, size in made.memory_rows()]
    lines.append(row("total", _bytes(made.memory)))
    lines += ["", "programs to be compiled"]
    lines.append(
        "  sized for samples that lack nothing; a run sizes them from the dataset's own gaps"
    )
    for number, rung in enumerate(made.ladder):
        text = f"{rung.enc} encoder tokens, {rung.dec} decoder tokens, {sum(rung.patches)} patches"
        text += f", {rung.loc} locations" if made.spec.loc_bound else ""
        lines.append(row(f"step program {number}", text))
    sizes = cfg.data_loader.max_patch_size - cfg.data_loader.min_patch_size + 1
    return [*lines, row("resize programs (small, lazy)", f"at most {len(made.timesteps) * sizes}")]


def _parameters(cfg: ExperimentConfig) -> list[str]:
    rows = estimate.parameter_rows(cfg)
    trained, target = sum(n for _, n in rows), estimate.target_size(cfg)
    kind = "whole encoder" if estimate.full_target(cfg) else "patch projection only"
    lines = [row(part, f"{n:,}") for part, n in rows]
    lines.append(row("trained", f"{trained:,}"))
    lines.append(row(f"frozen target ({kind})", f"{target:,}"))
    reference = estimate.reference_total(cfg)
    if reference is not None:
        lines.append(row("as the reference counts them", f"{reference:,}"))
    return lines


def _step(made: _plan.Plan) -> list[str]:
    cfg, devices, spec, tokens = made.cfg, made.devices, made.spec, made.tokens
    steps = made.samples.steps_per_epoch(cfg)
    batch, views = cfg.data_loader.global_batch_size, cfg.data_loader.num_masked_views
    flops = estimate.step_flops(cfg, spec, tokens)
    lines = [
        row("samples", f"{batch}, in {cfg.groups_per_step} groups"),
        row("devices planned for", f"{devices}, {spec.samples} samples each per micro-step"),
        row("micro-steps", f"{batch // (spec.samples * devices)}"),
        row("encoded tokens", f"{tokens.encoded * views * batch:,.0f} ({tokens.encoded:.0f} each)"),
        row("decoded tokens", f"{tokens.decoded * views * batch:,.0f} ({tokens.decoded:.0f} each)"),
        row("FLOPs", f"{flops:.3g} ({flops / devices:.3g} per device)"),
        row(
            "forward FLOPs per view of a sample",
            f"{estimate.forward_flops(cfg, tokens):.3g} without patch projection",
        ),
    ]
    if steps is not None:
        total = stop_step(cfg.trainer, steps)
        lines += [row("steps per epoch", f"{steps:,}"), row("steps of the run", f"{total:,}")]
        horizon = max_steps(cfg.trainer.max_duration, steps)
        warm = warmup_steps(cfg.train_module.scheduler, horizon)
        if warm > total:
            lines.append(row("steps of warm-up", f"{warm:,}: the run never reaches lr"))
    return lines


def _bytes(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**29 else f"{size / 2**20:.1f} MiB"


def main(
    cfg: ExperimentConfig,
    devices: int | None = None,
    num_samples: int | None = None,
    card: str | None = None,
    full: bool = False,
) -> int:
    """Prints the report; 0 if the config can be run.

    Args:
      cfg: the config.
      devices: devices to plan for; None takes those of the mesh.
      num_samples: samples of a dataset that is not here; None goes by its folder's name.
      card: name of an accelerator that it must fit.
      full: print the resolved config too, at the end.

    Raises:
      ConfigError: it cannot; every problem is listed.
    """
    if card is not None and card not in cards.CARDS:
        raise _app.UserError(f"unknown --card={card}; {closest(card, cards.CARDS)}")
    found = check.problems(cfg)
    devices = planned_devices(cfg, devices)
    notes: tuple[str, ...] = ()
    if not found:
        try:
            mesh_sizes(cfg.mesh.data, cfg.mesh.fsdp, devices)
            samples = _samples.known(cfg, num_samples)
            found, notes = list(samples.problems), samples.notes
            print("\n".join(report(cfg, devices, samples, card)))
        except ValueError as e:
            found = [str(e)]
    if full:
        print("\nconfig\n" + cfg.to_json(), end="")
    for note in notes:
        print(f"note: {note}")
    sys.stdout.flush()
    if found:
        raise ConfigError(found)
    print("\nno problems found in the config" + ("" if full else "; --full prints every setting"))
    return 0


if __name__ == "__main__":
    _samples.define_flag()
    _app.run(
        lambda cfg: main(cfg, _DEVICES.value, flags.FLAGS.num_samples, _CARD.value, _FULL.value),
        require_valid=False,
    )
