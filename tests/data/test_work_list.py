"""The work list: who takes what, and what is left on disk at every moment."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from olmoearth_jax.data import durable, work_list, worker_place
from olmoearth_jax.data.work_list import WorkList

GOLDEN = Path(__file__).resolve().parents[1] / "goldens" / "maps" / "workers.json"
UNITS = [f"zone{k % 2}/{k}" for k in range(12)]

WORKER = """
import sys, time
from pathlib import Path
from olmoearth_jax.files import replacing
from olmoearth_jax.data import work_list
root, index, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
units = [f"zone{k % 2}/{k}" for k in range(12)]

def work(unit):
    path = root / "objects" / unit
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as scratch:
        scratch.write_text(unit * 3)
        time.sleep(0.01)
    return {"valid": 1}, [unit]

out = work_list.WorkList(root / "job", root / "objects", "d", units).run(work, index, count)
print(out.made, len(out.busy))
"""


def _list(root: Path, digest: str = "d") -> WorkList:
    return WorkList(root / "job", root / "objects", digest, UNITS)


def _work(root: Path, seen: list[str]):
    def work(unit: str):
        path = root / "objects" / unit
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(unit)
        seen.append(unit)
        return {"valid": 1}, [unit]

    return work


def test_index_and_count_as_recorded():
    golden = json.loads(GOLDEN.read_text())
    for case in golden["cases"]:
        flags = case["flags"]
        if case["expect"] == "error":
            with pytest.raises(ValueError, match="of|OLMOEARTH_WORKERS"):
                worker_place.place_of(flags.get("shard"), flags.get("of"), case["env"])
        else:
            got = worker_place.place_of(flags.get("shard"), flags.get("of"), case["env"])
            assert list(got) == case["expect"], case


def test_the_order_of_the_workers_as_recorded():
    golden = json.loads(GOLDEN.read_text())["order"]
    for i in range(golden["workers"]):
        own = golden["own"][str(i)]
        taken = list(worker_place.order(golden["shards"], i, golden["workers"]))
        assert taken == own + golden["then"][str(i)]
        assert list(worker_place.order(golden["shards"], i, golden["workers"], steal=False)) == own


@pytest.mark.parametrize("env", [{"SLURM_ARRAY_TASK_ID": "x", "SLURM_ARRAY_TASK_MIN": "0"},
                                 {"SLURM_PROCID": "1"},
                                 {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_MIN": "0",
                                  "SLURM_ARRAY_TASK_STEP": "0"}])  # fmt: skip
def test_broken_variables_are_named(env):
    with pytest.raises(ValueError, match="SLURM_"):
        worker_place.place_of(env=env)


def test_all_units_are_done_once_and_not_again(tmp_path):
    seen: list[str] = []
    assert _list(tmp_path).run(_work(tmp_path, seen)).made == len(UNITS)
    assert seen == UNITS
    assert _list(tmp_path).run(_work(tmp_path, seen)).made == 0
    assert not list((tmp_path / "job" / "claims").rglob("*.json"))
    assert {_list(tmp_path).state(u) for u in UNITS} == {"done"}


def test_a_marker_counts_only_with_its_objects_and_its_job(tmp_path):
    work = _list(tmp_path)
    work.run(_work(tmp_path, []))
    assert _list(tmp_path, "other").marker(UNITS[0]) is None
    (tmp_path / "objects" / UNITS[0]).write_text("longer than before")
    (tmp_path / "objects" / UNITS[1]).unlink()
    (tmp_path / "job" / "done" / f"{UNITS[2]}.json").write_text('{"id": ')
    (tmp_path / "job" / "done" / f"{UNITS[3]}.json").write_text('{"job_digest": "d"}')
    again: list[str] = []
    assert work.run(_work(tmp_path, again)).made == 4
    assert again == UNITS[:4]


def test_a_failing_unit_is_tried_three_times_and_listed(tmp_path):
    tries: list[str] = []

    def work(unit: str):
        if unit == UNITS[5]:
            tries.append(unit)
            raise ValueError("the raster is damaged")
        return _work(tmp_path, [])(unit)

    out = _list(tmp_path).run(work)
    assert out.failed == {UNITS[5]: "the raster is damaged"} and len(tries) == 3
    assert out.made == len(UNITS) - 1
    assert _list(tmp_path).state(UNITS[5]) == "failed"
    assert _list(tmp_path).run(_work(tmp_path, []), attempts=4).failed == {}
    assert _list(tmp_path).state(UNITS[5]) == "done"


def test_a_full_disk_is_no_failure_of_the_unit(tmp_path):
    def work(unit: str):
        raise OSError(28, "No space left on device", "somewhere")

    with pytest.raises(OSError, match="No space left"):
        _list(tmp_path).run(work)
    assert _list(tmp_path).state(UNITS[0]) == "planned"


def _write_claim(path: Path, age: float = 0.0, **told) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(told))
    os.utime(path, (time.time() - age,) * 2)


def test_claims_of_the_living_are_respected_and_of_the_dead_taken(tmp_path):
    work, claims = _list(tmp_path), tmp_path / "job" / "claims"
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    here = work_list._HOST
    _write_claim(claims / f"{UNITS[0]}.json", host="elsewhere", pid=1, token="a")
    _write_claim(claims / f"{UNITS[1]}.json", age=601, host="elsewhere", pid=1, token="a")
    _write_claim(claims / f"{UNITS[2]}.json", host=here, pid=dead.pid, token="a")
    _write_claim(claims / f"{UNITS[3]}.json", host=here, pid=os.getpid(), token="an earlier life")
    _write_claim(claims / f"{UNITS[4]}.json", host=here, pid=os.getppid(), token="a")
    (claims / f"{UNITS[5]}.json").write_text("")
    # Clocks go wrong; a number that is none; what is said of the past is damaged.
    _write_claim(claims / f"{UNITS[6]}.json", age=-3600, host="elsewhere", pid=1, token="a")
    _write_claim(claims / f"{UNITS[7]}.json", host=here, pid=10**30, token="a")
    durable.write_durably(
        tmp_path / "job" / "failed" / f"{UNITS[7]}.json",
        json.dumps({"job_digest": work.digest, "attempts": "many"}),
    )
    out = work.run(_work(tmp_path, []))
    assert out.busy == [UNITS[0], UNITS[4], UNITS[5]]
    assert out.made == len(UNITS) - 3


def test_waiting_ends_when_the_others_are_done(tmp_path, monkeypatch):
    claim = tmp_path / "job" / "claims" / f"{UNITS[0]}.json"
    _write_claim(claim, host="elsewhere", pid=1, token="a")
    monkeypatch.setattr(work_list, "TOUCH_S", 0.01)
    other = threading.Timer(0.2, claim.unlink)
    other.start()
    out = _list(tmp_path).run(_work(tmp_path, []), wait=True)
    other.join()
    assert not out.busy and out.made == len(UNITS)


def test_the_first_job_wins_and_another_is_refused_with_what_differs(tmp_path):
    path = tmp_path / "out" / "job" / "job.json"
    job = {"model": "a", "grid": {"token": 10, "shard": 64}, "host": "here"}
    digest = work_list.open_job(path, job, ("model", "grid"))
    assert work_list.open_job(path, {**job, "host": "there"}, ("model", "grid")) == digest
    with pytest.raises(ValueError, match=r"grid.shard: 64 there, 128 here"):
        other = {**job, "grid": {"token": 10, "shard": 128}}
        work_list.open_job(path, other, ("model", "grid"))
    assert json.loads(path.read_text())["job_digest"] == digest


def test_stopping_gives_the_claim_back(tmp_path):
    def work(unit: str):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
        raise AssertionError("not stopped")

    with pytest.raises(work_list.Stopped), work_list.stopping():
        _list(tmp_path).run(work)
    assert not list((tmp_path / "job" / "claims").rglob("*.json"))
    assert _list(tmp_path).state(UNITS[0]) == "planned"


def test_killed_workers_leave_what_others_finish(tmp_path):
    draw = random.Random(0)
    for _ in range(6):
        workers = [
            subprocess.Popen([sys.executable, "-c", WORKER, str(tmp_path), str(k), "3"],
                             stdout=subprocess.DEVNULL)
            for k in (0, 1, 1)
        ]  # fmt: skip
        time.sleep(0.15 + draw.random() * 0.25)
        for worker in workers:
            worker.kill()
            worker.wait()
    last = subprocess.run([sys.executable, "-c", WORKER, str(tmp_path), "0", "1"],
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert last.stdout.split()[1] == "0"
    for unit in UNITS:
        assert (tmp_path / "objects" / unit).read_text() == unit * 3
        assert _list(tmp_path).state(unit) == "done"


def test_asked_to_end_right_after_the_claim_it_is_given_back(tmp_path, monkeypatch):
    held = work_list.WorkList(tmp_path / "job", tmp_path, "d", ["a"])
    claim = held.claim

    def stopped(unit):
        assert claim(unit)
        raise work_list.Stopped

    monkeypatch.setattr(held, "claim", stopped)
    with pytest.raises(work_list.Stopped):
        held.run(lambda unit: ({}, []))
    assert not list((tmp_path / "job" / "claims").rglob("*.json"))
