"""The command `olmoearth`, and what all programs do alike on their command lines."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from olmoearth_jax import commands, config_files

ROOT = Path(__file__).resolve().parents[2]


def run(*given: str) -> subprocess.CompletedProcess:
    command = (sys.executable, "-m", "olmoearth_jax", *given)
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_every_program_is_there_and_every_one_is_listed():
    for module, _ in commands.VERBS.values():
        assert importlib.util.find_spec(module) is not None, module
    listed = {module for module, _ in commands.VERBS.values()}
    own = (
        "tools.code_report",
        "tools.config_table",
        "tools.flag_table",
        "tools.oldest",
    )  # of this repository
    for path in (*(ROOT / "launch").glob("[a-z]*.py"), *(ROOT / "tools").glob("[a-z]*.py")):
        if "__main__" in path.read_text():
            name = f"{path.parent.name}.{path.stem}"
            assert name in listed or name in own, name
    for name in commands.BENCHMARKS:
        assert (ROOT / "tools" / "bench" / f"{name}.py").is_file()


@pytest.mark.parametrize("given", [(), ("--help",), ("-h",), ("help",)])
def test_the_command_lists_its_programs(given, capsys):
    with pytest.raises(SystemExit) as ended:
        commands.main(given)
    assert ended.value.code == 0
    lines = capsys.readouterr().out
    assert all(f"\n  {name} " in lines for name in (*commands.VERBS, "bench"))


@pytest.mark.parametrize(
    ("given", "part"),
    [
        (("bench", "--help"), "gpu_ladder"),
        (("help", "bench"), "gpu_ladder"),
        (("help", "verify_dataset"), "--h5py_dir"),
        (("help", "bench", "kernels"), "--profile_dir"),
    ],
)
def test_help_is_given_however_it_is_asked_for(given, part, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["olmoearth", *given])
    with pytest.raises(SystemExit) as ended:
        commands.main()
    out, err = capsys.readouterr()
    assert (ended.value.code, err) == (0, "") and part in out


@pytest.mark.parametrize(
    ("given", "part"),
    [
        (("trian",), "did you mean 'train'?"),
        (("bench",), "needs the name of a benchmark"),
        (("bench", "inferense"), "did you mean 'inference'?"),
        (("help", "trian"), "did you mean 'train'?"),
    ],
)
def test_a_wrong_name_is_answered(given, part, capsys):
    with pytest.raises(SystemExit) as ended:
        commands.main(given)
    assert ended.value.code == 2
    assert part in capsys.readouterr().err


def test_a_program_sees_its_own_arguments_and_ends_as_itself():
    done = run("verify_dataset", "--h5py_dir=/nowhere")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ")
    wrong = run("verify_dataset", "--h5py_dirr=3")
    assert wrong.returncode == 2
    assert (
        wrong.stderr == "error: Unknown command line flag 'h5py_dirr'. Did you mean: h5py_dir ?\n"
    )
    lacking = run("verify_dataset")
    assert (lacking.returncode, lacking.stderr) == (2, "error: give --h5py_dir\n")
    left = run("verify_dataset", "--h5py_dir=x", "stray")
    assert (left.returncode, left.stderr) == (2, "error: unexpected argument 'stray'\n")


def test_version():
    assert run("--version").stdout.startswith("olmoearth-jax 0")


def test_help_may_be_cut_off():
    command = f"{sys.executable} -m tools.verify_dataset --help | head -1"
    done = subprocess.run(command, cwd=ROOT, shell=True, capture_output=True, text=True)
    assert done.stderr == "" and done.stdout.startswith("Checks a dataset")


@pytest.mark.slow
@pytest.mark.parametrize(
    "given",
    [
        *(f"{verb} --help" for verb in commands.VERBS),
        *(f"bench {name} --help" for name in commands.BENCHMARKS),
        *(f"verify_dataset {form}" for form in ("-h", "--helpshort", "--helpfull")),
        *("train -h", "evaluate --helpshort", "convert_evals --helpfull"),
    ],
)
def test_help_of_every_program(given):
    done = run(*given.split())
    assert (done.returncode, done.stderr) == (0, "")
    assert "python -m" in done.stdout
    if given.split()[0] in ("train", "dry_run", "submit"):
        names = [line.strip() for line in done.stdout.split("flags:\n")[1].splitlines()]
        assert [n for n in names if n.startswith("--")][:2] == ["--config", "--run_name"]


@pytest.mark.parametrize(
    ("given", "meant"),
    [("nanno", "nano"), ("Base", "base"), ("no_landsatt", "no_landsat"),
     ("configs/bas.py", "configs/base.py"), ("configs/tinny.py", "configs/tiny.py")],
)  # fmt: skip
def test_a_mistyped_config_is_guessed(given, meant):
    with pytest.raises(config_files.ConfigError, match=f"did you mean '{meant}'[?] known: ") as e:
        config_files.load_file(given)
    assert "common.py" not in str(e.value)


def test_configs_have_names_without_a_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert config_files.load_file("base:version=v1_2") == config_files.load_file(
        "configs/base.py:version=v1_2"
    )
    assert config_files.load_file("ema") == config_files.load_file("configs/ablations/ema.py")


def test_a_stopped_program_ends_at_once_with_its_code():
    """Whatever its threads still do: taking JAX down beneath them is a segmentation fault."""
    code = """
import threading, time
from olmoearth_jax import commands
def main(argv):
    threading.Thread(target=time.sleep, args=(600,)).start()
    print("stopped")
    return 75
commands.run(main)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT
    )
    assert (done.returncode, done.stdout) == (75, "stopped\n")
