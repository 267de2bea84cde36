"""The data path against recorded outputs of the reference."""

import json
import shutil
from pathlib import Path

import pytest

from tools import check_goldens
from tools.goldens.common import Case, Checks, Result, compare

COMPACT = Path(__file__).resolve().parents[1] / "goldens" / "data"
SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "goldens" / "data"


def _assert_all_pass(folder: Path, capsys, at_least: int) -> None:
    counts = check_goldens.check(folder, "data", failures_only=True)
    assert counts["failed"] == 0, capsys.readouterr().out
    assert counts["passed"] >= at_least


def test_the_committed_goldens_pass(capsys):
    _assert_all_pass(COMPACT, capsys, 260)


@pytest.mark.skipif(not SHARED.is_dir(), reason="no full goldens; those of tests/goldens ran")
def test_the_full_goldens_pass(capsys):
    _assert_all_pass(SHARED, capsys, 1600)


def test_a_changed_value_fails(tmp_path, capsys):
    folder = tmp_path / "data"
    shutil.copytree(COMPACT, folder)
    table = json.loads((folder / "naming.json").read_text())
    table["fingerprints"][0]["fingerprint"] = "0" * 64
    (folder / "naming.json").write_text(json.dumps(table))
    assert check_goldens.check(tmp_path, failures_only=True)["failed"] == 1
    assert "naming/fingerprints/0" in capsys.readouterr().out


def test_areas_are_recognised_by_their_contents(tmp_path):
    assert check_goldens.find_areas(COMPACT, None) == {"data": COMPACT}
    with pytest.raises(ValueError, match="found no goldens of area 'evals'"):
        check_goldens.find_areas(COMPACT, "evals")
    with pytest.raises(ValueError, match="did you mean 'model'"):
        check_goldens.find_areas(COMPACT, "modle")
    with pytest.raises(ValueError, match="does not exist"):
        check_goldens.find_areas(tmp_path / "none", None)
    with pytest.raises(ValueError, match="no manifest"):
        check_goldens.find_areas(tmp_path, None)


def test_malformed_goldens_are_named(tmp_path):
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="manifest.json"):
        check_goldens.find_areas(tmp_path, None)
    (tmp_path / "manifest.json").write_text(json.dumps({"h5_dirs": {}, "files": ["pieces.json"]}))
    with pytest.raises(ValueError, match="pieces.json"):
        check_goldens.check(tmp_path)


def test_an_exception_is_a_failed_case():
    def broken() -> Result:
        raise KeyError("sentinel9")

    result = check_goldens.run_case(Case("x", broken))
    assert result.status == "failed" and "sentinel9" in result.reason


def test_compare_scales_by_the_tolerance():
    assert compare([1.0, float("nan")], [1.0, float("nan")]) == 0
    assert compare([1.0], [2.0]) == float("inf")
    assert compare([1.0], [2.0], atol=0.5) == pytest.approx(2)
    with pytest.raises(ValueError, match="shape"):
        compare([1.0], [1.0, 2.0])
    checks = Checks(atol=0.1)
    checks.array("a", [1.0], [1.2])
    assert checks.result().status == "failed" and checks.worst == pytest.approx(0.2)
