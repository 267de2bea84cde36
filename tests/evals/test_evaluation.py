"""Whole tasks: runner, sweeps, in-loop evaluator, the evaluate verb."""

import dataclasses
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest

from launch import _eval_report as report
from launch import _sweep as sweep
from launch import benchmark, evaluate
from olmoearth_jax import outputs, overrides
from olmoearth_jax.config import DownstreamEvaluatorConfig, ExperimentConfig
from olmoearth_jax.configlib import tasks
from olmoearth_jax.configlib.tasks import EvalInterval
from olmoearth_jax.evals import callback, models, runner
from olmoearth_jax.evals.models import Loaded
from olmoearth_jax.model import latent_mim

from .builders import task, tiny_config, tiny_model, write_windows

TEST = tasks.RunOptions(run_on_test=True, k=5)


@pytest.fixture
def windows(tmp_path, monkeypatch):
    root = tmp_path / "data"
    write_windows(root / "yemen_crop", {"train": 6, "val": 3, "test": 3})
    write_windows(root / "forest_loss_driver", {"train": 9, "val": 6}, "classification", 64, 1)
    write_windows(root / "lfmc_woody_3k", {"train": 4, "val": 2}, "regression", 32, 1)
    monkeypatch.setenv("EVAL_DATASETS_DIR", str(root))
    return root


def test_every_mode_on_one_model(windows):
    model = tiny_model()
    for mode in ("knn", "linear_probe", "embedding_diagnostics"):
        result = runner.run_task("t", task(eval_mode=mode), model, TEST)
        assert result.mode == mode and result.embedding_shape == (4, 4, 32)
        if mode == "embedding_diagnostics":
            assert result.valid is None and result.diagnostics["global_effective_rank"] > 1
        else:
            assert result.test is not None and 0 < result.test.primary <= 1
    knn = runner.run_task(
        "t", task("forest_loss_driver", eval_mode="knn"), model, tasks.RunOptions(k=3)
    )
    assert knn.valid is not None and knn.valid.primary_key == "accuracy"
    regression = runner.run_task("t", task("lfmc_woody_3k"), model)
    assert regression.valid is not None and regression.valid.primary_key == "neg_rmse"


def test_raw_bands_tell_the_classes_apart(windows):
    model = models.baseline("raw_bands").model
    out = runner.run_task("t", task(epochs=40), model, TEST)
    assert out.test is not None and out.test.primary > 0.5


def test_transforms_and_subsets_are_applied(windows):
    settings = task(max_train_samples=4, embedding_dim=5, quantize_embeddings=True)
    out = runner.run_task("t", settings, tiny_model())
    assert out.embedding_shape == (4, 4, 5) and out.settings["quantize_bits"] == 8
    with pytest.raises(ValueError, match="quantile_config_path"):
        runner.run_task("t", task(quantize_embeddings=True, quantize_bits=4), tiny_model())
    for half, message in (
        ({"quantile_config_path": "t.h5", "quantize_embeddings": True}, "it needs quantize_bits"),
        ({"quantile_config_path": "t.h5", "quantize_bits": 4}, "needs quantize_embeddings=true"),
        ({"primary_metric": "class_f1", "primary_metric_class": 9}, "must lie in 0...8"),
    ):
        with pytest.raises(ValueError, match=message):
            runner.run_task("t", task(**half), tiny_model())
    with pytest.raises(ValueError, match="does not fit a segmentation task"):
        runner.run_task("t", task(use_center_token=True), tiny_model())


def test_embeddings_are_made_once_for_runs_of_one_kind(windows, monkeypatch):
    model, hooks, calls = tiny_model(), runner.Hooks(cache={}), []
    original = runner.extract
    monkeypatch.setattr(runner, "extract", lambda *a, **k: (calls.append(1), original(*a, **k))[1])
    for lr in (0.1, 0.01):
        runner.run_task("t", task(probe_lr=lr), model, hooks=hooks)
    assert len(calls) == 2
    runner.run_task("t", task(pooling_type="max"), model, hooks=hooks)
    assert len(calls) == 4


