"""Labels, splits, metrics and blending against the recorded vectors."""

from pathlib import Path

import pytest

from tools.goldens import maps_labels

HERE = Path(__file__).resolve().parents[1] / "goldens" / "maps"
SHARED = Path(__file__).resolve().parents[3] / "shared" / "goldens" / "maps"

SMALL = list(maps_labels.cases(HERE))
FULL = list(maps_labels.cases(SHARED)) if SHARED.exists() else []


@pytest.mark.parametrize("case", SMALL, ids=lambda c: c.name)
def test_recorded_case(case):
    result = case.run()
    assert result.status == "passed", result.reason


@pytest.mark.skipif(not FULL, reason="no full goldens; those of tests/goldens ran")
@pytest.mark.parametrize("case", FULL, ids=lambda c: c.name)
def test_full_set(case):
    result = case.run()
    assert result.status == "passed", result.reason


def test_every_kind_of_vector_is_there():
    assert {c.name.split("/")[0] for c in SMALL} == {"labels", "split", "blend", "metrics"}
