"""launch.embed --readers: the same values from other processes, which end with their parent."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rasterio.transform import Affine

from olmoearth_jax.data.pool import Workers
from olmoearth_jax.interop import checkpoints
from tests.inference.test_model import weights_of
from tests.maps import region
from tests.maps.test_embed import ROOT, objects, run

pytestmark = pytest.mark.filterwarnings("ignore:Use `@` matmul:PendingDeprecationWarning")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with model and images, and the arguments for four shards of four blocks."""
    folder = tmp_path_factory.mktemp("readers")
    checkpoints.write(weights_of(), folder / "model")
    corner = Affine(10, 0, 500_480, 0, -10, 5_600_000)
    rows = []
    for month in (5, 8):
        region.write_raster(folder / f"{month}.tif", region.image(month, 150, 140), corner)
        rows.append({"path": f"{month}.tif", "date": f"2023-{month:02d}",
                     "modality": "sentinel2_l2a"})  # fmt: skip
    (folder / "imagery.json").write_text(json.dumps(rows))
    given = [f"--model={folder / 'model'}", f"--inputs={folder / 'imagery.json'}", *region.ARGS,
             "--years=2023", "--shard_side=32", "--block=16"]  # fmt: skip
    assert run(*given, f"--output={folder / 'one'}") == 0
    return folder, given


def test_readers_change_no_byte(world, tmp_path):
    folder, given = world
    assert run(*given, "--readers=2", f"--output={tmp_path}") == 0
    assert objects(tmp_path) == objects(folder / "one")
    digests = [json.loads((p / "job" / "job.json").read_text())["job_digest"]
               for p in (folder / "one", tmp_path)]  # fmt: skip
    assert digests[0] == digests[1]
    # What one began the other ends.
    assert run(*given, "--readers=2", f"--output={folder / 'one'}") == 0


def test_a_damaged_raster_is_told_alike(world, tmp_path, capsys):
    folder, given = world
    rows = json.loads((folder / "imagery.json").read_text())
    for row in rows:
        row["path"] = str(folder / row["path"])
    broken = tmp_path / "b.tif"
    whole, rows[0]["path"] = region.damage(rows[0]["path"], broken), str(broken)
    (tmp_path / "m.json").write_text(json.dumps(rows))
    told = []
    for readers in (1, 2):
        out = tmp_path / str(readers)
        assert run(*given, f"--inputs={tmp_path / 'm.json'}", f"--output={out}",
                   "--nocheck_units", "--attempts=2", f"--readers={readers}") == 1  # fmt: skip
        told.append(capsys.readouterr().err)
        assert "b.tif" in told[-1]
    assert told[0] == told[1]
    broken.write_bytes(whole)
    assert run(*given, f"--inputs={tmp_path / 'm.json'}", f"--output={out}", "--nocheck_units",
               "--readers=2", "--attempts=4") == 0  # fmt: skip
    got, want = objects(out), objects(folder / "one")
    assert all(got[key] == want[key] for key in want if "/c/" in key)


def _children(pid: int) -> list[int]:
    """The processes that one has started for tasks."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            started = b"spawn_main" in (path / "cmdline").read_bytes()
        except OSError:
            continue
        if parent == pid and started:
            found.append(int(path.name))
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_readers_hold_no_jax_and_end_with_their_parent(world, tmp_path):
    _, given = world
    parent = subprocess.Popen(
        [sys.executable, "-m", "launch.embed", *given, "--readers=2", f"--output={tmp_path}"],
        cwd=ROOT, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        while not list((tmp_path / "job" / "done").rglob("*.json")):
            assert parent.poll() is None
            time.sleep(0.02)
        readers = _children(parent.pid)
        loaded = [Path(f"/proc/{pid}/maps").read_text() for pid in readers]
    finally:
        parent.kill()
        parent.wait()
    assert len(readers) == 2
    assert all("rasterio" in held and "jaxlib" not in held for held in loaded)
    until = time.monotonic() + 20
    while any(os.path.exists(f"/proc/{pid}") for pid in readers):
        assert time.monotonic() < until
        time.sleep(0.1)


@pytest.mark.skipif(sys.platform != "linux", reason="a group of processes")
def test_sigterm_to_all_processes_costs_nothing(world, tmp_path):
    """As Slurm sends it."""
    _, given = world
    parent = subprocess.Popen(
        [sys.executable, "-m", "launch.embed", *given, "--readers=2", f"--output={tmp_path}"],
        cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    while len(_children(parent.pid)) < 2:
        assert parent.poll() is None
        time.sleep(0.02)
    time.sleep(1)
    os.killpg(parent.pid, signal.SIGTERM)
    assert parent.wait(60) == 75
    assert not list((tmp_path / "job" / "failed").rglob("*.json"))
    assert not list((tmp_path / "job" / "claims").rglob("*.json"))
    assert _children(parent.pid) == []


def test_a_killed_reader_costs_an_attempt_only(world, tmp_path, capsys, monkeypatch):
    from olmoearth_jax.maps import embed_shards

    folder, given = world
    real, struck = embed_shards.Readers.windows, []

    def windows(self, part, places):
        for window in real(self, part, places):
            if not struck:
                struck.extend(_children(os.getpid()))
                os.kill(struck[0], signal.SIGKILL)
            yield window

    monkeypatch.setattr(embed_shards.Readers, "windows", windows)
    assert run(*given, "--readers=2", f"--output={tmp_path}") == 0
    assert struck and objects(tmp_path) == objects(folder / "one")
    assert _children(os.getpid()) == []


def _late(number: int) -> int:
    time.sleep(0.2 * (number % 3 == 0))
    return number


def test_results_in_order_and_few_ahead():
    asked = []

    def tasks():
        for number in range(9):
            asked.append(number)
            yield number

    with Workers(2, apart=True) as workers:
        for place, got in enumerate(workers.in_order(_late, tasks())):
            assert got == place and len(asked) <= place + 3
    assert list(Workers(0).in_order(_late, [1, 2])) == [1, 2]
