"""FLOPs that the ladder computes over the FLOPs of real tokens, over simulated official draws.

    python -m tools.bench.padding --config=configs/base.py --devices=8

The ladder is sized with one seed and judged with another. Nothing runs on a device. Prints one
JSON line; `--h5py_dir` takes the gaps of a data set instead of complete samples.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from absl import flags

from olmoearth_jax import commands
from olmoearth_jax.config_files import load_file
from olmoearth_jax.data.index import prepare
from olmoearth_jax.stream.ladder import cheapest, fitting_rungs
from olmoearth_jax.train import build, estimate, probe
from olmoearth_jax.train.flops import real_tokens

from .micro_step import config_path, padded_tokens, without_rows

flags.declare_key_flag("config")
_DEVICES = flags.DEFINE_integer("devices", 1, "Devices that share a micro-step.")
_DATA = flags.DEFINE_string("h5py_dir", None, "Data set whose gaps are simulated.")
_STEPS = flags.DEFINE_integer("micro_steps", 240, "Micro-steps that judge the ladder.")
_RUNGS = flags.DEFINE_list("max_rungs", ["12"], "Step programs, one or several values.")


def measure(config: Any, rungs: int) -> dict[str, Any]:
    """Ratios over all simulated micro-steps (sums over sums)."""
    config.ladder.max_rungs = rungs
    timesteps = estimate.most_timesteps(config)
    objective = build.build_objective(config)
    spec = build.stream_of(config, timesteps, _DEVICES.value, objective)
    presence = [probe.complete(spec.modalities)]
    if _DATA.value:
        presence = probe.read_presence(prepare(_DATA.value, spec.modalities))
    ladder = build.size_ladder(config, spec, timesteps, presence)
    real = streams = rows = 0.0
    used = np.zeros(len(ladder), int)
    strategies = build.masking_strategies(config)
    shapes = build.likely_shapes(config, timesteps, _STEPS.value)
    steps = _STEPS.value if shapes is timesteps else len(shapes)
    for counts, need in probe.simulate(
        spec, presence, strategies, shapes, config.data_loader.seed + 1, steps
    ):
        number = cheapest(fitting_rungs(ladder, need))
        used[number] += 1
        own, most = real_tokens(counts, spec), padded_tokens(ladder[number], spec, spec.devices)
        real += estimate.forward_flops(config, own)
        streams += estimate.forward_flops(config, without_rows(most, own))
        rows += estimate.forward_flops(config, most)
    return {
        "max_rungs": rungs,
        "step_programs": len(ladder) + 1,
        "samples_per_device": spec.samples,
        "groups_per_micro_step": spec.groups,
        "padded_over_real_without_rows": streams / real,
        "padded_over_real": rows / real,
        "micro_steps_per_rung": used.tolist(),
    }


def main(_argv: list[str]) -> None:
    path = config_path()
    results = [measure(load_file(path), int(r)) for r in _RUNGS.value]
    print(
        json.dumps(
            {
                "benchmark": "padding",
                "config": path,
                "devices": _DEVICES.value,
                "data": "complete samples" if not _DATA.value else "gaps of --h5py_dir",
                "results": results,
            }
        )
    )


if __name__ == "__main__":
    commands.run(main)
