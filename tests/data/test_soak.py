"""Long reading: file handles, memory and shared memory stay flat."""

from __future__ import annotations

import os
import resource
import time
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import pytest

from olmoearth_jax.data.index import prepare
from olmoearth_jax.modalities import OFFICIAL_MODALITIES
from tests.data.test_remote_and_cache import make_stream

PROC = Path("/proc/self")


def _open_files() -> int:
    return len(os.listdir(PROC / "fd"))


def _resident_mb() -> float:
    pages = int((PROC / "statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


@pytest.fixture
def segments(monkeypatch):
    """Counts the shared-memory segments that this process has opened and that still exist."""
    names, real = set(), SharedMemory.__init__

    def noted(self, *args, **options):
        real(self, *args, **options)
        names.add(self.name)

    monkeypatch.setattr(SharedMemory, "__init__", noted)
    return lambda: sum((Path("/dev/shm") / name).exists() for name in names)


@pytest.mark.slow
@pytest.mark.skipif(not PROC.is_dir(), reason="needs /proc")
@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_grows_over_20000_samples(dataset, workers, segments):
    stream = make_stream(prepare(dataset, OFFICIAL_MODALITIES), num_workers=workers, normalize=True)
    steps, seen = 20_000 // 8, []
    batches = stream.batches(0, steps)
    for step, _ in enumerate(batches):
        if step in (200, steps - 1):
            seen.append((_open_files(), _resident_mb(), segments()))
    (files_then, memory_then, shared_then), (files_now, memory_now, shared_now) = seen
    assert files_now <= files_then + 2
    assert memory_now <= memory_then + 40
    assert stream.samples_read == 20_000
    assert shared_now <= shared_then + 36  # the groups that are read ahead: nine arrays each
    deadline = time.monotonic() + 20
    while segments() and time.monotonic() < deadline:
        time.sleep(0.1)  # what the worker still held goes with it
    assert segments() == 0
