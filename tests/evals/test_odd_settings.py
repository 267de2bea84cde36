"""Settings of tasks and of the verb that cannot work are told before any work is done."""

import os

import jax
import numpy as np
import pytest

from launch import evaluate
from olmoearth_jax.checkpoints.folders import NoCheckpoint
from olmoearth_jax.configlib import tasks
from olmoearth_jax.configlib.tasks import EvalTaskConfig, check_task
from olmoearth_jax.evals import finetune, linear_probe, models, runner, samples
from olmoearth_jax.evals.models import Precomputed
from olmoearth_jax.evals.scoring import bootstrap

from .builders import task, tiny_config, tiny_model, write_windows
from .test_evaluation import _evaluate, _evaluator


@pytest.fixture
def windows(tmp_path, monkeypatch):
    root = tmp_path / "data"
    write_windows(root / "yemen_crop", {"train": 6, "val": 3, "test": 3})
    monkeypatch.setenv("EVAL_DATASETS_DIR", str(root))
    return root


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("patch_size=abc", "takes an integer"),
        ("patch_size=4.5", "takes an integer"),
        ("probe_lr=fast", "takes a number"),
        ("probe_lr=-1", "probe_lr must be a number above 0"),
        ("probe_lr=nan", "probe_lr must be a number above 0"),
        ("use_dice_loss=maybe", "takes true or false"),
        ("input_modalities=sentinel2_l2a", "takes a list, such as [a, b]"),
        ("pooling_type=sum", "has no value"),
        ("tasks=3", "unknown task field 'tasks'"),
        ("finetune_seed=-1", "finetune_seed must not be negative"),
    ],
)
def test_values_that_a_setting_does_not_take(windows, tmp_path, capsys, setting, said):
    given = ("--baseline=raw_bands", "--tasks=yemen_crop", f"--out={tmp_path / 'e'}")
    assert _evaluate(*given, f"--set={setting}") == 2
    assert said in capsys.readouterr().err and not (tmp_path / "e").exists()


def test_values_of_settings_are_read_as_their_fields_ask(windows, tmp_path, capsys):
    given = ("--baseline=raw_bands", "--tasks=yemen_crop", f"--out={tmp_path / 'e'}", "--dry_run")
    file = tmp_path / "s.json"
    file.write_text('{"yemen_crop": {"probe_lr": 1}}')
    more = ("--set=input_modalities=[SENTINEL2_L2A]", "--set=quantile_config_path=123")
    more += ("--set=quantize_bits=8", "--set=quantize_embeddings=yes")
    assert _evaluate(*given, *more, f"--settings_json={file}") == 0
    out = capsys.readouterr().out
    for text in ("['sentinel2_l2a']", "path='123'", "bits=8", "embeddings=True", "probe_lr=1.0"):
        assert text in out


@pytest.mark.parametrize("text", ["[" * 100_000, "{", "\ud800"])
def test_a_file_of_settings_that_cannot_be_read(windows, tmp_path, capsys, text):
    file = tmp_path / "s.json"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    given = ("--baseline=raw_bands", "--tasks=yemen_crop", f"--out={tmp_path / 'e'}")
    assert _evaluate(*given, f"--settings_json={file}") == 2
    assert f"--settings_json={file} cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("dataset", "settings", "said"),
    [
        ("m-bigearthnet", {"eval_mode": "linear_probe"}, "does not do multi-label"),
        ("m-eurosat", {"eval_mode": "linear_probe", "probe_type": "attnpool"}, "a per-pixel task"),
        ("lfmc_woody_3k", {"probe_type": "attnpool"}, "attnpool does not do regression"),
        ("yemen_crop", {"eval_mode": "knn", "primary_metric": "auroc"}, "gives no probabilities"),
        ("yemen_crop", {"eval_mode": "knn", "patch_size": 5}, "does not divide the tile of 16"),
        (
            "yemen_crop",
            {"eval_mode": "knn", "balanced_trials": tasks.BalancedTrials()},
            "one class",
        ),
        ("pretrain_subset", {"pretrain_max_samples": 0}, "pretrain_max_samples must be at least"),
        ("pretrain_subset", {"pretrain_geographic_bin_size_deg": 0}, "must be a number above 0"),
        ("pretrain_subset", {"pretrain_label_seed": -1}, "must not be negative"),
        ("m-eurosat", {"ft_lr": float("inf")}, "ft_lr must be a number above 0"),
    ],
)
def test_tasks_that_would_fail_when_all_is_embedded(dataset, settings, said):
    with pytest.raises(ValueError, match=said):
        check_task("t", EvalTaskConfig(dataset, **{"probe_lr": 0.1, **settings}))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"draw_pool": ["train", "train"]}, "each once"),
        ({"draw_pool": []}, "draw_pool must name splits"),
        ({"seed": -1}, "seed must not be negative"),
    ],
)
def test_trials_that_cannot_be_drawn(settings, said):
    """A sample that is twice in the pool would be drawn and scored."""
    trials = tasks.BalancedTrials(**settings)
    with pytest.raises(ValueError, match=said):
        check_task("t", EvalTaskConfig("m-eurosat", balanced_trials=trials))


