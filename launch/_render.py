"""Job files for Slurm, Kubernetes JobSet and Docker, from the templates beside this module."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from olmoearth_jax import modalities
from olmoearth_jax.config import ExperimentConfig
from olmoearth_jax.configlib.texts import shown, unprintable
from olmoearth_jax.data import transforms
from olmoearth_jax.mesh import mesh_sizes
from olmoearth_jax.outputs import SCRIPT_MARK
from olmoearth_jax.train.assemble import micro_step_shape
from olmoearth_jax.train.build import masking_strategies

from ._app import USER_ERROR

_TEMPLATES = Path(__file__).parent / "templates"
SCHEDULERS = ("slurm", "jobset", "docker")
PROCESS_PER = ("node", "gpu")

STOPPED = 75
"""Exit code of a process that was told to stop and saved: the scheduler starts it again."""

GRACE_S = 300
"""Seconds that a job gets between the request to stop and its end."""

_RESTARTS = 20
"""Restarts of a JobSet or a container."""

_MEMORY_PER_GPU = 64
"""GiB of host memory per GPU that a JobSet asks for if nothing else is said."""

APP = "/app"
"""Folder of the code in the image (Dockerfile)."""

PORT = 29500
"""Port of the coordinator where each job has its own network or machine."""


@dataclasses.dataclass(frozen=True)
class Topology:
    """Which process runs on which host and uses which of its GPUs."""

    hosts: int
    gpus_per_host: int
    process_per: str = "node"

    @property
    def devices(self) -> int:
        return self.hosts * self.gpus_per_host

    @property
    def device_sets(self) -> list[str]:
        """GPUs, as '0,1', of each process of a host."""
        ids = [str(i) for i in range(self.gpus_per_host)]
        return ids if self.process_per == "gpu" else [",".join(ids)]

    @property
    def processes(self) -> int:
        return self.hosts * len(self.device_sets)

    def problems(self, cfg: ExperimentConfig) -> list[str]:
        """Why a config cannot be trained on these devices, one sentence each."""
        if self.process_per not in PROCESS_PER:
            near = modalities.closest(self.process_per, PROCESS_PER)
            return [f"unknown --process_per={self.process_per}; {near}"]
        if self.hosts < 1 or self.gpus_per_host < 1:
            return [f"{self.hosts} host(s) with {self.gpus_per_host} GPUs are no devices to run on"]
        out = []
        group = cfg.train_module.rank_microbatch_size
        for check in (
            lambda: mesh_sizes(cfg.mesh.data, cfg.mesh.fsdp, self.devices),
            lambda: micro_step_shape(cfg.data_loader.global_batch_size, group, self.devices),
        ):
            try:
                check()
            except ValueError as e:
                out.append(f"{self.hosts} host(s) with {self.gpus_per_host} GPUs: {e}")
        if self.processes > group:
            out.append(
                f"{self.processes} processes cannot share groups of {group} samples; use "
                "--process_per=node or a larger train_module.rank_microbatch_size"
            )
        parts = {f"masking {s.name!r}": s for s in masking_strategies(cfg)}
        parts["data_loader.transform_config"] = transforms.build(cfg.data_loader.transform_config)
        for name, part in parts.items():
            if self.processes > 1 and getattr(part, "needs_whole_group", False):
                out.append(f"{name} sees whole groups, so it needs one process")
        return out

    def table(self, cfg: ExperimentConfig) -> list[str]:
        """The lines of the table of processes and devices."""
        k, samples = micro_step_shape(
            cfg.data_loader.global_batch_size, cfg.train_module.rank_microbatch_size, self.devices
        )
        lines = [
            f"{self.hosts} host(s) x {self.gpus_per_host} GPUs, one process per "
            f"{self.process_per}: {self.processes} processes, {self.devices} devices",
            f"step: {cfg.data_loader.global_batch_size} samples in {cfg.groups_per_step // k} "
            f"micro-step(s) of {k} groups, {samples} samples per device",
            f"{'process':>7} {'host':>5}  {'local devices':<18} global devices",
        ]
        each = len(self.device_sets)
        for process in range(self.processes):
            host, local = divmod(process, each)
            first = process * (self.gpus_per_host // each)
            last = first + self.gpus_per_host // each - 1
            span = str(first) if first == last else f"{first}-{last}"
            lines.append(f"{process:>7} {host:>5}  {self.device_sets[local]:<18} {span}")
        return lines


@dataclasses.dataclass(frozen=True)
class Mount:
    """A host folder, or a volume (docker) or claim (JobSet) by name, inside the container."""

    source: str
    target: str
    read_only: bool = False

    @classmethod
    def parse(cls, text: str) -> Mount:
        """A mount written SOURCE:TARGET[:ro]. Raises ValueError for anything else."""
        source, _, rest = text.partition(":")
        target, colon, mode = rest.partition(":")
        if not source or not target.startswith("/") or (colon and mode != "ro"):
            raise ValueError(f"--mount={text} must be SOURCE:/TARGET or SOURCE:/TARGET:ro")
        return cls(source, target, bool(colon))

    def __str__(self) -> str:
        return f"{self.source}:{self.target}" + (":ro" if self.read_only else "")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the job files need besides config and topology.

    Attributes:
      image: container to run in; None (Slurm only) runs in the virtual environment `venv`.
      workdir: folder in which the program starts; config files are named relative to it.
      environment: variables; a value of None is taken over from the machine that starts the job.
      sbatch: further options of sbatch.
      memory: GiB of a host; None leaves it to the scheduler, but a JobSet names MEMORY_PER_GPU.
      time, account: of a Slurm job.
      tolerations: taints (KEY or KEY=VALUE) of the nodes that a JobSet may use.
      pull_secrets: Kubernetes secrets with which the image is fetched.
    """

    image: str | None = None
    venv: str | None = None
    workdir: str = "."
    mounts: Sequence[Mount] = ()
    environment: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
    cpus_per_gpu: int = 8
    requeue: bool = True
    namespace: str = "default"
    sbatch: Sequence[str] = ()
    memory: int | None = None
    time: str | None = None
    account: str | None = None
    tolerations: Sequence[str] = ("nvidia.com/gpu",)
    pull_secrets: Sequence[str] = ()


