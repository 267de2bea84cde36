"""What is written where: nothing of a user's is lost, and home folders are found."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from olmoearth_jax import files, outputs
from olmoearth_jax.interop import checkpoints
from olmoearth_jax.model import latent_mim
from olmoearth_jax.model.config import EncoderConfig, ModelConfig, PredictorConfig
from tools import convert_weights
from tools.convert_evals import fit_buckets, save_buckets

ROOT = Path(__file__).resolve().parents[1]


def test_home_is_found_behind_an_equals_sign(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    given = ["train", "--out=~/a", "--input=~/a.tif,b,~/c", "--config.x.y=~/d", "--v=~", "~/e",
             "--ratio=~x", "--text=a~/b", "--config.list=[~/a, ~/b]", "--set=task.h5py_dir=~/h",
             "--mount=~/a:/data", "--x=~nobody-of-this-name/y", "--text=on ~/ and"]  # fmt: skip
    assert outputs.expand_home(given) == [
        "train", "--out=/home/me/a", "--input=/home/me/a.tif,b,/home/me/c",
        "--config.x.y=/home/me/d", "--v=/home/me", "~/e", "--ratio=~x", "--text=a~/b",
        "--config.list=[/home/me/a, /home/me/b]", "--set=task.h5py_dir=/home/me/h",
        "--mount=/home/me/a:/data", "--x=~nobody-of-this-name/y", "--text=on ~/ and",
    ]  # fmt: skip


def test_inputs_are_never_replaced(tmp_path):
    scene = tmp_path / "scene.tif"
    scene.write_bytes(b"x")
    (tmp_path / "link.tif").symlink_to(scene)
    inside = tmp_path / "a" / ".." / "scene.tif"
    for path in (scene, tmp_path / "link.tif", inside):
        with pytest.raises(ValueError, match="would replace one of the inputs"):
            outputs.check(path, [scene], overwrite=True)


def test_files_of_others_stay_unless_the_user_says_so(tmp_path):
    for name in ("map.tif", "item.json", "e.npz", "e.safetensors", "curve.png", "notes.txt"):
        path = tmp_path / name
        outputs.check(path)  # nothing there yet
        path.write_bytes(b"{}" if name.endswith("json") else b"somebody's")
        with pytest.raises(ValueError, match="was not written by this program"):
            outputs.check(path)
        outputs.check(path, overwrite=True)
    with pytest.raises(ValueError, match="is a folder"):
        outputs.check(tmp_path, overwrite=True)


def test_our_own_files_are_replaced(tmp_path):
    np.savez(tmp_path / "e.npz", x=np.zeros(2), software=np.array("olmoearth-jax 1"))
    (tmp_path / "s.json").write_text(json.dumps({"software": "olmoearth-jax 1"}))
    item = {"properties": {"olmoearth:software": "olmoearth-jax 1"}}
    (tmp_path / "i.json").write_text(json.dumps(item))
    for name in ("e.npz", "s.json", "i.json"):
        outputs.check(tmp_path / name)
    other = {"properties": {"olmoearth:software": "another"}}
    (tmp_path / "i.json").write_text(json.dumps(other))
    assert not outputs.is_ours(tmp_path / "i.json")
    save_buckets(tmp_path / "q.h5", {1: fit_buckets(np.eye(4, dtype="f4"), 1)})
    assert outputs.is_ours(tmp_path / "q.h5")


@pytest.mark.parametrize("suffix", ["tif", "npz", "safetensors", "h5", "png", "md", "json", "sh"])
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"[" * 9999, b"II*\0\xff\xff\xff\xff"])
def test_damaged_files_are_not_ours(tmp_path, suffix, content):
    path = tmp_path / f"x.{suffix}"
    path.write_bytes(content)
    assert not outputs.is_ours(path)


@pytest.mark.parametrize("text", ["[]", "1", "null", '{"properties": []}', "{", ""])
def test_odd_files_are_not_ours(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    assert not outputs.is_ours(tmp_path / "x.json")


@pytest.mark.parametrize("name", ["map.tif", "e.npz", "e.json", "curves.png"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_pipes_are_neither_waited_for_nor_replaced(tmp_path, name, overwrite):
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match="is a pipe or device; the output must be a file"):
        outputs.check(tmp_path / name, overwrite=overwrite)


def test_nothing_takes_the_place_of_a_pipe_or_device(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="pipe is a pipe, device or folder"):
        files.write_atomically(tmp_path / "pipe", "x")
    assert [p.name for p in tmp_path.iterdir()] == ["pipe"] and (tmp_path / "pipe").is_fifo()


def test_a_mark_is_no_longer_than_a_mark(tmp_path):
    path = tmp_path / "e.npz"
    np.savez_compressed(path, software=np.array("olmoearth-jax " + "x" * 10_000))
    assert not outputs.is_ours(path)


def test_folders_are_looked_at_before_the_work(tmp_path, monkeypatch):
    outputs.check(tmp_path / "new" / "deeper" / "map.tif")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is a file, so nothing can be written"):
        outputs.check(tmp_path / "file" / "map.tif")
    with pytest.raises(ValueError, match="/proc cannot be written to"):
        outputs.check(Path("/proc/map.tif"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ValueError, match="cannot be written to"):
        outputs.check(tmp_path / "map.tif")


def test_a_folder_of_files_without_marks_is_claimed(tmp_path):
    ours, other = tmp_path / "ours", tmp_path / "other"
    outputs.claim(ours)
    (ours / "0.npy").write_bytes(b"x")
    outputs.claim(ours)
    other.mkdir()
    outputs.claim(other)  # empty
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "0.npy").write_bytes(b"mine")
    with pytest.raises(ValueError, match="holds files that were not written by this program"):
        outputs.claim(mine)
    assert [path.name for path in mine.iterdir()] == ["0.npy"]
    outputs.claim(mine, overwrite=True)
    with pytest.raises(ValueError, match="is a file, so nothing can be written"):
        outputs.claim(mine / "0.npy")


def test_weights_are_not_exported_over_a_run_or_over_foreign_weights(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"trainer": {}, "train_module": {}}))
    with pytest.raises(ValueError, match="is the folder of a run"):
        convert_weights.export_weights("nowhere", str(run), overwrite=True)
    (run / "checkpoints" / "7" / "meta").mkdir(parents=True)
    for inside in ("checkpoints", "checkpoints/7"):
        with pytest.raises(ValueError, match="is the folder of a run"):
            convert_weights.export_weights("nowhere", str(run / inside), overwrite=True)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "weights.pth").write_bytes(b"weights")
    with pytest.raises(ValueError, match="no export of this program"):
        convert_weights.export_weights("nowhere", str(foreign))
    with pytest.raises(ValueError, match="No complete checkpoint"):  # got past the target
        convert_weights.export_weights("nowhere", str(foreign), overwrite=True)
    assert (foreign / "weights.pth").read_bytes() == b"weights"


def test_an_export_is_repeated_but_keeps_what_others_put_beside_it(tmp_path):
    common = {"supported_modality_names": ["sentinel2_l2a"], "num_heads": 2, "depth": 1}
    config = ModelConfig(
        encoder_config=EncoderConfig(**common, embedding_size=16, max_patch_size=4),
        decoder_config=PredictorConfig(**common),
    )
    params = latent_mim.initial_params(config, 3)
    checkpoints.write(checkpoints.Weights(config, params, None, {}, ()), tmp_path / "run")
    source, target = str(tmp_path / "run"), tmp_path / "out"
    convert_weights.export_weights(source, str(target))
    first = (target / "weights.pth").read_bytes()
    convert_weights.export_weights(source, str(target))
    assert (target / "weights.pth").read_bytes() == first
    (target / "model.safetensors").write_bytes(b"mine")
    with pytest.raises(ValueError, match="model.safetensors that is no export"):
        convert_weights.export_weights(source, str(target))
    other = tmp_path / "other"
    other.mkdir()
    (other / "ATTRIBUTION.md").write_text("Made by me.")
    with pytest.raises(ValueError, match="ATTRIBUTION.md that is no export"):
        convert_weights.export_weights(source, str(other))
    with pytest.raises(ValueError, match="was not written by this program"):
        convert_weights.import_weights(str(target), str(other))
    assert (other / "ATTRIBUTION.md").read_text() == "Made by me."


def test_a_tool_finds_home_and_keeps_what_is_not_its_own(tmp_path):
    table = tmp_path / "stats.json"
    table.write_text('{"mine": 1}')
    command = [sys.executable, "-m", "tools.compute_norm_stats", "--h5py_dir=~/none",
               "--output=~/stats.json"]  # fmt: skip
    environment = {**os.environ, "HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"{table} exists and was not written by this program" in done.stderr
    assert table.read_text() == '{"mine": 1}'