def test_buckets_are_read_before_anything_is_embedded(windows, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "extract", lambda *given: pytest.fail("it embeds"))
    for bits, said in ((3, "must be one of"), (4, "holds no quantile table")):
        table = {"quantize_bits": bits, "quantile_config_path": str(tmp_path / "none.h5")}
        with pytest.raises(ValueError, match=said):
            runner.run_task("t", task(quantize_embeddings=True, **table), tiny_model())


def _run(folder, *steps):
    for step in steps:
        (folder / "checkpoints" / str(step) / "meta").mkdir(parents=True)
    return folder


@pytest.mark.parametrize("name", ["run", "2024"])
def test_results_lie_in_the_folder_of_the_run(tmp_path, monkeypatch, name):
    """Whatever it is called, and from wherever it is named."""
    run = _run(tmp_path / "local_output" / name, 20)
    evaluate.FLAGS.unparse_flags()
    evaluate.FLAGS(["evaluate", "--run_name=" + name])
    for given in (run, run / "checkpoints", run / "checkpoints" / "20"):
        assert evaluate._results_folder(given) == run / "evals"
    monkeypatch.chdir(tmp_path)
    assert str(evaluate._results_folder(evaluate._source_folder())) == f"local_output/{name}/evals"
    for folder, given in ((run, "."), (run / "checkpoints", "20"), (run / "checkpoints", ".")):
        monkeypatch.chdir(folder)
        found = evaluate._results_folder(evaluate.Path(given))
        assert os.path.samefile(found.parent, run) and found.name == "evals"


def _steps(source, *flags):
    for flag in evaluate.FLAGS:
        evaluate.FLAGS[flag].unparse()
    evaluate.FLAGS(["evaluate", *flags])
    return [p.name for p in evaluate._step_folders(source)]


def test_steps_that_are_asked_for(tmp_path):
    run = _run(tmp_path / "run", 20, 3)
    assert _steps(run, "--steps=all") == ["3", "20"]
    assert _steps(run, "--steps=020,3,20") == ["3", "20"]
    for odd in ("4", "²", "-3", "all,3", ""):
        with pytest.raises(ValueError, match=f"no checkpoint of step {odd.split(',')[0]}"):
            _steps(run, f"--steps={odd},20")
    assert _steps(run, "--watch", "--steps=20,40") == ["20"]
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(NoCheckpoint):
        _steps(empty, "--steps=all")
    assert _steps(empty, "--watch") == []
    with pytest.raises(ValueError, match="leave out --steps"):
        _steps(run / "checkpoints" / "20", "--steps=all")


INFO = tasks.DatasetInfo("d", "classification", 3, ("sentinel2_l2a",))
PIXELS = tasks.DatasetInfo("d", "segmentation", 3, ("sentinel2_l2a",), height_width=4)
SEVERAL = tasks.DatasetInfo("d", "classification", 3, ("sentinel2_l2a",), multilabel=True)


@pytest.mark.parametrize(
    ("info", "shape", "said"),
    [
        (INFO, (6, 1), r"must be \[N\], got \[6, 1\]"),
        (PIXELS, (6, 4), r"must be \[N, H, W\]"),
        (SEVERAL, (6,), r"must be \[N, 3\]"),
        (SEVERAL, (6, 2), r"must be \[N, 3\]"),
    ],
)
def test_labels_of_another_shape(info, shape, said):
    """A column of classes was taken for several labels of each sample."""
    with pytest.raises(ValueError, match=said):
        samples.check_split("train", np.zeros((6, 2), np.float32), np.zeros(shape, int), info)


