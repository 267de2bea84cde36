"""Job files of workers that share a list of work."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from absl.testing import flagsaver

from launch import _workers, embed, predict
from olmoearth_jax import plugins

ROOT = Path(__file__).resolve().parents[2]
WORK = ["--model=m", "--inputs=i.csv", "--years=2023", "--output=/data/re gion"]


@pytest.fixture
def submit(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def call(*given: str, work=WORK) -> tuple[int, str]:
        saved = [
            (flagsaver.save_flag_values(f), f) for f in (_workers.FLAGS, embed.FLAGS, predict.FLAGS)
        ]
        try:
            rest = _workers.FLAGS(["submit", "--job=embed", *given, "--", *work])
            code = _workers.main(rest)
        finally:
            for values, own in saved:
                flagsaver.restore_flag_values(values, own)
        return code, "".join(capsys.readouterr())

    return call


STUB = """#!/bin/bash
echo "$(basename "$0") $*" >> "$LOG"
if [ "$(basename "$0")" = srun ]; then exit "${CODE:-0}"; fi
"""


def _bash(path: Path, folder: Path, **env: str) -> tuple[int, str]:
    """Runs a job file with programs that only note what they were called with."""
    bin_folder, log = folder / "bin", folder / "log"
    bin_folder.mkdir(exist_ok=True)
    for name in ("srun", "scontrol"):
        (bin_folder / name).write_text(STUB)
        (bin_folder / name).chmod(0o755)
    log.write_text("")
    path_text = f"{bin_folder}:{os.environ['PATH']}"
    done = subprocess.run(["bash", str(path)], env={**os.environ, "PATH": path_text,
                          "LOG": str(log), **env}, check=False)  # fmt: skip
    return done.returncode, log.read_text()


def test_slurm_array(submit, tmp_path):
    code, told = submit("--workers=64", "--at_once=16", "--time=2:00:00",
                        "--sbatch=--partition=gpu")  # fmt: skip
    assert code == 0 and "64 workers" in told
    path = tmp_path / "local_output" / "re gion" / "submit" / "job.sbatch"
    text = path.read_text()
    for line in ("--array=0-63%16", "--requeue", "--signal=B:TERM@300", "--time=2:00:00",
                 "--partition=gpu", "--gpus=1"):  # fmt: skip
        assert f"#SBATCH {line}\n" in text
    env = {"SLURM_JOB_ID": "7"}
    done, log = _bash(path, tmp_path, **env)
    assert done == 0 and "launch.embed" in log and "--output=/data/re gion" in log
    done, log = _bash(path, tmp_path, CODE="75", **env)
    assert done == 0 and "scontrol requeue 7" in log
    done, log = _bash(path, tmp_path, CODE="2", **env)
    assert done == 2 and "requeue" not in log


def test_kubernetes_indexed_job(submit, tmp_path):
    code, _ = submit("--scheduler=k8s", "--workers=9", "--mount=claim:/data", "--env=A=b c",
                     "--output=out", "--gpus=0")  # fmt: skip
    assert code == 0
    job = yaml.safe_load((tmp_path / "out" / "job.yaml").read_text())
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"] == 9 and spec["backoffLimitPerIndex"] == 6
    rules = {r["onExitCodes"]["values"][0]: r["action"] for r in spec["podFailurePolicy"]["rules"]
             if "onExitCodes" in r}  # fmt: skip
    assert rules == {2: "FailJob", 75: "Ignore"} and pod["restartPolicy"] == "Never"
    (container,) = pod["containers"]
    env = {e["name"]: e["value"] for e in container["env"]}
    assert env["OLMOEARTH_WORKERS"] == "9" and env["A"] == "b c"
    assert container["command"][:2] == ["python", "-m"] and container["command"][3:] == WORK
    assert container["volumeMounts"][0]["mountPath"] == "/data"


@pytest.mark.parametrize("given, work, said", [
    (["--scheduler=docker"], WORK, "slurm, k8s"),
    (["--job=embd"], WORK, "embed"),
    (["--image=i", "--venv=v"], WORK, "exclude each other"),
    (["--env=1"], WORK, "NAME=VALUE"),
    (["--mount=x"], WORK, "SOURCE:/TARGET"),
    (["--mount=/a:/b"], WORK, "--mount goes with --image"),
    (["--namespace=a"], WORK, "--namespace goes with --scheduler=k8s"),
    (["--scheduler=k8s", "--time=1:00:00"], WORK, "--time goes with --scheduler=slurm"),
    ([], [*WORK, "--shard=1", "--of=2"], "leave out --shard"),
    ([], [*WORK, "--patchsize=1"], "patch_size"),
    ([], WORK[1:], "give --model"),
    ([], [*WORK, "more"], "unexpected argument 'more'"),
    (["--run_name=a\nb"], WORK, "line break"),
])  # fmt: skip
def test_mistakes_are_told_and_nothing_is_written(submit, tmp_path, given, work, said):
    code, told = submit(*given, work=work)
    assert code == 2 and said in told
    assert not list(tmp_path.iterdir())


def test_workers_of_a_map(submit, tmp_path):
    work = ["--run=runs/crops", "--inputs=i.csv", "--output=/data/crops"]
    code, told = submit("--job=predict", "--workers=5", work=work)
    assert code == 0 and "5 workers" in told
    text = (tmp_path / "local_output" / "crops" / "submit" / "job.sbatch").read_text()
    assert "#SBATCH --array=0-4\n" in text
    assert "python -m launch.predict --run=runs/crops --inputs=i.csv --output=/data/crops" in text
    code, _ = submit("--job=predict", "--scheduler=k8s", "--workers=5", work=work)
    held = yaml.safe_load((tmp_path / "local_output" / "crops" / "submit" / "job.yaml").read_text())
    container = held["spec"]["template"]["spec"]["containers"][0]
    assert code == 0 and container["command"][2] == "launch.predict"
    assert {"name": "OLMOEARTH_WORKERS", "value": "5"} in container["env"]


def test_the_command_of_submit_leads_here(tmp_path):
    assert not _workers.asked(["submit", "--config=a", "--", "--job=x"])
    command = [sys.executable, "-m", "launch.submit", "--job=embed", "--workers=3",
               f"--output={tmp_path}", "--", *WORK]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "#SBATCH --array=0-2\n" in (tmp_path / "job.sbatch").read_text()


@pytest.mark.parametrize("scheduler", ["slurm", "k8s"])
def test_workers_import_the_same_plugins(submit, tmp_path, monkeypatch, scheduler):
    monkeypatch.setenv(plugins.VARIABLE, "my_masks,my.losses")
    code, told = submit(f"--scheduler={scheduler}", f"--output={tmp_path}")
    assert code == 0, told
    (text,) = (p.read_text() for p in tmp_path.glob("job.*"))
    command = re.search(r"launch\.embed\W+--plugins=my_masks,my\.losses\W+--model=m", text)
    assert command, text
    monkeypatch.delenv(plugins.VARIABLE)
    submit(f"--scheduler={scheduler}", f"--output={tmp_path}")
    assert all("--plugins" not in p.read_text() for p in tmp_path.glob("job.*"))
