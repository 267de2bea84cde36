"""Builds and checks everything that needs neither data nor devices, and prints what it finds.

    python -m launch.dry_run --config=configs/base.py --run_name=check [--config.<path>=<value> ...]

Prints the resolved config, the parameter table, tokens and FLOPs per step, a memory estimate per
device, and the shapes that will be compiled. Exits 0, or 2 with every problem listed.
"""

from __future__ import annotations

import sys

from absl import flags

from olmoearth_jax import check
from olmoearth_jax.config import ConfigError, ExperimentConfig
from olmoearth_jax.mesh import mesh_sizes
from olmoearth_jax.train import build, estimate

from . import _app, _samples

_DEVICES = flags.DEFINE_integer(
    "devices", None, "Devices to plan for; default: those of config.mesh, or 1."
)


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


def report(cfg: ExperimentConfig, devices: int, samples: _samples.Samples) -> list[str]:
    """The lines that are printed below the config."""
    lines = ["", "parameters", *_parameters(cfg)]
    timesteps = estimate.grid_timesteps(cfg)
    most = estimate.most_timesteps(cfg)
    spec = build.stream_of(cfg, most, devices, build.build_objective(cfg))
    tokens = estimate.simulate_tokens(cfg, timesteps)
    lines += ["", "step", *_step(cfg, devices, spec, tokens, samples.steps_per_epoch(cfg))]
    grids = ", ".join(f"{g}x{g}: {t}" for g, t in timesteps.items())
    lines += ["", "crops", _row("timesteps per grid", grids)]
    ladder = build.size_ladder(cfg, spec, most, [])
    usual = ladder[max(len(ladder) - 2, 0)]
    half = cfg.precision != "float32"  # 'auto' is bfloat16 on the GPUs that are planned for
    lines += ["", "memory per device (estimate, largest usual program)"]
    _, fsdp = mesh_sizes(cfg.mesh.data, cfg.mesh.fsdp, devices)
    rows = estimate.memory_rows(cfg, spec, usual, half, fsdp)
    lines += [_row(what, _bytes(size)) for what, size in rows]
    lines.append(_row("total", _bytes(sum(size for _, size in rows))))
    lines += ["", "programs to be compiled"]
    if cfg.engine == "dense":
        return [*lines, _row("dense engine", f"one per grid and timesteps: {len(timesteps)}")]
    lines.append(
        "  sized for samples that lack nothing; a run sizes them from the dataset's own gaps"
    )
    for number, rung in enumerate(ladder):
        text = f"{rung.enc} encoder tokens, {rung.dec} decoder tokens, {sum(rung.patches)} patches"
        text += f", {rung.loc} locations" if spec.loc_bound else ""
        lines.append(_row(f"step program {number}", text))
    resizes = len(timesteps) * (cfg.data_loader.max_patch_size - cfg.data_loader.min_patch_size + 1)
    return [*lines, _row("resize programs (small, lazy)", f"at most {resizes}")]


def _parameters(cfg: ExperimentConfig) -> list[str]:
    rows = estimate.parameter_rows(cfg)
    trained, target = sum(n for _, n in rows), estimate.target_size(cfg)
    kind = "whole encoder" if estimate.full_target(cfg) else "patch projection only"
    lines = [_row(part, f"{n:,}") for part, n in rows]
    lines.append(_row("trained", f"{trained:,}"))
    lines.append(_row(f"frozen target ({kind})", f"{target:,}"))
    reference = estimate.reference_total(cfg)
    if reference is not None:
        lines.append(_row("as the reference counts them", f"{reference:,}"))
    return lines


def _step(
    cfg: ExperimentConfig, devices: int, spec, tokens: estimate.Tokens, steps: int | None
) -> list[str]:
    batch, views = cfg.data_loader.global_batch_size, cfg.data_loader.num_masked_views
    flops = estimate.step_flops(cfg, spec, tokens)
    lines = [
        _row("samples", f"{batch}, in {cfg.groups_per_step} groups"),
        _row("devices planned for", f"{devices}, {spec.samples} samples each per micro-step"),
        _row("micro-steps", f"{batch // (spec.samples * devices)}"),
        _row(
            "encoded tokens", f"{tokens.encoded * views * batch:,.0f} ({tokens.encoded:.0f} each)"
        ),
        _row(
            "decoded tokens", f"{tokens.decoded * views * batch:,.0f} ({tokens.decoded:.0f} each)"
        ),
        _row("FLOPs", f"{flops:.3g} ({flops / devices:.3g} per device)"),
        _row(
            "forward FLOPs per view of a sample",
            f"{estimate.forward_flops(cfg, tokens):.3g} without patch projection",
        ),
    ]
    if steps is not None:
        total = build.max_steps(cfg.trainer.max_duration, steps)
        lines += [_row("steps per epoch", f"{steps:,}"), _row("steps of the run", f"{total:,}")]
    return lines


def _row(name: str, value: str) -> str:
    return f"  {name:<46} {value}"


def _bytes(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**29 else f"{size / 2**20:.1f} MiB"


def main(cfg: ExperimentConfig, devices: int | None = None, num_samples: int | None = None) -> int:
    """Prints the report; 0 if the config can be run.

    Args:
      cfg: the config.
      devices: devices to plan for; None takes those of the mesh.
      num_samples: samples of a dataset that is not here; None goes by its folder's name.

    Raises:
      ConfigError: it cannot; every problem is listed.
    """
    print(cfg.to_json(), end="")
    sys.stdout.flush()
    found = check.problems(cfg)
    devices = planned_devices(cfg, devices)
    if not found:
        try:
            mesh_sizes(cfg.mesh.data, cfg.mesh.fsdp, devices)
            samples = _samples.known(cfg, num_samples)
            print("\n".join(report(cfg, devices, samples)))
            found = list(samples.problems)
            for note in samples.notes:
                print(f"note: {note}")
        except ValueError as e:
            found = [str(e)]
    if found:
        raise ConfigError(found)
    print("\nno problems found")
    return 0


if __name__ == "__main__":
    _samples.define_flag()
    _app.run(lambda cfg: main(cfg, _DEVICES.value, flags.FLAGS.num_samples), require_valid=False)
