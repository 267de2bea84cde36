"""The first hour of three people, as they type it (tests/walks)."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
WALKS = ROOT / "tests" / "walks"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder of their own, with the command on the path and the files of the pages."""
    folder = tmp_path_factory.mktemp("walk")
    (folder / "bin").mkdir()
    for name, module in (("olmoearth", "-m olmoearth_jax"), ("python", "")):
        shim = folder / "bin" / name
        shim.write_text(f'#!/bin/sh\nexec "{sys.executable}" {module} "$@"\n')
        shim.chmod(0o755)
    for page, kind, name in (
        ("new_masking.md", "python", "my_masks.py"),
        ("new_task.md", "python", "make_fields.py"),
        ("new_task.md", "json", "my_tasks.json"),
    ):
        found = re.search(rf"```{kind}\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)
        assert found
        (folder / name).write_text(found[1])
    return folder


@pytest.fixture(scope="module")
def pretrained(place) -> str:
    """What the engineer's walk prints; its run is there for the others from then on."""
    return walk(place, "engineer")


def walk(place: Path, name: str) -> str:
    """What a walk prints."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{place}/bin:{os.environ['PATH']}"}
    script = str(WALKS / f"{name}.sh")
    done = subprocess.run(["sh", script], cwd=place, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", ["engineer", "scientist", "contributor"])
def test_walk(request, place, name):
    # Workers of a parallel run each have a place of their own, so who needs the run asks for it.
    pretrained = "" if name == "contributor" else request.getfixturevalue("pretrained")
    said = pretrained if name == "engineer" else walk(place, name)
    expected = {
        "engineer": ["fits h100", "val/loss", "already complete", "second - first", "report.html"],
        "scientist": ["OlmoEarth-v1_2-Nano", "<Sample 1 place, 64 x 64 pixels", "(y: 16, x: 16"],
        "contributor": ["fits", "my_fields_probe"],
    }[name]
    for part in expected:
        assert part in said, part


def test_every_verb_of_the_walks_is_there():
    from olmoearth_jax import commands

    for path in WALKS.glob("*.sh"):
        verbs = re.findall(r"^olmoearth (\w+)", path.read_text(), re.MULTILINE)
        assert verbs and set(verbs) <= set(commands.VERBS), path.name
