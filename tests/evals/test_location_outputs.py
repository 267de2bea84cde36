"""Embeddings of models with an attention pooler, cut samples, and trials beside a kNN task."""

import dataclasses
import json

import numpy as np
import pytest

from launch import _sweep as sweep
from olmoearth_jax.configlib import tasks
from olmoearth_jax.configlib.tasks import BalancedTrials
from olmoearth_jax.evals import runner
from olmoearth_jax.evals.datasets import open_split
from olmoearth_jax.evals.embeddings import pooling_of
from olmoearth_jax.evals.models import EncoderModel, Loaded
from olmoearth_jax.evals.samples import collate
from olmoearth_jax.model import latent_mim
from olmoearth_jax.model.config import AttentionPoolerConfig, EncoderConfig, ModelConfig

from .builders import task, tiny_model, write_windows

SENSORS = {"landsat": 11, "sentinel1": 2, "sentinel2_l2a": 12}


def pooled_model(student=(16, 8)) -> EncoderModel:
    pooler = AttentionPoolerConfig(
        pooler_dim=32, pooler_depth=1, attn_dim=32, student_dims=list(student) or None,
        student_output_norm=True,
    )  # fmt: skip
    encoder = EncoderConfig(
        supported_modality_names=list(SENSORS), embedding_size=32, depth=1, num_heads=2,
        position_encoding="rope_3d_mixed", attention_pooler_config=pooler,
    )  # fmt: skip
    config = ModelConfig(kind="mae", encoder_config=encoder, decoder_config=None)
    return EncoderModel(config, latent_mim.initial_params(config, 0))


def write_stored(root, counts, side, spatial) -> None:
    """Windows of three sensors whose label shows in the brightness of each quarter or pixel."""
    rng, number = np.random.default_rng(1), 0
    for split, count in counts.items():
        for _ in range(count):
            folder = root / "windows" / "g" / f"w{number:03}"
            folder.mkdir(parents=True)
            (folder / "metadata.json").write_text(json.dumps({"options": {"eval_split": split}}))
            label = np.full((side, side), number % 3)
            if spatial:
                label = rng.integers(0, 3, (side // 16, side // 16)).repeat(16, 0).repeat(16, 1)
            images = {
                n: (900 + 500 * label + rng.normal(0, 20, (c, 2, side, side))).astype("f4")
                for n, c in SENSORS.items()
            }
            images["label"] = label[None, None]
            np.savez(folder / "arrays.npz", **images)  # pyright: ignore[reportArgumentType]
            number += 1


@pytest.fixture
def stored(tmp_path, monkeypatch):
    root = tmp_path / "data"
    write_stored(root / "descals_year_aligned", {"train": 24, "val": 9, "test": 9}, 32, False)
    write_stored(root / "pastis_year_aligned", {"train": 1, "val": 1}, 128, True)
    monkeypatch.setenv("EVAL_DATASETS_DIR", str(root))


def official(name: str, **changes) -> tasks.EvalTaskConfig:
    return tasks.change_all(tasks.official_tasks("v1_3"), num_workers=0, **changes)[name]


KNN = "descals_year_aligned_ws16_ps1_sentinel1_sentinel2_landsat_knn_proj64"
PASTIS = "pastis_year_aligned_ws16_ps1_sentinel1_sentinel2_landsat_proj128"


def test_official_tasks_are_nine_at_both_widths():
    found = tasks.official_tasks("v1_3")
    names = list(found)
    assert len(names) == 18 and names[0] == PASTIS and names[9] == PASTIS.replace("128", "64")
    assert names[1:9] == sorted(names[1:9]) and all(n.endswith("_proj64") for n in names[9:])
    for name, one in found.items():
        tasks.check_task(name, one)
        assert (one.output, one.patch_size, one.quantize_embeddings) == ("student", 1, True)
        assert (one.eval_interval.value, one.eval_interval.unit) == (80_000, "steps")
        assert (one.balanced_trials is None) == name.startswith("pastis")


def test_a_grid_is_kept_averaged_or_taken_in_the_middle(stored):
    model = pooled_model()
    reader = open_split(KNN, official(KNN, output_dim=8), "valid")
    batch = collate([reader[i][0] for i in range(3)])

    def embed(**changes):
        one = official(KNN, output_dim=None, **changes)
        return model.embed(batch, 4, pooling_of(one, tasks.dataset_info(one.dataset), model))

    spatial = official(PASTIS, output_dim=None, output="locations")
    info = tasks.dataset_info(spatial.dataset)
    grid = model.embed(batch, 4, pooling_of(spatial, info, model))
    assert grid.shape == (3, 4, 4, 32)
    mean = embed(output="locations", use_center_token=False)
    np.testing.assert_allclose(mean, grid.mean((1, 2)), atol=1e-6)
    np.testing.assert_array_equal(embed(output="locations"), grid[:, 2, 2])
    np.testing.assert_array_equal(embed(output=None), grid[:, 2, 2])
    whole = embed(output="student")
    assert whole.shape == (3, 16)
    cut = official(KNN, output_dim=8)
    pool = pooling_of(cut, tasks.dataset_info(cut.dataset), model)
    np.testing.assert_array_equal(model.embed(batch, 4, pool), whole[:, :8])
    assert embed(output="tokens").shape == (3, 32)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        (KNN, {}),
        (KNN, {"use_center_token": False}),
        (KNN, {"quantize_embeddings": False}),
        (PASTIS, {"eval_mode": "embedding_diagnostics"}),
    ],
)
def test_a_student_is_encoded_once_for_all_its_widths(stored, monkeypatch, name, changes):
    calls, seen = [], []
    extract, scores = runner.extract, runner._scores
    monkeypatch.setattr(runner, "extract", lambda *a, **k: (calls.append(1), extract(*a, **k))[1])
    monkeypatch.setattr(runner, "_scores", lambda run, s: (seen.append(s), scores(run, s))[1])
    changes = {"patch_size": 4, "balanced_trials": None, **changes}
    model, hooks = pooled_model(), runner.Hooks(cache={})
    at = {d: official(name, output_dim=d, **changes) for d in (None, 16, 12, 8)}
    for width in (16, 8, 12):
        runner.run_task(name, at[width], model, hooks=hooks)
    once = len(calls)
    for width in (16, 8, 12):
        runner.run_task(name, at[width], model)
    assert len(calls) == 4 * once
    for kept, new in zip(seen[:3], seen[3:], strict=True):
        for split, (x, y) in kept.items():
            np.testing.assert_array_equal(x, new[split][0])
            np.testing.assert_array_equal(y, new[split][1])
            assert x.flags.c_contiguous
    # Fewer channels do not hold more, and what there is not is still refused.
    calls.clear()
    runner.run_task(name, at[8], model, hooks=(hooks := runner.Hooks(cache={})))
    runner.run_task(name, at[None], model, hooks=hooks)
    runner.run_task(name, at[16], model, hooks=hooks)
    assert len(calls) == 2 * once
    with pytest.raises(ValueError, match="output_dim=17 is more"):
        runner.run_task(name, official(name, output_dim=17, **changes), model, hooks=hooks)


