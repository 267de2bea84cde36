"""The worked example of docs/new_masking.md, and what --plugins may and may not do."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from launch import _app
from olmoearth_jax import check, commands, masking, overrides, plugins
from olmoearth_jax.checkpoints import integrity
from olmoearth_jax.configlib.official import official
from olmoearth_jax.masks import DECODE, MISSING_TOKEN, VISIBLE

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "new_masking.md").read_text()


def code() -> str:
    found = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert found
    return found[1]


def programs() -> list[list[str]]:
    lines = PAGE.replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if line.startswith("python -m ")]


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A folder with the module, imported as a program would, and forgotten afterwards."""
    (tmp_path / "my_masks.py").write_text(code())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(masking, "STRATEGIES", dict(masking.STRATEGIES))
    monkeypatch.setenv(plugins.VARIABLE, "")
    yield tmp_path
    sys.modules.pop("my_masks", None)


def run(folder: Path, *given: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": str(ROOT), plugins.VARIABLE: ""}
    return subprocess.run(
        [sys.executable, *given], cwd=folder, env=env, capture_output=True, text=True
    )


def test_the_strategy_of_the_page(mine):
    assert plugins.take(["train", "--plugins=my_masks", "--x=1"]) == ["train", "--x=1"]
    plugins.load()
    strategy = masking.build({"type": "checker", "size": 2})
    missing = {"sentinel2_l2a": np.zeros((3, 4, 4, 2, 1), bool), "latlon": np.zeros((3, 1), bool)}
    missing["sentinel2_l2a"][0, 0, 0] = True
    masks = strategy(missing, masking.MaskContext.whole_group(5, 3))
    got = masks["sentinel2_l2a"]
    assert (got[0, 0, 0] == MISSING_TOKEN).all() and (masks["latlon"] == VISIBLE).all()
    assert (got[1, :2, :2] == got[1, 2:, 2:]).all() and (got[1, :2, 2:] != got[1, :2, :2]).all()
    assert (got[1] == DECODE).sum() == 16
    import my_masks  # pyright: ignore[reportMissingImports]

    assert masking.register(my_masks.Checker) is my_masks.Checker  # once more changes nothing


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m, None),
        (lambda m: {n: x.astype(np.int64) for n, x in m.items()}, None),
        (lambda m: m | {"sentinel2_l2a": np.zeros((3, 4, 4, 2, 1), int)}, "have no data"),
        (lambda m: m | {"latlon": np.full((3, 1), 4)}, r"of latlon holds other codes than 0...3"),
        (lambda m: m | {"latlon": np.full((3, 1), -1)}, r"other codes"),
        (lambda m: m | {"latlon": np.zeros(3, int)}, r"of latlon is \(3,\), not \(3, 1\)"),
        (lambda m: {"latlon": m["latlon"]}, "gives no mask of sentinel2_l2a"),
    ],
)
def test_masks_are_what_was_promised(mine, change, said):
    plugins.take(["train", "--plugins=my_masks"])
    plugins.load()
    strategy = masking.build({"type": "checker"})
    missing = {"sentinel2_l2a": np.zeros((3, 4, 4, 2, 1), bool), "latlon": np.zeros((3, 1), bool)}
    missing["sentinel2_l2a"][0, 0, 0] = True
    masks = change(strategy(missing, masking.MaskContext.whole_group(5, 3)))
    if said is None:
        out = masking.checked_masks(strategy, missing, masks)
        assert all(m.dtype == np.int8 for m in out.values())
        return
    with pytest.raises(ValueError, match=f"masking strategy 'checker'.*{said}"):
        masking.checked_masks(strategy, missing, masks)


@pytest.mark.parametrize("name", ["my_masks.py", "./my_masks", "my-masks"])
def test_a_path_is_no_name_of_a_module(mine, name):
    plugins.take(["train", f"--plugins={name}"])
    with pytest.raises(ValueError, match=r"is no name of a module: write a\.b for a/b\.py"):
        plugins.load()


def test_a_strategy_without_a_free_key_is_refused():
    class Second(masking.STRATEGIES["random"]):
        pass

    with pytest.raises(ValueError, match="'random' is there already"):
        masking.register(Second)
    with pytest.raises(ValueError, match="with a `key` of its own"):
        masking.register(type("Nothing", (), {}))  # pyright: ignore[reportArgumentType]


def test_a_config_names_plugins_and_never_imports_them(mine):
    cfg = overrides.apply_values(official("nano"), {"common.plugins": ["my_masks"]})
    (problem,) = [p for p in check.problems(cfg) if "plugins" in p]
    assert "add --plugins=my_masks" in problem and "my_masks" not in sys.modules
    plugins.take(["--plugins=my_masks"])
    assert check.problems(cfg) == []
    cfg.common.plugins = ["my_masks", "other"]
    assert any("add --plugins=my_masks,other" in p for p in check.problems(cfg))


@pytest.mark.parametrize("name", ["../x", "a/b.py", "x;y", "", " ", "os.system('x')"])
def test_odd_names_are_no_modules(name, monkeypatch):
    monkeypatch.setenv(plugins.VARIABLE, "a" if not name.strip() else name)
    cfg = overrides.apply_values(official("nano"), {"common.plugins": [name]})
    assert any("is no name of a module" in p for p in check.problems(cfg))
    if name.strip():
        with pytest.raises(ValueError, match="is no name of a module"):
            plugins.load()


def test_what_cannot_be_imported_is_said(mine, capsys):
    for given, message in (
        ("--plugins=absent", "the module absent cannot be imported"),
        ("--plugins", "needs names of modules"),
        ("--plugins=", "needs names of modules"),
    ):
        with pytest.raises(SystemExit) as ended:
            commands.parse_flags(_app.flags.FLAGS, ["train", given])
        assert ended.value.code == 2 and message in capsys.readouterr().err
        os.environ[plugins.VARIABLE] = ""


def test_the_names_are_saved_and_may_differ_when_a_run_goes_on(mine):
    plugins.take(["--plugins=my_masks,json"])
    cfg = _app.load("nano:smoke")
    assert cfg.common.plugins == ["my_masks", "json"]
    assert (
        integrity.config_differences({"seed": 1}, {"seed": 1, "common": {"plugins": ["json"]}})
        == []
    )
    assert plugins.allowed() == ("my_masks", "json")


def test_help_names_the_flag(mine):
    done = run(mine, "-m", "tools.verify_dataset", "--help")
    assert "--plugins=a,b" in done.stdout


@pytest.mark.slow
def test_every_command_of_the_page(mine):
    small = [
        "--config.data_loader.num_workers=1", "--config.ladder.max_rungs=2",
        "--config.trainer.max_duration.value=2", "--config.model.encoder_config.depth=1",
        "--config.common.training_modalities=[sentinel2_l2a,openstreetmap_raster]",
        "--config.trainer.callbacks.downstream_evaluator.enabled=False",
    ]  # fmt: skip
    commands = programs()
    assert [c[2] for c in commands] == ["launch.dry_run", "launch.train", "tools.eval_loss"]
    for command in commands:
        more = small if command[2].startswith("launch") else []
        done = run(mine, *command[1:], *more)
        assert done.returncode == 0, (command, done.stderr)
    bare = [part for part in commands[-1][1:] if not part.startswith("--plugins")]
    done = run(mine, *bare)
    assert done.returncode == 1 and "add --plugins=my_masks" in done.stderr