def surroundings(image: str | None, venv: str | None) -> tuple[str | None, str | None, str]:
    """(image, virtual environment, working folder) of a job; without an image that at hand.

    Raises:
      ValueError: both are given, or the environment is none.
    """
    if image is not None:
        if venv is not None:
            raise ValueError("--image and --venv exclude each other: the image has Python itself")
        return image, None, APP
    found = venv or sys.prefix
    if Path(found, "bin", "activate").is_file():
        return None, found, str(Path.cwd())
    if venv:
        raise ValueError(f"--venv={venv} is not a virtual environment")
    return None, None, str(Path.cwd())


def refuse_unread(given: flags.FlagValues, scheduler: str, read_by: Mapping[str, str]) -> None:
    """Refuses flags that are without effect on the jobs of a scheduler.

    Args:
      given: the flags.
      scheduler: of the jobs.
      read_by: flag -> the schedulers whose jobs read it, by spaces.

    Raises:
      ValueError: such a flag was given.
    """
    for name, readers in read_by.items():
        if given[name].present and scheduler not in readers.split():
            known = " or ".join(readers.split())
            raise ValueError(f"--{name} goes with --scheduler={known}, and not with {scheduler}")
    for name in {"mount", "baked"} & set(read_by):
        if given[name].present and scheduler == "slurm" and not given["image"].value:
            raise ValueError(f"--{name} goes with --image: without a container it has no effect")


def variable(text: str, form: str = "NAME=VALUE") -> tuple[str, str | None]:
    """(name, value) of --env, whose value is None where there is no '='.

    Raises:
      ValueError: not of that form.
    """
    name, equals, value = text.partition("=")
    known = re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name)
    if not known or (form == "NAME=VALUE" and not equals):
        raise ValueError(f"--env={text} must be {form}")
    return name, value if equals else None


