"""What v1.3 training adds, against the recorded values."""

from pathlib import Path

import pytest

from tools.goldens import train_v1_3

ROOT = Path(__file__).resolve().parents[2]
COMPACT = ROOT / "tests" / "goldens" / "train_v1_3"
SHARED = ROOT.parent / "shared" / "goldens" / "train_v1_3"


@pytest.mark.parametrize("case", [pytest.param(c, id=c.name) for c in train_v1_3.cases(COMPACT)])
def test_recorded(case):
    result = case.run()
    assert result.status == "passed", result.reason


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.exists(), reason="no full goldens; those of tests/goldens ran")
def test_full_folder():
    results = {c.name: c.run() for c in train_v1_3.cases(SHARED)}
    assert results
    assert not {n: r.reason for n, r in results.items() if r.status == "failed"}
