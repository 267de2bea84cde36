"""Linear probes and fine-tuning: learning, determinism, selection, bad input."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from olmoearth_jax.configlib.tasks import PROBE_TYPES, DatasetInfo, EvalTaskConfig, RunOptions
from olmoearth_jax.evals import finetune, linear_probe, probe_heads, scoring
from olmoearth_jax.evals.linear_probe import train_probe

from .builders import task, tiny_model, write_windows


def _classes(n=60, d=6, seed=0):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 3, n)
    x = rng.normal(size=(n, d)) + 4 * np.eye(3, d)[y]
    return x.astype(np.float32), y


SETTINGS = EvalTaskConfig(
    probe_lr=0.05, epochs=10, linear_probe_eval_interval=5, probe_batch_size=16
)
INFO = DatasetInfo("t", "classification", 3, ())


def _train(train, valid, test=None, settings=SETTINGS, info=INFO, **options):
    splits = {"train": train, "valid": valid} | ({} if test is None else {"test": test})
    return train_probe(settings, info, splits, RunOptions(**options))


def test_a_probe_learns_separable_classes():
    out = _train(_classes(), _classes(seed=1), _classes(seed=2))
    assert out.test is not None and out.test.primary > 0.9
    assert len(out.history) == 2 and len(out.losses) == 10 * 4


def test_the_same_seed_gives_the_same_bits():
    runs = [_train(_classes(), _classes(seed=1)) for _ in range(2)]
    other = _train(_classes(), _classes(seed=1), seed=1)
    assert np.array_equal(runs[0].losses, runs[1].losses)
    assert not np.array_equal(runs[0].losses, other.losses)


def test_small_chunks_change_nothing(monkeypatch):
    whole = _train(_classes(), _classes(seed=1))
    monkeypatch.setattr(linear_probe, "CHUNK_BYTES", 1000)
    parts = _train(_classes(), _classes(seed=1))
    assert np.allclose(whole.losses, parts.losses, rtol=1e-5)
    assert whole.valid.primary == parts.valid.primary


def test_every_probe_type_trains_on_pixels():
    rng = np.random.default_rng(0)
    y = rng.integers(-1, 2, (8, 8, 8))
    x = rng.normal(size=(8, 4, 4, 64)).astype(np.float32)
    info = DatasetInfo("t", "segmentation", 2, (), height_width=8)
    for kind in PROBE_TYPES:
        settings = EvalTaskConfig(probe_lr=0.01, epochs=2, probe_batch_size=4, probe_type=kind)
        data = x[:, :, :, None] if kind == "attnpool" else x
        out = _train((data, y), (data, y), settings=settings, info=info)
        assert 0 <= out.valid.primary <= 1 and np.isfinite(out.losses).all()


def test_interpolating_types_are_one_map():
    """A linear map before or after interpolation is the same, which `forward` relies on."""
    probe = probe_heads.make_probe(
        "interpolate_linear", "segmentation", 3, (2, 4, 4, 5), 8, bf16=False
    )
    params, _ = probe_heads.init(probe, 0)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 4, 5)), jnp.float32)
    got, _ = probe_heads.forward(probe, params, {}, x)
    want = probe_heads.linear(params["linear"], probe_heads.resize_bilinear(x, 8, 8))
    assert np.allclose(got, want, atol=1e-5)


def test_regression_is_scored_in_the_unit_of_the_labels():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 4)).astype(np.float32)
    y = (1000 + 50 * x[:, 0]).astype(np.float32)
    y[:3] = np.nan
    settings = EvalTaskConfig(probe_lr=0.1, epochs=30, probe_batch_size=8)
    info = DatasetInfo("t", "scalar_regression", 1, ())
    out = _train((x, y), (x, y), settings=settings, info=info)
    assert out.valid.metrics["r2"] > 0.9


def test_the_best_chunk_is_reported_when_asked_for():
    settings = dataclasses.replace(
        SETTINGS, select_best_by_primary_metric=True, epochs=6, linear_probe_eval_interval=2,
        probe_lr=0.5,
    )  # fmt: skip
    out = _train(_classes(), _classes(seed=1), settings=settings)
    assert out.valid is out.history[out.best_epoch // 2 - 1]
    assert out.valid.primary == max(r.primary for r in out.history)


@pytest.mark.parametrize("best", range(4))
def test_the_best_validation_is_reported_whatever_the_interval(monkeypatch, best):
    """Also where the last one comes after fewer epochs than the others."""
    settings = dataclasses.replace(
        SETTINGS, select_best_by_primary_metric=True, epochs=7, linear_probe_eval_interval=2
    )
    scores = iter(np.linspace(0.1, 0.3, 4)[np.roll(range(4), best + 1)])
    monkeypatch.setattr(
        scoring, "score", lambda *_: scoring.EvalResult(float(next(scores)), "accuracy", "a", {})
    )
    out = _train(_classes(), _classes(seed=1), settings=settings)
    assert out.best_epoch == min(2 * best + 2, 7)
    assert out.valid is out.history[best] and out.valid.primary == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (x[:0], y[:0]), "the train split is empty"),
        (lambda x, y: (x * np.nan, y), "NaN"),
        (lambda x, y: (x, y * 0 - 1), "every label of the train split"),
        (lambda x, y: (x, y + 3), "outside 0...2"),
        (lambda x, y: (x, y[:-1]), "60 embeddings but 59 labels"),
    ],
)
def test_probes_refuse_bad_data(change, message):
    with pytest.raises(ValueError, match=message):
        _train(change(*_classes()), _classes())
    with pytest.raises(ValueError, match="multi-label"):
        _train(_classes(), _classes(), info=dataclasses.replace(INFO, multilabel=True))


def test_probes_refuse_types_that_do_not_fit():
    for kind, kind_of_task, message in (
        ("linaer", "segmentation", "did you mean 'linear'"),
        ("bilinear_conv", "classification", "per-pixel"),
        ("attnpool", "regression", "regression"),
        ("attnpool", "segmentation", "divisible by 64"),
    ):
        with pytest.raises(ValueError, match=message):
            probe_heads.make_probe(kind, kind_of_task, 2, (1, 4, 4, 32), 8)


def test_nothing_to_score_is_a_loss_of_zero():
    logits = jnp.ones((2, 3, 3, 4))
    assert probe_heads.cross_entropy(logits, -jnp.ones((2, 3, 3), int)) == 0
    assert probe_heads.masked_mse(jnp.ones(3), jnp.full(3, jnp.nan)) == 0
    assert probe_heads.multilabel_soft_margin(jnp.ones((2, 3)), -jnp.ones((2, 3), int)) == 0


def test_heads_refuse_what_does_not_fit():
    for args, message in (
        (("unett", "segmentation", 2, 8, 4), "did you mean 'unet'"),
        (("unet", "classification", 2, 8, 4), "per-pixel"),
        (("unet", "segmentation", 2, 8, 5), "power of two"),
        (("linear", "scalar_regression", 1, 8, 4), "scalar regression"),
    ):
        with pytest.raises(ValueError, match=message):
            probe_heads.make_head(*args)


@pytest.mark.parametrize(("kind", "head"), [("segmentation", "unet"), ("segmentation", "linear")])
def test_fine_tuning_learns_and_leaves_the_model_alone(tmp_path, monkeypatch, kind, head):
    write_windows(tmp_path / "yemen_crop", {"train": 6, "val": 2, "test": 2}, kind)
    monkeypatch.setenv("EVAL_DATASETS_DIR", str(tmp_path))
    model = tiny_model()
    before = np.array(model.params["norm"]["scale"])
    settings = task(eval_mode="finetune", ft_lr=1e-2, ft_batch_size=4, epochs=5, ft_head_type=head)
    lines: list[str] = []
    out = finetune.run("t", settings, model, RunOptions(run_on_test=True), log=lines.append)
    assert out["valid"].primary > 0 and len(lines) == 5
    first, last = (float(line.split("loss ")[1].split(",")[0]) for line in (lines[0], lines[-1]))
    assert last < first
    assert np.array_equal(before, model.params["norm"]["scale"])


def _scored(monkeypatch, scores):
    """The parameters at the end of each epoch, whose validation is said to give these scores."""
    original, seen, left = finetune.FineTuner.evaluate, [], iter(scores)

    def evaluate(self, split):
        found = original(self, split)
        if len(seen) == len(scores):
            return found
        seen.append(jax.tree.map(np.array, self.params))
        return dataclasses.replace(found, primary=next(left))

    monkeypatch.setattr(finetune.FineTuner, "evaluate", evaluate)
    return seen


@pytest.mark.parametrize("scores", [(0.9, 0.1, 0.2), (0.1, 0.9, 0.2), (0.1, 0.2, 0.9)])
def test_fine_tuning_keeps_the_parameters_of_the_best_epoch(tmp_path, monkeypatch, scores):
    write_windows(tmp_path / "yemen_crop", {"train": 4, "val": 2})
    monkeypatch.setenv("EVAL_DATASETS_DIR", str(tmp_path))
    settings = task(eval_mode="finetune", ft_lr=1e-2, ft_batch_size=2, epochs=3)
    seen = _scored(monkeypatch, scores)
    tuner = finetune.FineTuner("t", settings, tiny_model(), RunOptions())
    tuner.train(lambda: False, None)
    best = int(np.argmax(scores))
    assert tuner.best_epoch == best + 1
    for number, params in enumerate(seen):
        leaves = zip(jax.tree.leaves(tuner.params), jax.tree.leaves(params), strict=True)
        assert all(np.array_equal(a, b) for a, b in leaves) == (number == best)


def test_fine_tuning_of_another_model_begins_anew(tmp_path, monkeypatch):
    write_windows(tmp_path / "yemen_crop", {"train": 4, "val": 2})
    monkeypatch.setenv("EVAL_DATASETS_DIR", str(tmp_path))
    settings = task(eval_mode="finetune", ft_lr=1e-2, ft_batch_size=2, epochs=1)
    lines: list[str] = []
    for seed, count in ((0, 1), (0, 1), (1, 2), (1, 2)):
        options = RunOptions(save_folder=tmp_path / "kept")
        finetune.run("t", settings, tiny_model(seed=seed), options, log=lines.append)
        assert len(lines) == count


def test_fine_tuning_goes_on_where_it_stopped(tmp_path, monkeypatch):
    write_windows(tmp_path / "yemen_crop", {"train": 5, "val": 2})
    monkeypatch.setenv("EVAL_DATASETS_DIR", str(tmp_path))
    settings = task(
        eval_mode="finetune", ft_lr=1e-3, ft_batch_size=2, epochs=3, ft_grad_accum_steps=2
    )
    whole = finetune.run("t", settings, tiny_model(), RunOptions(save_folder=tmp_path / "a"))
    calls = iter(range(100))

    with pytest.raises(finetune.embeddings.Stopped):
        finetune.run(
            "t", settings, tiny_model(), RunOptions(save_folder=tmp_path / "b"),
            stop=lambda: next(calls) > 4,
        )  # fmt: skip
    resumed = finetune.run("t", settings, tiny_model(), RunOptions(save_folder=tmp_path / "b"))
    assert resumed["valid"].metrics == whole["valid"].metrics
    folder = tmp_path / "b" / "t" / "lr0.001"
    assert [p.name for p in folder.iterdir()] == ["best.ckpt"]
    again = finetune.run("t", settings, tiny_model(), RunOptions(save_folder=tmp_path / "b"))
    assert again["valid"].metrics == whole["valid"].metrics
