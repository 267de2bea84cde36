"""Sample files that point elsewhere, or claim more than they hold, are refused and harm nothing."""

import os

import h5py
import numpy as np
import pytest

from olmoearth_jax.data.errors import ReadError
from olmoearth_jax.data.h5 import open_sample
from olmoearth_jax.data.h5_writer import Storage, write_sample
from olmoearth_jax.data.hdf5_file import every_array, open_hdf5, stored_array
from tools import _fuzz_parsers, fuzz, rechunk_h5

NAMES = ("sentinel2_l2a", "latlon")
SECRET = b"-----BEGIN PRIVATE KEY-----".ljust(4096, b"x")


def good(path, steps=3, dates=None, mask=None, dtype=np.uint16, value=1000):
    stamps = dates if dates is not None else [[15, m, 2020] for m in range(steps)]
    masks = {"sentinel2_l2a": np.ones(steps, bool) if mask is None else np.array(mask, bool)}
    pixels = np.full((8, 8, steps, 12), value, dtype)
    storage = Storage("zstd", 3)
    write_sample(path, {"sentinel2_l2a": pixels}, np.array(stamps), masks, np.zeros(2), storage)
    return path


def read(path):
    with open_sample(path, NAMES) as sample:
        return sample.read("sentinel2_l2a")


def replaced(path, name, make):
    """The good file at `path`, its array `name` made anew by `make(file, name)`."""
    with h5py.File(good(path), "a") as file:
        del file[name]
        make(file, name)
    return path


def external(folder):
    secret = folder / "secret"
    secret.write_bytes(SECRET)
    where = [(str(secret), 0, h5py.h5f.UNLIMITED)]
    return lambda f, n: f.create_dataset(n, (8, 8, 1, 12), np.uint8, external=where)


def virtual(folder):
    other = good(folder / "other.h5")
    layout = h5py.VirtualLayout((8, 8, 3, 12), np.uint16)
    layout[...] = h5py.VirtualSource(other, "sentinel2_l2a", (8, 8, 3, 12))
    return lambda f, n: f.create_virtual_dataset(n, layout)


def link(folder):
    other = good(folder / "other.h5")
    return lambda f, n: f.__setitem__(n, h5py.ExternalLink(str(other), n))


@pytest.mark.parametrize("way", [external, virtual, link])
def test_nothing_outside_of_the_file_is_read(tmp_path, way):
    path = replaced(tmp_path / "sample_0.h5", "sentinel2_l2a", way(tmp_path))
    with pytest.raises(ReadError, match="lies outside the file"):
        read(path)
    with pytest.raises(ReadError, match="lies outside the file"):
        rechunk_h5.rewrite(path, tmp_path / "copy.h5", Storage("zstd", 3, chunk_px=4))
    assert not (tmp_path / "copy.h5").exists()


def test_arrays_that_no_one_asked_for_are_not_copied_from_elsewhere(tmp_path):
    path = good(tmp_path / "sample_0.h5")
    with h5py.File(path, "a") as file:
        external(tmp_path)(file, "notes")
    assert read(path).shape == (8, 8, 3, 12)  # not looked at
    with pytest.raises(ReadError, match="lies outside the file"):
        rechunk_h5.rewrite(path, tmp_path / "copy.h5", Storage("zstd", 3, chunk_px=4))


@pytest.mark.parametrize("what", ["pipe", "folder", "device"])
def test_what_is_no_file_is_told_at_once(tmp_path, what):
    path = tmp_path / "sample_0.h5"
    if what == "pipe":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(ReadError, match="is a pipe, device or folder|cannot be read"):
        read(path)


def test_a_link_to_a_sample_is_a_sample(tmp_path):
    (tmp_path / "sample_1.h5").symlink_to(good(tmp_path / "sample_0.h5"))
    assert read(tmp_path / "sample_1.h5").shape == (8, 8, 3, 12)


