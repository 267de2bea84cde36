"""Checkpoints: retention, damage, full disks, and refusing what does not fit."""

from __future__ import annotations

import json
import logging
import resource
import shutil
import subprocess
import time
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from olmoearth_jax.checkpoints import checkpoint, integrity
from olmoearth_jax.checkpoints.checkpoint import Checkpointer, RunInfo
from olmoearth_jax.configlib import gone
from olmoearth_jax.train.metrics import read_metrics
from tests.train import train_toy as toy


def state_of(value: float, size: int = 1000):
    rng = np.random.Generator(np.random.Philox(int(value)))
    params = {"a": jnp.asarray(rng.normal(size=(size, 100)).astype(np.float32))}
    return {"params": params, "opt_state": {"m": jnp.full((3,), value)}, "step": jnp.int32(value)}


def abstract_of(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def saved(folder, steps=(2, 4), **options) -> Checkpointer:
    saver = Checkpointer(folder, RunInfo(), **{"save_interval": 2} | options)
    for step in steps:
        assert saver.save(step, state_of(step))
    assert saver.close()
    return saver


def damage_largest(folder, mode: str) -> None:
    path = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(path.read_bytes())
    if mode == "bit":
        content[len(content) // 2] ^= 1
    elif mode == "cut":
        content = content[: len(content) // 2]
    path.unlink() if mode == "lost" else path.write_bytes(content)


def test_keeps_every_nth_and_the_newest(tmp_path):
    saver = saved(tmp_path, range(2, 25, 2), save_interval=10, ephemeral_interval=2)
    assert checkpoint.complete_steps(tmp_path) == [10, 20, 24]
    assert [step for step in range(1, 21) if saver.due(step)] == list(range(2, 21, 2))
    assert checkpoint.find_checkpoint(tmp_path).name == "24"


def every(steps: int) -> RunInfo:
    """Of a run that keeps a checkpoint every so many steps."""
    config = {"trainer": {"callbacks": {"checkpointer": {"save_interval": steps}}}}
    return RunInfo(config=config)


def test_another_interval_deletes_nothing_that_was_kept_for_good(tmp_path):
    def go_on(steps, interval):
        saver = Checkpointer(tmp_path, every(interval), save_interval=interval)
        for step in steps:
            assert saver.save(step, state_of(step))
        assert saver.close()

    go_on((4, 10, 14, 20, 24), 10)
    assert checkpoint.complete_steps(tmp_path) == [10, 20, 24]
    go_on((28, 30, 32), 15)
    assert checkpoint.complete_steps(tmp_path) == [10, 20, 30, 32]
    go_on((36,), 7)
    assert checkpoint.complete_steps(tmp_path) == [10, 20, 30, 36]


def test_saved_state_survives_donation(tmp_path):
    step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    state = {"params": {"a": jnp.zeros((2000, 500))}, "step": jnp.int32(0)}
    saver = Checkpointer(tmp_path, RunInfo(), save_interval=1)
    for number in range(1, 5):
        state = step(state)
        assert saver.save(number, state)
        for _ in range(3):
            state = step(state)
    saver.close()
    for number in range(1, 5):
        value = checkpoint.load_item(tmp_path / str(number))["a"]
        assert (value == number + 3 * (number - 1)).all()


@pytest.mark.parametrize("mode", ["bit", "cut", "lost"])
def test_damaged_newest_falls_back(tmp_path, caplog, mode):
    saver = saved(tmp_path)
    damage_largest(tmp_path / "4" / "params", mode)
    with caplog.at_level(logging.WARNING):
        state, meta = saver.restore_latest(abstract_of(state_of(0)))
    assert meta["step"] == 2 and int(state["step"]) == 2
    np.testing.assert_array_equal(state["params"]["a"], state_of(2)["params"]["a"])
    assert "checkpoint" in caplog.text.lower() and str(tmp_path / "4") in caplog.text
    assert (tmp_path / "damaged-4").is_dir()
    assert saver.save(4, state_of(4)) and saver.close()  # its place is free again


def test_without_checksums_reading_tells(tmp_path):
    saver = saved(tmp_path)
    (tmp_path / "4" / integrity.CHECKSUMS_FILE).unlink()
    damage_largest(tmp_path / "4" / "params", "cut")
    _, meta = saver.restore_latest(abstract_of(state_of(0)))
    assert meta["step"] == 2


def test_only_damaged_ones_is_an_error(tmp_path):
    saver = saved(tmp_path)
    for step in (2, 4):
        damage_largest(tmp_path / str(step), "bit")
    for _ in range(2):  # a scheduler that starts the run again must not begin it anew
        with pytest.raises(ValueError, match=r"damaged \(steps \[4, 2\]\)"):
            saver.restore_latest(abstract_of(state_of(0)))


def test_unfinished_saves_do_not_count(tmp_path):
    saver = saved(tmp_path)
    (tmp_path / "6.orbax-checkpoint-tmp" / "params").mkdir(parents=True)
    (tmp_path / "8").mkdir()
    assert saver.latest_complete() == 4
    assert saver.save(6, state_of(6)) and saver.close()
    assert not (tmp_path / "6.orbax-checkpoint-tmp").exists()


@contextmanager
def no_large_files():
    """A disk on which no file can grow beyond 50 kB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_failed_save_keeps_the_old_checkpoint(tmp_path, caplog):
    saver = saved(tmp_path, steps=(2,), save_interval=0)
    with no_large_files():
        good = saver.save(4, state_of(4))
        good = saver.wait() and good
    assert not good
    assert "step 4 could not be written" in caplog.text and "step 2" in caplog.text
    assert checkpoint.complete_steps(tmp_path) == [2]
    assert integrity.damage(tmp_path / "2") is None
    assert saver.save(6, state_of(6)) and saver.close()
    assert checkpoint.complete_steps(tmp_path) == [6]


def test_run_goes_on_when_the_disk_is_full(tmp_path):
    with no_large_files():
        program = toy.ToyProgram(width=8)
        big = {"pad": jnp.asarray(np.random.default_rng(0).normal(size=(50_000,)), jnp.float32)}
        make = program.init_state
        program.init_state = lambda: make() | {"target": big}
        program.abstract_state = lambda: (
            toy.ToyProgram().abstract_state() | abstract_of({"target": big})
        )
        summary = toy.run(tmp_path, 9, program=program)
    assert (summary.status, summary.step, summary.saved) == ("completed", 9, False)
    assert toy.run(tmp_path / "other", 3).saved


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 8 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


# A save that fails leaves callbacks behind that call Orbax's closed event loop.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_run_survives_a_disk_that_fills_up_and_is_emptied(small_disk):
    filler, steps = small_disk / "filler", []

    class Filling(toy.ToyStream):
        def batches(self, start_step, stop_step):
            for step, batch in enumerate(super().batches(start_step, stop_step), start_step + 1):
                if step == 7:
                    while not checkpoint.complete_steps(small_disk / "run" / "checkpoints"):
                        time.sleep(0.05)  # the reader is ahead of the save of step 4
                    room = shutil.disk_usage(small_disk).free
                    filler.write_bytes(bytes(room - room % 4096))
                if step == 15:
                    assert integrity.damage(checkpoint.find_checkpoint(small_disk / "run")) is None
                    steps.extend(checkpoint.complete_steps(small_disk / "run" / "checkpoints"))
                    filler.unlink()
                yield batch

    summary = toy.run(small_disk / "run", 20, stream=Filling(), tensorboard=True)
    assert (summary.status, summary.step, summary.saved) == ("completed", 20, True)
    assert steps == [4]  # what was saved at 8, 10 and 12 found no room
    assert [r["step"] for r in read_metrics(small_disk / "run")] == list(range(1, 21))
    assert toy.run(small_disk / "run", 22, tensorboard=True).start_step == 20


def test_disk_too_small_is_told_before_training(tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 100})
    monkeypatch.setattr(integrity.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match="Not enough disk space"):
        toy.run(tmp_path, 3)


def test_other_architecture_is_refused(tmp_path):
    toy.run(tmp_path, 3)
    with pytest.raises(ValueError, match="another opt_state tree") as error:
        toy.run(tmp_path, 6, program=toy.ToyProgram(width=4))
    assert "differs: momentum/dense/kernel is float32[16, 8]" in str(error.value)
    meta = checkpoint.read_meta(checkpoint.find_checkpoint(tmp_path))
    changed = ["model.width: 8 -> 4"]
    with pytest.raises(ValueError, match=r"differs in:\n  model.width: 8 -> 4\nUse the same"):
        checkpoint._check_trees(meta, {"params": {"b": np.zeros(2)}}, changed)
    lines = integrity.tree_differences(
        {"a": [[1], "float32"], "b": [[2], "float32"]}, {"b": [[3], "float32"], "c": [[], "int32"]}
    )
    assert len(lines) == 3 and "missing in the checkpoint: c" in lines
    assert "unknown to this model: a" in lines


def test_other_dataset_is_refused_unless_allowed(tmp_path):
    toy.run(tmp_path, 3)
    with pytest.raises(ValueError, match=r"trainer\.allow_dataset_change"):
        toy.run(tmp_path, 6, dataset_content="other")
    assert toy.run(tmp_path, 6, dataset_content="other", allow_dataset_change=True).step == 6


def test_the_content_of_a_dataset_is_kept_and_found_under_both_names(tmp_path):
    toy.run(tmp_path, 3)
    meta = checkpoint.read_meta(checkpoint.find_checkpoint(tmp_path))
    assert meta["content"] == "def" and "dataset_content" not in meta
    old = {k: v for k, v in meta.items() if k != "content"} | {"dataset_content": "def"}
    for known in (meta, old):
        checkpoint._check_dataset(known, checkpoint.RunInfo(dataset_content="def"))
        with pytest.raises(ValueError, match="The dataset has changed"):
            checkpoint._check_dataset(known, checkpoint.RunInfo(dataset_content="other"))
    assert integrity.meta_fault(old) is None
    assert "is no text" in str(integrity.meta_fault(meta | {"content": 5}))


def test_a_dataset_that_was_moved_is_the_same(tmp_path):
    toy.run(tmp_path, 3)
    assert toy.run(tmp_path, 6, dataset_fingerprint="elsewhere").start_step == 3


@pytest.mark.parametrize(
    ("fingerprint", "steps", "taken"),
    [("abc", 5, True), ("elsewhere", 5, True), ("elsewhere", 6, False), ("elsewhere", 1, False)],
)
def test_a_checkpoint_without_content_is_judged_by_what_it_says(caplog, fingerprint, steps, taken):
    meta = {"step": 3, "dataset_fingerprint": "abc", "steps_per_epoch": steps}
    info = checkpoint.RunInfo(
        dataset_fingerprint=fingerprint, dataset_content="def", steps_per_epoch=min(steps, 5)
    )
    if taken:
        checkpoint._check_dataset(meta, info)
        assert ("taken for the same" in caplog.text) == (fingerprint != "abc")
    else:
        with pytest.raises(ValueError, match="The dataset has changed"):
            checkpoint._check_dataset(meta, info)


def test_changed_config_is_refused_unless_it_does_not_matter(tmp_path):
    toy.run(tmp_path, 3)
    harmless = {"model": {"width": toy.OUTPUTS}, "trainer": {"save_interval": 99}}
    assert toy.run(tmp_path, 6, config=harmless).start_step == 3
    other = harmless | {"model": {"width": 5, "depth": 2}}
    with pytest.raises(ValueError, match=r"model\.width: 8 -> 5") as error:
        toy.run(tmp_path, 9, config=other)
    assert 'model.depth: "(not set)" -> 2' in str(error.value)
    assert toy.run(tmp_path, 9, config=other, allow_config_change=True).step == 9


def test_what_moves_files_or_only_stops_a_run_may_change(tmp_path):
    def settings(folder, more):
        dataset = {"filter_idx_file": f"{folder}/a.npy", "more_h5py_dirs": {f"{folder}/9": 0.5}}
        loader = {"max_bad_fraction": more, "seed": 3}
        written = {"dataset": dataset | {"cache_size_gb": more}, "data_loader": loader}
        return written | {"trainer": {}}

    toy.run(tmp_path, 3, config=settings("/old.place", 0.1))
    assert toy.run(tmp_path, 6, config=settings("/new", 0.5)).start_step == 3
    assert (
        toy.run(
            tmp_path, 9, config=settings("/new", 0) | {"dataset": {"more_h5py_dirs": {}}}
        ).start_step
        == 6
    )
    with pytest.raises(ValueError, match=r"data_loader\.seed: 3 -> 4"):
        toy.run(tmp_path, 12, config=settings("/new", 0.5) | {"data_loader": {"seed": 4}})


def test_a_run_that_the_dense_engine_began_goes_on(tmp_path, caplog):
    gone._say_once.cache_clear()
    model = {"model": {"width": toy.OUTPUTS}, "trainer": {}}
    toy.run(tmp_path, 3, config=model | {"engine": "dense"})
    for last in (6, 9):
        assert toy.run(tmp_path, last, config=model).start_step == last - 3
    assert sum("engine=dense" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"best": {"step": "x", "val/loss": 1.0}}, "note of the best step"),
        ({"best": {"step": 3, "val/loss": "low"}}, "note of the best step"),
        ({"best": [3]}, "note of the best step"),
        ({"other_best": 3}, "note of earlier best steps"),
        ({"other_best": ["3"]}, "note of earlier best steps"),
        ({"step": 1 << 31}, "its step makes no sense"),
        ({"step": -1}, "its step makes no sense"),
        ({"config": {"trainer": []}}, "its config makes no sense"),
        ({"config": {"a": json.loads("[" * 90 + "]" * 90)}}, "its config makes no sense"),
    ],
)
def test_a_record_that_no_run_wrote_is_damaged(tmp_path, change, said):
    toy.run(tmp_path, 3)
    meta = checkpoint.read_meta(checkpoint.find_checkpoint(tmp_path))
    assert integrity.meta_fault(meta) is None
    assert said in str(integrity.meta_fault(meta | change))


def test_load_strategies(tmp_path):
    with pytest.raises(ValueError, match="load_strategy=always"):
        toy.run(tmp_path / "a", 3, load_strategy="always")
    toy.run(tmp_path / "a", 3)
    with pytest.raises(ValueError, match="load_strategy=never"):
        toy.run(tmp_path / "a", 6, load_strategy="never")
    toy.run(tmp_path / "never", 3, load_path=str(tmp_path / "a"), load_strategy="never")
    assert toy.lines_of(tmp_path / "never") == toy.lines_of(tmp_path / "a")
    summary = toy.run(tmp_path / "b", 3, load_path=str(tmp_path / "a"))
    assert (summary.start_step, summary.step) == (0, 3)
    ends = [checkpoint.load_item(checkpoint.find_checkpoint(tmp_path / name)) for name in "ab"]
    assert not np.array_equal(ends[0]["dense"]["kernel"], ends[1]["dense"]["kernel"])
    toy.run(tmp_path / "d", 3, load_path=str(tmp_path / "a"), load_weights_only=True)
    starts = [toy.lines_of(tmp_path / name)[0] for name in "bd"]
    assert starts[0] == starts[1]  # the same weights, hence the same loss
    end = checkpoint.load_item(checkpoint.find_checkpoint(tmp_path / "d"))
    assert not np.array_equal(ends[1]["dense"]["kernel"], end["dense"]["kernel"])
    assert not toy.run(tmp_path / "c", 3, no_checkpoints=True).saved
    with pytest.raises(ValueError, match="No complete checkpoint"):
        checkpoint.find_checkpoint(tmp_path / "c")


@pytest.mark.parametrize("how", [{}, {"load_partial": True}, {"load_weights_only": True}])
def test_no_run_starts_from_a_damaged_checkpoint(tmp_path, how):
    toy.run(tmp_path / "a", 3)
    found = checkpoint.find_checkpoint(tmp_path / "a")
    path = max((p for p in (found / "params").rglob("*") if p.is_file()),
               key=lambda p: p.stat().st_size)  # fmt: skip
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="is damaged: params/.* has changed since it was written"):
        toy.run(tmp_path / "b", 3, load_path=str(tmp_path / "a"), **how)


def test_meta_is_enough_to_embed(tmp_path):
    toy.run(tmp_path, 10)
    folder = checkpoint.find_checkpoint(tmp_path)
    meta = checkpoint.read_meta(folder)
    assert (meta["step"], meta["epoch"], meta["steps_into_epoch"]) == (10, 1, 3)
    assert meta["normalization"] == {"sentinel2": [1.0, 2.0]}
    assert meta["dataset_fingerprint"] == "abc" and meta["config"]["model"]["width"] == toy.OUTPUTS
    assert meta["digest"] == integrity.parameter_digest(checkpoint.load_item(folder))
    assert json.loads((tmp_path / "config.json").read_text()) == meta["config"]


def test_digest_sees_everything():
    base = {"a": np.zeros((2, 3), np.float32), "b": {"c": np.ones(2, np.float32)}}
    others = [
        {"a": np.zeros((3, 2), np.float32), "b": {"c": np.ones(2, np.float32)}},
        {"a": np.zeros((2, 3), np.int32), "b": {"c": np.ones(2, np.float32)}},
        {"a": np.zeros((2, 3), np.float32), "d": {"c": np.ones(2, np.float32)}},
        {"a": np.zeros((2, 3), np.float32), "b": {"c": np.array([1, 1 + 2**-23], np.float32)}},
    ]
    digests = {integrity.parameter_digest(tree) for tree in [base, *others]}
    assert len(digests) == 5
    assert integrity.parameter_digest(jax.tree.map(jnp.asarray, base)) in digests
    assert len(integrity.parameter_digest({"s": jnp.float32(1), "z": jnp.zeros((0, 2))})) == 64