def test_sweeps_list_every_run():
    one = {"t": task(), "k": task("forest_loss_driver", eval_mode="knn")}
    assert len(sweep.expand(one)) == 2
    assert len(sweep.expand(one, "lr")) == 8 + 1
    assert len(sweep.expand(one, "full")) == 32 + 4
    best = sweep.select_best_val(one)["t"]
    assert best.select_best_by_primary_metric and best.linear_probe_eval_interval == 5
    with pytest.raises(ValueError, match="unknown sweep"):
        sweep.expand(one, "all")
    with pytest.raises(ValueError, match="did you mean 'patch_size'"):
        tasks.change_all(one, patch_sise=3)


def test_a_sweep_makes_embeddings_of_one_kind_once(windows, tmp_path, monkeypatch):
    calls, original = [], runner.extract
    monkeypatch.setattr(runner, "extract", lambda *a, **k: (calls.append(1), original(*a, **k))[1])
    kinds = [{"probe_lr": lr, "pooling_type": how} for lr in (0.1, 0.01) for how in ("mean", "max")]
    plan = [(f"{k}", task(**kind)) for k, kind in enumerate(kinds)]
    loaded = Loaded(tiny_model(), "tiny", 7, {})
    found = sweep.evaluate(loaded, plan, TEST, tmp_path, say=lambda s: None)
    assert [item["task"] for item in found] == ["0", "1", "2", "3"]
    assert len(calls) == 2 * 3  # splits of two kinds
    assert sweep.evaluate(loaded, plan, TEST, tmp_path, say=lambda s: None) == found


def test_results_are_kept_and_not_made_again(windows, tmp_path):
    loaded = Loaded(tiny_model(), "tiny", 7, {})
    plan = sweep.expand({"t": task()})
    first = sweep.evaluate(loaded, plan, TEST, tmp_path, say=lambda s: None)
    lines: list[str] = []
    again = sweep.evaluate(loaded, plan, TEST, tmp_path, say=lines.append)
    assert not lines and again == first
    assert json.loads((tmp_path / "7.json").read_text()) == first
    settings = first[0]["settings"]
    for key in ("pooling", "normalization", "image_size", "patch_size", "seed"):
        assert key in settings
    assert "tiny" in report.table(first) and report.plot(first, tmp_path / "p.png")


def test_results_of_other_weights_are_made_again(windows, tmp_path):
    """A run that was trained anew under its name, or two of one name that share a folder."""
    plan = sweep.expand({"t": task()})
    first, second, third = (
        sweep.evaluate(Loaded(tiny_model(seed=s), "tiny", 7, {}), plan, TEST, tmp_path)
        for s in (0, 1, 1)
    )
    assert first[0]["valid"] != second[0]["valid"] and third == second
    assert json.loads((tmp_path / "7.json").read_text()) == second
    old = [dict(item) for item in first]
    for item in old:  # made before weights were told apart
        item["settings"] = {k: v for k, v in item["settings"].items() if k != "weights"}
    runner.append_line(tmp_path / "old", old[0])
    found = sweep.evaluate(Loaded(tiny_model(), "tiny", 7, {}), plan, TEST, tmp_path / "old")
    assert found == old


def test_an_evaluation_killed_between_its_two_records_is_completed(windows, tmp_path):
    loaded = Loaded(tiny_model(), "tiny", 7, {})
    plan = sweep.expand({"a": task(), "b": task(patch_size=8)})
    found = sweep.evaluate(loaded, plan, TEST, tmp_path, say=lambda s: None)
    step = tmp_path / "7.json"
    whole = step.read_bytes()
    for kept in ([], found[:1]):  # what the killed run had got into it
        step.unlink()
        if kept:
            runner.write_step(tmp_path, 7, kept)
        (tmp_path / ".7.json.0123abcd.tmp").write_text("[")
        lines: list[str] = []
        assert sweep.evaluate(loaded, plan, TEST, tmp_path, say=lines.append) == found
        assert not lines and step.read_bytes() == whole
        assert not list(tmp_path.glob(".7.json.*"))


def test_evaluations_side_by_side_lose_no_record(tmp_path):
    def write(worker):
        for i in range(20):
            runner.write_step(tmp_path, 7, [{"task": f"{worker}/{i}", "settings": {}}])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(8)))
    assert len(json.loads((tmp_path / "7.json").read_text())) == 160


