"""Texts of a config that reach file names and job files."""

from pathlib import Path
from typing import Any

import pytest

from launch import _render
from olmoearth_jax import check, overrides
from olmoearth_jax.configlib.official import official

BREAKS = ["\n", "\r", "\0", "\x0b", "\x0c", "\x1b", "\x85", "\u2028", "\u2029", "\ud800"]
NAMES = [*(f"a{c}touch x" for c in BREAKS), "", "   ", " a", "a ", "-x", "--x=1", "n" * 5000]
NAMES += ["../x", ".", "..", "é" * 150]
PATHS = [
    "common.save_folder",
    "dataset.h5py_dir",
    "dataset.cache_dir",
    "dataset.filter_idx_file",
    "trainer.load_path",
    "compile.cache_dir",
]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_run_name_that_is_no_plain_name(name):
    config = official("nano")
    config.common.run_name = name
    (found,) = check.problems(config)
    assert found.startswith("common.run_name must ") and "got " in found
    assert found.isascii() and found.isprintable() and len(found) < 400


@pytest.mark.parametrize("name", ["a", "My Run", "lr=0.1,b", "$(x) 'y' `z` {{command}}", "été"])
def test_plain_names_are_taken(name):
    config = official("nano")
    config.common.run_name = name
    config.common.save_folder = f"~/runs/{name}"
    assert check.problems(config) == []


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("bad", ["/d\n#", "/d\u2028", "/\ud800", "   ", "-d", "/" + "d" * 5000])
def test_path_that_is_no_plain_path(path, bad):
    config = overrides.apply_values(official("nano"), {path: bad})
    assert any(p.startswith(f"{path} must ") for p in check.problems(config))


def test_further_folders_are_plain_paths():
    config = official("nano")
    config.dataset.more_h5py_dirs = {"/d\n": 1.0}
    assert any(p.startswith("dataset.more_h5py_dirs must ") for p in check.problems(config))


def render(scheduler="slurm", name="run", arguments=(), folder="/out", **settings):
    options = _render.Settings(image="image", **settings)
    topology = _render.Topology(1, 1)
    config = official("nano")
    return _render.files(scheduler, name, arguments, config, topology, options, Path(folder))


@pytest.mark.parametrize("scheduler", _render.SCHEDULERS)
@pytest.mark.parametrize("bad", BREAKS, ids=ascii)
def test_job_files_hold_no_text_that_ends_its_line(scheduler, bad):
    text = f"x{bad}touch PWNED #"
    cases: list[dict[str, Any]] = [
        {"name": text},
        {"folder": f"/{text}"},
        {"arguments": [f"--config.init_seed={text}"]},
        {"workdir": text},
        {"venv": text},
        {"environment": {"A": text}},
        {"sbatch": [f"--x{text}"]},
        {"mounts": [_render.Mount(f"/{text}", "/d")]},
        {"namespace": text},
    ]
    for given in cases:
        with pytest.raises(ValueError, match="no job file can hold|must be at most 63"):
            render(scheduler, **given)
    settings = _render.Settings(image=text)
    with pytest.raises(ValueError, match="--image has"):
        _render.files(
            scheduler, "a", [], official("nano"), _render.Topology(1, 1), settings, Path("/o")
        )


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ({"sbatch": ["partition=gpu"]}, "must be an option"),
        ({"namespace": "x: {y"}, "must be at most 63"),
        ({"namespace": "Upper"}, "must be at most 63"),
    ],
)
def test_flags_that_are_something_else(given, part):
    with pytest.raises(ValueError, match=part):
        render("jobset", **given)


def test_settings_of_a_plain_job_are_taken():
    assert list(render(sbatch=["--partition=gpu"], namespace="my-team")) == ["job.sbatch"]


@pytest.mark.parametrize(
    ("scheduler", "folder"), [("docker", "/data:/etc"), ("slurm", "/d,/:/host"), ("slurm", "/d,e")]
)
def test_a_folder_that_would_be_two_mounts_is_refused(scheduler, folder):
    with pytest.raises(ValueError, match="cannot mount '/d.*separates its (parts|mounts); use a"):
        render(scheduler, mounts=[_render.Mount(folder, folder, read_only=True)])
