"""The tool that kills workers of a list of work."""

import random
import sys

import pytest

from tools import kill_test

WORKER = """
import pathlib, sys, time
from olmoearth_jax.data import durable, work_list
given = dict(a.lstrip("-").split("=", 1) for a in sys.argv[1:])
out = pathlib.Path(given["output"])

def work(unit):
    time.sleep(0.05)
    text = unit * 100
    durable.write_durably(out / unit, text)
    return {}, [unit]

units = [str(n) for n in range(12)]
found = work_list.WorkList(out / "job", out, "d", units).run(
    work, int(given["shard"]), int(given["of"]))
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "a_worker.py").write_text(WORKER)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{':'.join(p for p in sys.path if p)}")
    monkeypatch.setattr(kill_test, "_MOST_CALM_S", 1.0)
    return "a_worker"


def test_what_workers_leave_is_compared(module, tmp_path):
    got = kill_test.kill_workers(tmp_path / "well", [module], 2, 3, random.Random(0))
    assert got["kills"] == 3 and got["difference"] is None
    (tmp_path / "well" / "peace" / "out" / "3").write_text("other")
    storm = next((tmp_path / "well").glob("storm*"))
    assert kill_test.file_difference(tmp_path / "well" / "peace" / "out", storm / "out") == "3"
    (tmp_path / "well" / "peace" / "out" / "3").unlink()
    found = kill_test.file_difference(tmp_path / "well" / "peace" / "out", storm / "out")
    assert found == "names: 3"
    (storm / "out" / "3").rename(storm / "out" / ".3.0123abcd.tmp")  # killed before it was renamed
    assert kill_test.file_difference(tmp_path / "well" / "peace" / "out", storm / "out") is None


def test_a_worker_that_fails_by_itself_ends_the_storm(tmp_path, monkeypatch):
    (tmp_path / "b_worker.py").write_text("import sys\nsys.exit(3)\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{':'.join(p for p in sys.path if p)}")
    with pytest.raises(RuntimeError, match="b_worker failed"):
        kill_test.kill_workers(tmp_path / "out", ["b_worker"], 1, 1, random.Random(0))