@pytest.mark.parametrize("text", ["[", "{}", "[1]", "[" * 100_000])
def test_a_damaged_step_file_is_named(tmp_path, text):
    (tmp_path / "7.json").write_text(text)
    with pytest.raises(ValueError, match=r"7\.json .*delete it and evaluate again"):
        runner.complete_step(tmp_path, 7, {"task": "a"})
    assert (tmp_path / "7.json").read_text() == text


def test_a_failing_task_is_named_and_stops_no_other(windows, tmp_path):
    bad = dataclasses.replace(task(), use_center_token=True)
    loaded = Loaded(tiny_model(), "tiny", 0, {})
    lines: list[str] = []
    with pytest.raises(RuntimeError, match="1 of 2 runs failed: bad"):
        sweep.evaluate(loaded, [("bad", bad), ("good", task())], TEST, tmp_path, say=lines.append)
    assert any("error: bad" in line for line in lines)
    assert [r["task"] for r in runner.read_lines(tmp_path)] == ["good"]


@pytest.mark.parametrize("text", ["RESOURCE_EXHAUSTED: Out of memory\nmore", ""])
def test_a_task_that_needs_too_much_memory_ends_nothing(windows, tmp_path, monkeypatch, text):
    original = runner.run_task

    def run_task(name, *given):
        if name in ("big", "rarely"):
            raise jax.errors.JaxRuntimeError(text)
        return original(name, *given)

    for module in (sweep, callback):
        monkeypatch.setattr(module, "run_task", run_task)
    lines: list[str] = []
    loaded = Loaded(tiny_model(), "tiny", 0, {})
    with pytest.raises(RuntimeError, match="1 of 2 runs failed: big"):
        sweep.evaluate(
            loaded, [("big", task()), ("good", task(epochs=2))], TEST, tmp_path, say=lines.append
        )
    assert f"error: big: {text.partition(chr(10))[0] or 'JaxRuntimeError'}" in lines
    evaluator, said = _evaluator(tmp_path)
    params = jax.tree.map(jax.numpy.asarray, latent_mim.initial_params(tiny_config()))
    values = evaluator({"params": params}, 6)
    assert values is not None and "eval/often" in values and "eval/rarely" not in values
    assert any("task rarely failed at step 6" in line for line in said)


def _config(folder, evaluator):
    config = ExperimentConfig(model=tiny_config())
    config.common.save_folder = str(folder)
    config.trainer.callbacks.downstream_evaluator = evaluator
    return config


def _evaluator(tmp_path, **settings):
    chosen = {
        "often": task(eval_interval=EvalInterval(2, "steps")),
        "rarely": task(eval_mode="knn", eval_interval=EvalInterval(1, "epochs")),
        "absent": task("mados"),
        "foreign": task("small_landsat_vessel_type", input_modalities=["landsat"]),
    }
    config = _config(tmp_path, DownstreamEvaluatorConfig(tasks=chosen, **settings))
    lines: list[str] = []
    made = callback.DownstreamEvaluator(config, 6, lines.append)
    made.options = dataclasses.replace(made.options, k=5)
    return made, lines


def test_tasks_run_when_they_are_due(windows, tmp_path, monkeypatch):
    monkeypatch.delenv("MADOS_DIR", raising=False)
    evaluator, lines = _evaluator(tmp_path)
    assert sorted(evaluator.skipped) == ["absent", "foreign"]
    assert "MADOS_DIR" in lines[0] and "landsat" in lines[1]
    assert [s for s in range(8) if evaluator.due(s)] == [2, 4, 6]
    assert evaluator.due_tasks(6) == ["often", "rarely"]
    assert _evaluator(tmp_path, eval_on_startup=True)[0].due(0)
    assert not _evaluator(tmp_path, enabled=False)[0].due(2)
    only = _evaluator(tmp_path, tasks_to_run=["rarely"])[0]
    assert list(only.tasks) == ["rarely"]
    assert list(_evaluator(tmp_path, filter_for_eval_mode="knn")[0].tasks) == ["rarely"]
    with pytest.raises(ValueError, match="did you mean 'rarely'"):
        _evaluator(tmp_path, tasks_to_run=["rarly"])
    best = {"best": task(select_best_by_primary_metric=True)}
    with pytest.raises(ValueError, match="task 'best': select_best.* needs run_on_test"):
        config = _config(tmp_path, DownstreamEvaluatorConfig(tasks=best))
        callback.DownstreamEvaluator(config, 6)


