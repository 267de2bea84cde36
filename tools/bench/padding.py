"""FLOPs that the ladder computes over the FLOPs of real tokens, over simulated official draws.

    python -m tools.bench.padding --config=configs/base.py --devices=8

The ladder is sized with one seed and judged with another. Nothing runs on a device. Prints one
JSON line; `--h5py_dir` takes the gaps of a data set instead of complete samples. `--bounds` adds
what is left to win: a ladder sized with the draws that judge it, and one program per micro-step.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from absl import flags

from olmoearth_jax import commands
from olmoearth_jax.config_files import load_file
from olmoearth_jax.data.index import prepare
from olmoearth_jax.stream.ladder import build_ladder, cheapest, fitting_rungs, own_rung
from olmoearth_jax.stream.stream_shape import Rung, StreamSpec
from olmoearth_jax.train import build, estimate, probe
from olmoearth_jax.train.flops import real_tokens

from .micro_step import config_path, padded_tokens, without_rows

flags.declare_key_flag("config")
_DEVICES = flags.DEFINE_integer("devices", 1, "Devices that share a micro-step.")
_DATA = flags.DEFINE_string("h5py_dir", None, "Data set whose gaps are simulated.")
_STEPS = flags.DEFINE_integer("micro_steps", 240, "Micro-steps that judge the ladder.")
_BOUNDS = flags.DEFINE_bool("bounds", False, "Also the best that could be reached.")
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
    strategies = build.masking_strategies(config)
    shapes = build.likely_shapes(config, timesteps, _STEPS.value)
    steps = _STEPS.value if shapes is timesteps else len(shapes)
    drawn = list(
        probe.simulate(spec, presence, strategies, shapes, config.data_loader.seed + 1, steps)
    )
    used = [cheapest(fitting_rungs(ladder, need)) for _, need in drawn]
    found = {
        "max_rungs": rungs,
        "step_programs": len(ladder) + 1,
        "samples_per_device": spec.samples,
        "groups_per_micro_step": spec.groups,
        **shares(config, spec, drawn, [ladder[number] for number in used]),
        "micro_steps_per_rung": np.bincount(used, minlength=len(ladder)).tolist(),
    }
    if _BOUNDS.value:
        found["bounds"] = bounds(config, spec, drawn, rungs)
    return found


def bounds(config: Any, spec: StreamSpec, drawn: list, rungs: int) -> dict[str, Any]:
    """`shares` of ladders that know the draws, and of micro-steps on programs of their own.

    The last takes the same number of row lengths (`ladder.row_classes`), the same dealing of
    samples to devices, and no head room: nothing that only chooses rungs can do better.
    """
    needs, classes = [need for _, need in drawn], config.ladder.row_classes
    out = {}
    for count in (rungs, 2 * rungs):
        known = build_ladder(spec, needs, count, classes)
        best = [known[cheapest(fitting_rungs(known, need))] for need in needs]
        out[f"hindsight_{count}_rungs"] = shares(config, spec, drawn, best)
    own = [own_rung(spec, need, classes) for need in needs]
    return out | {"own_program_each": shares(config, spec, drawn, own)}


def shares(config: Any, spec: StreamSpec, drawn: list, on: list[Rung]) -> dict[str, float]:
    """FLOPs of the rungs that micro-steps run on over those of real tokens, sums over sums."""
    real = streams = rows = 0.0
    for (counts, _), rung in zip(drawn, on, strict=True):
        own, most = real_tokens(counts, spec), padded_tokens(rung, spec, spec.devices)
        real += estimate.forward_flops(config, own)
        streams += estimate.forward_flops(config, without_rows(most, own))
        rows += estimate.forward_flops(config, most)
    return {"padded_over_real_without_rows": streams / real, "padded_over_real": rows / real}


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