def fill(template: str, values: Mapping[str, Any]) -> str:
    """The text of a template with every `{{name}}` replaced; lines emptied by that are dropped."""
    lines = []
    for line in (_TEMPLATES / template).read_text().splitlines():
        new = re.sub(r"\{\{(\w+)\}\}", lambda m: str(values[m[1]]), line)
        if new.strip() or not line.strip():
            lines.append(new)
    return "\n".join(lines) + "\n"


def job_name(name: str) -> str:
    """A run's name as at most 40 of a-z, 0-9 and "-"; different names stay different."""
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    if plain == name and len(plain) <= 40 and plain[:1].isalpha():
        return plain
    digest = hashlib.sha256(name.encode()).hexdigest()[:6]
    return f"run-{plain}"[:33].rstrip("-") + f"-{digest}"


def refuse_breakouts(name: str, arguments: Sequence[str], settings: Settings, folder: Path) -> None:
    """Refuses texts that would end the line of a job file on which they stand.

    Quoting does not help in a comment (`#SBATCH ...`): what follows a line break there is run.
    """
    texts = [("the run's name", name), ("the folder of the job files", folder)]
    texts += [("the current folder", Path.cwd()), ("--image", settings.image)]
    texts += [("the working folder", settings.workdir), ("--venv", settings.venv)]
    texts += [("an argument", text) for text in arguments]
    texts += [("--mount", str(mount)) for mount in settings.mounts]
    texts += [("--env", f"{k}={v or ''}") for k, v in settings.environment.items()]
    texts += [("--sbatch", option) for option in settings.sbatch]
    texts += [("--account", settings.account)]
    texts += [("--toleration", text) for text in settings.tolerations]
    texts += [("--image_pull_secret", text) for text in settings.pull_secrets]
    for what, text in texts:
        found = unprintable(str(text or ""))
        if found is not None:
            raise ValueError(f"{what} has {found}, which no job file can hold: {shown(str(text))}")
    for mount in settings.mounts:
        if ":" in mount.source + mount.target:
            text = f"a container cannot mount {shown(mount.source)}: ':' separates its parts"
            raise ValueError(f"{text}; use a path without it")
    if settings.time and not re.fullmatch(r"(\d+-)?\d+(:\d\d){0,2}", settings.time):
        raise ValueError(f"--time={shown(settings.time)} must be as 24:00:00 or 2-12:00:00")
    for option in settings.sbatch:
        if not option.startswith("-"):
            raise ValueError(f"--sbatch={option} must be an option, as --sbatch=--partition=gpu")
    if (settings.image or "").startswith("-"):
        raise ValueError(f"--image={settings.image} must not begin with '-'")
    if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", settings.namespace):
        raise ValueError(
            f"--namespace={shown(settings.namespace)} must be at most 63 of a-z, 0-9 and '-'"
        )


def files(
    scheduler: str,
    name: str,
    arguments: Sequence[str],
    cfg: ExperimentConfig,
    topology: Topology,
    settings: Settings,
    folder: Path,
) -> dict[str, str]:
    """File name -> text of everything that a job needs, the file to submit first.

    Args:
      scheduler: one of SCHEDULERS.
      name: of the run.
      arguments: of launch.train.
      cfg: the config they stand for.
      folder: where the files will be written.

    Raises:
      ValueError: a text that can't stand on one line of these files.
    """
    arguments = [*arguments, f"--stopped_exit_code={STOPPED if settings.requeue else 0}"]
    refuse_breakouts(name, arguments, settings, folder)
    values = {
        "job": shlex.quote(name) if scheduler == "slurm" else job_name(name),
        "command": shlex.join(["python", "-m", f"{__package__}.train", *arguments]),
        "hosts": topology.hosts,
        "gpus_per_host": topology.gpus_per_host,
        "processes": topology.processes,
        "processes_per_host": len(topology.device_sets),
        "device_sets": " ".join(topology.device_sets),
        "topology": "\n".join([SCRIPT_MARK, *(f"# {line}" for line in topology.table(cfg))]),
        "workdir": shlex.quote(settings.workdir),
        "grace": GRACE_S,
        "stopped": STOPPED,
        "devices": ",".join(topology.device_sets),
        "user_error": USER_ERROR,
        "preflight": _preflight(cfg, topology),
    }
    writer = {"slurm": _slurm, "jobset": _jobset, "docker": _docker}[scheduler]
    return writer(values, topology, settings, folder)


