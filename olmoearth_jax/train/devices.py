"""How JAX is started, and what its errors mean: several processes, compilation cache, memory."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from olmoearth_jax import platforms

_DEFAULT_CACHE = "~/.cache/olmoearth_jax/xla"


def start_distributed(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    local_device_ids: Sequence[int] | None = None,
    environ: Mapping[str, str] = os.environ,
) -> bool:
    """Connects the processes of a run, before any other use of JAX; True if there are several.

    Either the first three arguments are given, or none: then they are read from
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID (or the JOB_COMPLETION_INDEX of a
    Kubernetes job), or a Slurm step (`srun`) of several tasks is recognised. A process uses
    `local_device_ids`; without them all devices it can see, unless Slurm runs one task per GPU.
    Raises ValueError for an incomplete or impossible description.
    """
    given = {
        "--coordinator": coordinator,
        "--num_processes": num_processes,
        "--process_id": process_id,
    }
    missing = [name for name, value in given.items() if value is None]
    names = " and ".join(missing) + (" is" if len(missing) == 1 else " are")
    if len(missing) == 3 and "JAX_COORDINATOR_ADDRESS" in environ:
        num_processes, process_id = _numbers_of(environ)
        coordinator, missing = environ["JAX_COORDINATOR_ADDRESS"], []
    if coordinator is not None and num_processes is not None and process_id is not None:
        _check_place(coordinator, num_processes, process_id)
        if num_processes == 1:
            return _alone(local_device_ids)
        # Detection is off: under Slurm it would hide all GPUs but one from this process.
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            local_device_ids,
            cluster_detection_method="deactivate",
        )
        return True
    if len(missing) < 3:
        raise ValueError(
            "Several processes need --coordinator=HOST:PORT, --num_processes and --process_id; "
            f"{names} missing."
        )
    tasks = _number(environ, "SLURM_STEP_NUM_TASKS", 1)
    if local_device_ids is None and tasks > 1 and "SLURM_STEP_NODELIST" in environ:
        for name in _SLURM_NAMES:
            if not environ.get(name):
                raise ValueError(
                    f"this is a task of a Slurm step, but {name} is not set: start it with srun, "
                    "without --export=NONE or env -i, or give --coordinator, --num_processes and "
                    "--process_id"
                )
        jax.distributed.initialize(
            cluster_detection_method="slurm", local_device_ids=slurm_devices(environ)
        )
        return True
    return _alone(local_device_ids)


def _check_place(coordinator: str, num_processes: int, process_id: int) -> None:
    if not coordinator.rpartition(":")[2].isdigit():
        raise ValueError(f"--coordinator={coordinator} must be HOST:PORT.")
    if num_processes < 1:
        raise ValueError(f"--num_processes={num_processes} must be at least 1.")
    if not 0 <= process_id < num_processes:
        raise ValueError(f"--process_id={process_id} must lie in 0..{num_processes - 1}.")


def _numbers_of(environ: Mapping[str, str]) -> tuple[int, int]:
    """(number of processes, this one) as variables tell them."""
    index = environ.get("JAX_PROCESS_ID") or environ.get("JOB_COMPLETION_INDEX")
    try:
        return int(environ["JAX_NUM_PROCESSES"]), int(index or "")
    except (KeyError, ValueError) as error:
        raise ValueError(
            "JAX_COORDINATOR_ADDRESS is set, so JAX_NUM_PROCESSES and JAX_PROCESS_ID (or "
            "JOB_COMPLETION_INDEX) must be whole numbers."
        ) from error


def _alone(local_device_ids: Sequence[int] | None) -> bool:
    if local_device_ids is not None:
        jax.config.update("jax_cuda_visible_devices", ",".join(map(str, local_device_ids)))
    return False


def slurm_devices(environ: Mapping[str, str]) -> list[int]:
    """GPUs of this Slurm task, as indices into those it can see.

    One task per node takes all of the node's; one task per GPU takes its own (or its only one,
    where Slurm binds GPUs to tasks). Raises ValueError for any other number of tasks.
    """
    count, nodes = (_number(environ, f"SLURM_STEP_NUM_{what}", 1) for what in ("TASKS", "NODES"))
    tasks, local = count // max(nodes, 1), _number(environ, "SLURM_LOCALID", 0)
    shown = environ.get("CUDA_VISIBLE_DEVICES", "")
    on_node = _number(environ, "SLURM_GPUS_ON_NODE", 0)
    seen = len(shown.split(",")) if shown else on_node or 1
    if tasks > 1 and 0 < on_node < tasks:
        raise ValueError(
            f"{tasks} Slurm tasks per node share {on_node} GPU{'s' * (on_node > 1)}: use "
            "--ntasks-per-node=1, or one task per GPU."
        )
    if tasks == 1 or seen == 1:
        return list(range(seen))
    if tasks != seen:
        raise ValueError(
            f"{tasks} Slurm tasks per node that see {seen} GPUs each: use --ntasks-per-node=1, or "
            "one task per GPU."
        )
    if local >= seen:
        raise ValueError(
            f"SLURM_LOCALID={local}, but a task sees only {seen} GPUs: Slurm has put more tasks on "
            "this node than on others; use --ntasks-per-node"
        )
    return [local]


_SLURM_NAMES = ("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
"""What JAX reads of a Slurm task, besides the SLURM_STEP_NODELIST by which it is known as one."""


def _number(environ: Mapping[str, str], name: str, default: int) -> int:
    """A count among the variables of Slurm, such as '8' or '8(x2)'."""
    text = environ.get(name, "").strip()
    if not text:
        return default
    found = re.match(r"\d+", text)
    if found is None:
        raise ValueError(f"{name}={text} must be a whole number")
    return int(found[0])


def topology(local_device_ids: Sequence[int] | None = None) -> str:
    """Table of processes and devices.

    Raises:
      ValueError: this process has not the devices it was given, or others have more or fewer.
    """
    platforms.check()
    here = jax.local_device_count()
    if local_device_ids is not None and len(local_device_ids) != here:
        raise ValueError(
            f"--local_device_ids names {len(local_device_ids)} devices, but JAX found "
            f"{here} of platform {jax.default_backend()!r}: install "
            "olmoearth-jax with an extra for the GPU, or name the devices that there are"
        )
    lost = [i for i in local_device_ids or () if i >= here]
    if lost and jax.default_backend() == "cpu" and platforms.given() != "cpu":
        # A GPU that is not there leaves JAX with the CPU. Other platforms show only what is given.
        raise ValueError(
            f"--local_device_ids names device {lost[0]}, but JAX found {here} of platform 'cpu': "
            "install olmoearth-jax with an extra for the GPU, or name a device that there is"
        )
    mine = np.array([here])
    counts = (
        multihost_utils.process_allgather(mine).reshape(-1) if jax.process_count() > 1 else mine
    )
    if len(set(counts.tolist())) > 1:
        raise ValueError(f"Every process must see as many devices as the others: {counts.tolist()}")
    kind = jax.devices()[0].device_kind
    return (
        f"{jax.process_count()} process(es) x {counts[0]} device(s) = {jax.device_count()} {kind}; "
        f"this is process {jax.process_index()}"
    )


def use_compilation_cache(folder: str | None = None) -> Path | None:
    """Keeps compiled programs between runs; `folder` '' turns it off, None means the folder that
    JAX_COMPILATION_CACHE_DIR names, or _DEFAULT_CACHE.

    Everything is kept, however quick it was to compile: JAX's own threshold of a second would
    leave out most of our programs. Returns the folder.
    """
    if folder == "":
        # The variable names a folder to JAX itself too.
        jax.config.update("jax_enable_compilation_cache", False)
        return None
    named = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    path = Path(folder or named or _DEFAULT_CACHE).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):  # permissions alone do not tell
            pass
    except OSError:
        return None  # nowhere to write to: compile every time
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return path


class OutOfMemory(RuntimeError):
    """The device ran out of memory; the message says what can be done."""


def memory_advice(error: BaseException, programs: Sequence[str] = ()) -> str | None:
    """What to do about an error that means 'out of device memory'; None for other errors.

    `programs` are lines that tell what the compiled programs need.
    """
    text = str(error)
    known = "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower()
    if not known or "No space left" in text:  # that is a disk
        return None
    lines = [
        "The device ran out of memory. Any of these three lowers the need:",
        "  --config.train_module.rank_microbatch_size=<smaller>  fewer samples at a time (also "
        "fewer negatives in the contrastive loss)",
        "  --config.remat=block          recomputes activations instead of keeping them (slower)",
        "  --config.mesh.fsdp=<devices>  spreads parameters and optimizer state over devices",
        "launch.dry_run prints the estimated memory per device for a config.",
        *(["The programs compiled so far need, per device:"] if programs else []),
        *(f"  {line}" for line in programs),
        f"JAX said: {text.splitlines()[0][:300]}",
    ]
    return "\n".join(lines)
