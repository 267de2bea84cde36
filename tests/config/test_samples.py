"""What is known of a dataset without opening it is refused alike by the verbs."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from launch import _samples, dry_run
from olmoearth_jax import check, overrides
from olmoearth_jax.config import ConfigError, ExperimentConfig
from olmoearth_jax.configlib.official import official
from olmoearth_jax.train.build import build_index, build_stream

ROOT = Path(__file__).resolve().parents[2]
FEW = "fewer than one global batch of 512"


def dataset(folder: Path, samples: int, images: int | None = None) -> Path:
    """A folder with nothing but its table; the first `images` samples have Sentinel-2."""
    folder.mkdir(parents=True)
    images = samples if images is None else images
    rows = [f"{i},{int(i < images)}" for i in range(samples)]
    (folder / "sample_metadata.csv").write_text("\n".join(["sample_index,sentinel2_l2a", *rows]))
    return folder


def config(folder: object, **changes: object) -> ExperimentConfig:
    named = {f"dataset.{k}": v for k, v in changes.items()}
    return overrides.apply_values(official("nano"), {"dataset.h5py_dir": str(folder), **named})


def test_table_counts_what_is_trained_on(tmp_path):
    folder = dataset(tmp_path / "1", 3000, images=2000)  # not what its name says
    keep = tmp_path / "keep.npy"
    np.save(keep, np.arange(1500))
    for changes, count in (
        ({}, 2000),
        ({"dataset_percentage": 0.5}, 1000),
        ({"filter_idx_file": str(keep)}, 1500),
        ({"filter_idx_file": str(keep), "dataset_percentage": 0.6}, 900),
        ({"more_h5py_dirs": {str(dataset(tmp_path / "more", 700)): 0.5}}, 2350),
    ):
        found = _samples.known(config(folder, **changes), given=9)
        assert (found.count, found.problems) == (count, ())
        assert found.steps_per_epoch(config(folder)) == count // 512


def test_number_by_name_or_flag_where_the_table_is_not():
    for folder in ("/nowhere/5120", "/nowhere/5120/", "gs://bucket/5120", "5120"):
        found = _samples.known(config(folder, dataset_percentage=0.5))
        assert (found.count, found.problems) == (2560, ())
        assert "is not looked into here" in found.notes[0]
    assert _samples.known(config("/nowhere/5120"), given=600).count == 600
    assert _samples.known(config("/nowhere/h5"), given=600).count == 600
    unknown = _samples.known(config("/nowhere/h5"))
    assert (unknown.count, unknown.problems) == (None, ())
    assert "--num_samples=N tells" in unknown.notes[-1]
    assert unknown.steps_per_epoch(config("/nowhere/h5")) is None
    none = _samples.known(official("nano"))
    assert (none.count, none.problems) == (None, ()) and "no dataset is given" in none.notes[0]


def test_too_few_samples_are_a_problem(tmp_path):
    here = dataset(tmp_path / "100000", 600, images=511)
    for folder, given in ((here, None), ("/nowhere/511", None), ("/nowhere/h5", 511)):
        (problem,) = _samples.known(config(folder), given).problems
        assert FEW in problem
    assert _samples.known(config(here), look=False).count == 100000  # a mount has another one
    (problem,) = _samples.known(config(dataset(tmp_path / "empty", 600, images=0))).problems
    assert "holds any of the trained space-time modalities" in problem
    (tmp_path / "bare").mkdir()
    (problem,) = _samples.known(config(tmp_path / "bare")).problems
    assert "is not a dataset folder" in problem


def test_dry_run_refuses_and_notes(tmp_path, capsys):
    with pytest.raises(ConfigError, match=FEW):
        dry_run.main(config("/nowhere/100"))
    with pytest.raises(ConfigError, match=FEW):
        dry_run.main(config("/nowhere/h5"), num_samples=100)
    capsys.readouterr()
    assert dry_run.main(config("/nowhere/h5"), num_samples=5120) == 0
    out = capsys.readouterr().out
    assert "note: the dataset /nowhere/h5 is not looked into here" in out
    assert "steps per epoch" in out and " 10\n" in out


@pytest.mark.parametrize("flags", [[], ["--num_samples=100"]])
def test_submit_and_train_refuse_what_dry_run_refuses(flags, tmp_path):
    folder = "/nowhere/h5" if flags else str(dataset(tmp_path / "h5", 100))
    given = ["--config=configs/nano.py", f"--config.dataset.h5py_dir={folder}", *flags]
    given += [f"--config.common.save_folder={tmp_path}/run"]
    for verb in ("launch.dry_run", "launch.submit"):
        done = subprocess.run(
            [sys.executable, "-m", verb, *given], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 2 and FEW in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_train_refuses_in_the_same_words(tmp_path):
    few = config(dataset(tmp_path / "h5py_data_256_x_1" / "sentinel2_l2a" / "100", 100))
    (problem,) = _samples.known(few).problems
    with pytest.raises(ValueError, match=FEW) as caught:
        stream = build_stream(few, build_index(few))
        stream.shapes(0)
    assert str(caught.value) == problem


def test_container_reads_its_mount_and_not_this_machine(tmp_path):
    folder = dataset(tmp_path / "100000", 100)
    given = ["--config=configs/nano.py", f"--config.dataset.h5py_dir={folder}", "--image=a"]
    given += [f"--output={tmp_path}/job", "--list"]
    codes = []
    for mounts in ([], [f"--mount=/nfs/h5:{tmp_path}"]):
        command = [sys.executable, "-m", "launch.submit", *given, *mounts]
        codes.append(subprocess.run(command, cwd=ROOT, capture_output=True).returncode)
    assert codes == [2, 0]


def test_index_of_vegetation_needs_its_source():
    changed = overrides.apply_values(
        official("nano"), {"common.training_modalities": ["sentinel1", "ndvi"]}
    )
    assert any("'ndvi', which is computed from" in p for p in check.problems(changed))