_Values = dict[str, Any]


def _preflight(cfg: ExperimentConfig, topology: Topology) -> str:
    """Shell lines that end a host at once if program, GPUs or dataset are not there."""
    lines = [
        'refuse() { echo "error: on $(hostname): $1" >&2; exit "$2"; }',
        f"python -c 'import olmoearth_jax' || refuse 'python has no olmoearth_jax' {USER_ERROR}",
        "gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU')",
        f'[ "$gpus" -ge {topology.gpus_per_host} ] || '
        f'refuse "there are $gpus GPUs, {topology.gpus_per_host} are needed" 1',
    ]
    for path in (cfg.dataset.h5py_dir or "", *cfg.dataset.more_h5py_dirs):
        if path and "://" not in path:
            told = shlex.quote(f"the dataset folder {path} is not there, or must not be read")
            lines.append(f"[ -r {shlex.quote(path)} ] || refuse {told} {USER_ERROR}")
    return "\n".join(lines)


def _slurm(values: _Values, topology: Topology, settings: Settings, folder: Path) -> dict[str, str]:
    gpus_per_process = topology.gpus_per_host // len(topology.device_sets)
    values |= slurm_values(settings) | {
        "cpus_per_process": settings.cpus_per_gpu * gpus_per_process,
        "log": slurm_log(folder, "%j"),
        "task_log": slurm_log(folder, "%j-%t"),
        "quoted_preflight": shlex.quote(values["preflight"]),
        "requeue": "--requeue" if settings.requeue else "--no-requeue",
    }
    return {"job.sbatch": fill("slurm.sbatch", values)}


def slurm_log(folder: Path, number: str) -> str:
    """A log in a folder, in whose name a % is none of Slurm's."""
    return shlex.quote(f"{str(folder).replace('%', '%%')}/slurm-{number}.out")


def slurm_values(settings: Settings) -> dict[str, str]:
    """What the templates of all Slurm jobs take of the settings."""
    given = [(k, v) for k, v in settings.environment.items() if v is not None]
    activate = shlex.quote(f"{settings.venv}/bin/activate")
    return {
        "limits": "\n".join(f"#SBATCH {option}" for option in _limits(settings)),
        "sbatch": "\n".join(f"#SBATCH {option}" for option in settings.sbatch),
        "submit_dir": shlex.quote(str(Path.cwd())),
        "activate": f"source {activate}" if settings.venv else "",
        "environment": "\n".join(f"export {k}={shlex.quote(v)}" for k, v in given),
        "srun": _pyxis(settings),
    }


def _pyxis(settings: Settings) -> str:
    """Options of srun for a container, which are those of the pyxis plugin."""
    if settings.image is None:
        return ""
    if odd := next((m for m in settings.mounts if "," in str(m)), None):
        text = f"Pyxis cannot mount {shown(odd.source)}: ',' separates its mounts"
        raise ValueError(f"{text}; use a path without it")
    container = f" --container-image={shlex.quote(settings.image)}"
    container += f" --container-workdir={shlex.quote(settings.workdir)}"
    mounts = ",".join(map(str, settings.mounts))
    return container + (f" --container-mounts={shlex.quote(mounts)}" if mounts else "")


def _limits(settings: Settings) -> list[str]:
    """Options of sbatch that say what the job may take."""
    given = {"time": settings.time, "account": settings.account}
    if settings.memory is not None:
        given["mem"] = f"{settings.memory}G"
    return [f"--{name}={shlex.quote(value)}" for name, value in given.items() if value]


