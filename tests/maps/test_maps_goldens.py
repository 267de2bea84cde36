"""Plans, look-ups, workers, quantisation and stores as recorded."""

import zipfile
from pathlib import Path

import pytest

from tools.goldens import maps

HERE = Path(__file__).resolve().parents[1] / "goldens" / "maps"
CASES = [c for c in maps.cases(HERE) if c.name != "labels"]


@pytest.mark.parametrize("case", CASES, ids=[c.name for c in CASES])
def test_golden(case):
    result = case.run()
    assert result.status == "passed", result.reason


def test_nothing_is_missing():
    assert {c.name.split("/")[0] for c in CASES} >= {
        "quantise",
        "plan",
        "lookup",
        "workers",
        "preview",
    }


def test_the_recorded_stores(tmp_path):
    with zipfile.ZipFile(HERE / "stores.zip") as held:
        held.extractall(tmp_path)
    cases = [c for c in maps.cases(tmp_path) if c.name.startswith("store_")]
    assert len(cases) == 4
    for case in cases:
        result = case.run()
        assert result.status == "passed", f"{case.name}: {result.reason}"
