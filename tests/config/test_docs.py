"""The documents agree with the code."""

from pathlib import Path

from olmoearth_jax.config import ExperimentConfig, get_path, official
from olmoearth_jax.configlib import doc, schema

ROOT = Path(__file__).resolve().parents[2]


def test_table_of_paths_is_up_to_date():
    page = (ROOT / "docs" / "configuration.md").read_text()
    assert doc.updated(page) == page, "run python -m olmoearth_jax.configlib.doc"


def test_every_documented_path_exists():
    config = official("base")
    known = set(schema.valid_paths(ExperimentConfig))
    for path, *_ in doc.rows(ExperimentConfig, config):
        assert path in known
        if "<name>" not in path and not path.startswith(
            ("trainer.hard_stop", "model.reconstructor_config")
        ):
            parent = path.rpartition(".")[0]
            if not parent or get_path(config, parent) is not None:
                get_path(config, path)


def test_every_ablation_says_what_it_asks():
    for path in (ROOT / "configs" / "ablations").glob("[a-z]*.py"):
        first = path.read_text().splitlines()[0]
        assert first.startswith('"""') and first.endswith("?"), path.name
