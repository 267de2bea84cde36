"""Starting JAX: several processes, the compilation cache, and advice on memory."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from olmoearth_jax import platforms
from olmoearth_jax.train import devices

ROOT = Path(__file__).resolve().parents[2]


def python(arguments: list[str], **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


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


def test_slurm_tasks_that_do_not_fit_the_node_are_told():
    for node in (
        slurm(2, 1, SLURM_GPUS_ON_NODE="1"),
        slurm(2, 1, SLURM_GPUS_ON_NODE="1", CUDA_VISIBLE_DEVICES="0"),
        slurm(8, 2, local=1, SLURM_GPUS_ON_NODE="2", CUDA_VISIBLE_DEVICES="0"),
    ):
        with pytest.raises(ValueError, match=r"Slurm tasks per node share \d GPU"):
            devices.slurm_devices(node)
    bound = slurm(4, 2, local=1, SLURM_GPUS_ON_NODE="2", CUDA_VISIBLE_DEVICES="1")
    assert devices.slurm_devices(bound) == [0]
    with pytest.raises(ValueError, match="SLURM_LOCALID=2, but a task sees only 2 GPUs"):
        devices.slurm_devices(slurm(4, 2, local=2, SLURM_GPUS_ON_NODE="2"))
    with pytest.raises(ValueError, match="SLURM_GPUS_ON_NODE=many must be a whole number"):
        devices.slurm_devices(slurm(2, 1, SLURM_GPUS_ON_NODE="many"))
    assert devices.slurm_devices(slurm(2, 1, SLURM_GPUS_ON_NODE="2(x2)")) == [0]


@pytest.mark.parametrize(
    "name", ["SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID", "all"]
)
def test_missing_variable_of_slurm_is_named(name, monkeypatch):
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **k: calls.append(k))
    step = slurm(2, 1, SLURM_STEP_NODELIST="a", SLURM_JOB_ID="1", SLURM_NTASKS="2")
    step |= {"SLURM_PROCID": "0", "SLURM_GPUS_ON_NODE": "2"}
    assert devices.start_distributed(environ=step) and calls[0]["local_device_ids"] == [0]
    left = {k: v for k, v in step.items() if k != name and (name != "all" or "STEP" in k)}
    with pytest.raises(ValueError, match=f"but {'SLURM_JOB_ID' if name == 'all' else name} is not"):
        devices.start_distributed(environ=left)


def test_device_that_is_not_there_is_told(monkeypatch):
    monkeypatch.setattr(platforms, "given", lambda: "")
    with pytest.raises(ValueError, match="names device 999, but JAX found"):
        devices.topology([*range(jax.local_device_count() - 1), 999])


PLATFORMS = ["cuda", "gpu", "tpu", "cpuu", "rocm", "cuda,tpu"]


@pytest.mark.parametrize("value", PLATFORMS)
def test_platform_that_is_not_there_is_told(value):
    code = "from olmoearth_jax import platforms; platforms.check()"
    done = python(["-c", code], JAX_PLATFORMS=value)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"ValueError: JAX_PLATFORMS={value} names a platform that is not here")
    assert ("extra cuda12 or cuda13" in last) == (value in ("cuda", "gpu", "cuda,tpu"))


def test_programs_tell_of_a_missing_platform(tmp_path):
    run = ["-m", "launch.train", "--config=configs/nano.py:smoke"]
    done = python([*run, f"--config.common.save_folder={tmp_path}"], JAX_PLATFORMS="cpuu")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "error: JAX_PLATFORMS=cpuu names a platform that is not here" in done.stderr


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


def test_no_processes_are_told():
    with pytest.raises(ValueError, match="--num_processes=0 must be at least 1"):
        devices.start_distributed("a:1", 0, 0, environ={})


def test_memory_advice_names_the_knobs():
    error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")
    advice = devices.memory_advice(error)
    assert advice is not None
    for knob in ("rank_microbatch_size", "remat", "mesh.fsdp"):
        assert knob in advice
    assert "2.50 GiB" in str(devices.memory_advice(error, ["2.50 GiB: 1.00 GiB of state"]))
    assert devices.memory_advice(ValueError("something else")) is None


def test_small_programs_are_cached_too(tmp_path):
    code = (
        "import sys, jax, jax.numpy as jnp; from olmoearth_jax.train import devices; "
        "devices.use_compilation_cache(sys.argv[1]); jax.jit(lambda x: x * 3 + 1)(jnp.ones(7))"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "xla")], cwd=ROOT, check=True)
    assert any((tmp_path / "xla").iterdir())


def test_a_cache_that_is_off_is_off_for_jax_too(tmp_path):
    code = (
        "import jax, jax.numpy as jnp; from olmoearth_jax.train import devices; "
        "assert devices.use_compilation_cache('') is None; "
        "jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0); "
        "jax.jit(lambda x: x * 3 + 1)(jnp.ones(7))"
    )
    named = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "xla")}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, env=named)
    assert not (tmp_path / "xla").exists()


def test_a_cache_that_cannot_be_written_is_none(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    assert devices.use_compilation_cache(str(tmp_path / "file")) is None

    def full(dir):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(devices.tempfile, "TemporaryFile", full)
    assert devices.use_compilation_cache(str(tmp_path)) is None


@pytest.mark.parametrize("value", ["CPU", "cuda"])
def test_tools_tell_of_a_platform_that_is_not_there(value):
    program = "import jax; from olmoearth_jax import commands; commands.run_alone(jax.devices)"
    done = python(["-c", program], JAX_PLATFORMS=value)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"error: JAX_PLATFORMS={value} names a platform that is not here" in done.stderr
