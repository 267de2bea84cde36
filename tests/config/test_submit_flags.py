"""Job files: what a command line means for them, whatever folder or scheduler it names."""

import shlex
import sys
from pathlib import Path

import pytest
import yaml
from absl import flags
from absl.testing import flagsaver

from launch import _app, submit
from olmoearth_jax import outputs, overrides
from olmoearth_jax.configlib.official import official

ROOT = Path(__file__).resolve().parents[2]
BASE = ["--config=configs/base.py:version=v1_2", "--run_name=My Run"]


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The program in this process."""
    monkeypatch.setattr(sys, "argv", ["submit", *arguments])
    monkeypatch.chdir(ROOT)
    rest, changes = overrides.take(outputs.expand_home(sys.argv))
    with flagsaver.flagsaver():
        flags.FLAGS(rest)
        given = flags.FLAGS
        return submit.main(_app.load(given.config, given.config_json, given.run_name, changes))


def test_a_home_folder_is_named_in_full(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    asked = [f"--output={tmp_path}/job", "--config.dataset.h5py_dir=~/h5/700000"]
    assert call(monkeypatch, *BASE, *asked) == 0
    text = (tmp_path / "job" / "job.sbatch").read_text()
    assert f"--config.dataset.h5py_dir={tmp_path}/home/h5/700000" in text and "~" not in text


def test_a_saved_config_keeps_its_folder_under_its_name(monkeypatch, tmp_path, capsys):
    saved = official("nano")
    saved.common.save_folder = str(tmp_path / "run")
    (tmp_path / "config.json").write_text(saved.to_json())
    for more, folder in ([], str(tmp_path / "run")), (["--run_name=next"], "local_output/next"):
        assert call(monkeypatch, f"--config_json={tmp_path}", *more, "--list") == 0
        given = dict(a.lstrip("-").split("=") for a in shlex.split(capsys.readouterr().out)[3:])
        cfg = _app.load(None, given["config_json"], given["run_name"])
        assert str(cfg.run_folder) == folder


@pytest.mark.parametrize("name", ["true", "null", "on", "y"])
def test_a_name_that_yaml_takes_for_something_else(name, monkeypatch, tmp_path):
    given = [BASE[0], f"--run_name={name}", "--scheduler=jobset", "--namespace=1"]
    assert call(monkeypatch, *given, f"--output={tmp_path}") == 0
    about = yaml.safe_load((tmp_path / "jobset.yaml").read_text())["metadata"]
    assert about == {"name": name, "namespace": "1"}


def test_logs_in_a_folder_with_a_percent_sign(monkeypatch, tmp_path):
    assert call(monkeypatch, *BASE, f"--output={tmp_path}/50%j") == 0
    text = (tmp_path / "50%j" / "job.sbatch").read_text()
    assert f"#SBATCH --output={tmp_path}/50%%j/slurm-%j.out\n" in text


def test_all_folders_of_a_dataset_are_mounted(monkeypatch, tmp_path, capsys):
    asked = ["--config.dataset.h5py_dir=/d/700000", "--config.dataset.more_h5py_dirs={/e/9: 0.5}"]
    asked += [f"--output={tmp_path}"]
    assert call(monkeypatch, *BASE, *asked, "--scheduler=docker") == 0
    text = (tmp_path / "docker.sh").read_text()
    assert "-v /d/700000:/d/700000:ro" in text and "-v /e/9:/e/9:ro" in text
    assert call(monkeypatch, *BASE, *asked, "--scheduler=jobset") == 0
    assert "no --mount holds /e/9: the container has no dataset" in capsys.readouterr().err


UNREAD = [
    ("slurm", "--namespace=a"), ("slurm", "--at_once=2"), ("slurm", "--mount=/a:/b"),
    ("slurm", "--baked"), ("jobset", "--time=1:00:00"), ("jobset", "--sbatch=--x"),
    ("docker", "--account=a"), ("docker", "--cpus_per_gpu=2"), ("local", "--hosts=2"),
    ("local", "--env=A=b"),
]  # fmt: skip


@pytest.mark.parametrize(("scheduler", "flag"), UNREAD)
def test_a_flag_without_effect_is_refused(scheduler, flag, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match=f"{flag.partition('=')[0]} goes with --"):
        call(monkeypatch, *BASE, f"--scheduler={scheduler}", flag, f"--output={tmp_path}/x")
    assert not list(tmp_path.iterdir())
