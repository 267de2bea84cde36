"""HDF5 hands out foreign memory for chunks that are too short: none of them reaches it."""

import itertools
import zlib

import h5py
import hdf5plugin
import numpy as np
import pytest

from olmoearth_jax.data import chunk_filters, zstd
from olmoearth_jax.data.errors import ReadError
from olmoearth_jax.data.h5 import open_sample
from olmoearth_jax.data.hdf5_file import every_array, open_hdf5, stored_array

SHAPE, CHUNK = (16, 16, 1, 12), (8, 8, 1, 12)
SIZE = 8 * 8 * 12 * 2

FILTERS = {
    "none": {},
    "shuffle": {"shuffle": True},
    "sum": {"fletcher32": True},
    "gzip": {"compression": "gzip"},
    "gzip, shuffle, sum": {"compression": "gzip", "shuffle": True, "fletcher32": True},
    "lzf": {"compression": "lzf"},
    "lz4": dict(hdf5plugin.LZ4()),
    "lz4, blocks": dict(hdf5plugin.LZ4(nbytes=300)),
    "zstd": dict(hdf5plugin.Zstd()),
}
EVERY = pytest.mark.parametrize("name", list(FILTERS))


def values():
    # Some of it repeats and some of it does not, so that every kind of operation occurs.
    out = np.random.default_rng(0).integers(0, 3000, SHAPE).astype(np.uint16)
    out[:12, :6] = 7
    return out


def stored(path, name, frame=None, skipped=0, size=None):
    """A file with an array, all of its chunks replaced by `frame`."""
    with h5py.File(path, "w") as file:
        file["timestamps"] = np.array([[15, 0, 2020]])
        file["latlon"] = np.zeros(2)
        x = file.create_dataset("sentinel2_l2a", SHAPE, "u2", chunks=CHUNK, **FILTERS[name])
        x[()] = values()
        for at in itertools.product((0, 8), (0, 8), (0,), (0,)) if frame is not None else ():
            x.id.write_direct_chunk(at, frame, skipped)
    return path


def frame_of(path, name, content):
    """Bytes as HDF5 stores them under the filters `name`."""
    with h5py.File(path, "w") as file:
        x = file.create_dataset("x", data=content, chunks=content.shape, **FILTERS[name])
        return x.id.read_direct_chunk((0,) * content.ndim)[1]


def read_all_ways(path):
    """The array by every reader; each must say the same."""
    out = []

    def sample():
        with open_sample(path, ("sentinel2_l2a", "latlon")) as held:
            return held.read("sentinel2_l2a")

    def array():
        with open_hdf5(path) as file:
            return stored_array(file, "sentinel2_l2a")

    def listed():
        with open_hdf5(path) as file:
            return every_array(file)["sentinel2_l2a"][()]

    for way in (sample, array, listed):
        try:
            out.append(way())
        except (ReadError, OSError) as error:
            out.append(str(error))
    return out


@EVERY
def test_whole_chunks_are_read(tmp_path, name):
    for found in read_all_ways(stored(tmp_path / "a.h5", name)):
        np.testing.assert_array_equal(found, values())


@EVERY
@pytest.mark.parametrize("count", [0, 1, 16, SIZE // 2 - 1])
def test_short_chunks_are_refused(tmp_path, name, count):
    frame = frame_of(tmp_path / "q.h5", name, np.ones(max(count, 1), np.uint16))
    frame = b"" if count == 0 else frame
    if count == 0 and name in ("none", "shuffle", "sum"):
        frame = b"a"  # HDF5 writes no chunk without bytes
    elif count == 0:
        frame = b"\0"
    for found in read_all_ways(stored(tmp_path / "a.h5", name, frame)):
        assert isinstance(found, str), name


@EVERY
def test_longer_chunks_are_refused(tmp_path, name):
    frame = frame_of(tmp_path / "q.h5", name, np.ones(SIZE, np.uint16))
    for found in read_all_ways(stored(tmp_path / "a.h5", name, frame)):
        assert isinstance(found, str), name


@EVERY
def test_chunks_whose_filters_were_left_out_have_their_whole_length(tmp_path, name):
    every = 0 if name == "none" else 7
    for found in read_all_ways(stored(tmp_path / "a.h5", name, b"ab", every)):
        assert "holds 2 bytes instead of" in found
    plain = values()[:8, :8].tobytes()
    for found in read_all_ways(stored(tmp_path / "a.h5", name, plain, every)):
        np.testing.assert_array_equal(found[8:, 8:], values()[:8, :8])


def test_a_gzip_bomb_takes_no_memory():
    bomb = zlib.compress(bytes(1 << 28), 9)
    with pytest.raises(ValueError, match="hold more than their array"):
        chunk_filters.check([chunk_filters.DEFLATE], bomb, 0, SIZE)


@pytest.mark.parametrize("name", ["lz4", "lz4, blocks", "lzf", "zstd", "gzip"])
def test_spoilt_chunks_end_in_a_sentence_or_in_values(tmp_path, name):
    """Blocks that reach beyond their frame among them."""
    frame = frame_of(tmp_path / "q.h5", name, values()[:8, :8])
    draw = np.random.default_rng(1)
    for _ in range(40):
        spoilt = bytearray(frame)
        for at in draw.integers(0, min(40, len(frame)), 2):
            spoilt[at] = draw.choice([0, 1, 0x7F, 0xFF])
        cut = bytes(spoilt[: draw.integers(1, len(frame) + 1)])
        for found in read_all_ways(stored(tmp_path / "a.h5", name, cut)):
            assert isinstance(found, str) or found.shape == SHAPE


def test_lz4_blocks_lie_within_their_frame():
    def frame(total, block, *stored):
        head = total.to_bytes(8, "big") + block.to_bytes(4, "big")
        return head + b"".join(n.to_bytes(4, "big") + bytes(k) for n, k in stored)

    chunk_filters.check([chunk_filters.LZ4], frame(20, 10, (10, 10), (10, 10)), 0, 20)
    for bad in (
        frame(20, 10, (10, 10), (10, 9)),
        frame(20, 10, (10, 10)),
        frame(20, 0, (0, 0)),
        frame(20, 10)[:9],
    ):
        with pytest.raises(ValueError, match="end early"):
            chunk_filters.check([chunk_filters.LZ4], bad, 0, 20)


def test_filters_that_cannot_be_judged_are_named(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("x", data=np.zeros((64, 64)), chunks=(8, 8), **hdf5plugin.Blosc())
        file.create_dataset("y", data=np.zeros((64, 64)), chunks=(8, 8), scaleoffset=3)
    for name in ("x", "y"):
        with open_hdf5(tmp_path / "a.h5") as file, pytest.raises(ReadError) as caught:
            stored_array(file, name)
        assert "in a way that is not read" in str(caught.value)


def test_two_compressions_are_refused(tmp_path):
    inner = zlib.compress(bytes(1 << 20))
    frame = zlib.compress(inner)
    with pytest.raises(ValueError, match="compressed twice"):
        chunk_filters.check([chunk_filters.DEFLATE, zstd.FILTER_ID], frame, 0, SIZE)
    with pytest.raises(ValueError, match="shuffled after"):
        chunk_filters.check([chunk_filters.DEFLATE, chunk_filters.SHUFFLE], frame, 0, SIZE)
