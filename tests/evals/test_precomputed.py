"""Embeddings of other programs, the int8 arm, and the look-alike land covers."""

import json

import numpy as np
import pytest

from olmoearth_jax.configlib import tasks
from olmoearth_jax.evals.datasets import open_split, why_unavailable
from olmoearth_jax.evals.datasets.pretrain import SimilarButDifferent, stratified
from olmoearth_jax.evals.models import Precomputed, RawBands, with_int8
from olmoearth_jax.evals.runner import run_task
from olmoearth_jax.evals.samples import collate
from olmoearth_jax.model.pooling import Pooling

from .builders import task

RNG = np.random.default_rng(0)
COUNTS = {"train": 40, "valid": 12, "test": 10}


def arrays(count, spatial=False, gap=True):
    """Two classes that lie apart; some samples of a product without data are NaN."""
    y = np.arange(count) % 2
    x = RNG.normal(size=(count, 5)).astype("f4") + 10 * y[:, None] - 5
    if spatial:
        x = np.broadcast_to(x[:, None, None], (count, 4, 4, 5)).copy()
    if gap:
        x = np.concatenate([x, np.full_like(x[:1], np.nan)])
        y = np.append(y, 1)
    return {"embeddings": x, "labels": y}


def write(root, dataset="m-brick-kiln", form="folder", **how):
    if form == "folder":
        (root / dataset).mkdir(parents=True, exist_ok=True)
        for split, count in COUNTS.items():
            np.savez(root / dataset / f"{split}.npz", **arrays(count, **how))
        return root
    table = {
        f"{dataset}/{split}/{key}": value
        for split, count in COUNTS.items()
        for key, value in arrays(count, **how).items()
    }
    root.mkdir(parents=True, exist_ok=True)
    np.savez(root / "product.npz", **table)
    return root / "product.npz"


@pytest.mark.parametrize("form", ["folder", "archive"])
@pytest.mark.parametrize("spatial", [False, True])
def test_they_are_judged_like_a_model(tmp_path, form, spatial):
    model = Precomputed(write(tmp_path, form=form, spatial=spatial))
    settings = task("m-brick-kiln", eval_mode="knn")
    options = tasks.RunOptions(run_on_test=True, k=5)
    result = run_task("kilns", settings, model, options)
    assert result.valid is not None and result.valid.primary == 1.0
    assert result.test is not None and result.test.primary == 1.0
    assert result.embedding_shape == (5,)
    probe = run_task("kilns", task("m-brick-kiln", eval_mode="linear_probe"), model, options)
    assert probe.test is not None and probe.test.primary > 0.9
    centre = task("m-brick-kiln", eval_mode="knn", use_center_token=True)
    assert run_task("kilns", centre, model, options).embedding_shape == (5,)


@pytest.mark.parametrize("form", ["folder", "archive"])
def test_embeddings_of_one_name_are_told_apart(tmp_path, form):
    """Results of one product must not be taken for those of another in a folder of its name."""
    paths = [write(tmp_path / side / "product", form=form) for side in ("a", "b")]
    one, other = (Precomputed(path).settings for path in paths)
    assert one["embeddings"] == other["embeddings"] and one != other
    assert Precomputed(paths[0]).settings == one
    write(tmp_path / "a" / "product", form=form)  # made anew, with other numbers
    assert Precomputed(paths[0]).settings != one


def test_a_share_of_the_labels_cannot_be_taken_of_them(tmp_path):
    """Which images a partition names is not known, and all would be a wrong answer."""
    model = Precomputed(write(tmp_path))
    few = task("m-brick-kiln", eval_mode="knn", label_fraction=0.1)
    with pytest.raises(ValueError, match="max_train_samples takes fewer"):
        run_task("kilns", few, model)


def test_tasks_that_differ_by_images_only_are_one(tmp_path):
    model = Precomputed(write(tmp_path))
    picked = {
        "a": task("m-brick-kiln", patch_size=4),
        "b": task("m-brick-kiln", patch_size=8, quantize_embeddings=True),
        "c": task("m-brick-kiln", eval_mode="finetune", ft_lr=0.1),
        "d": task("m-eurosat"),
        "e": task("m-brick-kiln", output="student", output_dim=3),
    }
    able, skipped = model.able(picked)
    assert list(able) == ["a"] and not able["a"].quantize_embeddings
    assert "the same as a" in skipped["e"]
    assert "the same as a" in skipped["b"] and "fine-tuned" in skipped["c"]
    assert "no train embeddings of m-eurosat" in skipped["d"]


def test_arrays_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no folder or archive"):
        Precomputed(tmp_path / "nowhere")
    model = Precomputed(write(tmp_path))
    settings, info = task("m-brick-kiln"), tasks.dataset_info("m-brick-kiln")
    cases = [
        ({"embeddings": np.zeros((3, 2))}, "has no labels"),
        ({"embeddings": np.zeros((3, 2, 2)), "labels": np.zeros(3, int)}, r"\[N, D\]"),
        ({"embeddings": np.zeros((3, 2)), "labels": np.zeros(2, int)}, "3 embeddings but 2"),
        ({"embeddings": np.zeros((3, 2)), "labels": np.full(3, 7)}, "label 7, outside 0...1"),
        ({"embeddings": np.full((3, 2), np.nan), "labels": np.zeros(3, int)}, "split is empty"),
    ]
    for held, message in cases:
        np.savez(tmp_path / "m-brick-kiln" / "train.npz", **held)
        with pytest.raises(ValueError, match=message):
            model.split(settings, info, "train")
    np.save(tmp_path / "one.npy", np.zeros(3))
    with pytest.raises(ValueError, match="must be an .npz file"):
        Precomputed(tmp_path / "one.npy")
    with pytest.raises(ValueError, match="can't be fine-tuned"):
        model.embed({}, 1, None)


