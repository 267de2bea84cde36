"""Writes the job file of a run, or of a sweep of runs, and on request submits it.

    python -m launch.submit --config=configs/base.py:version=v1_2 --run_name=NAME \\
        --scheduler=slurm --hosts=2 --gpus_per_host=8 [--submit] [--config.<path>=<value> ...]

    --scheduler=slurm    job.sbatch   in the virtual environment at hand, or --image (pyxis)
    --scheduler=jobset   jobset.yaml  Kubernetes JobSet, one pod per host
    --scheduler=docker   docker.sh    one container per host; run it on each of several hosts
    --job=embed|predict  many workers of that program: --job=embed --workers=N -- FLAGS
    --sweep              one job for each item of the config file's `sweep()`; --list shows them

The config is checked for these hosts and GPUs first: a batch that does not divide, a mesh that
does not fit, too many processes are refused. Files go to <run folder>/submit, or to --output.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from olmoearth_jax import check, commands, config_files, outputs, overrides, plugins
from olmoearth_jax.config import ConfigError, ExperimentConfig
from olmoearth_jax.files import write_atomically
from olmoearth_jax.modalities import closest

from . import _app, _local, _render, _samples, _workers

_SCHEDULER = flags.DEFINE_string("scheduler", "slurm", "slurm, jobset, docker or local.")
_HOSTS = flags.DEFINE_integer("hosts", 1, "Hosts of the job.")
_GPUS = flags.DEFINE_integer("gpus_per_host", 8, "GPUs of each host.")
_PER = flags.DEFINE_string("process_per", "node", "One process per node or per gpu.")
_OUTPUT = flags.DEFINE_string("output", None, "Folder of the job files.")
_SUBMIT = flags.DEFINE_bool("submit", False, "Submit the job with sbatch, kubectl or docker.")
_SWEEP = flags.DEFINE_bool("sweep", False, "One job per item of the config file's sweep().")
_LIST = flags.DEFINE_bool("list", False, "Print the jobs and write nothing.")
_REQUEUE = flags.DEFINE_bool("requeue", True, "Start a job again that was stopped early.")
_IMAGE = flags.DEFINE_string("image", None, "Container image; olmoearth-jax outside of Slurm.")
_VENV = flags.DEFINE_string("venv", None, "Virtual environment (Slurm); default: the one at hand.")
_BAKED = flags.DEFINE_bool("baked", False, "Use the code in the image instead of this folder's.")
_MOUNT = flags.DEFINE_multi_string(
    "mount", [], "SOURCE:/TARGET[:ro]: a host folder, a docker volume or a Kubernetes claim."
)
_ENV = flags.DEFINE_multi_string("env", [], "NAME=VALUE, or NAME to take over its value (docker).")
_FRACTION = flags.DEFINE_float(
    "memory_fraction", 0.92, "Part of the GPU memory that XLA takes.", 0.05, 1.0
)
_CPUS = flags.DEFINE_integer("cpus_per_gpu", 8, "CPU cores per GPU.", 1)
_TIME = flags.DEFINE_string("time", None, "Time limit of a Slurm job, as 24:00:00.")
_ACCOUNT = flags.DEFINE_string("account", None, "Account that a Slurm job is charged to.")
_MEMORY = flags.DEFINE_integer("memory", None, "GiB of memory of each host.", 1)
_SECRETS = flags.DEFINE_multi_string(
    "image_pull_secret", [], "Kubernetes secret with which the image is fetched."
)
_TOLERATIONS = flags.DEFINE_multi_string(
    "toleration", ["nvidia.com/gpu"], "Taint, KEY or KEY=VALUE, of nodes that a JobSet may use."
)
_AT_ONCE = flags.DEFINE_integer(
    "at_once", 1, "Jobs that run side by side with --scheduler=local, sharing the GPUs.", 1
)
_SBATCH = flags.DEFINE_multi_string("sbatch", [], "Option of sbatch, as --sbatch=--partition=gpu.")
_samples.define_flag()
_app.define_overwrite()
_NAMESPACE = flags.DEFINE_string("namespace", "default", "Kubernetes namespace.")

_READ_BY = {
    **dict.fromkeys(("time", "account", "sbatch", "venv"), "slurm"),
    **dict.fromkeys(("namespace", "toleration", "image_pull_secret"), "jobset"),
    **dict.fromkeys(
        ("hosts", "gpus_per_host", "process_per", "requeue", "image", "mount", "env", "memory",
         "memory_fraction"), "slurm jobset docker"),
    "cpus_per_gpu": "slurm jobset",
    "baked": "slurm docker",
    "at_once": "local",
}  # fmt: skip
"""Flag -> the schedulers whose jobs read it."""

LAUNCH_KEYS = ("launch.config", "launch.name", "launch.hosts", "launch.gpus_per_host")
"""Members of a sweep's item that are not overrides but settings of its job."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One run: where its config comes from, and its own launch settings."""

    name: str
    config: str | None
    config_json: str | None
    changes: tuple[str, ...]
    launch: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def load(self) -> ExperimentConfig:
        """The config, checked. Raises ConfigError."""
        return check.checked(_app.load(self.config, self.config_json, self.name, self.changes))

    @property
    def arguments(self) -> list[str]:
        """Of launch.train."""
        source = f"--config={self.config}" if self.config else f"--config_json={self.config_json}"
        dashed = [f"--config.{c.lstrip('-').removeprefix('config.')}" for c in self.changes]
        return [source, f"--run_name={self.name}", *plugins.as_flags(), *dashed]


