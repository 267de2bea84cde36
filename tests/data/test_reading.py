"""Reading files: every storage form, every kind of damage."""

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from olmoearth_jax.data import zstd
from olmoearth_jax.data.errors import ReadError
from olmoearth_jax.data.h5 import nominal_tile_px, open_sample
from olmoearth_jax.data.h5_writer import Storage, write_sample
from olmoearth_jax.data.hdf5_file import MASK_GROUP
from olmoearth_jax.data.subset import read_sample
from olmoearth_jax.modalities import MISSING, OFFICIAL_MODALITIES
from tools.make_synthetic_dataset import Gaps, make_sample

NAMES = ("sentinel2_l2a", "sentinel1", "worldcover")


def _whole(file, names=OFFICIAL_MODALITIES, **options):
    return read_sample(file, names, None, 12, lambda c: (int(c.starts[0]), 0, 0), **options)


@pytest.fixture(scope="module")
def parts():
    return make_sample(0, 0, 16, Gaps(0.3, 0))


def _write(path: Path, parts, storage: Storage, int64: bool = False) -> Path:
    arrays, stamps, masks, latlon = parts
    stamps = stamps.astype(np.int64 if int64 else np.int32)
    write_sample(path, arrays, stamps, masks, latlon, storage)
    return path


@pytest.mark.parametrize(
    "storage",
    [
        Storage("zstd", 3),
        Storage("zstd", 1, chunk_px=5),
        Storage("lz4", None),
        Storage("gzip", 6, shuffle=True),
        Storage("none", None),
    ],
)
def test_every_storage_reads_the_same(tmp_path, parts, storage):
    with open_sample(_write(tmp_path / "a.h5", parts, storage), OFFICIAL_MODALITIES) as file:
        for name, array in parts[0].items():
            np.testing.assert_array_equal(file.read(name), array)
        crop = file.read("sentinel2_l2a", slice(2, 9), slice(7, 16), slice(1, 3))
    np.testing.assert_array_equal(crop, parts[0]["sentinel2_l2a"][2:9, 7:16, 1:3])


def test_int64_timestamps_become_int32(tmp_path, parts):
    path = _write(tmp_path / "a.h5", parts, Storage(), int64=True)
    with open_sample(path, NAMES) as file:
        assert file.header.timestamps.dtype == np.int32
        np.testing.assert_array_equal(file.header.timestamps, parts[1])


def test_files_without_masks_hold_every_timestep(tmp_path, parts):
    arrays = {n: a for n, a in parts[0].items() if n in NAMES}
    write_sample(tmp_path / "a.h5", arrays, parts[1], {}, parts[3], Storage())
    with open_sample(tmp_path / "a.h5", NAMES) as file:
        sample = _whole(file, NAMES, normalized=False)
    held = arrays["sentinel1"].shape[2]
    np.testing.assert_array_equal(sample.arrays["sentinel1"][:, :, :held], arrays["sentinel1"])
    assert (sample.arrays["sentinel1"][:, :, held:] == MISSING).all()


def test_maps_of_true_and_false_read_as_1_and_0(tmp_path, parts):
    cover = parts[0]["worldcover"] > 30
    write_sample(tmp_path / "a.h5", {"worldcover": cover}, parts[1], {}, parts[3], Storage())
    with open_sample(tmp_path / "a.h5", ("worldcover",)) as file:
        sample = _whole(file, ("worldcover",), normalized=False)
    np.testing.assert_array_equal(sample.arrays["worldcover"], cover.astype(np.float32))


def test_absent_modalities_are_missing(tmp_path, parts):
    arrays = {"sentinel1": parts[0]["sentinel1"]}
    masks = {"sentinel1": parts[2]["sentinel1"]}
    write_sample(tmp_path / "a.h5", arrays, parts[1], masks, parts[3], Storage())
    with open_sample(tmp_path / "a.h5", NAMES) as file:
        sample = _whole(file, NAMES)
    assert sample.missing == ("sentinel2_l2a", "worldcover")
    assert sample.arrays["worldcover"].shape == (16, 16, 1, 1)
    assert (sample.arrays["worldcover"] == MISSING).all()


def _damage_truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _damage_no_timestamps(path: Path) -> None:
    with h5py.File(path, "a") as f:
        del f["timestamps"]


def _replace(name: str, value) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        with h5py.File(path, "a") as f:
            del f[name]
            f[name] = value

    return damage


DAMAGES = {
    "it may be damaged": _damage_truncate,
    "has no 'timestamps'": _damage_no_timestamps,
    "'timestamps' must be whole numbers": _replace("timestamps", np.ones((12, 3))),
    "'sentinel1' has shape": _replace("sentinel1", np.zeros((16, 16, 12, 3), np.float32)),
    "expected \\(16, 16, 1, 1\\)": _replace("worldcover", np.zeros((8, 8, 1, 1), np.uint8)),
    "must hold numbers": _replace("sentinel1", np.full((16, 16, 12, 2), b"x")),
    "not finite": _replace("sentinel1", np.full((16, 16, 12, 2), np.nan, np.float32)),
    "timestep mask of 'sentinel1'": _replace(f"{MASK_GROUP}/sentinel1", np.ones(5, bool)),
    "is an array, not a group": _replace(MASK_GROUP, np.ones(5)),
    "at most 12": lambda path: [
        _replace("timestamps", np.tile([1, 1, 2020], (14, 1)))(path),
        *(_replace(f"{MASK_GROUP}/{n}", np.arange(14) % 13 == 0)(path) for n in NAMES[:2]),
    ],
    "no timestep is present": lambda path: [
        _replace(f"{MASK_GROUP}/{n}", np.zeros(12, bool))(path) for n in NAMES[:2]
    ],
}


