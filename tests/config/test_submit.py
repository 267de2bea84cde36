"""Job files: what they start is the config that was asked for, on the processes that were shown."""

import os
import shlex
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from absl import flags
from absl.testing import flagsaver

from launch import _app, _render, submit, train
from olmoearth_jax import overrides
from olmoearth_jax.config import ConfigError
from olmoearth_jax.configlib.official import official
from olmoearth_jax.train.loop import Summary

ROOT = Path(__file__).resolve().parents[2]
CHANGES = [
    "--config.common.training_modalities=[sentinel2_l2a, 'landsat']",
    '--config.train_module.token_exit_cfg={"landsat": 0}',
    "--config.trainer.no_evals",
]
BASE = ["--config=configs/base.py:version=v1_2", "--run_name=My Run"]

STUBS = {
    # Every process writes its arguments, each ended by a zero byte, and what it got to see.
    "python": '[ "$1" = -c ] && exit 0; printf "%s\\0" "$@" > "$OUT/$$.args"\n'
    'echo "$XLA_PYTHON_CLIENT_MEM_FRACTION" > "$OUT/$$.env"\n'
    '[ -z "${HANG:-}" ] && exit 0\ntrap "exit 75" TERM\n'
    "for _ in $(seq 100); do sleep 0.1; done; exit 9\n",
    "nvidia-smi": 'for i in $(seq "${GPUS:-2}"); do echo "GPU $i"; done',
    "scontrol": 'case "$1" in show) echo first-host ;; *) echo "$@" >> "$OUT/scontrol" ;; esac\n',
    "srun": """while [ "${1#--}" != "$1" ]; do shift; done
pids=()
trap 'kill -TERM "${pids[@]}"' TERM
for i in $(seq 0 $((TASKS - 1))); do
  SLURM_PROCID=$i SLURM_LOCALID=$((i % PER_HOST)) "$@" & pids+=($!)
done
code=0
for p in "${pids[@]}"; do
  while kill -0 "$p" 2>/dev/null; do wait "$p"; done; wait "$p" || code=$?
done
exit $code
""",
    "docker": """case "$1" in
  ps) echo "$@" >> "$OUT/docker"; echo an-old-one; exit ;;
  rm) echo "$@" >> "$OUT/docker"; exit ;;
esac
while [ $# -gt 0 ]; do
  case "$1" in
    -e) case "$2" in *=*) export "$2" ;; esac; shift ;;
    -v) case "$2" in *:/host.sh:ro) script="${2%:/host.sh:ro}" ;; esac; shift ;;
  esac
  shift
done
exec bash "$script"
""",
}


