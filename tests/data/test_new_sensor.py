"""The worked example of docs/new_sensor.md, as written there."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from olmoearth_jax import check, modalities
from tests.data.trees import add_modality, make_tree, month

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "new_sensor.md").read_text()
SMALL = [
    "--config.data_loader.global_batch_size=4",
    "--config.train_module.rank_microbatch_size=4",
    "--config.data_loader.num_workers=1",
    "--config.data_loader.sampled_hw_p_list=[1,2]",
    "--config.ladder.max_rungs=2",
    "--config.common.save_folder=run",
]


def _commands(module: str) -> list[list[str]]:
    lines = PAGE.replace("\\\n", " ").splitlines()
    lines = [line for line in lines if line.startswith(f"python -m {module}")]
    assert lines, f"the page runs no {module}"
    return [shlex.split(line) for line in lines]


def _run(command: list[str], folder: Path, **names: str) -> subprocess.CompletedProcess:
    command = [part.replace("=DIR", f"={names.get('DIR', '')}") for part in command]
    code = (
        "import sys, runpy; sys.path.insert(0, sys.argv.pop(1)); m = sys.argv.pop(1); "
        "sys.argv[0] = m; runpy.run_module(m, run_name='__main__', alter_sys=True)"
    )
    module = command[command.index("-m") + 1]
    rest = command[command.index("-m") + 2 :]
    launched = [sys.executable, "-c", code, str(ROOT), module, *rest]
    return subprocess.run(launched, cwd=folder, capture_output=True, text=True)


@pytest.fixture(scope="module")
def own_registry():
    """Forgets the page's modalities afterwards."""
    parts = [v for n, v in vars(modalities).items() if n.startswith("_") and n.isupper()]
    kept = [(part, part.copy()) for part in parts if isinstance(part, dict | list)]
    yield
    for part, before in kept:
        part.clear()
        part.update(before) if isinstance(part, dict) else part.extend(before)


@pytest.fixture(scope="module")
def example(tmp_path_factory, own_registry) -> tuple[Path, str]:
    """(folder with the page's files, folder of the converted dataset)."""
    folder = tmp_path_factory.mktemp("sensor")
    (records,) = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
    (folder / "my_sensors.json").write_text(records)
    modalities.register_file(folder / "my_sensors.json")
    cells = list(make_tree(folder / "tree", tiles=2)["sentinel1"])
    months = [month(i) for i in range(12)]
    add_modality(folder / "tree", "sentinel2_l2a", cells, months, side=32)
    add_modality(folder / "tree", "planetscope", cells, months[:9], side=64)
    add_modality(folder / "tree", "soil", cells, [month(0)], side=32)
    for path in ("10_planetscope_monthly", "10_soil"):
        assert f"tree/{path}/EPSG:32633_100_-2000_" in PAGE
    for line in re.findall(r"tree/\S+\.(?:csv|tif)", PAGE):
        assert (folder / line).is_file(), line
    (convert,) = _commands("tools.convert_to_h5")
    run = _run([*convert, "--num_workers=0"], folder)
    assert run.returncode == 0, run.stderr
    return folder, run.stdout.splitlines()[-1]


def test_the_dataset_is_checked_and_measured(example):
    folder, dataset = example
    (verify,) = _commands("tools.verify_dataset")
    run = _run([*verify, "--num_workers=1"], folder, DIR=dataset)
    assert "8 files read" in run.stdout and "planetscope" in run.stdout, run.stderr
    (measure,) = _commands("tools.compute_norm_stats")
    run = _run([*measure, "--num_workers=1", "--partial_series"], folder, DIR=dataset)
    assert run.returncode == 0, run.stderr
    found = json.loads((folder / "stats.json").read_text())["records"]
    assert len(found["planetscope"]["computed"]["mean"]) == 4 and "soil" in found


def test_the_stream_holds_the_new_modalities_in_every_worker(example, monkeypatch):
    from launch import _app
    from olmoearth_jax.train.build import build_index, build_stream

    folder, dataset = example
    monkeypatch.chdir(folder)
    (train,) = _commands("launch.train")
    changes = [a for a in train if a.startswith("--config.") and "h5py_dir" not in a]
    changes += [f"--config.dataset.h5py_dir={dataset}", *SMALL]
    config = _app.load("configs/nano.py", None, "planet", changes)
    assert check.checked(config).common.extra_modalities.keys() == {"planetscope", "soil"}
    again = type(config).from_json(config.to_json())
    stream = build_stream(again, build_index(again))
    (group,) = next(iter(stream.batches(0, 1)))
    side = int(group["patch_size"] * group["grid"]) * 4
    assert group["data"]["planetscope"].shape[1:3] == (side, side)
    assert group["ok"].all() and (group["mask_a"]["soil"] != 0).all()


@pytest.mark.slow
def test_training_on_it_runs_as_written(example):
    folder, dataset = example
    (train,) = _commands("launch.train")
    extra = ["--config.trainer.max_duration.steps=1", "--config.trainer.no_evals=True"]
    run = _run([*train, *SMALL, *extra], folder, DIR=dataset)
    assert run.returncode == 0, run.stderr[-2000:]
    assert "planetscope" in (folder / "run" / "config.json").read_text()
