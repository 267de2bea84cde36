"""The command line: loading config files, run names, exit codes, the dry run."""

import subprocess
import sys
from pathlib import Path

import pytest

from launch import _app, _samples, dry_run
from olmoearth_jax import config_files, overrides
from olmoearth_jax.config import ConfigError
from olmoearth_jax.configlib.official import official
from olmoearth_jax.train import build_objective, estimate

ROOT = Path(__file__).resolve().parents[2]

PARAMETERS = {
    ("nano", "v1"): (2_187_776, 3_549_568),
    ("base", "v1"): (118_490_112, 207_448_320),
    ("nano", "v1_1"): (2_523_984, 4_222_080),
    ("small", "v1_2"): (43_012_672, 78_630_176),
    ("large", "v1_2"): (393_660_672, 734_832_896),
}


def test_load_takes_file_argument_name_and_overrides():
    config = _app.load(
        "configs/base.py:version=v1_2,faster", None, "mine", ["--config.trainer.no_evals"]
    )
    assert config.common.run_name == "mine"
    assert config.model.projection_only_target and config.trainer.no_evals
    assert config.run_folder == Path("local_output/mine")


def test_config_files_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config_files.load_file("configs/nano.py").common.recipe == "nano v1"


def test_config_file_of_a_user(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from olmoearth_jax.configs import common\n"
        "def get_config(arg=''):\n"
        "    c = common.config(arg, 'nano')\n"
        "    c.train_module.optim_config.lr = 0.5\n"
        "    return c\n"
    )
    assert config_files.load_file(f"{path}:version=v1_1").train_module.optim_config.lr == 0.5


def test_saved_config_starts_another_run(tmp_path):
    saved = official("tiny", "v1_1")
    saved.common.save_folder = str(tmp_path)
    (tmp_path / "config.json").write_text(saved.to_json())
    for source in (tmp_path, tmp_path / "config.json"):
        assert _app.load(None, str(source)) == saved
    assert _app.load(None, str(tmp_path), "next").run_folder == Path("local_output/next")
    saved.trainer.loaded = {"taken": ["params/a"]}
    (tmp_path / "config.json").write_text(saved.to_json())
    assert _app.load(None, str(tmp_path), "next").trainer.loaded == {}


@pytest.mark.parametrize(
    ("argument", "part"),
    [
        ("configs/bas.py", "did you mean 'configs/base.py'?"),
        ("configs/base.py:smok", "did you mean 'smoke'?"),
        ("configs/base.py:version=v1_5", "unknown version 'v1_5'"),
        ("configs/large.py:version=v1_3", "valid: nano:version=v1"),
        ("configs/base.py:version=v13", "did you mean 'v1_3'?"),
        ("configs/base.py:version", "needs a value"),
        ("configs/base.py:smoke=1", "takes no value"),
        ("configs/base.py:smoke,smoke", "given twice"),
        ("configs/base.py:size=nano", "unknown config argument 'size'"),
        ("configs/small.py:version=v1", "valid: nano:version=v1"),
        ("configs/large.py:version=v1_1", "size 'large' was never defined for version 'v1_1'"),
        ("pyproject.toml", "is not a Python file"),
    ],
)
def test_wrong_config_argument(argument, part):
    with pytest.raises(ConfigError) as caught:
        config_files.load_file(argument)
    assert part in str(caught.value)


def test_one_config_is_needed():
    for given in ((None, None), ("a.py", "b.json")):
        with pytest.raises(ConfigError, match="--config_json"):
            _app.load(*given)


@pytest.mark.parametrize(("pair", "counts"), PARAMETERS.items(), ids=str)
def test_parameter_counts(pair, counts):
    config = official(*pair)
    trained = sum(n for _, n in estimate.parameter_rows(config))
    assert (trained, estimate.reference_total(config)) == counts


def test_parameter_count_of_a_projection_only_target():
    assert estimate.reference_total(official("base", "v1_2", faster=True)) == 171_856_256


def test_tokens_of_the_official_recipe():
    config = official("nano")
    tokens = estimate.simulate_tokens(config, estimate.grid_timesteps(config))
    assert tokens.encoded == pytest.approx(395, rel=0.03)
    assert tokens.decoded == pytest.approx(571, rel=0.03)


def test_report_of_a_small_run(capsys):
    config = config_files.load_file("configs/nano.py:smoke")
    assert dry_run.main(config, full=True) == 0
    out = capsys.readouterr().out
    for part in ("trained", "encoded tokens", "FLOPs", "step program 0", "steps of the run"):
        assert part in out
    assert config.to_json() in out


def test_dry_run_of_wrong_config_lists_every_problem(capsys):
    config = overrides.apply_values(
        official("nano"), {"data_loader.global_batch_size": 500, "mesh.data": 0}
    )
    with pytest.raises(ConfigError) as caught:
        dry_run.main(config)
    assert len(caught.value.problems) == 2


def test_dry_run_holds_the_mesh_to_the_devices():
    config = overrides.apply_values(
        config_files.load_file("configs/nano.py:smoke"), {"mesh.fsdp": 3}
    )
    with pytest.raises(ConfigError, match="size 3 does not divide 4 devices"):
        dry_run.main(config, devices=4)


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "launch.dry_run", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_exit_code_and_messages_of_the_program():
    done = run("--config=configs/nano.py", "--config.trainer.nope=1", "--config.mesh.data=0")
    assert done.returncode == _app.USER_ERROR
    assert done.stderr.count("error: ") == 2
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "arguments", [("--confg=configs/nano.py",), ("--config=configs/nano.py", "stray")]
)
def test_other_wrong_arguments_of_the_program(arguments):
    done = run(*arguments)
    assert done.returncode == _app.USER_ERROR
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train_module.ema_decay": [0.99, 1.0]},
        {"train_module.token_exit_cfg": {"landsat": 1}},
    ],
)
def test_target_is_counted_as_the_run_keeps_it(changes):
    config = overrides.apply_values(official("nano"), changes)
    objective = build_objective.build_objective(config)
    assert estimate.full_target(config) == objective.full_target == bool(changes)
    encoder = sum(n for p, n in estimate.parameter_rows(config) if p.startswith("encoder/"))
    patches = dict(estimate.parameter_rows(config))["encoder/patch_embeddings"]
    low, high = (encoder * 0.8, encoder) if changes else (patches, patches)
    assert low <= estimate.target_size(config) <= high


def memory(changes: dict, devices: int) -> str:
    """The report's lines on memory."""
    config = overrides.apply_values(config_files.load_file("configs/nano.py:smoke"), changes)
    lines = dry_run.report(config, devices, _samples.Samples(None))
    first = next(i for i, line in enumerate(lines) if line.startswith("memory per device"))
    return "\n".join(lines[first : lines.index("", first)])


def test_memory_is_that_of_the_precision_and_not_of_the_attention():
    half = memory({"precision": "bfloat16", "attention": "xla"}, 1)
    assert memory({"attention": "xla"}, 1) == half
    assert memory({"precision": "float32", "attention": "xla"}, 1) != half


def test_memory_counts_the_devices_that_an_open_mesh_axis_takes():
    open_axis = memory({"mesh.data": 1, "mesh.fsdp": -1}, 4)
    assert open_axis == memory({"mesh.data": 1, "mesh.fsdp": 4}, 4)
    assert open_axis != memory({}, 4)
