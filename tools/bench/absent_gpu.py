"""Compiles the arms of `tools.bench.gpu_ladder` for a GPU that is not there.

    python -m tools.bench.absent_gpu --absent_arms=rotations_again,lean

Shows, before time on a GPU is spent, that XLA takes every arm and its options, and what memory it
plans for each in bfloat16. Nothing is run or tuned, so there is no speed in it. Needs JAX's plugin
for CUDA, but neither a GPU nor its driver:

    pip install "jax[cuda12]"

Prints one JSON line per arm. Attention is XLA's: cuDNN's kernels want the GPU.
"""

from __future__ import annotations

import dataclasses
import json
import time
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from olmoearth_jax import commands, overrides
from olmoearth_jax.config_files import load_file
from olmoearth_jax.stream.stream_shape import Rung

from .arms import BASELINE, MOST_TIME, Arm, Bench, chosen, short
from .micro_step import config_path

flags.declare_key_flag("config")
_ARMS = flags.DEFINE_list("absent_arms", None, "Only these arms; today's is always one.")
_DRAWS = flags.DEFINE_integer("absent_draws", 96, "Micro-steps of the mix.", lower_bound=1)
_SAMPLES = flags.DEFINE_integer("absent_micro_batch", 32, "Samples of a group.", lower_bound=1)

_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84978434048 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
"""XLA's description of the card, by its vendor's figures."""


def absent_device() -> Any:
    """A device to compile for.

    Raises:
      ValueError: JAX's plugin for CUDA is not installed.
    """
    jax.devices()  # finds the plugins
    try:
        found = topologies.get_topology_desc("h100", "cuda", target_config=_H100, topology="1x1x1")
    except Exception as e:
        raise ValueError(
            f"JAX cannot compile for a GPU here ({str(e).partition(chr(10))[0][:200]}); "
            'pip install "jax[cuda12]" brings what is needed'
        ) from e
    return found.devices[0]


def plan(arm: Arm, bench: Bench, device: Any) -> dict[str, Any]:
    """What XLA makes of the micro-step of an arm; `error` if it does not take it."""
    try:
        return _planned(arm, bench, device)
    except Exception as e:  # one arm must not end the others
        return {"error": short(e)}


def _planned(arm: Arm, bench: Bench, device: Any) -> dict[str, Any]:
    everywhere = NamedSharding(Mesh(np.array([device]), ("data",)), PartitionSpec())
    program = bench.program(dataclasses.replace(arm, attention="xla"), [bench.rungs[MOST_TIME]])
    program._flat = False  # as on a GPU: gradients apart
    (prepared, *_) = program.engine.prepare(bench.groups[MOST_TIME])
    state, key = bench.state, jax.random.key(0)
    assert bench.zeros is not None
    total = jax.eval_shape(bench.zeros.programs["zeros"])
    params = state["params"]
    total["grads"] = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), params)
    arguments = (params, state["target"], total, prepared.inputs, key)
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), arguments
    )
    assert isinstance(prepared.key, Rung)
    step = jax.jit(program.micro_step(prepared.key), donate_argnums=2, out_shardings=everywhere)
    begun = time.perf_counter()
    # What the model chooses by the backend, it is to choose as on a GPU.
    with mock.patch.object(jax, "default_backend", lambda: "gpu"):
        lowered = step.lower(*shapes)
    options: Any = {"xla_gpu_autotune_level": 0, **arm.options}
    compiled = lowered.compile(options)
    memory: Any = compiled.memory_analysis()
    return {
        "at_work_gb": memory.temp_size_in_bytes / 1e9,
        "arguments_gb": memory.argument_size_in_bytes / 1e9,
        "compile_s": time.perf_counter() - begun,
    }


def main() -> None:
    arms = chosen(_ARMS.value, "--absent_arms")
    device = absent_device()
    changes = {"train_module.rank_microbatch_size": _SAMPLES.value, "precision": "bfloat16"}
    config = overrides.apply_values(load_file(config_path("configs/base.py:version=v1_2")), changes)
    bench = Bench.build(config, _DRAWS.value, 0, {})
    bench.program(BASELINE, [bench.rungs[MOST_TIME]])  # makes the state that all share
    for arm in arms:
        head = {"benchmark": "absent_gpu", "arm": arm.name, "for": device.device_kind}
        print(json.dumps({**head, **plan(arm, bench, device)}), flush=True)


if __name__ == "__main__":
    commands.run_alone(main)
