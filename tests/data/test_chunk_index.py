"""Reading crops by the index in a file's user block."""

import dataclasses
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from olmoearth_jax.data import chunk_index, zstd
from olmoearth_jax.data import verify as verify_dataset
from olmoearth_jax.data.errors import ReadError
from olmoearth_jax.data.h5 import open_sample
from olmoearth_jax.data.h5_writer import Storage, write_arrays, write_sample
from olmoearth_jax.data.hdf5_file import MASK_GROUP
from olmoearth_jax.modalities import OFFICIAL_MODALITIES
from tools.make_synthetic_dataset import Gaps, make_sample

pytestmark = pytest.mark.skipif(not zstd.available(), reason="hdf5plugin lacks zstd's functions")
CHUNKED = Storage("zstd", 3, chunk_px=5, chunk_steps=4)


@pytest.fixture(scope="module")
def parts():
    return make_sample(0, 3, 16, Gaps(0.3, 0))


def _write(path: Path, parts, storage: Storage = CHUNKED) -> Path:
    write_sample(path, *parts, storage)
    return path


@pytest.fixture(scope="module")
def path(tmp_path_factory, parts) -> Path:
    return _write(tmp_path_factory.mktemp("indexed") / "sample_0.h5", parts)


def _has_index(path: Path) -> bool:
    return path.read_bytes().startswith(chunk_index.MAGIC)


@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_any_window_is_that_of_the_array(path, parts, data):
    def part(size: int) -> slice:
        start = data.draw(st.integers(0, size))
        return slice(start, data.draw(st.integers(start, size)))

    with open_sample(path, OFFICIAL_MODALITIES) as file:
        assert isinstance(file._arrays, chunk_index.IndexedFile)
        for name in ("sentinel2_l2a", "worldcover"):
            array = parts[0][name]
            rows, cols, steps = (part(n) for n in array.shape[:3])
            expected = array[rows, cols, steps if name == "sentinel2_l2a" else slice(None)]
            np.testing.assert_array_equal(file.read(name, rows, cols, steps), expected)


def test_the_header_is_that_of_hdf5(path, parts, tmp_path):
    plain = _write(tmp_path / "plain.h5", parts, Storage("gzip", 1, chunk_px=5, chunk_steps=4))
    assert _has_index(path) and not _has_index(plain)
    with (
        open_sample(path, OFFICIAL_MODALITIES) as a,
        open_sample(plain, OFFICIAL_MODALITIES) as b,
    ):
        assert a.header.shapes == b.header.shapes
        assert a.header.tile_px == b.header.tile_px
        np.testing.assert_array_equal(a.header.timestamps, b.header.timestamps)
        assert a.header.masks.keys() == b.header.masks.keys()
        for name, mask in a.header.masks.items():
            np.testing.assert_array_equal(mask, b.header.masks[name])


def test_hdf5_reads_the_same_file(path, parts):
    with h5py.File(path) as file:
        for name, array in parts[0].items():
            stored = file[name]
            assert isinstance(stored, h5py.Dataset)
            np.testing.assert_array_equal(stored[()], array)


def test_published_files_have_none(tmp_path, parts):
    assert not _has_index(_write(tmp_path / "a.h5", parts, Storage()))


@pytest.mark.parametrize("cut", [1, 5000])
def test_a_file_cut_short_is_named(tmp_path, path, cut):
    short = tmp_path / "sample_1.h5"
    short.write_bytes(path.read_bytes()[:-cut])
    with (
        pytest.raises(ReadError, match=r"sample_1\.h5.*bytes long"),
        open_sample(short, OFFICIAL_MODALITIES),
    ):
        pass


def test_a_damaged_index_is_named(tmp_path, path):
    content = bytearray(path.read_bytes())
    content[200] ^= 1
    (tmp_path / "sample_1.h5").write_bytes(content)
    with (
        pytest.raises(ReadError, match="index is damaged"),
        open_sample(tmp_path / "sample_1.h5", OFFICIAL_MODALITIES),
    ):
        pass