def sweep_jobs(config: str, run_name: str | None, changes: Sequence[str]) -> list[Job]:
    """One job per item of the config file's `sweep()`; `changes` win over the item's.

    Raises:
      ConfigError: no such function, no items, an unknown launch setting, or equal names.
    """
    module, argument = config_files.load_module(config)
    if not hasattr(module, "sweep"):
        raise ConfigError(f"config file {config!r} has no function sweep()")
    takes = inspect.signature(module.sweep).parameters
    prefix = run_name or config_files.load_file(config).common.run_name
    jobs = []
    for item in module.sweep(argument) if takes else module.sweep():
        launch = {k: v for k, v in item.items() if k.startswith("launch.")}
        for key in launch:
            if key not in LAUNCH_KEYS:
                raise ConfigError(f"sweep() has {key!r}; {closest(key, LAUNCH_KEYS)}")
        if argument and not takes and "launch.config" in launch:
            raise ConfigError(
                f"sweep() of {config!r} takes no argument and names the configs of its jobs, so "
                f"{argument!r} would have no effect"
            )
        own = {k: v for k, v in item.items() if k not in launch}
        texts = [f"{k}={overrides.format_value(v)}" for k, v in own.items()]
        name = f"{prefix}_{launch.get('launch.name') or _slug(own, len(jobs))}"
        source = launch.get("launch.config", config)
        jobs.append(Job(name, source, None, (*texts, *changes), launch))
    if not jobs:
        raise ConfigError(f"sweep() of {config!r} has no items")
    twice = {j.name for j in jobs if sum(j.name == k.name for k in jobs) > 1}
    if twice:
        raise ConfigError(f"sweep() of {config!r} names several jobs {sorted(twice)[0]!r}")
    return jobs


def _slug(values: Mapping[str, Any], number: int) -> str:
    """A name from what an item sets, as lr0.0002_weight_decay0.02."""
    parts = (
        path.rpartition(".")[2] + (f"{v:g}" if isinstance(v, float) else str(v))
        for path, v in values.items()
    )
    return re.sub(r"[^A-Za-z0-9.+_-]+", "-", "_".join(parts))[:80].strip("-") or str(number)


