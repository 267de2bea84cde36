"""Verification by several workers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from olmoearth_jax.data import blocks, verify
from tests.data.shared import ROOT, ended, start


def _change(path: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    with h5py.File(path, "r+") as held:
        file: Any = held
        values = change(file["sentinel2_l2a"][()])
        del file["sentinel2_l2a"]
        file["sentinel2_l2a"] = values


def _fill_one(x: np.ndarray) -> np.ndarray:
    x[0, 0, 0, 0] = 65535
    return x


@pytest.fixture
def spoilt(writable_dataset) -> Path:
    """A dataset with a truncated file, one in another unit, one that is gone, one with fills."""
    folder = writable_dataset
    (folder / "sample_0.h5").write_bytes((folder / "sample_0.h5").read_bytes()[:5000])
    (folder / "sample_3.h5").unlink()
    _change(folder / "sample_2.h5", lambda x: (x / 1e4).astype(np.float32))
    _change(folder / "sample_4.h5", _fill_one)
    return folder


def _plain(report: verify.Report) -> str:
    held = {n: v.to_json() for n, v in report.values.items()}
    return json.dumps([report.errors, report.warnings, held, list(report.digests.items())])


def _worker(folder: Path, state: Path, index: int, *more: str):
    given = [f"--h5py_dir={folder}", f"--state={state}", f"--shard={index}", "--of=2", *more]
    return start("tools.verify_dataset", given, 1)


def test_reports_survive_a_file(dataset, spoilt):
    for path in [*sorted(dataset.glob("sample_*.h5")), *spoilt.glob("sample_*.h5")]:
        found = verify.inspect(path)
        again = verify.FileReport.from_json(json.loads(json.dumps(found.to_json())))
        assert json.dumps(again.to_json()) == json.dumps(found.to_json())
        assert repr(again) == repr(found)


@pytest.mark.parametrize("block", [1, 4])
def test_the_report_is_that_of_one_process(spoilt, tmp_path, monkeypatch, block):
    monkeypatch.setattr(blocks, "BLOCK", block)
    plain = _plain(verify.verify(spoilt))
    assert _plain(verify.verify(spoilt, state=tmp_path / "state")) == plain
    seen: list[str] = []
    real = verify.inspect
    monkeypatch.setattr(verify, "inspect", lambda path: seen.append(path.name) or real(path))
    assert _plain(verify.verify(spoilt, state=tmp_path / "state")) == plain and not seen
    os.utime(spoilt / "sample_5.h5", (1, 1))  # perhaps another file now
    assert _plain(verify.verify(spoilt, state=tmp_path / "state")) == plain
    assert "sample_5.h5" in seen and len(seen) <= block
    few = _plain(verify.verify(spoilt, max_files=3))
    assert _plain(verify.verify(spoilt, max_files=3, state=tmp_path / "state")) == few


def test_workers_print_what_one_prints(spoilt, tmp_path):
    command = [sys.executable, "-m", "tools.verify_dataset", f"--h5py_dir={spoilt}"]
    alone = subprocess.run(
        [*command, "--num_workers=0"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert alone.returncode == 1
    report = alone.stdout.splitlines()[1:]
    first = _worker(spoilt, tmp_path / "state", 0)
    while first.poll() is None and not list(tmp_path.rglob("done/*.json")):
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    workers = [_worker(spoilt, tmp_path / "state", n, "--wait") for n in range(2)]
    for worker in workers:
        assert ended(worker, 1)[-len(report) :] == report


def test_places_need_a_state(spoilt):
    command = ["-m", "tools.verify_dataset", f"--h5py_dir={spoilt}", "--shard=0", "--of=2"]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "need --state, a folder" in done.stderr
