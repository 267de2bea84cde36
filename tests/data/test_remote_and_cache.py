"""Datasets that are remote, several, or cached."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import fsspec
import numpy as np
import pytest

from olmoearth_jax.data.errors import ReadError
from olmoearth_jax.data.h5 import open_sample
from olmoearth_jax.data.index import concat, prepare, read_metadata
from olmoearth_jax.data.pipeline import TrainStream
from olmoearth_jax.data.raster_file import RasterError
from olmoearth_jax.data.raster_list import read_manifest
from olmoearth_jax.data.remote import RemotePath, location
from olmoearth_jax.data.store import SampleStore
from olmoearth_jax.modalities import OFFICIAL_MODALITIES
from tests.data import streams
from tests.data.test_pipeline import STRATEGY, _flat


def make_stream(index, **options) -> TrainStream:
    given = {"patch_sizes": (1, 2), "sampled_hw_p_list": [2, 4]}
    return streams.make_stream(index, [STRATEGY], **given | options)


def same(a, b) -> bool:
    a, b = _flat(a), _flat(b)
    return list(a) == list(b) and all(np.array_equal(a[k], b[k]) for k in a)


def _upload(dataset) -> str:
    """The dataset in fsspec's in-memory file system."""
    memory = fsspec.filesystem("memory")
    relative = "/".join(dataset.parts[-3:])
    memory.put(f"{dataset}/", f"/bucket/{relative}/", recursive=True)
    return f"memory://bucket/{relative}"


@pytest.fixture
def remote(dataset):
    url = _upload(dataset)
    yield url
    fsspec.filesystem("memory").rm("/bucket", recursive=True)


def test_a_remote_dataset_gives_the_same_stream(dataset, remote, tmp_path):
    here = make_stream(prepare(dataset, OFFICIAL_MODALITIES))
    there_index = prepare(remote, OFFICIAL_MODALITIES)
    there = make_stream(there_index)
    cached = make_stream(there_index, cache_dir=tmp_path)
    for number in range(3):
        expected = here.group(number)
        assert same(expected, there.group(number)) and same(expected, cached.group(number))
    assert list(tmp_path.rglob("sample_*.h5"))


def test_file_urls_are_read_in_worker_processes(dataset):
    index = prepare(f"file://{dataset}", OFFICIAL_MODALITIES)
    steps = list(make_stream(index, num_workers=1).batches(0, 1))
    expected = list(make_stream(prepare(dataset, OFFICIAL_MODALITIES)).batches(0, 1))
    assert all(same(a, b) for a, b in zip(steps[0], expected[0], strict=True))


def test_missing_remote_things_are_named(remote, monkeypatch):
    with pytest.raises(ValueError, match="does not exist: memory://bucket/none"):
        prepare("memory://bucket/none", ["worldcover"])
    with (
        pytest.raises(ReadError, match="file does not exist"),
        open_sample(RemotePath(remote) / "sample_99.h5", ["worldcover"]),
    ):
        pass
    with pytest.raises(ValueError, match="cannot look into .* nosuch://x/y: cannot open nosuch"):
        prepare("nosuch://x/y", ["worldcover"])
    path = location("gs://bucket/a/12/")
    assert (path.name, path.parent.name, str(path)) == ("12", "a", "gs://bucket/a/12")
    assert location("a/b").name == "b"


def test_joined_datasets_of_different_places(dataset, remote):
    both = concat([prepare(p, OFFICIAL_MODALITIES) for p in (dataset, remote)])
    stream = make_stream(both)
    assert len(both) == 48 and stream.group(0)["ok"].any()


def test_the_config_joins_datasets_with_their_shares(dataset, remote):
    from launch import _app
    from olmoearth_jax.train.build import build_index

    changes = [f"dataset.h5py_dir={dataset}", f'dataset.more_h5py_dirs={{"{remote}": 0.5}}']
    index = build_index(_app.load("configs/nano.py", None, None, changes))
    assert [len(p.numbers) for p in index.parts] == [24, 12]


def test_a_cache_stops_growing_at_its_limit(dataset, tmp_path):
    size = (dataset / "sample_0.h5").stat().st_size
    store = SampleStore(tmp_path, cache_size_gb=2.5 * size / 1e9)
    opened = [store.local(dataset / f"sample_{n}.h5") for n in range(8)]
    copies = [p for p in opened if p.is_relative_to(tmp_path)]
    assert 1 <= len(copies) <= 5 and opened[-1] == dataset / "sample_7.h5"
    assert store.local(dataset / "sample_0.h5") == opened[0]
    with pytest.raises(ValueError, match="cache_size_gb must not be negative"):
        SampleStore(tmp_path, cache_size_gb=-1)