def test_damaged_data_are_named(tmp_path, path):
    with path.open("rb") as file:
        indexed = chunk_index.open_indexed(file.fileno())
        assert indexed is not None
        where = indexed.arrays["sentinel2_l2a"].offsets[0]
    content = bytearray(path.read_bytes())
    content[where : where + 8] = bytes(8)
    (tmp_path / "sample_1.h5").write_bytes(content)
    with (
        open_sample(tmp_path / "sample_1.h5", OFFICIAL_MODALITIES) as file,
        pytest.raises(ReadError, match="cannot be read"),
    ):
        file.read("sentinel2_l2a")


def test_an_index_of_other_chunks_is_found(tmp_path, path, parts, monkeypatch):
    assert chunk_index.disagreement(path) is None
    assert not verify_dataset.inspect(path).problems
    real = chunk_index._describe

    def longer(source):
        array = real(source)
        assert array is not None
        return dataclasses.replace(array, sizes=[s + 1 for s in array.sizes])

    monkeypatch.setattr(chunk_index, "_describe", longer)
    changed = _write(tmp_path / "sample_0.h5", parts)
    monkeypatch.setattr(chunk_index, "_describe", real)
    assert "other places" in str(chunk_index.disagreement(changed))
    assert any("changed after its index" in p for p in verify_dataset.inspect(changed).problems)


def _bad_dates(parts):
    return (parts[0], parts[1].astype(np.float32), *parts[2:])


def _bad_mask(parts):
    wrong = {n: np.where(m, 0.5, 0).astype(np.float32) for n, m in parts[2].items()}
    arrays = {**parts[0], "timestamps": parts[1], "latlon": np.asarray(parts[3], np.float32)}
    return arrays | {f"{MASK_GROUP}/{n}": m for n, m in wrong.items()}


@pytest.mark.parametrize(
    ("make", "message"), [(_bad_dates, "whole numbers"), (_bad_mask, "must be true/false")]
)
def test_an_index_hides_nothing_from_the_checks(tmp_path, parts, make, message):
    path, made = tmp_path / "a.h5", make(parts)
    if isinstance(made, tuple):
        write_sample(path, *made, CHUNKED)
    else:
        write_arrays(path, made, CHUNKED)
    assert not _has_index(path)
    with pytest.raises(ReadError, match=message), open_sample(path, OFFICIAL_MODALITIES):
        pass


def test_masks_that_are_an_array_are_named(tmp_path, parts):
    arrays = {**parts[0], "timestamps": parts[1], MASK_GROUP: np.ones(12, bool)}
    write_arrays(tmp_path / "a.h5", arrays, CHUNKED)
    with (
        pytest.raises(ReadError, match="an array, not a group"),
        open_sample(tmp_path / "a.h5", OFFICIAL_MODALITIES),
    ):
        pass


def test_other_dates_and_masks_than_the_index_says_are_found(tmp_path, path, parts, monkeypatch):
    real = chunk_index._contents
    changes = {
        "other timestamps": lambda t, m, a: (t + 1, m, a),
        "other timestep masks": lambda t, m, a: (t, {n: ~x for n, x in m.items()}, a),
        "other arrays": lambda t, m, a: (t, m, {n: x for n, x in a.items() if n != "srtm"}),
    }
    for message, change in changes.items():
        monkeypatch.setattr(chunk_index, "_contents", lambda f, change=change: change(*real(f)))
        changed = _write(tmp_path / "sample_0.h5", parts)
        monkeypatch.setattr(chunk_index, "_contents", real)
        assert chunk_index.disagreement(changed) == message


def test_without_room_there_is_no_index(tmp_path, parts, monkeypatch):
    monkeypatch.setattr(chunk_index, "block_size", lambda forms: 512)
    path = _write(tmp_path / "a.h5", parts)
    assert not _has_index(path)
    with open_sample(path, OFFICIAL_MODALITIES) as file:
        np.testing.assert_array_equal(file.read("srtm"), parts[0]["srtm"])
