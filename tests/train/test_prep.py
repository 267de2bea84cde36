"""launch.prep: what it writes appears whole, and what it cannot keep is told before the work."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from launch import _app, prep
from olmoearth_jax import config_files
from olmoearth_jax.data.index import DatasetIndex, Part


@dataclasses.dataclass
class Stream:
    steps_per_epoch: int = 2
    timesteps: dict = dataclasses.field(default_factory=lambda: {4: 1})


def test_an_index_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    index = DatasetIndex((Part(Path("/d"), np.arange(3), 128),), ("srtm",), "f", "c", None)
    stream: Any = Stream()
    about = prep.write_index(tmp_path, index, stream)
    assert json.loads(about.read_text())["samples"] == 3
    np.testing.assert_array_equal(np.load(tmp_path / "dataset_index.npy"), np.arange(3))
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def cut(file, values):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prep.np, "save", cut)
    with pytest.raises(OSError):
        prep.write_index(tmp_path, index, stream)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize(("folder", "why"), [("", "is off"), ("file", "cannot be written to")])
def test_programs_that_would_be_lost_are_told(tmp_path, monkeypatch, folder, why):
    config = config_files.load_file("nano:smoke")
    config.common.save_folder = str(tmp_path / "run")
    (tmp_path / "file").write_text("")
    config.compile.cache_dir = str(tmp_path / folder) if folder else ""
    monkeypatch.setattr(prep, "_FILES", SimpleNamespace(value=0))
    monkeypatch.setattr(prep, "_COMPILE", SimpleNamespace(value=True))
    monkeypatch.setattr(prep.jax.config, "update", lambda *given: None)
    with pytest.raises(_app.UserError, match=f"the compilation cache {why}.*or use --nocompile"):
        prep.main(config)
