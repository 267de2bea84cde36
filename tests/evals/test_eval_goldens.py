"""Parity with the reference's recorded evaluations."""

from pathlib import Path

import pytest

from tools.goldens import evals

HERE = Path(__file__).resolve().parents[1] / "goldens" / "evals"
SHARED = Path(__file__).resolve().parents[3] / "shared" / "goldens" / "evals"

SMALL = list(evals.cases(HERE))
FULL = list(evals.cases(SHARED)) if SHARED.exists() else []


@pytest.mark.parametrize("case", SMALL, ids=lambda c: c.name)
def test_recorded_case(case):
    result = case.run()
    assert result.status == "passed", result.reason


@pytest.mark.slow
@pytest.mark.skipif(not FULL, reason="no full goldens; those of tests/goldens ran")
@pytest.mark.parametrize("case", FULL, ids=lambda c: c.name)
def test_full_set(case):
    result = case.run()
    assert result.status == "passed", result.reason


@pytest.mark.skipif(not FULL, reason="no full goldens; those of tests/goldens ran")
def test_every_case_has_a_check():
    assert len(FULL) >= 91