def test_a_command_names_a_task_of_the_catalogue_and_changes_it():
    path = "trainer.callbacks.downstream_evaluator"
    cfg = overrides.apply(
        ExperimentConfig(),
        [f"{path}.tasks.mados.eval_interval.value=20", f"{path}.tasks_to_run=[mados]"],
    )
    evaluator = cfg.trainer.callbacks.downstream_evaluator
    assert (
        evaluator.tasks_to_run == ["mados"] and evaluator.tasks["mados"].eval_interval.value == 20
    )


def test_evaluating_changes_no_bit_of_the_state(windows, tmp_path):
    evaluator, _ = _evaluator(tmp_path, cancel_after_first_eval=True)
    params = jax.tree.map(jax.numpy.asarray, latent_mim.initial_params(tiny_config()))
    before = jax.tree.map(np.array, params)
    values = evaluator({"params": params}, 6)
    assert values is not None and evaluator.cancel
    assert {"eval/often", "eval/rarely", "eval_time/often", "checkpoint_step"} <= set(values)
    same = jax.tree.map(lambda a, b: np.array_equal(a, b), before, params)
    assert all(jax.tree.leaves(same))
    assert evaluator({"params": params}, 6, lambda: True) is None
    stored = json.loads((tmp_path / "evals" / "6.json").read_text())
    assert [r["task"] for r in stored] == ["often", "rarely"]


def _evaluate(*arguments: str) -> int:
    evaluate.FLAGS.unparse_flags()
    for flag in evaluate.FLAGS:
        evaluate.FLAGS[flag].unparse()
    evaluate.FLAGS(["evaluate", *arguments])
    return evaluate.main(["evaluate"])


def test_tasks_are_listed_without_a_model(windows, monkeypatch, capsys):
    monkeypatch.delenv("MADOS_DIR", raising=False)
    assert _evaluate("--list", "--tasks=yemen_crop,mados") == 0
    out = capsys.readouterr().out
    assert "data of 1 tasks is there: yemen_crop" in out and "mados: set MADOS_DIR" in out
    assert _evaluate("--list", "--tasks=yemen_crp") == 2
    assert "did you mean 'yemen_crop'" in capsys.readouterr().err


def test_runs_that_fail_hide_no_result_of_others(windows, tmp_path, monkeypatch, capsys):
    """Of other tasks, and of other checkpoints."""
    every = [Loaded(tiny_model(seed=step), "tiny", step, {}) for step in (1, 2)]
    steps = iter(every)
    monkeypatch.setattr(evaluate, "_step_folders", lambda source: [Path("1"), Path("2")])
    monkeypatch.setattr(models, "load_checkpoint", lambda path, dtype=None: next(steps))
    given = ("--tasks=yemen_crop,lfmc_woody_3k", "--set=epochs=2", "--norun_on_test",
             f"--checkpoint={tmp_path}", f"--out={tmp_path / 'e'}")  # fmt: skip
    monkeypatch.setattr(sweep, "run_task", _failing(runner.run_task, "yemen_crop"))
    assert _evaluate(*given) == 1
    out, err = capsys.readouterr()
    for step in (1, 2):
        assert f"tiny step {step}: 1 of 2 runs failed: yemen_crop" in err
    rows = [line for line in out.splitlines() if line.startswith("tiny ")]
    assert len(rows) == 2 and all("lfmc_woody_3k" in row for row in rows)


def _failing(original, name):
    def run_task(task, *given):
        if task == name:
            raise ValueError("bad data")
        return original(task, *given)

    return run_task