def test_embeddings_without_a_middle(tmp_path):
    """Of a sample whose middle cell has no numbers there is no embedding of the middle."""
    x = np.ones((4, 3, 3, 2), np.float32)
    x[1, 1, 1], x[2, 0, 0], x[3] = np.nan, np.nan, np.nan
    (tmp_path / "m-eurosat").mkdir()
    np.savez(tmp_path / "m-eurosat" / "train.npz", embeddings=x, labels=np.arange(4))
    model, info = Precomputed(tmp_path), tasks.dataset_info("m-eurosat")
    centre = EvalTaskConfig("m-eurosat", use_center_token=True)
    assert model.split(centre, info, "train")[1].tolist() == [0, 2]
    assert model.split(EvalTaskConfig("m-eurosat"), info, "train")[1].tolist() == [0, 1, 2]
    np.savez(tmp_path / "m-eurosat" / "train.npz", embeddings=x, labels=np.arange(4) + 0.5)
    with pytest.raises(ValueError, match=r"holds label 0\.5, which is no whole number"):
        model.split(centre, info, "train")


def test_resamples_in_which_nothing_is_known():
    """Of few tiles, most without any label, some draws hold none of those that have one."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(4, 2, 2, 3)).astype("f4"), rng.integers(0, 3, (4, 4, 4))
    test = y.copy()
    test[1:] = -1
    splits = {"train": (x, y), "valid": (x, y), "test": (x, test)}
    options = tasks.RunOptions(run_on_test=True, n_bootstrap=50)
    found = linear_probe.train_probe(task(epochs=1), PIXELS, splits, options).bootstrap
    unknown = np.isnan(found["bootstrap_scores"])
    assert 0 < unknown.sum() < 50 and np.isfinite(found["ci_lower"]) and np.isfinite(found["mean"])
    assert np.isnan(bootstrap(lambda rows: np.nan, 3, 5, 0)["mean"])


def _tuned(tmp_path, model, epochs=1):
    options = tasks.RunOptions(save_folder=tmp_path)
    tuner = finetune.FineTuner(
        "t", task(eval_mode="finetune", ft_lr=0.01, epochs=epochs), model, options
    )
    tuner.train(lambda: False, None)
    return tuner


def test_a_state_of_another_precision_is_not_taken_up(windows, tmp_path):
    config, params = tiny_config(), tiny_model().params
    of = {d: models.EncoderModel(config, {"encoder": params}, d) for d in ("float32", "bfloat16")}
    _tuned(tmp_path / "s", of["float32"])
    best = tmp_path / "s" / "t" / "lr0.01" / "best.ckpt"
    before = best.stat().st_mtime_ns
    _tuned(tmp_path / "s", of["float32"])
    assert best.stat().st_mtime_ns == before
    _tuned(tmp_path / "s", of["bfloat16"])
    assert best.stat().st_mtime_ns != before
    for text in (b"", b"PK\x03\x04", b"\x93NUMPY"):
        best.write_bytes(text)
        with pytest.raises(ValueError, match=r"best\.ckpt cannot be read as a NumPy file"):
            _tuned(tmp_path / "s", of["bfloat16"])


def test_states_that_killed_processes_left_unfinished_go(windows, tmp_path):
    """But not what another one may write just now."""
    folder = tmp_path / "s" / "t" / "lr0.01"
    folder.mkdir(parents=True)
    old, new = (folder / f".last.ckpt.{n}.tmp" for n in ("0123abcd", "4567abcd"))
    for path in (old, new):
        path.write_bytes(b"x")
    os.utime(old, (0, 0))
    _tuned(tmp_path / "s", tiny_model())
    assert sorted(p.name for p in folder.iterdir()) == [new.name, "best.ckpt"]


def test_training_without_any_label_is_told(windows, tmp_path):
    for path in (windows / "yemen_crop" / "windows").rglob("arrays.npz"):
        number = int(path.parent.name[1:])
        if number < 6:  # train
            held = dict(np.load(path))
            np.savez(path, **{**held, "label": np.full_like(held["label"], -1)})
    with pytest.raises(ValueError, match="no train sample carries a label"):
        _tuned(tmp_path / "s", tiny_model())


@pytest.mark.parametrize("damage", ["record", "folder"])
def test_results_that_cannot_be_written_end_no_training(windows, tmp_path, damage):
    evaluator, said = _evaluator(tmp_path)
    if damage == "folder":
        (tmp_path / "evals").write_text("")
    else:
        (tmp_path / "evals").mkdir()
        (tmp_path / "evals" / "2.json").write_text("{")
    params = jax.tree.map(jax.numpy.asarray, models.latent_mim.initial_params(tiny_config()))
    values = evaluator({"params": params}, 2)
    assert values is not None and "eval/often" in values
    assert any("results of step 2 are not in" in line for line in said)


def _embeddings(folder, dataset="yemen_crop"):
    (folder / dataset).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split in ("train", "valid", "test"):
        x = rng.normal(size=(6, 4, 4, 5)).astype("f4")
        np.savez(
            folder / dataset / f"{split}.npz", embeddings=x, labels=rng.integers(0, 9, (6, 16, 16))
        )
    return folder


def test_sweeps_of_embeddings_vary_what_matters_to_them(tmp_path, capsys):
    """Neither normalisation of images nor pooling changes embeddings of patches."""
    given = (f"--embeddings={_embeddings(tmp_path / 'e')}", "--tasks=yemen_crop", "--dry_run")
    assert _evaluate(*given, "--sweep=full") == 0
    assert capsys.readouterr().out.count("yemen_crop: ") == 8


def test_embeddings_are_called_by_their_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(_embeddings(tmp_path / "product"))
    assert _evaluate("--embeddings=.", "--tasks=yemen_crop", "--set=epochs=1", "--out=r") == 0
    assert [r["model"] for r in runner.read_lines(evaluate.Path("r"))] == ["product"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--baseline=raw_bands", "--checkpoint=x"], "give --checkpoint or --baseline"),
        (["--run_name=x", "--checkpoint=x"], "give --run_name or --checkpoint"),
        (["--embeddings=e", "--baseline=raw_bands"], "give --baseline or --embeddings"),
        (["--baseline=raw_bands", "--steps=all"], "are for runs and checkpoints"),
        (["--embeddings=e", "--watch"], "are for runs and checkpoints"),
        (["--embeddings=e", "--int8_arm"], "--int8_arm is for models"),
        (["--baseline=raw_bands", "--n_bootstrap=5", "--norun_on_test"], "leave out --norun_on"),
    ],
)
def test_flags_without_effect(tmp_path, monkeypatch, capsys, flags, said):
    monkeypatch.chdir(tmp_path)
    _embeddings(tmp_path / "e")
    assert _evaluate(*flags, "--tasks=yemen_crop", "--out=r") == 2
    assert said in capsys.readouterr().err


def test_what_is_not_resampled_is_said(windows, tmp_path, capsys):
    given = ("--baseline=raw_bands", "--tasks=yemen_crop", "--dry_run", "--n_bootstrap=5")
    for mode, said in (("knn", True), ("linear_probe", False)):
        assert _evaluate(*given, f"--set=eval_mode={mode}") == 0
        assert ("no resamples of yemen_crop: " in capsys.readouterr().out) == said


def test_nothing_can_run_says_how_to_learn_why(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "split_available", lambda picked, names: ({}, {"a": "no data"}))
    assert _evaluate("--baseline=raw_bands", f"--out={tmp_path / 'r'}") == 2
    assert "no task can run; --list says why" in capsys.readouterr().err


def test_lines_of_others_among_the_results(windows, tmp_path):
    """A list, a number, a record of something else: no result, and no end of the evaluation."""
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / runner.LINES).write_text('3\n[]\n{"task": "yemen_crop"}\n"x"\n')
    given = ("--baseline=raw_bands", "--tasks=yemen_crop", f"--out={tmp_path / 'r'}")
    assert _evaluate(*given, "--set=epochs=1", "--norun_on_test") == 0
    assert [r["task"] for r in runner.read_results(tmp_path / "r")] == ["yemen_crop"]
