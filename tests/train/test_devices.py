"""Starting JAX: several processes, the compilation cache, and advice on memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import jax
import pytest

from olmoearth_jax.train import devices

ROOT = Path(__file__).resolve().parents[2]


def slurm(tasks: int, nodes: int, local: int = 0, **more: str) -> dict[str, str]:
    return {
        "SLURM_STEP_NUM_TASKS": str(tasks),
        "SLURM_STEP_NUM_NODES": str(nodes),
        "SLURM_LOCALID": str(local),
    } | more


def test_slurm_tasks_take_their_own_devices():
    node = slurm(2, 2, SLURM_GPUS_ON_NODE="8")
    assert devices.slurm_devices(node) == list(range(8))
    assert devices.slurm_devices(slurm(16, 2, local=3, CUDA_VISIBLE_DEVICES="0,1,2,3,4,5,6,7")) == [
        3
    ]
    assert devices.slurm_devices(slurm(16, 2, local=3, CUDA_VISIBLE_DEVICES="3")) == [0]
    with pytest.raises(ValueError, match="3 Slurm tasks per node"):
        devices.slurm_devices(slurm(6, 2, SLURM_GPUS_ON_NODE="8"))


def test_one_process_needs_nothing():
    assert not devices.start_distributed(environ={})
    assert not devices.start_distributed("localhost:1", 1, 0)
    assert not devices.start_distributed(environ={"SLURM_STEP_NUM_TASKS": "4"})
    assert devices.topology().startswith("1 process(es) x ")
    with pytest.raises(ValueError, match="names 999 devices, but JAX found"):
        devices.topology(range(999))


def test_incomplete_descriptions_are_told():
    with pytest.raises(ValueError, match="--num_processes and --process_id are missing"):
        devices.start_distributed("localhost:1234")
    with pytest.raises(ValueError, match=r"must lie in 0\.\.1"):
        devices.start_distributed("localhost:1234", 2, 2)

    with pytest.raises(ValueError, match="must be HOST:PORT"):
        devices.start_distributed("localhost", 2, 0)
    with pytest.raises(ValueError, match="JOB_COMPLETION_INDEX"):
        devices.start_distributed(environ={"JAX_COORDINATOR_ADDRESS": "a:1"})


def test_processes_are_described_by_arguments_or_environment(monkeypatch):
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: calls.append(a))
    assert devices.start_distributed("a:1", 4, 3, [0, 1], environ={})
    job = {"JAX_COORDINATOR_ADDRESS": "b:2", "JAX_NUM_PROCESSES": "2", "JOB_COMPLETION_INDEX": "1"}
    assert devices.start_distributed(environ=job)
    assert devices.start_distributed(environ=job | {"JAX_PROCESS_ID": "0"})
    assert calls == [("a:1", 4, 3, [0, 1]), ("b:2", 2, 1, None), ("b:2", 2, 0, None)]


def test_memory_advice_names_the_knobs():
    error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")
    advice = devices.memory_advice(error)
    assert advice is not None
    for knob in ("rank_microbatch_size", "remat", "mesh.fsdp"):
        assert knob in advice
    assert "2.50 GiB" in devices.memory_advice(error, ["2.50 GiB: 1.00 GiB of state"])
    assert devices.memory_advice(ValueError("something else")) is None


def test_small_programs_are_cached_too(tmp_path):
    code = (
        "import sys, jax, jax.numpy as jnp; from olmoearth_jax.train import devices; "
        "devices.use_compilation_cache(sys.argv[1]); jax.jit(lambda x: x * 3 + 1)(jnp.ones(7))"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "xla")], cwd=ROOT, check=True)
    assert any((tmp_path / "xla").iterdir())
    assert devices.use_compilation_cache("") is None