def _docker(
    values: _Values, topology: Topology, settings: Settings, folder: Path
) -> dict[str, str]:
    options = [f"-v {shlex.quote(str(mount))}" for mount in settings.mounts]
    options += [
        f"-e {shlex.quote(k if v is None else f'{k}={v}')}" for k, v in settings.environment.items()
    ]
    alone = topology.hosts == 1
    made = [m.source for m in settings.mounts if m.source.startswith("/") and not m.read_only]
    values |= {
        "last_host": topology.hosts - 1,
        "first_host": 0 if alone else "",
        "coordinator": f"127.0.0.1:{PORT}" if alone else "",
        "usage": "" if alone else f"HOST_INDEX ADDRESS_OF_HOST_0:{PORT}",
        "restart": f"--restart=on-failure:{_RESTARTS}" if settings.requeue else "--rm",
        "folders": f"mkdir -p {shlex.join(made)}" if made else "",
        "options": "".join(f"  {option} \\\n" for option in options).rstrip("\n"),
        "image": shlex.quote(settings.image or ""),
        "memory": f" --memory={settings.memory}g" if settings.memory else "",
        "host_script": shlex.quote(f"{folder}/host.sh"),
    }
    return {"docker.sh": fill("docker.sh", values), "host.sh": fill("host.sh", values)}


def _jobset(
    values: _Values, topology: Topology, settings: Settings, folder: Path
) -> dict[str, str]:
    memory = settings.memory or _MEMORY_PER_GPU * topology.gpus_per_host
    # Readers hand samples over in shared memory, which counts as memory of the pod.
    shared = {"medium": "Memory", "sizeLimit": f"{max(memory // 4, 1)}Gi"}
    shm = {"name": "shm", "mountPath": "/dev/shm"}, {"name": "shm", "emptyDir": shared}
    job = values["job"]
    head = f'HOST_INDEX="$JOB_COMPLETION_INDEX"\nCOORDINATOR={job}-host-0-0.{job}:{PORT}\n'
    script = head + fill("host.sh", values)
    values |= pod_values(settings, 16, [shm]) | {
        "restarts": _RESTARTS if settings.requeue else 0,
        "script": "".join(f"{'':22}{line}\n" for line in script.rstrip("\n").split("\n")).rstrip(
            "\n"
        ),
        "cpus": settings.cpus_per_gpu * topology.gpus_per_host,
        "memory": f"{memory}Gi",
    }
    return {"jobset.yaml": fill("jobset.yaml", values)}


_Volume = tuple[dict[str, Any], dict[str, Any]]
"""A mount of a container, and the volume of its pod."""


def pod_values(settings: Settings, indent: int, first: Sequence[_Volume] = ()) -> dict[str, str]:
    """What the templates of all Kubernetes jobs take of the settings.

    Args:
      indent: of the lists of a pod; those of its container stand 4 deeper.
      first: volumes before those of the settings.
    """
    environment = [{"name": k, "value": v} for k, v in settings.environment.items()]
    mounts, volumes = [mount for mount, _ in first], {v["name"]: v for _, v in first}
    names = {m.source: f"mount-{i}" for i, m in enumerate(settings.mounts)}
    for m in settings.mounts:
        name, path = names[m.source], {"hostPath": {"path": m.source}}
        claim = {"persistentVolumeClaim": {"claimName": m.source}}
        mounts.append({"name": name, "mountPath": m.target, "readOnly": m.read_only})
        volumes[name] = {"name": name, **(path if m.source.startswith("/") else claim)}
    return {
        "namespace": settings.namespace,
        "image": json.dumps(settings.image),
        "workdir": json.dumps(settings.workdir),
        "environment": _items(environment, indent + 4),
        "pull_secrets": _items([{"name": name} for name in settings.pull_secrets], indent),
        "tolerations": _items([_toleration(text) for text in settings.tolerations], indent),
        "mounts": _items(mounts, indent + 4),
        "volumes": _items([*volumes.values()], indent),
    }


def _toleration(text: str) -> dict[str, str]:
    """A taint, KEY or KEY=VALUE, that a pod tolerates."""
    key, equals, value = text.partition("=")
    if equals:
        return {"key": key, "operator": "Equal", "value": value, "effect": "NoSchedule"}
    return {"key": key, "operator": "Exists", "effect": "NoSchedule"}


def _items(items: Sequence[Mapping[str, Any]], indent: int) -> str:
    """YAML text of a list, one item a line."""
    return "".join(f"\n{'':{indent}}- {json.dumps(item)}" for item in items) or "[]"