def test_components_of_fewer_channels_are_found_anew(stored):
    model, hooks = pooled_model(), runner.Hooks(cache={})
    at = {d: official(KNN, output_dim=d, embedding_dim=4, patch_size=4) for d in (16, 8)}
    runner.run_task(KNN, at[16], model, hooks=hooks)
    assert hooks.cache is not None
    runner.run_task(KNN, at[8], model, hooks=hooks)
    kept = hooks.cache["splits"]["train"][0]
    runner.run_task(KNN, at[8], model, hooks=(alone := runner.Hooks(cache={})))
    assert alone.cache is not None
    np.testing.assert_array_equal(kept, alone.cache["splits"]["train"][0])


def test_tasks_of_one_encoding_follow_each_other():
    found = list(tasks.official_tasks("v1_3").values())
    order = runner.encoding_order(found)
    assert order == [place for first in range(9) for place in (first, first + 9)]
    assert runner.encoding_order(found[9:] + found[:9]) == [
        place for first in range(9) for place in (first + 9, first)
    ]
    plain = list(tasks.official_tasks("v1_2").values())
    assert runner.encoding_order(plain) == list(range(len(plain)))


def test_samples_are_cut_out_of_stored_windows(stored):
    reader = open_split(KNN, official(KNN), "train")
    sample, label = reader[4]
    assert sample["landsat"].shape[:2] == (16, 16) and int(label) == 4 % 3
    pastis = open_split(PASTIS, official(PASTIS), "train")
    assert len(pastis) == 64 and pastis[0][1].shape == (16, 16)
    brightness = [float(pastis[i][0]["landsat"].mean()) for i in range(64)]
    classes = [int(pastis[i][1][0, 0]) for i in range(64)]
    assert max(b for b, c in zip(brightness, classes, strict=True) if c == 0) < min(
        b for b, c in zip(brightness, classes, strict=True) if c == 2
    )


