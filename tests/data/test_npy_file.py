"""NumPy's files of others: read as NumPy does, and no more is believed than the file holds."""

import io
import os
import struct
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from olmoearth_jax.data import npy_file
from olmoearth_jax.evals.datasets.windowed import read_window

ARRAYS = {
    "floats": np.arange(12, dtype=np.float32).reshape(3, 4),
    "columns": np.asfortranarray(np.arange(6).reshape(2, 3)),
    "big": np.arange(5, dtype=">i2"),
    "none": np.zeros((0, 4)),
    "one": np.array(3.5),
    "truth": np.array([True, False]),
    "names": np.array(["B02", "B03"]),
    "days": np.array(["2020-01-01"], "datetime64[D]"),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_come_back(tmp_path, name):
    np.save(tmp_path / "a.npy", ARRAYS[name])
    found = npy_file.read(tmp_path / "a.npy")
    np.testing.assert_array_equal(found, ARRAYS[name])
    assert found.dtype == ARRAYS[name].dtype and found.flags.writeable


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_archives_come_back(tmp_path, save):
    save(tmp_path / "a.npz", **ARRAYS)
    found = npy_file.read(str(tmp_path / "a.npz"))
    assert list(found) == list(ARRAYS)
    for name, x in ARRAYS.items():
        np.testing.assert_array_equal(found[name], x)


def npy(shape, kind: object = "<f4", data=bytes(16)):
    header = str({"descr": kind, "fortran_order": False, "shape": shape}).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


HOSTILE = {
    "4 TiB": npy((2**40,)),
    "overflowing": npy((2**30, 2**30, 2**30)),
    "negative": npy((-1,)),
    "negative twice": npy((-2, -2)),
    "huge and empty": npy((2**62, 2**62, 0)),
    "cut off": npy((5,)),
    "objects": npy((2,), "|O"),
    "objects within": npy((2,), [("a", "|O")]),
    "nested": npy((2,), [("a", "<f4", (2**28,))]),
    "nothing": b"",
    "half a header": npy((4,))[:20],
    "text": b"date,row\n",
    "another format": b"\x93NUMPY\x09\x00" + bytes(20),
    "deep": b"\x93NUMPY\x01\x00" + struct.pack("<H", 9000) + b"[" * 9000,
    "code": b"\x93NUMPY\x01\x00" + struct.pack("<H", 30) + b"__import__('os').abort()      ",
}


@pytest.mark.parametrize("what", HOSTILE)
@pytest.mark.parametrize("packed", [None, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_headers_are_believed_as_far_as_the_bytes_go(tmp_path, what, packed):
    path = tmp_path / "a.npy"
    if packed is None:
        path.write_bytes(HOSTILE[what])
    else:
        with zipfile.ZipFile(path, "w", packed) as out:
            out.writestr("x.npy", HOSTILE[what])
    with pytest.raises(ValueError, match=r"a\.npy cannot be read as a NumPy file: ."):
        npy_file.read(path)


def test_what_is_compressed_is_bounded(tmp_path):
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out, out.open("x.npy", "w") as member:
        member.write(npy((2**28,), "|u1", b""))
        for _ in range(256):
            member.write(bytes(1 << 20))
    with pytest.raises(ValueError, match="far larger than the file"):
        npy_file.read(path)


def test_members_hold_an_array_and_nothing_more(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as out:
        out.writestr("x.npy", npy((3,)))
    with pytest.raises(ValueError, match="x holds more than its array"):
        npy_file.read(tmp_path / "a.npz")


def test_damaged_archives(tmp_path):
    np.savez(tmp_path / "a.npz", **ARRAYS)
    raw = (tmp_path / "a.npz").read_bytes()
    for cut in (10, len(raw) // 2, len(raw) - 5):
        (tmp_path / "a.npz").write_bytes(raw[:cut])
        with pytest.raises(ValueError, match="cannot be read as a NumPy file"):
            npy_file.read(tmp_path / "a.npz")
    at = raw.index(np.float32(5).tobytes())
    (tmp_path / "a.npz").write_bytes(raw[:at] + b"\xff" + raw[at + 1 :])
    with pytest.raises(ValueError, match="Bad CRC"):
        npy_file.read(tmp_path / "a.npz")


def test_pipes_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.npy")
    with pytest.raises(ValueError, match="pipe"):
        npy_file.read(tmp_path / "a.npy")
    with pytest.raises(OSError, match="No such file"):
        npy_file.read(tmp_path / "b.npy")


def test_truth_values_are_zero_or_one():
    raw = npy((4,), "|b1", b"\0\1\2\xff")
    found = npy_file.array(io.BytesIO(raw), len(raw))
    assert found.view(np.uint8).tolist() == [0, 1, 1, 1]


@given(st.binary(max_size=100), st.integers(0, 140))
def test_any_bytes_end_in_an_array_or_a_sentence(tmp_path_factory, data, at):
    path = tmp_path_factory.getbasetemp() / "fuzzed.npy"
    good = npy((2, 2))
    path.write_bytes(good[:at] + data + good[at + len(data) :])
    try:
        npy_file.read(path)
    except ValueError as told:
        assert "fuzzed.npy" in str(told)


def test_evaluation_data_are_read_through_it(tmp_path):
    (tmp_path / "arrays.npz").write_bytes(npy((2**40,)))
    with pytest.raises(ValueError, match="cannot be read as a NumPy file"):
        read_window(tmp_path, ("sentinel2_l2a",))
