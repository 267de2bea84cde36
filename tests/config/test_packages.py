"""What is installed, under which names, and who imports whom."""

import ast
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BESIDE = ("configs", "launch", "tools")
"""Folders beside the package that are installed below it."""


def _imports(path: Path) -> set[str]:
    """First names of all modules that a file imports absolutely."""
    out = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            out |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            out.add((node.module or "").split(".")[0])
    return out


def test_every_package_is_installed():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert settings["package-dir"] == {f"olmoearth_jax.{name}": name for name in BESIDE}
    found = set()
    for top in ("olmoearth_jax", *BESIDE):
        for path in (ROOT / top).rglob("__init__.py"):
            parts = path.parent.relative_to(ROOT).parts
            found.add(".".join(parts if top == "olmoearth_jax" else ("olmoearth_jax", *parts)))
    assert set(settings["packages"]) == found


def test_the_folders_beside_the_package_are_imported_relatively_only():
    for top in ("olmoearth_jax", *BESIDE):
        for path in (ROOT / top).rglob("*.py"):
            assert not _imports(path) & set(BESIDE), path


def _up(path: Path) -> set[str]:
    """What a file beside the package imports relatively from outside of its folder."""
    deep = len(path.relative_to(ROOT).parts) - 1
    nodes = ast.walk(ast.parse(path.read_text()))
    return {n.module or "" for n in nodes if isinstance(n, ast.ImportFrom) and n.level > deep}


def test_no_folder_beside_the_package_imports_another():
    for top in BESIDE:
        for path in (ROOT / top).rglob("*.py"):
            assert not _up(path), path


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """An interpreter that has the wheel and the dependencies, and no source tree."""
    folder = tmp_path_factory.mktemp("wheel")
    skipped = shutil.ignore_patterns(".git", "__pycache__", "build", "*.egg-info", "local_output")
    shutil.copytree(ROOT, folder / "source", ignore=skipped, symlinks=True)
    pip = (sys.executable, "-m", "pip")
    build = (*pip, "wheel", "-q", "--no-deps", "-w", folder / "built", folder / "source")
    subprocess.run(build, check=True, capture_output=True)
    subprocess.run((sys.executable, "-m", "venv", "--without-pip", folder / "venv"), check=True)
    python = folder / "venv" / "bin" / "python"
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = folder / "venv" / "lib" / version / "site-packages"
    (wheel,) = (folder / "built").glob("*.whl")
    shutil.unpack_archive(wheel, packages, "zip")
    shutil.rmtree(folder / "source")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return python


@pytest.mark.slow
def test_a_wheel_beside_folders_of_a_user(python, tmp_path):
    for name in BESIDE:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('not the program')\n")
    (tmp_path / "mine.py").write_text((ROOT / "configs" / "nano.py").read_text())
    (tmp_path / "other.py").write_text((ROOT / "configs" / "ablations" / "ema.py").read_text())
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}

    def run(module: str, *given: str) -> subprocess.CompletedProcess:
        command = (str(python), "-m", f"olmoearth_jax.{module}", *given)
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)

    for config in ("configs/nano.py:smoke", "mine.py:smoke", "other.py"):
        done = run("launch.dry_run", f"--config={config}", "--run_name=x")
        assert done.returncode == 0, done.stderr
    trained = run("launch.train", "--config=configs/nano.py:smoke", "--run_name=x",
                  "--config.trainer.max_duration.value=1")  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    done = run("tools.inspect_checkpoint", "--checkpoint=local_output/x")
    assert done.returncode == 0, done.stderr
    done = run("launch.submit", "--config=configs/nano.py", "--run_name=y")
    assert done.returncode == 0, done.stderr
    job = tmp_path / "local_output" / "y" / "submit" / "job.sbatch"
    assert "python -m olmoearth_jax.launch.train" in job.read_text()
