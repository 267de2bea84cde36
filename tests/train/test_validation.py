"""The loss on what is kept out of training: fixed draws, no influence, best checkpoint kept."""

import json
import shutil

import jax
import numpy as np
import pytest

from olmoearth_jax import config_files, overrides
from olmoearth_jax.checkpoints import checkpoint
from olmoearth_jax.checkpoints.folders import complete_steps
from olmoearth_jax.train import build, progress, validation
from olmoearth_jax.train.metrics import read_metrics
from olmoearth_jax.train.progress import VAL_LOSS as LOSS
from olmoearth_jax.train.validation import Together, Validation
from tests.train import train_toy
from tools import eval_loss
from tools.goldens.dense_engine import dense_engine

SMALL = {
    "common.training_modalities": ["sentinel2_l2a", "openstreetmap_raster"],
    "model.encoder_config.depth": 1,
    "model.encoder_config.embedding_size": 16,
    "model.encoder_config.num_heads": 2,
    "model.decoder_config.depth": 1,
    "model.decoder_config.encoder_embedding_size": 16,
    "model.decoder_config.decoder_embedding_size": 16,
    "model.decoder_config.num_heads": 2,
    "model.encoder_config.max_patch_size": 2,
    "model.encoder_config.drop_path": 0.3,
    "data_loader.max_patch_size": 2,
    "data_loader.sampled_hw_p_list": [2],
    "data_loader.global_batch_size": 8,
    "data_loader.num_workers": 0,
    "train_module.rank_microbatch_size": 4,
    "ladder.max_rungs": 2,
    "compile.ahead": False,
    "dataset.seed": 3,
    "dataset.validation_fraction": 0.4,
    "trainer.callbacks.validation.samples": 10,
    "trainer.callbacks.validation.interval": 2,
}