def declared(shape, dtype=np.uint16, **how):
    return lambda f, n: f.create_dataset(n, shape, dtype, **how)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("timestamps", declared((2**31, 3), np.int64)),
        ("missing_timesteps_masks/sentinel2_l2a", declared((3 * 2**30,), bool)),
        ("sentinel2_l2a", declared((8, 8, 2**28, 12))),
        ("sentinel2_l2a", declared((8, 8, 2**28, 12), chunks=(8, 8, 2**16, 12))),
        ("sentinel2_l2a", declared((2**20, 2**20, 3, 12), chunks=(8, 8, 3, 12))),
        ("sentinel2_l2a", declared((8, 8, 13, 12))),
    ],
)
def test_sizes_that_the_file_cannot_hold_are_refused(tmp_path, name, make):
    with pytest.raises(ReadError):
        read(replaced(tmp_path / "sample_0.h5", name, make))


@pytest.mark.parametrize(
    "date", [[0, 1, 2020], [32, 1, 2020], [1, 12, 2020], [1, -7, 2020], [1, 1, 0], [1, 1, 2**40],
             [2**31, 1, 2020]],
)  # fmt: skip
def test_impossible_dates_make_a_sample_unreadable(tmp_path, date):
    dates = [[15, 0, 2020], [15, 1, 2020], date]
    with pytest.raises(ReadError, match="impossible date"):
        read(good(tmp_path / "sample_0.h5", dates=dates))


@pytest.mark.parametrize("mask", [[1, 1, 1, 1], [1, 1], []])
def test_masks_that_do_not_fit_make_a_sample_unreadable(tmp_path, mask):
    with pytest.raises(ReadError, match="mask"):
        read(good(tmp_path / "sample_0.h5", mask=mask))


def test_fewer_timesteps_than_the_mask_has_make_a_sample_unreadable(tmp_path):
    path = good(tmp_path / "sample_0.h5")
    with h5py.File(path, "a") as file:
        del file["sentinel2_l2a"]
        file["sentinel2_l2a"] = np.ones((8, 8, 2, 12), np.uint16)
    with pytest.raises(ReadError, match="holds 2 timesteps, but its mask has 3"):
        read(path)


@pytest.mark.parametrize("value", [1e300, -1e39, np.inf, np.nan])
def test_values_that_float32_cannot_hold_make_a_sample_unreadable(tmp_path, value):
    with pytest.raises(ReadError, match="too large for float32|not finite"):
        read(good(tmp_path / "sample_0.h5", dtype=np.float64, value=value))


@pytest.mark.parametrize("parser", ["sample", "index", "csv"])
def test_spoilt_files_end_in_a_sentence(tmp_path, parser):
    for number in range(150):
        assert fuzz.try_case(parser, 1, number, tmp_path) is None, number


def test_the_fuzzer_notices_an_error_that_nobody_meant(tmp_path, monkeypatch):
    def broken(path):
        return [][len(path.name)]

    parser = _fuzz_parsers.PARSERS["sample"]
    bad = _fuzz_parsers.Parser(parser.plain, parser.make, broken)
    monkeypatch.setitem(_fuzz_parsers.PARSERS, "sample", bad)
    assert "IndexError" in str(fuzz.try_case("sample", 0, 0, tmp_path))


def test_lists_that_are_one_and_the_same_are_not_read(tmp_path):
    path = good(tmp_path / "sample_0.h5")
    with h5py.File(path, "a") as file:
        lists = file.create_dataset("extra", (2000,), dtype=h5py.vlen_dtype(np.uint8))
        lists[0] = np.zeros(1000, np.uint8)
        place = lists.id.get_offset()
    with path.open("r+b") as file:  # every element refers to the content of the first
        file.seek(place)
        first = file.read(16)
        file.seek(place)
        file.write(first * 2000)
    with open_hdf5(path) as file:
        with pytest.raises(ReadError, match="'extra' holds texts, lists or links"):
            every_array(file)
        with pytest.raises(ReadError, match="'extra' holds texts, lists or links"):
            stored_array(file, "extra")


def test_arrays_that_together_are_larger_than_the_file_explains(tmp_path):
    path = good(tmp_path / "sample_0.h5")
    with h5py.File(path, "a") as file:
        for number in range(3):  # each is fine alone, and none is ever written
            file.create_dataset(f"x{number}", (1 << 26,), np.uint8, chunks=(1 << 20,))
    with open_hdf5(path) as file, pytest.raises(ReadError, match="more than the file can hold"):
        every_array(file)
