"""Losses, schedule, EMA and AdamW against the recorded values."""

from pathlib import Path

import pytest

from tools.goldens import train

ROOT = Path(__file__).resolve().parents[2]
COMPACT = ROOT / "tests" / "goldens" / "train"
SHARED = ROOT.parent / "shared" / "goldens" / "train"
SLOW_TO_COMPILE = ("02", "04", "05", "06", "07", "08", "09", "11", "12", "15", "18", "19")


def marked(case):
    """The case as a parameter; most token losses need a compilation of their own."""
    number = case.name.split("/")[-1][:2]
    slow = case.name.startswith("losses/") and number in SLOW_TO_COMPILE
    slow |= case.name.endswith(("koleo/patch", "koleo/instance", "mae/1", "mae/2", "mae/3"))
    return pytest.param(case, id=case.name, marks=[pytest.mark.slow] if slow else [])


CASES = [marked(c) for c in train.cases(COMPACT) if not c.name.startswith("masks/")]


@pytest.mark.parametrize("case", CASES)
def test_recorded(case):
    result = case.run()
    assert result.status == "passed", result.reason


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.exists(), reason="no full goldens; those of tests/goldens ran")
def test_full_folder():
    cases = [c for c in train.cases(SHARED) if not c.name.startswith("traj_")]
    results = {c.name: c.run() for c in cases}
    assert len(results) > 150
    assert not {n: r.reason for n, r in results.items() if r.status != "passed"}
