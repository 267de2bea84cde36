"""Job files of many workers that need not know of each other: `launch.submit --job=embed|predict`.

    python -m launch.submit --job=embed --scheduler=slurm --workers=64 [--at_once=16] -- FLAGS
    python -m launch.submit --job=predict --scheduler=k8s --workers=8 -- FLAGS

FLAGS are those of launch.embed or launch.predict. --scheduler=slurm writes an array,
--scheduler=k8s an Indexed Job of Kubernetes. Each worker takes one GPU, and finds its number in the
environment.
"""

from __future__ import annotations

import importlib
import json
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from olmoearth_jax import commands, outputs, plugins
from olmoearth_jax.files import write_atomically
from olmoearth_jax.modalities import closest

from . import _render

FLAGS = flags.FlagValues()
"""The flags before `--`; other programs have flags of the same names."""

_bool, _integer, _multi_string, _string = commands.definers(
    FLAGS, "bool integer multi_string string"
)

_JOBS = ("embed", "predict")
"""Programs whose workers share a list of work."""
_SCHEDULERS = ("slurm", "k8s")
_RESTARTS = 6

_string("job", None, "embed or predict.")
_string("scheduler", "slurm", "slurm or k8s.")
_string("run_name", None, "Name of the job; default: that of the output folder.")
_integer("workers", 1, "How many workers there are.", lower_bound=1)
_integer("at_once", None, "How many run side by side; default: all.", lower_bound=1)
_integer("gpus", 1, "GPUs of a worker; 0 for none.", lower_bound=0, upper_bound=1)
_integer("cpus", 8, "CPU cores of a worker.", lower_bound=1)
_integer("memory", 32, "GiB of memory of a worker.", lower_bound=1)
_string("output", None, "Folder of the job file; default: ./local_output/NAME/submit.")
_string("image", None, "Container image; olmoearth-jax on Kubernetes.")
_string("venv", None, "Virtual environment (Slurm); default: the one at hand.")
_multi_string("mount", [], "SOURCE:/TARGET[:ro]: a host folder, or a Kubernetes claim.")
_multi_string("env", [], "NAME=VALUE.")
_string("time", None, "Time limit of a Slurm job, as 24:00:00.")
_string("account", None, "Account that a Slurm job is charged to.")
_multi_string("sbatch", [], "Option of sbatch, as --sbatch=--partition=gpu.")
_string("namespace", "default", "Kubernetes namespace.")
_multi_string("toleration", ["nvidia.com/gpu"], "Taint, KEY or KEY=VALUE, of nodes.")
_multi_string("image_pull_secret", [], "Kubernetes secret with which the image is fetched.")
_bool("overwrite", False, "Replace a file that is not of this program.")


_READ_BY = {
    **dict.fromkeys(("time", "account", "sbatch", "venv"), "slurm"),
    **dict.fromkeys(("namespace", "toleration", "image_pull_secret"), "k8s"),
    "mount": "slurm k8s",
}
"""Flag -> the schedulers whose jobs read it."""


def asked(argv: Sequence[str]) -> bool:
    """Whether a command line of launch.submit is for this module."""
    own = argv[: list(argv).index("--")] if "--" in argv else argv
    return any(re.match("--?job(=|$)", a) for a in own[1:])


def main(argv: list[str]) -> int:
    """Writes the job file; the exit code."""
    try:
        path = _write(argv[1:])
    except (ValueError, OSError, flags.Error) as e:
        print(f"error: {e}", file=sys.stderr)
        return commands.USER_ERROR
    start = "sbatch" if FLAGS.scheduler == "slurm" else "kubectl apply -f"
    print(f"wrote {path} for {FLAGS.workers} workers; start them with: {start} {path}")
    return 0