def config(tmp_path, **changes):
    made = overrides.apply_values(config_files.load_file("nano:smoke"), SMALL | changes)
    made.common.save_folder = str(tmp_path / "run")
    return made


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(config, training, its validation, states before and after two steps, groups)."""
    cfg = config(tmp_path_factory.mktemp("val"))
    made = build.build_training(cfg, say=lambda line: None)
    held = Validation(cfg, made.program, made.stream.steps_per_epoch)
    return cfg, made, held


def test_same_draws_give_the_same_loss_and_training_does_not_notice(trained):
    cfg, made, held = trained
    state = made.program.init_state()
    first = held(state, 2)
    assert first is not None and LOSS in first and all(n.startswith("val/") for n in first)
    assert np.isfinite(list(first.values())).all()
    assert held(state, 4) == first and held.samples == 8  # whole micro-steps of 4
    seen = {int(i) for groups in held._read() for g in groups for i in g["index"]}
    trained_on = set(made.stream.index.parts[0].numbers.tolist())
    assert not seen & trained_on
    (groups,) = made.stream.batches(0, 1)
    with_it, _ = made.program.step(state, groups, 1)
    without, _ = made.program.step(made.program.init_state(), groups, 1)
    jax.tree.map(np.testing.assert_array_equal, with_it["params"], without["params"])
    assert held(with_it, 2) != first


def test_samples_that_are_too_large_to_keep_are_read_once_each_time(trained, monkeypatch):
    cfg, made, _ = trained
    held = Validation(cfg, made.program, made.stream.steps_per_epoch)
    assert held.batches == 2
    kept = [g["index"].tolist() for groups in held._read() for g in groups]
    assert held._read() is held._read()
    held._groups = None
    original, calls = held.stream.batches, []

    def batches(first, count):
        for groups in original(first, count):
            calls.append(groups)
            yield groups

    monkeypatch.setattr(held.stream, "batches", batches)
    monkeypatch.setattr(validation, "_KEPT_BYTES", 1)
    for read in (1 + 2, 2, 2):  # found to be too large after the first batch, and then known
        calls.clear()
        assert [g["index"].tolist() for groups in held._read() for g in groups] == kept
        assert len(calls) == read


def test_it_is_the_loss_of_the_dense_engine_too(trained):
    cfg, made, held = trained
    state = made.program.init_state()
    other = Validation(cfg, made.program, made.stream.steps_per_epoch)
    size, objective = cfg.train_module.rank_microbatch_size, made.program.engine.objective
    other.engine = dense_engine(validation.quiet(cfg), objective, made.program.mesh, size)
    theirs = other(state, 2)
    ours = held(state, 2)
    assert theirs is not None and ours is not None and {LOSS, "val/base"} <= set(theirs)
    for name, value in theirs.items():
        assert ours[name] == pytest.approx(value, rel=1e-4)


def test_its_programs_can_be_compiled_before(trained):
    cfg, made, _ = trained
    held = Validation(cfg, made.program, made.stream.steps_per_epoch)
    state = made.program.init_state()
    count = held.warm_up(state)
    programs = dict(held._programs)
    assert 0 < count == len(programs) and held(state, 2) is not None
    assert held._programs == programs and all(p._cache_size() == 1 for p in programs.values())


def test_it_stops_when_told_and_knows_its_steps(trained):
    _, made, held = trained
    assert held(made.program.init_state(), 2, lambda: True) is None
    assert [s for s in range(22) if held.due(s)] == list(range(2, 21, 2))
    held.last_step = 7
    assert held.due(7) and not held.due(0)


def test_too_few_samples_are_said(tmp_path):
    cfg = config(tmp_path, **{"data_loader.global_batch_size": 32,
                              "train_module.rank_microbatch_size": 32})  # fmt: skip
    cfg.dataset.validation_fraction = 0.6
    held = len(build.build_index(cfg, "validation"))
    cfg.dataset.validation_fraction = 0.4
    assert held > len(build.build_index(cfg, "validation"))
    index = build.build_index(cfg, "validation")
    calm = validation.quiet(cfg)
    calm.data_loader.global_batch_size = len(index) + 1
    with pytest.raises(ValueError, match="raise dataset.validation_fraction"):
        validation._stream(cfg, calm)


def test_the_loss_of_a_step_is_recorded_under_its_plain_name(trained):
    _, made, _ = trained
    (groups,) = made.stream.batches(0, 1)
    _, report = made.program.step(made.program.init_state(), groups, 1)
    name = made.program.engine.objective.metric_name
    assert float(report.metrics["train/loss"]) == float(report.metrics[f"train/{name}"])
    line = progress.progress_line(
        3, 9, {"train/base": 2.0, "train/loss": 2.5, LOSS: 1.25, "val/step": 2}, {}
    )
    assert line == "step 3/9  loss 2.5  base 2  val/loss 1.25 (step 2)"


class Falling:
    """Validation losses by step."""

    def __init__(self, losses):
        self.losses = losses

    def due(self, step):
        return step in self.losses

    def __call__(self, state, step, stop):
        return {LOSS: self.losses[step], "val/norm": 1.0}


LOSSES = {3: 5.0, 6: 2.0, 9: 4.0, 12: float("nan"), 15: 2.0}


def test_the_best_checkpoint_is_kept(tmp_path):
    lines = []
    train_toy.run(tmp_path, 18, evaluation=Falling(LOSSES), lines=lines)
    folder = tmp_path / "checkpoints"
    assert complete_steps(folder) == [6, 10, 18]  # best, every ten, newest
    meta = checkpoint.read_meta(folder / "18")
    assert meta["best"] == {"step": 6, LOSS: 2.0}
    assert sum("lowest val/loss" in line for line in lines) == 2
    told = [line for line in lines if line.startswith("step 9/")]
    assert "val/loss 2 (step 6)" in told[0]
    records = [r for r in read_metrics(tmp_path) if LOSS in r]
    assert [r["step"] for r in records] == list(LOSSES)


@pytest.mark.parametrize(
    ("losses", "best"), [({3: 5.0, 6: 2.0}, 3), ({3: 5.0, 6: 2.0, 9: 4.0}, 9), ({6: 2.0}, None)]
)
def test_a_best_step_that_could_not_be_saved_is_none(tmp_path, monkeypatch, losses, best):
    original = checkpoint.Checkpointer.save

    def save(self, step, state, **extra):
        return step != 6 and original(self, step, state, **extra)

    monkeypatch.setattr(checkpoint.Checkpointer, "save", save)
    train_toy.run(tmp_path, 12, evaluation=Falling(losses))
    steps = complete_steps(tmp_path / "checkpoints")
    assert steps == sorted({10, 12, *([] if best is None else [best])})
    meta = checkpoint.read_meta(tmp_path / "checkpoints" / "12")
    assert meta.get("best") == (None if best is None else {"step": best, LOSS: losses[best]})


def test_a_resumed_run_keeps_the_same_best(tmp_path):
    train_toy.run(tmp_path / "whole", 18, evaluation=Falling(LOSSES))
    train_toy.run(tmp_path / "parts", 18, evaluation=Falling(LOSSES), hard_stop=8)
    train_toy.run(tmp_path / "parts", 18, evaluation=Falling(LOSSES))
    assert complete_steps(tmp_path / "parts" / "checkpoints") == [6, 10, 18]
    metas = [checkpoint.read_meta(tmp_path / n / "checkpoints" / "18") for n in ("whole", "parts")]
    assert metas[0]["best"] == metas[1]["best"]
    lines = [str(train_toy.lines_of(tmp_path / n)) for n in ("whole", "parts")]
    assert lines[0] == lines[1]  # as text: NaN is not equal to itself


def test_another_measure_is_not_compared_with_the_best_so_far(tmp_path):
    def settings(samples):
        return {"trainer": {"callbacks": {"validation": {"samples": samples}}}}

    early, late, lines = {3: 1.0}, {15: 2.0, 18: 3.0}, []
    train_toy.run(tmp_path, 24, evaluation=Falling(early), hard_stop=10, config=settings(64))
    train_toy.run(
        tmp_path, 24, evaluation=Falling(late), hard_stop=18, config=settings(32), lines=lines
    )
    assert any("samples: 64 -> 32" in line and "of step 3" in line for line in lines)
    train_toy.run(tmp_path, 24, config=settings(32))
    folder = tmp_path / "checkpoints"
    assert complete_steps(folder) == [3, 10, 15, 20, 24]  # 3 stays from before, 15 is the best
    meta = checkpoint.read_meta(folder / "24")
    assert (meta["best"], meta["other_best"]) == ({"step": 15, LOSS: 2.0}, [3])


def test_an_evaluation_owed_from_before_counts_for_its_step(tmp_path):
    train_toy.run(tmp_path, 18, hard_stop=10)  # saved after step 10, nothing evaluated
    train_toy.run(tmp_path, 18, evaluation=Falling({10: 1.0, 15: 3.0}))
    assert checkpoint.read_meta(tmp_path / "checkpoints" / "18")["best"] == {"step": 10, LOSS: 1.0}


def test_no_best_without_validation(tmp_path):
    train_toy.run(tmp_path, 9, evaluation=train_toy.ToyEvaluation(3))
    assert "best" not in checkpoint.read_meta(tmp_path / "checkpoints" / "9")


def test_evaluations_together():
    class Other:
        cancel = True

        def due(self, step):
            return step == 6

        def __call__(self, state, step, stop):
            return None if stop() else {"eval/x": 1.0}

    both = Together((Falling(LOSSES), Other()))
    assert both.cancel and both.due(3) and both.due(6) and not both.due(4)
    assert both({}, 3, lambda: True) == {LOSS: 5.0, "val/norm": 1.0}
    assert both({}, 6, lambda: False) == {LOSS: 2.0, "val/norm": 1.0, "eval/x": 1.0}
    assert both({}, 6, lambda: True) is None


@pytest.mark.slow
def test_a_run_with_validation_resumes_bit_for_bit(tmp_path):
    import subprocess
    import sys

    def train(name, stop):
        changes = [f"--config.{k}={json.dumps(v)}" for k, v in SMALL.items()]
        command = [
            sys.executable, "-m", "launch.train", "--config=nano:smoke", *changes,
            f"--config.common.save_folder={tmp_path / name}",
            "--config.trainer.max_duration.value=6", f"--config.trainer.hard_stop.value={stop}",
            "--config.trainer.hard_stop.unit=steps",
            "--config.trainer.callbacks.downstream_evaluator.enabled=False",
            "--config.trainer.callbacks.tensorboard.enabled=False",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    out = train("whole", 6)
    assert "samples that are kept out of training, every 2 steps" in out
    train("parts", 3)
    train("parts", 6)
    ours, theirs = (train_toy.lines_of(tmp_path / n) for n in ("whole", "parts"))
    assert ours == theirs and sum(LOSS in r for r in ours) == 3
    shutil.rmtree(tmp_path / "parts")


def test_nothing_random_is_left_in_any_model():
    model = config_files.load_file("configs/ablations/mae.py").model
    assert model.reconstructor_config is not None
    model.reconstructor_config.decoder_config.drop_path = 0.5
    validation.without_noise(model)
    rates = [model.encoder_config.drop_path, model.reconstructor_config.decoder_config.drop_path]
    assert rates == [0, 0]


def saved(cfg, folder):
    """A checkpoint before the first step."""
    program = build.build_training(cfg, say=lambda line: None).program
    state = program.init_state()
    with checkpoint.Checkpointer(
        folder / "checkpoints", checkpoint.RunInfo(config=cfg.to_dict()), save_interval=1
    ) as saver:
        assert saver.save(0, state)
    return checkpoint.find_checkpoint(folder)


def test_checkpoints_on_fixed_draws(tmp_path, capsys):
    cfg = config(tmp_path, **{"train_module.reinit_targets": True})
    first, second = (saved(cfg, tmp_path / place / "run") for place in "ab")
    found = eval_loss.evaluate([first, second], None, 1, 99)
    assert list(found) == ["fresh", str(first), str(second)]  # runs of one name are told apart
    assert found["fresh"] == found[str(first)] == found[str(second)]  # also of drawn targets
    with pytest.raises(ValueError, match="--all_steps takes one run"):
        eval_loss._step_folders([str(first), str(second)], True)
    other = saved(config(tmp_path, **{"model.encoder_config.num_projection_layers": 2}), tmp_path)
    with pytest.raises(ValueError, match=f"{other} holds another model than {first}: unknown to"):
        eval_loss.evaluate([first, other], None, 1, 99)


def test_losses_on_another_folder_are_of_all_of_it(tmp_path):
    """A folder need not say where its samples lie, and the run has kept none of them out."""
    cfg = config(tmp_path)
    folder = tmp_path / "elsewhere"
    assert cfg.dataset.h5py_dir is not None
    shutil.copytree(cfg.dataset.h5py_dir, folder)
    (folder / "latlon_distribution.npy").unlink()
    other = eval_loss._fixed_draws(cfg, str(folder), 99)
    assert other.dataset.validation_fraction == 0 and len(build.build_index(other)) > 0
    same = eval_loss._fixed_draws(cfg, None, 99)
    assert same.dataset.validation_fraction == cfg.dataset.validation_fraction
    assert same.model.encoder_config.drop_path == 0 != cfg.model.encoder_config.drop_path