def test_the_verb_evaluates_a_baseline(windows, tmp_path, capsys):
    out = (
        "--baseline=raw_bands",
        "--tasks=yemen_crop",
        "--set=epochs=2",
        f"--out={tmp_path / 'e'}",
    )
    assert _evaluate(*out) == 0
    assert "yemen_crop" in capsys.readouterr().out
    assert len(runner.read_lines(tmp_path / "e")) == 1
    picture = tmp_path / "e" / "results.png"
    assert outputs.is_ours(picture)
    picture.write_bytes(b"mine")
    assert _evaluate(*out) == 0
    assert "no plot: " in capsys.readouterr().out and picture.read_bytes() == b"mine"
    assert _evaluate(*out, "--overwrite") == 0 and outputs.is_ours(picture)
    assert _evaluate(*out[:-1], f"--out={picture}") == 2
    assert "is a file, so nothing can be written" in capsys.readouterr().err
    assert _evaluate(*out, "--dry_run", "--sweep=lr") == 0
    assert capsys.readouterr().out.count("yemen_crop: ") == 8
    settings = tmp_path / "settings.json"
    settings.write_text('{"yemen_crop": {"pooling_type": "max"}}')
    assert _evaluate(*out, "--dry_run", f"--settings_json={settings}") == 0
    assert "pooling_type='max'" in capsys.readouterr().out
    settings.write_text('{"yemen_crop": {"poolingtype": "max"}}')
    assert _evaluate(*out, "--dry_run", f"--settings_json={settings}") == 2
    assert "did you mean 'pooling_type'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--baseline=raw_bands", "--tasks=yemen_corp"], "did you mean 'yemen_crop'"),
        (["--baseline=raw_bands", "--tasks=breizhcrops"], "BREIZHCROPS_DIR"),
        (["--checkpoint=/nowhere"], "No complete checkpoint"),
        (["--run_name=no_such_run"], "there is no run folder"),
        ([], "give --run_name"),
        (["--baseline=raw_bands", "--set=patch=3"], "unknown task field 'patch'"),
        (["--baseline=raw_bands", "--set=patch_size"], "not of the form"),
    ],
)
def test_the_verb_refuses_mistakes(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert _evaluate(*arguments) == 2
    assert message in capsys.readouterr().err


def test_the_verbs_run_as_programs(tmp_path):
    for verb, argument, code, text in (
        ("evaluate", "--baseline=raw_band", 2, "raw_bands"),
        ("benchmark", "--sweep_keys=bach", 2, "did you mean 'batch'"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", f"launch.{verb}", argument, f"--work_dir={tmp_path}"][
                : 4 if verb == "evaluate" else 5
            ],
            cwd=Path(__file__).resolve().parents[2],
            capture_output=True,
            text=True,
        )
        assert done.returncode == code and text in done.stderr, done.stderr


def test_benchmark_plans_and_measures():
    small = benchmark.Run("nano", image_size=8, num_timesteps=1, batch_size=1, bf16=False)
    small = dataclasses.replace(small, benchmark_interval_s=0.0, min_batches_per_interval=2)
    assert small.name.endswith("_s2_is8_ps4_ts1_bs1")
    runs = benchmark.plan(small, {"patch_size": [2, 4], "use_s1": [True, False]}, cross=False)
    assert len(runs) == 3 and runs[-1] == small
    assert len(benchmark.plan(small, {"patch_size": [2, 4], "use_s1": [1, 0]}, cross=True)) == 4
    figures = benchmark.measure(small)
    assert figures["num_tokens_per_batch"] == 12 and figures["num_batches"] == 2
    assert figures["peak_host_bytes"] > 0 and figures["mean_batch_token_rate"] > 0
    with pytest.raises(ValueError, match="does not divide"):
        dataclasses.replace(small, patch_size=3).check()
    with pytest.raises(ValueError, match="did you mean 'batch_size'"):
        benchmark.parse("batchsize", 1)


def test_a_run_that_does_not_fit_is_recorded_and_stops_no_other(tmp_path, monkeypatch, capsys):
    def measure(run):
        if run.batch_size == 2:
            raise MemoryError
        return {"oom_occurred": 0}

    monkeypatch.setattr(benchmark, "measure", measure)
    benchmark.FLAGS.unparse_flags()
    sizes = '--sweep={"batch_size": [2, 1]}'
    benchmark.FLAGS(["benchmark", "--model_size=nano", sizes, f"--work_dir={tmp_path}"])
    assert benchmark.execute() == 0
    lines = (tmp_path / "benchmark" / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["oom_occurred"] for line in lines] == [1, 0, 0]
    assert len(capsys.readouterr().out.splitlines()) == 3
