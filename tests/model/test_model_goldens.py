"""Parity with the reference's recorded outputs."""

from pathlib import Path

import pytest

from tools.goldens import model, model_v1_3

HERE = Path(__file__).resolve().parents[1] / "goldens" / "model"
SHARED = Path(__file__).resolve().parents[3] / "shared" / "goldens" / "model"

SMALL = list(model.cases(HERE))
FULL = list(model.cases(SHARED)) if SHARED.exists() else []
LATER = SHARED.parent / "model_v1_3"
FULL += list(model_v1_3.cases(LATER)) if LATER.exists() else []


@pytest.mark.parametrize("case", SMALL, ids=lambda c: c.name)
def test_recorded_case(case):
    result = case.run()
    assert result.status == "passed", result.reason


@pytest.mark.slow
@pytest.mark.skipif(not FULL, reason="no full goldens; those of tests/goldens ran")
@pytest.mark.parametrize("case", FULL, ids=lambda c: c.name)
def test_full_set(case):
    result = case.run()
    if result.status == "skipped":
        pytest.skip(result.reason)
    assert result.status == "passed", result.reason
