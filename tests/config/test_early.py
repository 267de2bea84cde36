"""Help and mistakes are answered before JAX is imported, in the words of the program itself."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from olmoearth_jax import commands, early
from tools import flag_table

ROOT = Path(__file__).resolve().parents[2]
TABLE = json.loads(early.TABLE.read_text())
HEAVY = ("jax", "flax", "orbax", "grain", "optax", "h5py", "rasterio", "matplotlib")


def run(*given: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-X", "importtime", "-m", *given],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, **env},
    )  # fmt: skip


def imported(done: subprocess.CompletedProcess) -> set[str]:
    lines = [x for x in done.stderr.splitlines() if x.startswith("import time:")]
    return {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}


def told(done: subprocess.CompletedProcess) -> str:
    lines = done.stderr.splitlines()
    return "\n".join(x for x in lines if not x.startswith("import time:"))


def test_the_table_is_up_to_date():
    old = [name for name in flag_table.modules() if TABLE.get(name, {}).get("digest")
           != early.digest(name)]  # fmt: skip
    assert not old, f"flags of {', '.join(old)} have changed: run python -m tools.flag_table"
    assert set(TABLE) == set(flag_table.modules())


def same(found, held):
    """Whether entries agree, but for flags that only some versions of libraries define.

    A flag of ours that the table lacks changes the digest of its program.
    """
    both = found["flags"].keys() & held["flags"].keys()
    assert len(both) > 0.8 * len(held["flags"])
    pair = [{**x, "flags": {k: x["flags"][k] for k in both}} for x in (found, held)]
    return pair[0] == pair[1]


@pytest.mark.parametrize("module", ["launch.submit", "tools.verify_dataset"])
def test_the_table_says_what_the_program_says(module):
    assert same(flag_table.entry(module), TABLE[module])


@pytest.mark.slow
@pytest.mark.parametrize("module", flag_table.modules())
def test_the_table_says_what_every_program_says(module):
    assert same(flag_table.entry(module), TABLE[module])


@pytest.mark.parametrize(
    "given",
    [
        ("launch.train", "--help"),
        ("launch.evaluate", "-h"),
        ("tools.embed", "--helpshort"),
        ("tools.bench.inference", "--help"),
        ("olmoearth_jax", "embed", "--help"),
        ("olmoearth_jax",),
    ],
)
def test_help_imports_nothing_heavy(given):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run(*given)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0 and told(done) == ""
    assert "--" in done.stdout
    assert not imported(done) & set(HEAVY)
    assert after.ru_utime - before.ru_utime < 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("launch.train", "--confg=x"), "Unknown command line flag 'confg'. Did you mean: config"),
        (("launch.dry_run", "--devices=x"), "flag --devices=x: invalid literal"),
        (("launch.train", "--config=nno"), "config file 'nno' does not exist"),
        (("launch.evaluate", "--n_bootstrap=-3"), "-3 is not a non-negative integer"),
        (("launch.evaluate", "--catalogue=x"), "value should be one of <knn_lp|"),
        (("tools.embed", "--patchsize=3"), "Unknown command line flag 'patchsize'"),
        (("olmoearth_jax", "predict", "--runn=x"), "Unknown command line flag 'runn'"),
    ],
)
def test_mistakes_import_nothing_heavy(given, message):
    done = run(*given)
    assert done.returncode == 2 and message in told(done)
    assert told(done).startswith("error: ") and "Traceback" not in told(done)
    assert not imported(done) & set(HEAVY)


def test_plugins_are_left_to_the_program():
    for flag in ("--plugins=my_masks", "-plugins=my_masks"):
        done = run("launch.train", flag, "--confg=x")
        assert done.returncode == 2 and told(done).startswith("error: Unknown command line flag")
        assert "'confg'" in told(done)
    done = run("launch.train", "--pluginss=my_masks")
    assert done.returncode == 2 and "'pluginss'" in told(done)
    assert not imported(done) & set(HEAVY)


def test_a_wrong_setting_is_answered_without_what_trains():
    done = run("launch.train", "--config=nano", "--config.trainer.nope=1", "--config.mesh.data=0")
    assert done.returncode == 2 and told(done).count("error: ") == 2
    assert not imported(done) & {"orbax", "grain", "h5py", "matplotlib"}


def test_the_words_are_those_of_the_program(tmp_path, monkeypatch):
    """A program whose source is newer than the table answers by itself, and alike."""
    quick = run("tools.verify_dataset", "--h5py_dirr=3")
    code = (
        "import sys, pathlib, runpy; from olmoearth_jax import early;"
        "early.TABLE = pathlib.Path('nowhere');"
        "sys.argv = ['x', *sys.argv[1:]];"
        "runpy.run_module('tools.verify_dataset', run_name='__main__', alter_sys=True)"
    )
    for given, mine in (("--h5py_dirr=3", told(quick)),):
        slow = subprocess.run(
            [sys.executable, "-c", code, given], cwd=ROOT, capture_output=True, text=True
        )
        assert slow.returncode == quick.returncode and slow.stderr.strip() == mine
    monkeypatch.setattr(early, "TABLE", tmp_path / "absent.json")
    assert early._record("launch.train") is None
    (tmp_path / "absent.json").write_text(json.dumps({"launch.train": {"digest": "old"}}))
    assert early._record("launch.train") is None


def test_only_command_lines_of_programs_are_looked_at(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["-m", "--x"])
    for given, module in (
        (["python", "-m", "launch.train", "--x"], "launch.train"),
        (["python", "-X", "dev", "-m", "olmoearth_jax.tools.embed", "--x"], "tools.embed"),
        (["python", "-c", "...", "--x"], None),
        (["python", "-m", "launch.train"], None),
    ):
        monkeypatch.setattr(sys, "orig_argv", given)
        assert early.of_command_line() == module
    assert early.answer(None) is None and early.answer("pytest") is None


def test_every_flag_can_be_made_of_its_record():
    for module, record in TABLE.items():
        values = early._values(record["flags"])
        assert {n for n in values if values[n].name == n} == set(record["flags"]), module
        assert record["help"].rstrip().endswith(commands.plugins.HELP)