@pytest.mark.parametrize("message", DAMAGES)
def test_damage_is_a_read_error_that_names_the_file(tmp_path, parts, message):
    path = _write(tmp_path / "sample_7.h5", parts, Storage("none", None))
    DAMAGES[message](path)
    with pytest.raises(ReadError, match=message) as error, open_sample(path, NAMES) as file:
        _whole(file, NAMES)
    assert "sample_7.h5" in str(error.value)


def test_a_missing_file_and_a_too_large_crop_are_read_errors(tmp_path, parts):
    with (
        pytest.raises(ReadError, match="does not exist"),
        open_sample(tmp_path / "b.h5", NAMES) as file,
    ):
        pass
    with (
        open_sample(_write(tmp_path / "a.h5", parts, Storage()), NAMES) as file,
        pytest.raises(ReadError, match="16 px wide, the crop needs 17"),
    ):
        read_sample(file, NAMES, 17, 1, lambda c: (0, 0, 0))
    with (
        open_sample(tmp_path / "a.h5", ("latlon",)) as file,
        pytest.raises(ReadError, match="spatial"),
    ):
        _whole(file, ("latlon",))


def test_float16_is_refused_on_writing_and_nothing_is_left(tmp_path, parts):
    arrays = {"sentinel1": parts[0]["sentinel1"].astype(np.float16)}
    with pytest.raises(ValueError, match="float16"):
        write_sample(tmp_path / "a.h5", arrays, parts[1], {}, parts[3], Storage())
    assert not list(tmp_path.iterdir())


def test_the_tile_size_is_read_from_the_folder_name():
    assert nominal_tile_px("/a/h5py_data_w_missing_timesteps_zstd_3_128_x_4/x_y/9") == 128
    assert nominal_tile_px("/a/h5py_data_w_missing_timesteps_256_x_1/b/9") == 256
    assert nominal_tile_px("/a/other_128_x_4/b") is None


def _frame(path: Path, name: str) -> tuple[int, int]:
    """(offset, size) of an array's only chunk in its file."""
    with h5py.File(path) as f:
        info = f[name].id.get_chunk_info(0)
    return info.byte_offset, info.size


def test_a_crop_decodes_no_more_than_its_last_row(tmp_path):
    noise = np.random.default_rng(0).integers(0, 4000, (128, 128, 6, 12)).astype(np.uint16)
    path = tmp_path / "a.h5"
    stamps, mask = np.tile(np.int32([1, 1, 2020]), (6, 1)), {"sentinel2_l2a": np.ones(6, bool)}
    write_sample(path, {"sentinel2_l2a": noise}, stamps, mask, np.zeros(2), Storage())
    offset, size = _frame(path, "sentinel2_l2a")
    content = bytearray(path.read_bytes())
    content[offset + size // 2 : offset + size] = bytes(size - size // 2)
    path.write_bytes(content)
    with open_sample(path, NAMES) as file:
        crop = file.read("sentinel2_l2a", slice(20, 50), slice(3, 9), slice(1, 4))
        np.testing.assert_array_equal(crop, noise[20:50, 3:9, 1:4])
        assert crop.base is None
        with pytest.raises(ReadError, match="a.h5: cannot be read, .*break off after"):
            file.read("sentinel2_l2a", slice(100, 128))


def test_without_the_decoder_hdf5_reads_the_same(tmp_path, parts, monkeypatch):
    path = _write(tmp_path / "a.h5", parts, Storage())
    with open_sample(path, OFFICIAL_MODALITIES) as file:
        fast = {n: file.read(n, slice(3, 7), slice(1, 9)) for n in parts[0]}
        monkeypatch.setattr(zstd, "available", lambda: False)
        for name, array in fast.items():
            np.testing.assert_array_equal(file.read(name, slice(3, 7), slice(1, 9)), array)


def test_chunks_stored_without_their_filter_and_never_written_arrays(tmp_path, parts):
    path = _write(tmp_path / "a.h5", parts, Storage())
    cover = np.arange(256, dtype=np.uint8).reshape(16, 16, 1, 1)
    with h5py.File(path, "a") as f:
        del f["worldcover"], f["srtm"]
        options = Storage().options((16, 16, 1, 1))
        f.create_dataset("worldcover", cover.shape, "u1", **options)
        f["worldcover"].id.write_direct_chunk((0, 0, 0, 0), cover.tobytes(), filter_mask=1)
        f.create_dataset("srtm", cover.shape, "i4", **options)
    with open_sample(path, ("worldcover", "srtm")) as file:
        np.testing.assert_array_equal(file.read("worldcover"), cover)
        assert not file.read("srtm").any()