def settings(cfg: ExperimentConfig, scheduler: str) -> _render.Settings:
    """The flags' settings for one job.

    Raises:
      UserError: flags that exclude each other or are malformed.
    """
    image = _IMAGE.value or (None if scheduler == "slurm" else "olmoearth-jax")
    try:
        image, venv, workdir = _render.surroundings(image, _VENV.value)
        mounts = [_render.Mount.parse(text) for text in _MOUNT.value]
    except ValueError as e:
        raise _app.UserError(str(e)) from e
    if image is not None and scheduler != "jobset":
        mounts = _host_mounts(cfg, mounts)
    return _render.Settings(
        image=image,
        venv=venv,
        workdir=workdir,
        mounts=mounts,
        environment=_environment(scheduler, Path(_render.APP, cfg.run_folder), mounts),
        cpus_per_gpu=_CPUS.value,
        requeue=_REQUEUE.value,
        namespace=_NAMESPACE.value,
        sbatch=_SBATCH.value,
        memory=_MEMORY.value,
        time=_TIME.value,
        account=_ACCOUNT.value,
        tolerations=_TOLERATIONS.value,
        pull_secrets=_SECRETS.value,
    )


def _host_mounts(cfg: ExperimentConfig, given: list[_render.Mount]) -> list[_render.Mount]:
    """The given mounts, and those of code, results and dataset where nothing is mounted there.

    The current folder is mounted over the image's code only where it is a checkout itself.
    """
    here, saved = Path.cwd(), cfg.common.save_folder
    wanted = []
    if _BAKED.value or not Path("launch", "train.py").is_file():
        wanted.append(_render.Mount(f"{here}/local_output", f"{_render.APP}/local_output"))
    else:
        wanted.append(_render.Mount(str(here), _render.APP))
    wanted += [_render.Mount(data, data, read_only=True) for data in _local_data(cfg)]
    if saved is not None and saved.startswith("/"):
        wanted.append(_render.Mount(saved, saved))
    targets = [m.target for m in given]
    return [*given, *(m for m in wanted if not _covered(m.target, targets))]


def _local_data(cfg: ExperimentConfig) -> list[str]:
    """The folders of the dataset that lie at the same place on every host."""
    folders = (cfg.dataset.h5py_dir or "", *cfg.dataset.more_h5py_dirs)
    return [folder for folder in folders if folder.startswith("/")]


def _covered(path: str, targets: Sequence[str]) -> bool:
    return any(path == t or path.startswith(t.rstrip("/") + "/") for t in targets)


def _environment(
    scheduler: str, run_folder: Path, mounts: Sequence[_render.Mount]
) -> dict[str, str | None]:
    out: dict[str, str | None] = {
        "XLA_PYTHON_CLIENT_MEM_FRACTION": f"{_FRACTION.value:g}",
        "PYTHONUNBUFFERED": "1",
        "HDF5_USE_FILE_LOCKING": "FALSE",  # network file systems often have no locks
    }
    if scheduler == "docker":
        out["HOME"] = "/tmp"  # the container runs as the caller, who has no home in the image
    kept = [m.target for m in mounts if not m.read_only]
    if scheduler != "slurm" and _covered(str(run_folder), kept):
        # A container's own cache would be empty after each restart.
        out["JAX_COMPILATION_CACHE_DIR"] = str(run_folder.parent / "compilation_cache")
    for text in _ENV.value:
        name, value = _render.variable(text, "NAME=VALUE or NAME")
        if value is None and scheduler == "jobset":
            raise _app.UserError(f"--env={text}: a JobSet cannot take over values; give {name}=...")
        out[name] = value
    return out


@dataclasses.dataclass(frozen=True)
class Files:
    """The files of a job, the one to submit first.

    Attributes:
      folder: where they go.
      texts: by name.
      options: what they were made of.
    """

    folder: Path
    texts: Mapping[str, str]
    options: _render.Settings

    def check(self, overwrite: bool) -> None:
        """Raises ValueError if one of them would replace a file that is not ours."""
        for name in self.texts:
            outputs.check(self.folder / name, overwrite=overwrite)