def test_damaged_copies_are_replaced_and_damaged_files_are_not_trusted(dataset, tmp_path):
    original = tmp_path / "data" / "/".join(dataset.parts[-3:])
    shutil.copytree(dataset, original)
    index = prepare(original, OFFICIAL_MODALITIES)
    expected = make_stream(index).group(0)
    stream = make_stream(index, cache_dir=tmp_path / "cache")
    assert same(expected, stream.group(0))
    for copy in (tmp_path / "cache").rglob("sample_*.h5"):
        copy.write_bytes(copy.read_bytes()[: copy.stat().st_size // 2])
    assert same(expected, stream.group(0))
    for path in original.glob("sample_*.h5"):
        path.write_bytes(b"\0" * 100)
    shutil.rmtree(tmp_path / "cache")
    stream = make_stream(index, cache_dir=tmp_path / "cache", max_bad_fraction=1.0)
    assert not stream.group(0)["ok"].any()


def test_a_cache_holds_what_its_folder_does(tmp_path, monkeypatch):
    """Not what another folder of the same relative name does, nor what it did before."""
    store, file = SampleStore(tmp_path / "cache"), Path("data/sample_0.h5")
    for project in (b"one", b"two"):
        folder = tmp_path / project.decode()
        (folder / "data").mkdir(parents=True)
        (folder / file).write_bytes(project)
        monkeypatch.chdir(folder)
        copy = store.local(file)
        assert copy.read_bytes() == project and copy == store.local(folder / file)
    (folder / file).write_bytes(b"new")
    os.utime(folder / file, (2**31, 2**31))
    assert store.local(file).read_bytes() == b"new"
    (folder / file).unlink()
    assert store.local(file).read_bytes() == b"new"  # all that is left of it


def test_a_cache_that_cannot_be_written_is_named(dataset, tmp_path):
    (tmp_path / "file").write_text("")
    index = prepare(dataset, OFFICIAL_MODALITIES)
    with pytest.raises(ValueError, match=r"cache_dir .*file/cache cannot be written: .*Not a dir"):
        make_stream(index, cache_dir=tmp_path / "file" / "cache")


def test_a_cache_that_fills_the_disk_is_left_alone(dataset, tmp_path, monkeypatch, caplog):
    index = prepare(dataset, OFFICIAL_MODALITIES)
    expected = make_stream(index).group(0)
    stream = make_stream(index, cache_dir=tmp_path)
    real, written = Path.write_bytes, []

    def fills(self, content):
        if len(written) == 2:
            real(self, content[:10])
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(self)
        return real(self, content)

    monkeypatch.setattr(Path, "write_bytes", fills)
    assert same(expected, stream.group(0))
    assert len(list(tmp_path.rglob("*.h5"))) == 2 and not list(tmp_path.rglob("*.tmp"))
    assert caplog.text.count("No space left on device") == 1


def test_a_file_replaced_while_it_is_read_stays_whole(writable_dataset):
    first, second = (writable_dataset / f"sample_{n}.h5" for n in (0, 1))
    with open_sample(first, ["srtm", "cdl"]) as file:
        before = file.read("srtm")
        shutil.copy(second, first.with_name("new"))
        first.with_name("new").replace(first)
        assert np.array_equal(before, file.read("srtm")) and file.read("cdl").size


class _Refused(Exception):
    """As HTTP's 403 comes out of aiohttp: no OSError."""


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (_Refused("403, message='Forbidden'"), OSError, "x.json cannot be read: 403"),
        (FileNotFoundError("x"), FileNotFoundError, "there is no file https://a.b/x.json"),
        (TimeoutError("slow"), TimeoutError, "slow"),
    ],
)
def test_whatever_a_server_says_is_an_error_of_reading(monkeypatch, error, kind, said):
    class System:
        def cat_file(self, path):
            raise error

    monkeypatch.setattr(RemotePath, "_open_system", lambda self: (System(), "x"))
    with pytest.raises(kind, match=said):
        RemotePath("https://a.b/x.json").read_bytes()
    with pytest.raises(ValueError, match="the manifest .* cannot be read"):
        read_manifest(RemotePath("https://a.b/x.json"))


@pytest.mark.parametrize(
    "url",
    ["memory://me:s3cret@host/data", "memory://s3cret@host/data", "http://h/a.tif?sig=s3cret&x=1"],
)
def test_messages_hold_no_passwords(url):
    path = location(url)
    told = [f"{path}", f"{[path]}", str(ReadError(path, "is bad"))]
    told += [str(RasterError(url, f"cannot be read ({url})"))]
    for read in (prepare, open_sample):
        with pytest.raises(ValueError) as refused:
            if read is prepare:
                prepare(url, OFFICIAL_MODALITIES)
            else:
                with open_sample(path, OFFICIAL_MODALITIES):
                    pass
        told.append(str(refused.value))
    assert not [text for text in told if "s3cret" in text]
    assert str(path) == url  # what opens it has all of it


def test_a_protocol_that_repeats_the_url_in_its_error(monkeypatch):
    class Refusing:
        def cat_file(self, path):
            raise ConnectionError(f"403 Forbidden for url 'https://h/a?sig=s3cret' and {path}")

    url = "https://me:s3cret@h/a"
    monkeypatch.setattr(RemotePath, "_open_system", lambda path: (Refusing(), url))
    with pytest.raises(OSError, match="@h/a cannot be read: 403 Forbidden") as refused:
        RemotePath(url).read_bytes()
    assert "s3cret" not in str(refused.value)


def test_a_table_saved_with_a_byte_order_mark(dataset, tmp_path):
    copy = tmp_path / dataset.name
    shutil.copytree(dataset, copy)
    table = copy / "sample_metadata.csv"
    table.write_bytes(b"\xef\xbb\xbf" + table.read_bytes())
    assert read_metadata(copy)[0] == read_metadata(dataset)[0]