def test_the_int8_arm_doubles_tasks_once():
    picked = {"a": task(), "b": task(quantize_embeddings=True), "c": task(eval_mode="finetune")}
    both = with_int8(picked)
    assert list(both) == ["a", "a_int8", "b", "c"] and both["a_int8"].quantize_embeddings


def write_patches(root, count=30, stats=None):
    for split in ("train", "val", "test"):
        images = RNG.integers(0, 4000, (count, 32, 32, 12)).astype(np.uint16)
        np.savez(root / f"SBD_{split}.npz", images=images, labels=np.arange(count) % 10)
    if stats is not None:
        (root / "norm_stats.json").write_text(json.dumps(stats))


BAND_NAMES = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12")
MODEL_ORDER = ("B02", "B03", "B04", "B08", "B05", "B06", "B07", "B8A", "B11", "B12", "B01", "B09")
BY_BAND = {b: {"mean": i, "std": 2.0, "min": 0, "max": 9} for i, b in enumerate(BAND_NAMES)}
BY_FIGURE = {k: [BY_BAND[b][k] for b in BAND_NAMES] for k in ("mean", "std", "min", "max")}


@pytest.mark.parametrize("stats", [BY_BAND, BY_FIGURE])
def test_look_alikes_are_read_in_the_order_of_the_model(monkeypatch, tmp_path, stats):
    write_patches(tmp_path, stats=stats)
    monkeypatch.setenv("SBD_DIR", str(tmp_path))
    settings = tasks.catalogue()["similar_but_different"]
    reader = open_split("s", settings, "val")
    sample, label = reader[3]
    assert sample["sentinel2_l2a"].shape == (32, 32, 1, 12) and label == 3
    assert sample["timestamps"].tolist() == [[1, 6, 2021]]
    settings.norm_stats_from_pretrained, settings.norm_method = False, "standardize"
    reader = open_split("s", settings, "val")
    assert isinstance(reader, SimilarButDifferent)
    disk = reader.images[3].astype(float)
    for place, name in enumerate(MODEL_ORDER):
        i = BAND_NAMES.index(name)
        got = reader[3][0]["sentinel2_l2a"][:, :, 0, place]
        np.testing.assert_allclose(got, (disk[..., i] - i) / 2, rtol=1e-6)
    batch = collate([reader[0][0], reader[1][0]])
    assert RawBands(("sentinel2_l2a",)).embed(batch, 4, Pooling()).shape == (2, 192)


def test_look_alikes_lose_labels_class_by_class(monkeypatch, tmp_path):
    labels = np.repeat([0, 1, 3], [40, 3, 10])
    rows = stratified(labels, 0.1)
    assert np.unique(labels[rows], return_counts=True)[1].tolist() == [4, 1, 1]
    np.testing.assert_array_equal(rows, stratified(labels, 0.1))
    write_patches(tmp_path)
    monkeypatch.setenv("SBD_DIR", str(tmp_path))
    settings = tasks.catalogue()["similar_but_different"]
    settings.label_fraction = 0.34
    assert len(open_split("s", settings, "train")) == 10
    assert len(open_split("s", settings, "test")) == 30


def test_look_alikes_that_are_absent_or_wrong_are_named(monkeypatch, tmp_path):
    settings = tasks.catalogue()["similar_but_different"]
    monkeypatch.delenv("SBD_DIR", raising=False)
    assert "SBD_DIR" in str(why_unavailable("s", settings))
    monkeypatch.setenv("SBD_DIR", str(tmp_path))
    assert "SBD_train.pt is missing" in str(why_unavailable("s", settings))
    write_patches(tmp_path, stats={"B01": {}})
    settings.norm_stats_from_pretrained = False
    with pytest.raises(ValueError, match=r"norm_stats\.json must hold"):
        open_split("s", settings, "train")
    np.savez(tmp_path / "SBD_train.npz", images=np.zeros((2, 8, 8, 13)), labels=np.zeros(2, int))
    with pytest.raises(ValueError, match=r"images must be \[N, H, W, 12\]"):
        open_split("s", settings, "train")


def test_the_verb_evaluates_them(tmp_path, capsys):
    from tests.evals.test_evaluation import _evaluate

    write(tmp_path)
    out = f"--out={tmp_path / 'out'}"
    assert _evaluate(f"--embeddings={tmp_path}", "--tasks=m_brick_kiln", out) == 0
    assert "m_brick_kiln" in (tmp_path / "out" / "results.jsonl").read_text()
    assert _evaluate(f"--embeddings={tmp_path}", "--baseline=raw_bands") == 2
    assert "give --baseline or --embeddings" in capsys.readouterr().err