def test_a_window_of_another_size_is_named(stored, tmp_path):
    path = tmp_path / "data/descals_year_aligned/windows/g/w000/arrays.npz"
    held = dict(np.load(path))
    np.savez(path, **{k: v[..., :30, :] for k, v in held.items()})
    with pytest.raises(ValueError, match="w000: landsat is 30 x 32 pixels .* have 32 per side"):
        open_split(KNN, official(KNN), "train")[0]


def test_trials_are_reported_as_tasks_and_run_once(stored, tmp_path):
    settings = official(KNN, output_dim=8, balanced_trials=BalancedTrials(max_folds=3, knn_ks=[5]))
    options = tasks.RunOptions(run_on_test=True, k=5)
    loaded = Loaded(pooled_model(), "pooled", 7, {})
    lines: list[str] = []
    first = sweep.evaluate(loaded, [(KNN, settings)], options, tmp_path / "out", say=lines.append)
    names = [r["task"] for r in first]
    assert names == [f"{KNN}_aeftrial_ridge", f"{KNN}_aeftrial_knn5", KNN]
    for item in first[:2]:
        assert item["mode"] == "balanced_trials"
        assert item["valid"]["primary_metric"] == "balanced_accuracy"
        assert item["valid"]["metrics"]["n_folds"] == 3 and 0 < item["valid"]["primary"] <= 1
        assert item["settings"]["balanced_trials"]["cap"] == 200
    assert first[2]["settings"]["output"] == "student"
    assert first[2]["valid"]["primary_metric"] == "balanced_accuracy"
    assert len(lines) == 1
    again = sweep.evaluate(loaded, [(KNN, settings)], options, tmp_path / "out", say=lines.append)
    assert again == first and len(lines) == 1
    plain = dataclasses.replace(settings, balanced_trials=None)
    other = dataclasses.replace(settings, balanced_trials=BalancedTrials(max_folds=3, knn_ks=[2]))
    for changed, trials in ((plain, []), (other, ["ridge", "knn2"])):
        for _ in range(2):  # made, and taken up
            found = sweep.evaluate(loaded, [(KNN, changed)], options, tmp_path / "out")
            assert [r["task"] for r in found] == [*(f"{KNN}_aeftrial_{t}" for t in trials), KNN]
    values = runner.log_values(runner.run_task(KNN, settings, loaded.model, options))
    assert values[f"eval/{KNN}_aeftrial_ridge"] == first[0]["valid"]["primary"]


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        (tiny_model(tuple(SENSORS)), {}, "output=student needs a model with an attention pooler"),
        (pooled_model(()), {"output_dim": None}, "this model has no student"),
        (pooled_model(), {"output_dim": 17}, "output_dim=17 is more than the student's 16"),
        (pooled_model(), {"output": "locations"}, "output_dim keeps the first channels"),
        (pooled_model(), {"output_dim": 0}, "output_dim must be at least 1"),
        (
            pooled_model(),
            {"eval_mode": "linear_probe"},
            "balanced_trials needs a kNN task",
        ),
        (
            pooled_model(),
            {"balanced_trials": BalancedTrials(cap=0), "output_dim": 8},
            "cap must be at least 1",
        ),
    ],
)
def test_what_does_not_fit_is_refused(stored, model, changes, message):
    with pytest.raises(ValueError, match=message):
        runner.run_task(KNN, official(KNN, **changes), model)


def test_a_task_without_wishes_is_as_before(tmp_path, monkeypatch):
    write_windows(tmp_path / "yemen_crop", {"train": 4, "val": 2})
    monkeypatch.setenv("EVAL_DATASETS_DIR", str(tmp_path))
    out = runner.run_task("t", task(epochs=1), tiny_model())
    assert not {"output", "output_dim", "balanced_trials"} & set(out.settings) and not out.trials


def test_settings_of_trials_are_given_as_a_mapping():
    changed = tasks.change_all({"t": task()}, balanced_trials={"knn_ks": [3], "cap": 9})["t"]
    assert changed.balanced_trials == BalancedTrials(knn_ks=[3], cap=9)
    with pytest.raises(ValueError, match="did you mean 'cap'"):
        tasks.change_all({"t": task()}, balanced_trials={"cpa": 9})