def render(job: Job, cfg: ExperimentConfig, scheduler: str, topology: _render.Topology) -> Files:
    """The files of a job.

    Raises:
      ValueError: flags that exclude each other, or text that cannot stand in them.
    """
    folder = cfg.run_folder / "submit"
    if _OUTPUT.value is not None:
        folder = Path(_OUTPUT.value, *([job.name] if _SWEEP.value else []))
    folder = folder.absolute()
    options = settings(cfg, scheduler)
    texts = _render.files(scheduler, job.name, job.arguments, cfg, topology, options, folder)
    return Files(folder, texts, options)


def write(job: Job, cfg: ExperimentConfig, files: Files) -> Path:
    """Writes the files of a job; the path of the one to submit."""
    files.folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.texts.items():
        write_atomically(files.folder / name, text)
    if files.options.image is not None:
        _warn(job, cfg, files.options.mounts, str(Path(files.options.workdir) / cfg.run_folder))
    elif files.options.time is None and next(iter(files.texts)).endswith(".sbatch"):
        text = "the partition's time limit holds; --time=24:00:00 sets another"
        print(f"note: {text}", file=sys.stderr)
    return files.folder / next(iter(files.texts))


def _warn(
    job: Job, cfg: ExperimentConfig, mounts: Sequence[_render.Mount], run_folder: str
) -> None:
    """Says what a container will miss."""
    if not _covered(run_folder, [m.target for m in mounts if not m.read_only]):
        text = f"no --mount holds {run_folder}: checkpoints are lost with the container"
        print(f"warning: {text}", file=sys.stderr)
    for data in _local_data(cfg):
        if not _covered(data, [m.target for m in mounts]):
            text = f"no --mount holds {data}: the container has no dataset there"
            print(f"warning: {text}", file=sys.stderr)
    source = (job.config or job.config_json or "").partition(":")[0]
    if source.startswith("/") and not _covered(source, [m.target for m in mounts]):
        print(f"warning: no --mount holds {source}: the container cannot read it", file=sys.stderr)


def submit(path: Path, scheduler: str) -> None:
    """Hands a job file to its scheduler.

    Raises:
      UserError: the scheduler's program is not here, or it refused the job.
    """
    program, *rest = {
        "slurm": ["sbatch", str(path)],
        "jobset": ["kubectl", "apply", "-f", str(path)],
        "docker": ["docker"],
    }[scheduler]
    if shutil.which(program) is None:
        raise _app.UserError(
            f"{program!r} is not on this machine; {path} is written, submit it where it is"
        )
    command = [program, *rest] if rest else ["bash", str(path)]
    code = subprocess.run(command, check=False).returncode
    if code:
        raise _app.UserError(f"{' '.join(command)} failed with exit code {code}")


def run_here(checked: Sequence[tuple[Job, ExperimentConfig, _render.Topology]], name: str) -> int:
    """Runs jobs on this machine and reports them; 0 if all are complete, 75 if stopped.

    Args:
      name: of all of them.

    Raises:
      ValueError: --output holds files of others.
    """
    folder = checked[0][1].run_folder.parent / f"{name}_jobs"
    if _OUTPUT.value:
        folder = Path(_OUTPUT.value)
        outputs.claim(folder, flags.FLAGS.overwrite)
    module = f"{__package__}.train"
    commands = {job.name: _local.command(module, job.arguments) for job, *_ in checked}
    jobs = _local.Jobs(commands, folder, lambda line: print(line, flush=True))
    codes = jobs.run(_local.shares(_AT_ONCE.value))
    runs = {job.name: cfg.run_folder for job, cfg, _ in checked}
    print("\n".join(["", *_local.report(runs, codes, folder)]))
    if jobs.stopped:
        return _render.STOPPED
    return 1 if any(codes.values()) else 0


