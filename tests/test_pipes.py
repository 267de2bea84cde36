"""A pipe in the place of a file is told, and not waited for."""

import os
import shutil
import signal

import pytest

from olmoearth_jax import modalities
from olmoearth_jax.data import raster_list, verify
from olmoearth_jax.data.convert.index_csv import read_series
from olmoearth_jax.data.raster_file import RasterFile
from olmoearth_jax.evals.datasets import base, series
from olmoearth_jax.interop import checkpoints
from tests.interop.test_weights import loaded, tiny

READERS = {
    "10_sentinel1_monthly.csv": lambda path: read_series(path.parent, "sentinel1"),
    "modalities.json": modalities.register_file,
    "manifest.json": raster_list.read_manifest,
    "manifest.csv": raster_list.read_manifest,
    "checksums.csv": lambda path: verify.read_manifest(path),
    "rows.csv": series.read_rows,
    "tile.tif": RasterFile,
    "label.tif": base.read_masked,
}
WITHIN = ["meta/metadata", "checksums.json", "params/_METADATA", "params/manifest.ocdbt"]


@pytest.fixture(autouse=True)
def no_waiting():
    def waits(*_):
        pytest.fail("it waits")

    before = signal.signal(signal.SIGALRM, waits)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("what", ["pipe", "folder", "device"])
@pytest.mark.parametrize("name", READERS)
def test_what_is_no_file_is_told(tmp_path, name, what):
    path = tmp_path / name
    if what == "pipe":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(ValueError, match="is a pipe, device or folder and no file"):
        READERS[name](path)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    checkpoints.write(loaded(tiny()), folder)
    return folder


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("name", WITHIN)
def test_checkpoints_hold_files(written, tmp_path, name, listed):
    shutil.copytree(written, tmp_path / "run")
    step = tmp_path / "run" / "checkpoints" / "0"
    (step / name).unlink()
    os.mkfifo(step / name)
    if not listed and name != "checksums.json":
        (step / "checksums.json").unlink()
    with pytest.raises(ValueError, match=f"damaged: {name} is a pipe or device"):
        checkpoints.read(tmp_path / "run")