def _write(given: list[str]) -> Path:
    """Writes the job file of the flags; its path.

    Args:
      given: the flags of the workers.

    Raises:
      ValueError: flags that do not fit.
    """
    if FLAGS.job not in _JOBS:
        raise ValueError(f"unknown --job={FLAGS.job}; {closest(str(FLAGS.job), _JOBS)}")
    if FLAGS.scheduler not in _SCHEDULERS:
        near = closest(FLAGS.scheduler, _SCHEDULERS)
        raise ValueError(f"unknown --scheduler={FLAGS.scheduler} of --job; {near}")
    output = _check(given)
    name = FLAGS.run_name or Path(output).name or str(FLAGS.job)
    folder = Path(FLAGS.output or Path("local_output", name, "submit")).absolute()
    settings = _settings()
    _render.refuse_unread(FLAGS, FLAGS.scheduler, _READ_BY)
    _render.refuse_breakouts(name, given, settings, folder)
    program = f"{__package__}.{FLAGS.job}"
    command = ["python", "-m", program, *plugins.as_flags(), *given]
    file, text = (_slurm if FLAGS.scheduler == "slurm" else _k8s)(name, command, settings, folder)
    outputs.check(folder / file, overwrite=FLAGS.overwrite)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / file, text)
    return folder / file


def _check(given: list[str]) -> str:
    """Parses the workers' flags as they will; what they write to."""
    program = importlib.import_module(f"{__package__}.{FLAGS.job}")
    for flag in ("shard", "of"):
        if any(re.match(f"--?{flag}(=|$)", a) for a in given):
            raise ValueError(f"leave out --{flag}: each worker finds its number itself")
    rest = program.FLAGS([FLAGS.job, *given])
    if len(rest) > 1:
        raise ValueError(f"unexpected argument {rest[1]!r} after --")
    return program.options().output


def _settings() -> _render.Settings:
    image = FLAGS.image or (None if FLAGS.scheduler == "slurm" else "olmoearth-jax")
    image, venv, workdir = _render.surroundings(image, FLAGS.venv)
    environment = {"PYTHONUNBUFFERED": "1", **dict(map(_render.variable, FLAGS.env))}
    if FLAGS.scheduler == "k8s":
        environment["OLMOEARTH_WORKERS"] = str(FLAGS.workers)
    return _render.Settings(
        image=image, venv=venv, workdir=workdir,
        mounts=[_render.Mount.parse(text) for text in FLAGS.mount], environment=environment,
        cpus_per_gpu=FLAGS.cpus, namespace=FLAGS.namespace, sbatch=FLAGS.sbatch,
        memory=FLAGS.memory, time=FLAGS.time, account=FLAGS.account, tolerations=FLAGS.toleration,
        pull_secrets=FLAGS.image_pull_secret,
    )  # fmt: skip


def _slurm(
    name: str, command: list[str], settings: _render.Settings, folder: Path
) -> tuple[str, str]:
    last, most = FLAGS.workers - 1, FLAGS.at_once
    values: dict[str, Any] = _render.slurm_values(settings) | {
        "job": shlex.quote(name), "array": f"0-{last}" + (f"%{most}" if most else ""),
        "gpus": FLAGS.gpus, "cpus": FLAGS.cpus, "log": _render.slurm_log(folder, "%A_%a"),
        "grace": _render.GRACE_S, "stopped": _render.STOPPED, "mark": outputs.SCRIPT_MARK,
        "command": shlex.join(command),
    }  # fmt: skip
    text = _render.fill("workers.sbatch", values)
    return "job.sbatch", text.replace("#SBATCH --gpus=0\n", "")


def _k8s(
    name: str, command: list[str], settings: _render.Settings, folder: Path
) -> tuple[str, str]:
    values: dict[str, Any] = _render.pod_values(settings, 8) | {
        "job": _render.job_name(name), "workers": FLAGS.workers,
        "at_once": FLAGS.at_once or FLAGS.workers, "restarts": _RESTARTS,
        "user_error": commands.USER_ERROR, "stopped": _render.STOPPED,
        "command": json.dumps(command), "gpus": FLAGS.gpus, "cpus": FLAGS.cpus,
        "memory": f"{FLAGS.memory}Gi", "grace": _render.GRACE_S, "mark": outputs.SCRIPT_MARK,
    }  # fmt: skip
    return "job.yaml", _render.fill("workers.yaml", values)
