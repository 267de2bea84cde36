"""The declared lower bounds, as tools.oldest prints them."""

from pathlib import Path

import pytest

from tools import oldest

ROOT = Path(__file__).resolve().parents[2]


def test_every_dependency_has_one_lower_bound():
    lines = oldest.constraints((ROOT / "pyproject.toml").read_text())
    assert any(x.startswith("jax==") for x in lines)
    assert len(lines) == len({x.split("==")[0] for x in lines})
    project = '[project]\ndependencies=["a>=1", "{}"]\n[project.optional-dependencies]\n'
    groups = "dev=[]\ngeo=[]\nzarr=[]\n"
    with pytest.raises(ValueError, match="has no lower bound"):
        oldest.constraints(project.format("b") + groups)
    with pytest.raises(ValueError, match="a has two lower bounds: 1 and 2"):
        oldest.constraints(project.format("a>=2") + groups)
