"""The documents agree with the code."""

import re
from pathlib import Path

from olmoearth_jax.config import ExperimentConfig
from olmoearth_jax.configlib import schema
from olmoearth_jax.configlib.official import official
from olmoearth_jax.configlib.schema import get_path
from tools import config_table

ROOT = Path(__file__).resolve().parents[2]


def test_table_of_paths_is_up_to_date():
    page = (ROOT / "docs" / "configuration.md").read_text()
    assert config_table.updated(page) == page, "run python -m tools.config_table"


def test_every_documented_path_exists():
    config = official("base")
    known = set(schema.valid_paths(ExperimentConfig))
    for path, *_ in config_table.rows(ExperimentConfig, config):
        assert path in known
        if "<name>" not in path and not path.startswith(
            ("trainer.hard_stop", "model.reconstructor_config")
        ):
            parent = path.rpartition(".")[0]
            if not parent or get_path(config, parent) is not None:
                get_path(config, path)


def test_every_difference_names_tests_that_exist():
    lines = (ROOT / "docs" / "differences.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("| ") and not line.startswith("| here")]
    for row in rows:
        named = re.findall(r"`(tests/\S+\.py)::(\w+)`", row)
        assert named, row
        for path, test in named:
            assert f"def {test}(" in (ROOT / path).read_text(), (path, test)


def test_every_ablation_says_what_it_asks():
    for path in (ROOT / "configs" / "ablations").glob("[a-z]*.py"):
        first = path.read_text().splitlines()[0]
        assert first.startswith('"""') and first.endswith("?"), path.name


def test_every_promise_names_tests_that_exist():
    page = (ROOT / "docs" / "security.md").read_text()
    rows = [x for x in page.splitlines() if x.startswith("| ") and not x.startswith("| file")]
    assert len(rows) > 10 and all("`tests/" in row for row in rows)
    for path, test in re.findall(r"`(tests/\S+?\.py)::(\w+)`", page):
        assert f"def {test}(" in (ROOT / path).read_text(), (path, test)
