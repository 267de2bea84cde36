"""Shows what a checkpoint holds: run, data, config, parameters with their norms, and a digest.

    python -m tools.inspect_checkpoint --checkpoint=local_output/my_run

Takes a run folder, its checkpoints folder or one step folder, saved on any number of devices, or a
folder of weights in the reference's layout. Damaged files are an error.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from absl import app, flags

from olmoearth_jax import commands
from olmoearth_jax.checkpoints import checkpoint, integrity
from olmoearth_jax.interop import checkpoints, weights
from olmoearth_jax.train.metrics import parameter_table

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "Run folder, checkpoints folder or step folder."
)
_CONFIG = flags.DEFINE_bool("show_config", True, "Print the config of the run.")


def report(step_folder: Path, show_config: bool = True) -> list[str]:
    """Lines that describe a checkpoint; the last is `digest: <hex>` of the parameters."""
    step_folder, meta = checkpoint.open_whole(step_folder)
    params = checkpoint.load_item(step_folder, "params")
    saved_on = meta["saved_on"]
    lines = [
        f"checkpoint: {step_folder}",
        f"step: {meta['step']} (epoch {meta['epoch']}, {meta['steps_into_epoch']} of "
        f"{meta['steps_per_epoch']} steps into it)",
        f"saved on: {saved_on['devices']} device(s), {saved_on['processes']} process(es)",
        f"seed: {meta['seed']}",
        f"dataset fingerprint: {meta['dataset_fingerprint'] or '(none)'}",
        f"normalisation: {', '.join(meta['normalization']) or '(none)'}",
        "files: whole",
    ]
    for name, leaves in meta["items"].items():
        values = sum(_size(shape) for shape, _ in leaves.values())
        lines.append(f"item {name}: {len(leaves)} arrays, {values:,} values")
    if show_config:
        lines += ["config:", json.dumps(meta["config"], indent=2)]
    lines += _table(params)
    digest = integrity.parameter_digest(params)
    if meta.get("digest") not in (None, digest):
        lines.append(f"WARNING: the parameters had the digest {meta['digest']} when saved")
    return [*lines, f"digest: {digest}"]


def _table(params: dict) -> list[str]:
    rows = parameter_table(params)
    width = max([len(row[0]) for row in rows], default=0)
    lines = [f"{'parameter':<{width}}  {'shape':>16}  {'dtype':>9}  {'values':>12}  norm"]
    lines += [f"{p:<{width}}  {s:>16}  {d:>9}  {n:>12,}  {norm}" for p, s, d, n, norm in rows]
    return [*lines, f"total: {sum(row[3] for row in rows):,} values"]


def report_reference(folder: Path, show_config: bool = True) -> list[str]:
    """The same lines for a folder of weights in the reference's layout."""
    loaded = checkpoints.from_reference(folder)
    lines = [f"weights in the reference's layout: {folder}"]
    if show_config:
        lines += ["config:", json.dumps(dataclasses.asdict(loaded.config), indent=2)]
    return [*lines, *_table(loaded.params), f"digest: {integrity.parameter_digest(loaded.params)}"]


def _size(shape: list[int]) -> int:
    count = 1
    for side in shape:
        count *= side
    return count


def main() -> None:
    if not _CHECKPOINT.value:
        raise app.UsageError("Give the checkpoint: --checkpoint=DIR.")
    folder = Path(_CHECKPOINT.value).expanduser()
    if weights.is_reference_folder(folder):
        lines = report_reference(folder, _CONFIG.value)
    else:
        lines = report(checkpoint.find_checkpoint(folder), _CONFIG.value)
    print("\n".join(lines))


if __name__ == "__main__":
    commands.run_alone(main, quiet=True)