def _topology(job: Job) -> _render.Topology:
    """The flags' topology; a sweep's own settings count where a flag is not given."""
    if _SCHEDULER.value == "local":
        return _render.Topology(1, max(len(_local.shares(_AT_ONCE.value)[0]), 1))
    hosts, gpus = _HOSTS.value, _GPUS.value
    if not flags.FLAGS["hosts"].present:
        hosts = job.launch.get("launch.hosts", hosts)
    if not flags.FLAGS["gpus_per_host"].present:
        gpus = job.launch.get("launch.gpus_per_host", gpus)
    return _render.Topology(hosts, gpus, _PER.value)


def _looks(cfg: ExperimentConfig) -> bool:
    """Whether the run reads its dataset where this machine has it, and not from a mount."""
    targets = [text.split(":")[1] for text in _MOUNT.value if ":" in text]
    return not _covered(cfg.dataset.h5py_dir or "", targets)


def _checked(jobs: Sequence[Job]) -> Iterator[tuple[Job, ExperimentConfig, _render.Topology]]:
    """Every job with its config and topology, after all of them were found good."""
    out, found = [], []
    for job in jobs:
        prefix = f"{job.name}: " if len(jobs) > 1 else ""
        try:
            cfg = job.load()
        except ConfigError as e:
            found += [prefix + p for p in e.problems]
            continue
        if any(cfg.run_folder == other.run_folder for _, other, _ in out):
            found.append(f"{prefix}another job has the run folder {cfg.run_folder} already")
        topology = _topology(job)
        found += [prefix + p for p in topology.problems(cfg)]
        samples = _samples.known(cfg, flags.FLAGS.num_samples, _looks(cfg))
        found += [prefix + p for p in samples.problems]
        out.append((job, cfg, topology))
    if found:
        raise ConfigError(found)
    yield from out


def main(first: ExperimentConfig) -> int:
    """Writes and submits the jobs of the command line.

    Raises:
      ConfigError: what stands against one of the jobs; nothing is written then.
    """
    scheduler, given = _SCHEDULER.value, flags.FLAGS
    known = (*_render.SCHEDULERS, "local")
    if scheduler not in known:
        near = closest(scheduler, known)
        raise _app.UserError(f"unknown --scheduler={scheduler}; {near}")
    _render.refuse_unread(given, scheduler, _READ_BY)
    changes = tuple(overrides.take(outputs.expand_home(sys.argv))[1])
    if scheduler == "docker" and _SUBMIT.value and _HOSTS.value > 1:
        raise _app.UserError("--submit with docker starts one host; run docker.sh on each of them")
    if _SWEEP.value:
        if given.config is None:
            raise _app.UserError("--sweep needs --config=FILE.py with a function sweep()")
        jobs = sweep_jobs(given.config, given.run_name, changes)
    else:
        name = first.common.run_name
        jobs = [Job(name, given.config, given.config_json, changes)]
    checked = list(_checked(jobs))
    if scheduler == "local" and not _LIST.value:
        return run_here(checked, given.run_name or first.common.run_name)
    files = [] if _LIST.value else [render(j, cfg, scheduler, t) for j, cfg, t in checked]
    for found in files:
        found.check(given.overwrite)
    for number, (job, cfg, topology) in enumerate(checked):
        if _LIST.value:
            print(shlex.join(["python", "-m", f"{__package__}.train", *job.arguments]))
            continue
        print(job.name)
        print("\n".join(f"  {line}" for line in topology.table(cfg)))
        path = write(job, cfg, files[number])
        print(f"  wrote {path}", flush=True)
        if _SUBMIT.value:
            submit(path, scheduler)
    return 0


if __name__ == "__main__":
    if _workers.asked(sys.argv):
        commands.run(_workers.main, _workers.FLAGS)
    _app.run(main, require_valid=False)
