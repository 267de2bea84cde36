"""launch.embed and what is odd: leftovers of other jobs, ends of zones, early signals."""

import json
import os
import shutil
import signal
import time

import pytest
from rasterio.transform import Affine

from launch import embed
from tests.maps import region
from tests.maps.test_embed import run

pytestmark = pytest.mark.filterwarnings("ignore:Use `@` matmul:PendingDeprecationWarning")


@pytest.fixture
def given(tmp_path):
    """Arguments for one small raster in 2023, but --inputs and --output; its row."""
    flags = [a for a in region.build(tmp_path) if not a.startswith(("--inputs", "--years"))]
    return [*flags, "--years=2023", f"--output={tmp_path / 'out'}"]


def listed(tmp_path, northing=5_600_640):
    place = Affine(10, 0, 500_480, 0, -10, northing)
    region.write_raster(tmp_path / "r.tif", region.image(1, 64, 64), place)
    row = {"path": "r.tif", "date": "2023-05-10", "modality": "sentinel2_l2a"}
    (tmp_path / "m.json").write_text(json.dumps([row]))
    return f"--inputs={tmp_path / 'm.json'}"


def test_the_store_of_another_job_is_refused(given, tmp_path, capsys):
    out, inputs = tmp_path / "out", listed(tmp_path)
    assert run(*given, inputs) == 0
    before = (out / "embeddings.zarr" / "zarr.json").read_bytes()
    shutil.rmtree(out / "job")
    assert run(*given, inputs, "--pooling_type=max") == 2
    assert "holds the embeddings of another job" in capsys.readouterr().err
    assert not (out / "job").exists()
    assert run(*given, inputs) == 0  # the same job makes its folder anew
    assert (out / "embeddings.zarr" / "zarr.json").read_bytes() == before


def test_a_zone_ends_at_84_degrees(given, tmp_path, capsys):
    inputs = listed(tmp_path, 9_400_640)
    assert run(*given, inputs, "--extent=zone") == 2
    assert "beyond 80 S or 84 N in zone 32" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert run(*given, inputs) == 0


@pytest.mark.parametrize("flags", [
    ["--scale=inf"], ["--scale=nan"], ["--scale=1e-50"], ["--scale=1", "--offset=nan"],
    ["--scale=1", "--offset=inf"],
])  # fmt: skip
def test_a_rule_that_gives_no_numbers_is_refused(given, tmp_path, capsys, flags):
    assert run(*given, listed(tmp_path), "--quantization=linear", *flags) == 2
    assert "linear needs a --scale above 0" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_sigterm_before_the_first_shard_ends_with_75(given, tmp_path, monkeypatch):
    def load(_):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)

    before = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # lest it ends the tests
    try:
        monkeypatch.setattr(embed, "_load", load)
        assert run(*given, listed(tmp_path)) == 75
    finally:
        signal.signal(signal.SIGTERM, before)


def test_rasters_that_were_written_since_are_told(given, tmp_path, capsys):
    inputs = listed(tmp_path)
    assert run(*given, inputs) == 0
    assert "written after" not in capsys.readouterr().out
    later = time.time() + 60
    os.utime(tmp_path / "r.tif", (later, later))
    assert run(*given, inputs) == 0
    assert "1 rasters such as" in capsys.readouterr().out