@pytest.fixture
def stubs(tmp_path: Path) -> Path:
    """A virtual environment whose programs are STUBS; the folder they write to is its `out`."""
    folder = tmp_path / "venv"
    (folder / "bin").mkdir(parents=True)
    (folder / "out").mkdir()
    (folder / "bin" / "activate").write_text(f'PATH="{folder}/bin:$PATH"\n')
    for name, text in STUBS.items():
        path = folder / "bin" / name
        path.write_text("#!/bin/bash\n" + text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return folder


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The program in this process."""
    monkeypatch.setattr(sys, "argv", ["submit", *arguments])
    monkeypatch.chdir(ROOT)
    rest, changes = overrides.take(sys.argv)
    with flagsaver.flagsaver():
        flags.FLAGS(rest)
        given = flags.FLAGS
        cfg = _app.load(given.config, given.config_json, given.run_name, changes)
        return submit.main(cfg)


def bash(script: Path, stubs: Path, *arguments: str, **environment: str) -> None:
    """Checks a script's syntax, and runs it with the stubs."""
    subprocess.run(["bash", "-n", str(script)], check=True)
    environment = _environment(stubs, environment)
    subprocess.run(["bash", str(script), *arguments], check=True, env=environment)


def _environment(stubs: Path, more: dict[str, str]) -> dict[str, str]:
    path = f"{stubs}/bin:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "OUT": str(stubs / "out"), **more}


def started(stubs: Path) -> list[list[str]]:
    """The arguments of every process that was started."""
    found = sorted((stubs / "out").glob("*.args"))
    return [path.read_text().split("\0")[:-1] for path in found]


def changes(tmp_path: Path) -> list[str]:
    """CHANGES, and a dataset in a folder with an awkward name."""
    folder = tmp_path / 'it\'s $HOME "here"' / "700000"
    return [*CHANGES, f"--config.dataset.h5py_dir={folder}"]


def check_processes(
    stubs: Path, topology: _render.Topology, coordinator: str, asked: list[str]
) -> None:
    """Every process of the topology was started once, with the config that was asked for."""
    wanted = _app.load(BASE[0].partition("=")[2], None, "My Run", asked)
    seen = {}
    for module, name, *arguments in started(stubs):
        assert (module, name) == ("-m", "launch.train")
        rest, changes = overrides.take(arguments)
        given = dict(a.lstrip("-").split("=", 1) for a in rest)
        assert _app.load(given["config"], None, given["run_name"], changes) == wanted
        assert given["coordinator"] == coordinator
        assert int(given["num_processes"]) == topology.processes
        seen[int(given["process_id"])] = given["local_device_ids"]
    each = len(topology.device_sets)
    assert seen == {i: topology.device_sets[i % each] for i in range(topology.processes)}
    assert len(started(stubs)) == topology.processes
    assert {p.read_text() for p in (stubs / "out").glob("*.env")} == {"0.8\n"}


@pytest.mark.parametrize("per", _render.PROCESS_PER)
@pytest.mark.parametrize("scheduler", _render.SCHEDULERS)
def test_job_starts_what_was_asked_for(scheduler, per, stubs, tmp_path, monkeypatch, capsys):
    topology = _render.Topology(2, 2, per)
    options = [
        f"--scheduler={scheduler}",
        "--hosts=2",
        "--gpus_per_host=2",
        "--memory_fraction=0.8",
    ]
    options += [f"--process_per={per}", f"--output={tmp_path}/a b"]
    options += [f"--venv={stubs}"] if scheduler == "slurm" else []
    asked = [*changes(tmp_path)]
    assert call(monkeypatch, *BASE, *options, *asked) == 0
    assert f"one process per {per}: {topology.processes} processes" in capsys.readouterr().out
    folder = tmp_path / "a b"
    Path(asked[-1].partition("=")[2]).mkdir(parents=True)
    if scheduler == "slurm":
        counts = {"TASKS": str(topology.processes), "PER_HOST": str(topology.processes // 2)}
        job = {"SLURM_JOB_ID": "42", "SLURM_JOB_NODELIST": "first-host,second"}
        bash(folder / "job.sbatch", stubs, **counts, **job)
        check_processes(stubs, topology, "first-host:20042", asked)
    elif scheduler == "docker":
        for host in "01":
            bash(folder / "docker.sh", stubs, host, "10.0.0.1:29500")
        check_processes(stubs, topology, "10.0.0.1:29500", asked)
    else:
        document = yaml.safe_load((folder / "jobset.yaml").read_text())
        name = check_jobset(document, hosts=2, gpus=2)
        container = container_of(document)
        environment = {v["name"]: v["value"] for v in container["env"]}
        script = tmp_path / "pod.sh"
        script.write_text(container["args"][0])
        for host in "01":
            bash(script, stubs, **environment, JOB_COMPLETION_INDEX=host)
        check_processes(stubs, topology, f"{name}-host-0-0.{name}:{_render.PORT}", asked)


def container_of(document: dict) -> dict:
    job = document["spec"]["replicatedJobs"][0]["template"]["spec"]
    return job["template"]["spec"]["containers"][0]


def check_jobset(document: dict, hosts: int, gpus: int) -> str:
    """Holds a document to the part of the JobSet schema that it uses; its name."""
    assert (document["apiVersion"], document["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert set(document) == {"apiVersion", "kind", "metadata", "spec"}
    name = document["metadata"]["name"]
    assert len(name) <= 40 and name.replace("-", "").isalnum() and name == name.lower()
    (group,) = document["spec"]["replicatedJobs"]
    assert set(group) == {"name", "replicas", "template"} and group["replicas"] == 1
    job = group["template"]["spec"]
    assert job["parallelism"] == job["completions"] == hosts
    assert job["completionMode"] == "Indexed" and job["backoffLimit"] == 0
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"
    container = container_of(document)
    assert container["resources"]["limits"]["nvidia.com/gpu"] == gpus
    assert all(set(v) == {"name", "value"} for v in container["env"])
    volumes = {v["name"] for v in pod["volumes"]}
    assert {m["name"] for m in container["volumeMounts"]} == volumes
    return name


def test_jobset_mounts_claims_and_folders(monkeypatch, tmp_path, capsys):
    mounts = ["--mount=results:/app/local_output", "--mount=/nfs/h5:/data:ro"]
    options = ["--scheduler=jobset", "--norequeue", f"--output={tmp_path}", "--image=hub/a:1"]
    assert call(monkeypatch, *BASE, *options, *mounts) == 0
    assert "warning" not in capsys.readouterr().err
    document = yaml.safe_load((tmp_path / "jobset.yaml").read_text())
    pod = document["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    shm, claim, folder = pod["volumes"]
    assert claim["persistentVolumeClaim"] == {"claimName": "results"}
    assert folder["hostPath"] == {"path": "/nfs/h5"}
    assert container_of(document)["volumeMounts"][2]["readOnly"] is True
    assert document["spec"]["failurePolicy"]["maxRestarts"] == 0
    assert "--stopped_exit_code=0" in container_of(document)["args"][0]
    assert call(monkeypatch, *BASE, *options) == 0
    assert "checkpoints are lost" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("lack", "code", "part"),
    [
        ("dataset", 2, "is not there, or must not be read"),
        ("gpus", 1, "there are 1 GPUs, 2 are needed"),
        ("program", 2, "python has no olmoearth_jax"),
    ],
)
def test_a_host_is_looked_at_before_a_run_starts(lack, code, part, stubs, tmp_path, monkeypatch):
    asked = changes(tmp_path)
    options = ["--scheduler=docker", "--gpus_per_host=2", f"--output={tmp_path}/job"]
    assert call(monkeypatch, *BASE, *options, *asked) == 0
    if lack != "dataset":
        Path(asked[-1].partition("=")[2]).mkdir(parents=True)
    if lack == "program":
        (stubs / "bin" / "python").write_text("#!/bin/bash\nexit 1\n")
    environment = _environment(stubs, {"GPUS": "1" if lack == "gpus" else "2"})
    command = ["bash", str(tmp_path / "job" / "docker.sh")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == code and part in done.stderr
    assert not started(stubs)


def test_what_a_job_asks_its_scheduler_for(monkeypatch, tmp_path, capsys):
    call(monkeypatch, *BASE, f"--output={tmp_path}/a")
    assert "note: the partition's time limit holds" in capsys.readouterr().err
    asked = ["--memory=500", "--cpus_per_gpu=4", f"--output={tmp_path}/b"]
    call(monkeypatch, *BASE, *asked, "--time=2-12:00:00", "--account=lab")
    text = (tmp_path / "b" / "job.sbatch").read_text()
    for option in ("time=2-12:00:00", "account=lab", "mem=500G", "cpus-per-task=32"):
        assert f"#SBATCH --{option}\n" in text
    assert "--cpus-per-task=32 \\\n" in text and "/slurm-%j-%t.out --open-mode" in text
    taints = ["--toleration=nvidia.com/gpu", "--toleration=team=eo", "--image_pull_secret=hub"]
    call(monkeypatch, *BASE, *asked, *taints, "--scheduler=jobset")
    text = (tmp_path / "b" / "jobset.yaml").read_text()
    group = yaml.safe_load(text)["spec"]["replicatedJobs"][0]
    pod = group["template"]["spec"]["template"]["spec"]
    assert pod["imagePullSecrets"] == [{"name": "hub"}]
    assert pod["tolerations"] == [
        {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"},
        {"key": "team", "operator": "Equal", "value": "eo", "effect": "NoSchedule"},
    ]
    resources = pod["containers"][0]["resources"]
    assert resources["limits"]["memory"] == resources["requests"]["memory"] == "500Gi"
    assert pod["volumes"][0]["emptyDir"] == {"medium": "Memory", "sizeLimit": "125Gi"}


def test_a_jobset_says_what_its_pods_will_miss(monkeypatch, tmp_path, capsys):
    asked = [f"--output={tmp_path}", "--scheduler=jobset", "--config.dataset.h5py_dir=/data/h5"]
    call(monkeypatch, *BASE, *asked)
    told = capsys.readouterr().err
    assert "no --mount holds /data/h5" in told and "checkpoints are lost" in told
    call(monkeypatch, *BASE, *asked, "--mount=data:/data/h5:ro", "--mount=runs:/app/local_output")
    assert capsys.readouterr().err == ""
    container = container_of(yaml.safe_load((tmp_path / "jobset.yaml").read_text()))
    variables = {v["name"]: v["value"] for v in container["env"]}
    assert variables["JAX_COMPILATION_CACHE_DIR"] == "/app/local_output/compilation_cache"


@pytest.mark.parametrize("requeue", [True, False])
def test_stopped_slurm_job_is_queued_again(requeue, stubs, tmp_path, monkeypatch):
    options = ["--hosts=1", "--gpus_per_host=1", f"--output={tmp_path}", f"--venv={stubs}"]
    options += [f"--requeue={requeue}", "--sbatch=--partition=gpu"]
    assert call(monkeypatch, *BASE, *options) == 0
    text = (tmp_path / "job.sbatch").read_text()
    assert f"#SBATCH --{'' if requeue else 'no-'}requeue\n" in text
    assert "#SBATCH --partition=gpu\n" in text
    if not requeue:
        assert "--stopped_exit_code=0" in text
        return
    environment = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "a", "TASKS": "1", "PER_HOST": "1"}
    full = _environment(stubs, environment | {"HANG": "1"})
    job = subprocess.Popen(["bash", str(tmp_path / "job.sbatch")], env=full)
    for _ in range(200):
        if started(stubs):
            break
        time.sleep(0.05)
    time.sleep(0.3)  # for the trap of the stub
    job.send_signal(signal.SIGTERM)
    assert job.wait(20) == 0
    assert (stubs / "out" / "scontrol").read_text() == "requeue 7\n"


def test_containers_get_code_results_and_data(monkeypatch, tmp_path):
    data = [
        "--config.dataset.h5py_dir=/data/h5/700000",
        f"--output={tmp_path}",
        "--gpus_per_host=2",
    ]
    assert call(monkeypatch, *BASE, *data, "--scheduler=docker", "--env=WANDB_API_KEY") == 0
    text = (tmp_path / "docker.sh").read_text()
    assert f"-v {ROOT}:/app \\\n" in text and "-v /data/h5/700000:/data/h5/700000:ro \\\n" in text
    assert "-e WANDB_API_KEY \\\n" in text and "--gpus '\"device=0,1\"'" in text
    assert call(monkeypatch, *BASE, *data, "--image=a.sqsh", "--baked") == 0
    text = (tmp_path / "job.sbatch").read_text()
    mounts = f"{ROOT}/local_output:/app/local_output,/data/h5/700000:/data/h5/700000:ro"
    assert f"--container-image=a.sqsh --container-workdir=/app --container-mounts={mounts}" in text
    assert "activate" not in text


def test_a_container_that_has_ended_makes_room_for_the_next(monkeypatch, tmp_path, stubs):
    options = ["--scheduler=docker", "--gpus_per_host=2", f"--output={tmp_path}/job"]
    assert call(monkeypatch, *BASE, *options) == 0
    bash(tmp_path / "job" / "docker.sh", stubs)
    listed, removed = (stubs / "out" / "docker").read_text().splitlines()
    name = _render.job_name("My Run") + "-0"
    assert f"name=^{name}$ " in listed and removed == "rm an-old-one"
    assert "label=olmoearth-jax" in listed and "status=exited" in listed
    assert len(started(stubs)) == 1


def test_a_host_of_docker_is_a_number(monkeypatch, tmp_path, stubs):
    options = ["--scheduler=docker", "--hosts=2", "--gpus_per_host=2", f"--output={tmp_path}"]
    assert call(monkeypatch, *BASE, *options) == 0
    for host in ("one", "-1", "2", ""):
        command = ["bash", str(tmp_path / "docker.sh"), host, "10.0.0.1:29500"]
        done = subprocess.run(command, env=_environment(stubs, {}), capture_output=True, text=True)
        assert done.returncode == 2 and "usage: bash" in done.stderr
    assert not started(stubs)


REFUSED = [
    (["--scheduler=slrum"], "did you mean 'slurm'?"),
    (["--process_per=gpus"], "did you mean 'gpu'?"),
    (["--hosts=0"], "no devices"),
    (["--hosts=3"], "does not divide over 24 devices"),
    (["--hosts=9", "--process_per=gpu"], "72 processes cannot share groups of 64"),
    (["--config.mesh.fsdp=3"], "does not divide 8 devices"),
    (
        ["--hosts=2", "--config.data_loader.transform_config={type: mixup, alpha: 1.0}"],
        "data_loader.transform_config sees whole groups, so it needs one process",
    ),
    (["--config.mesh.data=4"], "needs 4 devices, but there are 8"),
    (["--time=tomorrow"], "must be as 24:00:00"),
    (["--env=1A=2"], "must be NAME=VALUE"),
    (["--env=TOKEN", "--scheduler=jobset"], "cannot take over"),
    (["--mount=here", "--image=a"], "SOURCE:/TARGET"),
    (["--venv=/nowhere"], "not a virtual environment"),
    (["--venv=/nowhere", "--image=a"], "exclude each other"),
    (["--submit", "--scheduler=docker", "--hosts=2"], "on each of them"),
    (["--config.data_loader.global_batch_size=100"], "must be divisible"),
    (["--sweep", "--config=configs/small.py"], "has no function sweep()"),
    (["--sweep", "--config.common.save_folder=/d"], "has the run folder /d already"),
]


@pytest.mark.parametrize(("options", "part"), REFUSED, ids=[" ".join(o) for o, _ in REFUSED])
def test_mismatch_is_refused_and_nothing_written(options, part, monkeypatch, tmp_path):
    with pytest.raises(ValueError) as caught:
        call(monkeypatch, *BASE, f"--output={tmp_path}/x", *options)
    assert part in str(caught.value)
    assert not list(tmp_path.glob("x/job*"))


@pytest.mark.parametrize(
    ("scheduler", "name"),
    [("slurm", "job.sbatch"), ("jobset", "jobset.yaml"), ("docker", "host.sh")],
)
def test_job_files_replace_job_files_of_ours_only(scheduler, name, monkeypatch, tmp_path):
    given = [*BASE, f"--scheduler={scheduler}", f"--output={tmp_path}"]
    assert call(monkeypatch, *given) == 0
    assert call(monkeypatch, *given) == 0
    written = {path.name: path.read_text() for path in tmp_path.iterdir()}
    (tmp_path / name).write_text("#!/bin/bash\n# the image is olmoearth-jax\n")
    with pytest.raises(ValueError, match=f"{name} exists and was not written by this program"):
        call(monkeypatch, *given)
    assert "the image" in (tmp_path / name).read_text()
    assert call(monkeypatch, *given, "--overwrite") == 0
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == written


def test_submitting_needs_the_schedulers_program(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(_app.UserError, match="'sbatch' is not on this machine"):
        call(monkeypatch, *BASE, f"--output={tmp_path}", "--submit")
    program = tmp_path / "sbatch"
    program.write_text('#!/bin/sh\n[ -f "$1" ]\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert call(monkeypatch, *BASE, f"--output={tmp_path}", "--submit") == 0


def test_sweep_is_one_job_per_item(monkeypatch, tmp_path, capsys):
    arguments = ["--config=configs/nano.py", "--run_name=n", "--sweep", "--config.trainer.no_evals"]
    assert call(monkeypatch, *arguments, f"--output={tmp_path}") == 0
    out = capsys.readouterr().out
    assert out.count("1 host(s) x 4 GPUs") == len(list(tmp_path.glob("*/job.sbatch"))) == 9
    text = (tmp_path / "n_lr0.0005_weight_decay0.2" / "job.sbatch").read_text()
    assert "--config.train_module.optim_config.lr=0.0005" in text
    assert "--config.trainer.no_evals" in text
    assert call(monkeypatch, *arguments, "--gpus_per_host=2", f"--output={tmp_path}") == 0
    assert "1 host(s) x 2 GPUs" in capsys.readouterr().out


@pytest.mark.parametrize(("file", "jobs"), [("sweep_ablations", 11), ("sweep_v1_2_sizes", 4)])
def test_listed_sweeps(file, jobs, monkeypatch, capsys):
    assert (
        call(monkeypatch, f"--config=configs/{file}.py", "--run_name=x", "--sweep", "--list") == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == jobs
    for line in lines:
        program, module, verb, *given = shlex.split(line)
        assert (program, module, verb) == ("python", "-m", "launch.train")
        assert any(a.startswith("--run_name=x_") for a in given)


def test_the_argument_of_a_sweep_reaches_its_jobs(monkeypatch, tmp_path, capsys):
    sizes = "--config=configs/sweep_v1_2_sizes.py:smoke"
    assert call(monkeypatch, sizes, "--run_name=x", "--sweep", "--list") == 0
    assert capsys.readouterr().out.count(".py:version=v1_2,smoke ") == 4
    (tmp_path / "mine.py").write_text(
        "from olmoearth_jax.configs import common\n\n"
        "def get_config(arg=''):\n    return common.config(arg, 'nano')\n\n"
        "def sweep():\n    yield {'launch.config': 'configs/nano.py'}\n"
    )
    with pytest.raises(ConfigError, match="'smoke' would have no effect"):
        call(monkeypatch, f"--config={tmp_path}/mine.py:smoke", "--sweep", "--list")


@pytest.mark.parametrize(
    ("body", "part"),
    [
        ('yield {"launch.gpus": 1}', "'launch.gpus_per_host'"),
        ("yield from ()", "has no items"),
        ('yield from 2 * [{"init_seed": 1}]', "names several jobs 'nano_v1_init_seed1'"),
        ('yield {"init_sed": 1}', "did you mean 'init_seed'?"),
    ],
)
def test_wrong_sweep(body, part, monkeypatch, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from olmoearth_jax.configs import common\n\n"
        "def get_config(arg=''):\n    return common.config(arg, 'nano')\n\n"
        f"def sweep():\n    {body}\n"
    )
    with pytest.raises(ConfigError) as caught:
        call(monkeypatch, f"--config={path}", "--sweep", "--list")
    assert part in str(caught.value)


def test_image_holds_what_the_program_needs():
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    copied = [w for line in lines if line.startswith("COPY") for w in line.split()[1:-1]]
    assert all((ROOT / path).exists() for path in copied)
    assert {"olmoearth_jax", "launch", "configs", "tools"} <= {p.strip("./") for p in copied}
    assert any(line.startswith("ARG CUDA") for line in lines)
    # What changes seldom comes first: an edit of the code must not install the packages again.
    order = [next(i for i, ln in enumerate(lines) if t in ln) for t in ("-r requirements.lock",
             "COPY olmoearth_jax", "--no-deps -e .")]  # fmt: skip
    assert order == sorted(order)
    locked = {ln.partition("==")[0] for ln in (ROOT / "requirements.lock").read_text().split()}
    assert {"jax", "flax", "optax", "grain", "rasterio", "wandb", "gcsfs", "s3fs"} <= locked
    assert any(line.startswith("USER ") and line != "USER root" for line in lines)


@pytest.mark.parametrize(("status", "code"), [("cancelled", 75), ("completed", 0)])
def test_training_ends_with_the_code_that_the_job_waits_for(status, code, monkeypatch):
    monkeypatch.setattr(train, "run", lambda config: Summary(status, 0, 5, True, 1.0))
    with flagsaver.flagsaver():
        flags.FLAGS(["train", f"--stopped_exit_code={_render.STOPPED}"])
        assert train.main(official("nano")) == code


def test_gpus_of_a_process_are_numbers():
    assert train._local_devices(["0", "3"]) == [0, 3]
    for wrong in ([], ["a"], ["1", "1"]):
        with pytest.raises(_app.UserError, match="--local_device_ids"):
            train._local_devices(wrong)
