"""Plans, look-ups, workers, quantisation and stores as recorded."""

from pathlib import Path

import pytest

from tools import check_goldens
from tools.goldens import maps

HERE = Path(__file__).resolve().parents[1] / "goldens" / "maps"
CASES = [c for c in maps.cases(HERE) if not c.name.startswith(("labels", "store_"))]


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


def test_the_tool_finds_this_folder_and_the_recorded_stores():
    """The stores lie in one file, which is unpacked while their cases run."""
    assert check_goldens.find_areas(HERE.parent, None)["maps"] == HERE
    run = (check_goldens.run_case(c) for c in maps.cases(HERE) if c.name.startswith("store_"))
    results = list(run)
    assert [r.status for r in results] == ["passed"] * 4, [r.reason for r in results]
