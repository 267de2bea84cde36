"""Rechunking by several workers."""

from __future__ import annotations

import concurrent.futures
import errno
import signal
import threading
import time
from pathlib import Path

import pytest

from olmoearth_jax.data import blocks
from olmoearth_jax.data.checksums import text_digest
from olmoearth_jax.data.h5_writer import Storage
from tests.data.shared import content, ended, start
from tools import rechunk_h5

STORAGE = Storage("gzip", 1, None, 8, 1)
FLAGS = ["--compression=gzip", "--level=1", "--chunk_hw=8", "--chunk_t=1"]


@pytest.fixture(scope="module")
def alone(dataset, tmp_path_factory) -> Path:
    """What one process makes."""
    return rechunk_h5.rechunk(dataset, tmp_path_factory.mktemp("alone"), STORAGE)[0]


def _worker(dataset: Path, out: Path, index: int, *more: str):
    given = [f"--h5py_dir={dataset}", f"--output_dir={out}", *FLAGS, f"--shard={index}", "--of=2"]
    return start("tools.rechunk_h5", [*given, *more])


def _only(out: Path) -> Path:
    """The dataset in a folder, where nothing else may be left."""
    (folder,) = (p for p in out.rglob("24"))
    assert [p.name for p in folder.parent.iterdir()] == ["24"]
    return folder


def test_two_workers_make_what_one_makes(dataset, alone, tmp_path):
    lines = [ended(w) for w in [_worker(dataset, tmp_path, n) for n in range(2)]]
    folder = _only(tmp_path)
    assert content(folder) == content(alone)
    last = {said[-1] for said in lines}
    assert str(folder) in last
    assert all(t == str(folder) or "nothing left to do here; others work on" in t for t in last)


def test_others_go_on_where_one_was_killed(dataset, alone, tmp_path):
    first = _worker(dataset, tmp_path, 0)
    while first.poll() is None and not list(tmp_path.rglob("sample_*.h5")):
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert ended(_worker(dataset, tmp_path, 1, "--wait"))[-1] == str(_only(tmp_path))
    assert content(_only(tmp_path)) == content(alone)


def test_a_damaged_file_does_not_stop_the_others_and_is_forgiven(
    writable_dataset, tmp_path, monkeypatch
):
    monkeypatch.setattr(blocks, "BLOCK", 2)
    path = writable_dataset / "sample_0.h5"
    whole = path.read_bytes()
    path.write_bytes(whole[:5000])
    out = tmp_path / "out"
    for _ in range(2):
        with pytest.raises(ValueError, match="sample_0.h5: cannot be read"):
            rechunk_h5.rechunk(writable_dataset, out, STORAGE)
        assert len(list(out.rglob("sample_*.h5"))) == 4
    path.write_bytes(whole)
    assert rechunk_h5.rechunk(writable_dataset, out, STORAGE)[1] == 2


def test_what_an_earlier_version_began_is_refused(dataset, alone, tmp_path):
    digest = text_digest(vars(STORAGE))
    partial = tmp_path / alone.parents[1].name / alone.parent.name / f".24.{digest}.partial"
    partial.mkdir(parents=True)
    (partial / "finished.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"rechunking of an earlier version.* delete that folder"):
        rechunk_h5.rechunk(dataset, tmp_path, STORAGE)


def test_a_folder_that_another_worker_finished_is_a_success(dataset, alone, tmp_path, monkeypatch):
    real = rechunk_h5.rewrite

    def rewrite(source, target, storage):
        if target.name == "sample_7.h5":  # a worker that took this block over has come first
            job = next(tmp_path.rglob("*.job"))
            target.parent.rename(target.parent.with_name("24"))
            blocks.clear(job)
        real(source, target, storage)

    monkeypatch.setattr(rechunk_h5, "rewrite", rewrite)
    folder, _ = rechunk_h5.rechunk(dataset, tmp_path, STORAGE)
    assert folder == _only(tmp_path)


def test_a_full_disk_ends_it_at_once_and_is_no_fault_of_a_file(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 4)
    seen: list[Path] = []

    def full(path, *_):
        seen.append(path)
        raise OSError(errno.EFBIG, "File too large")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="File too large"):
        patch.setattr(rechunk_h5, "write_arrays", full)
        rechunk_h5.rechunk(dataset, tmp_path, STORAGE)
    assert len(seen) == 1
    assert rechunk_h5.rechunk(dataset, tmp_path, STORAGE)[1] == 24


def test_workers_that_finish_at_the_same_time(tmp_path):
    for turn in range(20):
        partial, final, job = (tmp_path / f"{turn}" / n for n in (".a.partial", "a", ".a.job"))
        partial.mkdir(parents=True)
        job.mkdir()
        (partial / "sample_0.h5").write_text("x")
        (partial / ".sample_0.h5.01234567.tmp").write_text("cut sho")
        together = threading.Barrier(4)

        def write(folder: Path, together=together) -> None:
            (folder / "table.csv").write_text("y" * 1000)
            together.wait()

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            ends = [pool.submit(blocks.publish, partial, final, job, write) for _ in range(4)]
        assert [e.result() for e in ends] == [None] * 4
        assert content(final) == {"sample_0.h5": b"x", "table.csv": b"y" * 1000}
        assert [p.name for p in final.parent.iterdir()] == ["a"]
