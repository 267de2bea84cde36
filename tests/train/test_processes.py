"""launch.train in one and in two real processes: the same losses, and resuming across."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from olmoearth_jax.checkpoints import checkpoint
from olmoearth_jax.train.metrics import read_metrics
from tests.train.test_run import events
from tools import eval_loss, kill_test

ROOT = Path(__file__).resolve().parents[2]
TINY = [
    "--config=configs/nano.py:smoke",
    "--config.common.training_modalities=[sentinel2_l2a,openstreetmap_raster]",
    "--config.model.encoder_config.depth=1",
    "--config.model.encoder_config.embedding_size=32",
    "--config.model.decoder_config.depth=1",
    "--config.model.decoder_config.decoder_embedding_size=32",
    "--config.model.encoder_config.max_patch_size=2",
    "--config.data_loader.max_patch_size=2",
    "--config.data_loader.sampled_hw_p_list=[1,2]",
    "--config.ladder.max_rungs=1",
    "--config.trainer.callbacks.tensorboard.image_interval=2",
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> list[str]:
    return [*TINY, f"--config.compile.cache_dir={tmp_path_factory.mktemp('cache')}"]


def train(folder: Path, arguments: list[str], processes: int) -> None:
    kill_test.run_to_end(folder, ["launch.train", *arguments], processes)


@pytest.mark.slow
def test_two_processes_equal_one_and_resume_each_other(tmp_path, tiny, monkeypatch):
    monkeypatch.chdir(ROOT)
    steps = [*tiny, "--config.trainer.max_duration.value=6"]
    half = [*steps, "--config.trainer.hard_stop.steps=3"]
    train(tmp_path / "one", steps, 1)
    for name, first, second in (("grown", 1, 2), ("shrunk", 2, 1)):
        train(tmp_path / name, half, first)
        meta = checkpoint.read_meta(checkpoint.find_checkpoint(tmp_path / name))
        assert (meta["step"], meta["saved_on"]["processes"]) == (3, first)
        train(tmp_path / name, steps, second)
    one = read_metrics(tmp_path / "one")
    assert len(one) == 6
    for name in ("grown", "shrunk"):
        other = read_metrics(tmp_path / name)
        assert [r["step"] for r in other] == list(range(1, 7))
        for a, b in zip(one, other, strict=True):
            for key in [k for k in a if k.startswith("train/") and "micro_steps" not in k]:
                np.testing.assert_allclose(b[key], a[key], rtol=2e-4, atol=1e-6, err_msg=key)
            for key in ("data/samples", "data/encoded_tokens", "data/decoded_tokens", "data/holes"):
                assert a[key] == b[key], key
            for key in [k for k in a if k.startswith("masks/")]:
                np.testing.assert_allclose(b[key], a[key], rtol=1e-6, err_msg=key)
    pictures = [e for e in events(tmp_path / "one" / "tensorboard") if e[1] == "features"]
    assert [step for step, _, _ in pictures] == [0, 2, 4, 6]
    assert_learning_is_measured(tmp_path / "one")


FSDP = [
    "--config.mesh.data=1",
    "--config.mesh.fsdp=2",
    "--config.fsdp_rules=[['mlp/fc1/kernel',[None,'fsdp']],['mlp/fc2/kernel',['fsdp']]]",
]
VALIDATED = [
    "--config.dataset.validation_fraction=0.4",
    "--config.trainer.callbacks.validation.interval=2",
    "--config.trainer.callbacks.validation.samples=8",
]


@pytest.mark.slow
def test_parameters_sharded_over_two_processes_go_on_in_one(tmp_path, tiny, monkeypatch):
    monkeypatch.chdir(ROOT)
    steps = [*tiny, "--config.trainer.max_duration.value=6", *VALIDATED]
    train(tmp_path / "one", steps, 1)
    train(tmp_path / "sharded", [*steps, "--config.trainer.hard_stop.steps=3", *FSDP], 2)
    meta = checkpoint.read_meta(checkpoint.find_checkpoint(tmp_path / "sharded"))
    assert (meta["step"], meta["saved_on"]["processes"]) == (3, 2)
    train(tmp_path / "sharded", steps, 1)
    one, other = (read_metrics(tmp_path / n) for n in ("one", "sharded"))
    assert [r["step"] for r in other if "val/loss" not in r] == list(range(1, 7))
    assert [r["step"] for r in one if "val/loss" in r] == [2, 4, 6]
    for a, b in zip(one, other, strict=True):
        assert ("val/loss" in a) == ("val/loss" in b)
        measured = [k for k in a if k.startswith(("train/", "optim/", "val/"))]
        for key in [k for k in measured if "micro_steps" not in k]:
            np.testing.assert_allclose(b[key], a[key], rtol=2e-4, atol=1e-6, err_msg=key)


def assert_learning_is_measured(run: Path) -> None:
    """tools.eval_loss: the same draws for all checkpoints, whose order does not matter."""
    last = checkpoint.find_checkpoint(run)
    results = eval_loss.evaluate([last, last], None, 2, 99)
    fresh, trained = results["fresh"], results[f"one {last.name}"]
    assert list(results) == ["fresh", f"one {last.name}"]
    assert fresh.keys() == trained.keys() and fresh != trained
    total, parts = trained["ModalityPatchDisc"], trained["base"] + trained["contrastive"]
    np.testing.assert_allclose(total, parts, rtol=1e-4)
    assert any("| base |" in line for line in eval_loss.table(results))


STORMS = {
    # python -m tools.kill_test --module=tests.train.train_toy --folder=... -- --steps=200
    "toy": ["--module=tests.train.train_toy", "--kills=4", "--", "--steps=60"],
    "real": ["--kills=1", "--", "--config.trainer.max_duration.value=8",
             "--config.trainer.callbacks.checkpointer.ephemeral_save_interval=3"],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("storm", STORMS)
def test_killed_two_process_run_ends_in_the_same_bits(tmp_path, tiny, storm):
    command = [sys.executable, "-m", "tools.kill_test", f"--folder={tmp_path}", *STORMS[storm]]
    command += tiny if storm == "real" else []
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["difference"] is None and result["kills"] >= 1
