"""Every reader of HDF5 files from others keeps to the file; what no reader could use is refused."""

import os

import h5py
import numpy as np
import pytest

from olmoearth_jax.data import derived
from olmoearth_jax.data import verify as verify_dataset
from olmoearth_jax.data.errors import ReadError
from olmoearth_jax.data.h5 import open_sample
from olmoearth_jax.data.h5_writer import Storage, write_sample
from olmoearth_jax.data.hdf5_file import open_hdf5, stored_array
from olmoearth_jax.data.index import METADATA_FILE, prepare
from olmoearth_jax.data.subset import read_sample
from olmoearth_jax.evals.datasets import geobench
from olmoearth_jax.inference import quantize

STAMPS = np.array([[15, m, 2020] for m in range(3)])
MASK = {"sentinel2_l2a": np.ones(3, bool)}


def sample(path):
    pixels = {"sentinel2_l2a": np.full((8, 8, 3, 12), 1000, np.uint16)}
    write_sample(path, pixels, STAMPS, MASK, np.zeros(2), Storage("zstd", 3, chunk_px=4))
    return path


def point_away(file, name, folder, how):
    """Puts an array under `name` whose numbers are those of another file."""
    if how == "storage":
        (folder / "secret").write_bytes(b"secret" * 1000)
        where = [(str(folder / "secret"), 0, h5py.h5f.UNLIMITED)]
        file.create_dataset(name, (8, 8), np.uint8, external=where)
        return
    with h5py.File(folder / "other.h5", "w") as other:
        other["held"] = np.zeros((8, 8), np.uint8)
    if how == "link":
        file[name] = h5py.ExternalLink(str(folder / "other.h5"), "held")
        return
    layout = h5py.VirtualLayout((8, 8), np.uint8)
    layout[...] = h5py.VirtualSource(str(folder / "other.h5"), "held", (8, 8))
    file.create_virtual_dataset(name, layout)


HOW = pytest.mark.parametrize("how", ["storage", "link", "virtual"])


@HOW
@pytest.mark.parametrize("name", ["x", "deep/in/it"])
def test_a_stored_array_lies_in_its_file(tmp_path, name, how):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        point_away(file, name, tmp_path, how)
        file["own/y"] = np.arange(3)
    with open_hdf5(tmp_path / "a.h5") as file:
        with pytest.raises(ReadError, match="lies outside the file"):
            stored_array(file, name)
        with pytest.raises(ReadError, match="has no array 'own/z'"):
            stored_array(file, "own/z")
        with pytest.raises(ReadError, match="is a group"):
            stored_array(file, "own")
        np.testing.assert_array_equal(stored_array(file, "own/y"), np.arange(3))


@HOW
@pytest.mark.parametrize("name", ["B02", "label"])
def test_geobench_samples_keep_to_their_file(tmp_path, name, how):
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        for other in {"B02", "label"} - {name}:
            file[other] = np.zeros((8, 8), np.uint8)
        point_away(file, name, tmp_path, how)
        file.attrs["pickle"] = repr(b"\x80\x04}\x94.")
    with pytest.raises(ReadError, match="lies outside the file"):
        geobench.read_sample(tmp_path / "a.hdf5", ["B02"], True)


@HOW
def test_quantile_tables_keep_to_their_file(tmp_path, how):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["8bit/midpoints"] = np.zeros((8, 8))
        point_away(file, "8bit/quantiles", tmp_path, how)
    with pytest.raises(ValueError, match="lies outside the file"):
        quantize.load_buckets(tmp_path / "a.h5", 8)


@HOW
def test_verification_names_arrays_from_elsewhere(tmp_path, how):
    path = sample(tmp_path / "sample_0.h5")
    assert not verify_dataset.inspect(path).problems
    with h5py.File(path, "a") as file:
        point_away(file, "notes", tmp_path, how)
    plain = tmp_path / "sample_1.h5"  # without an index, which says how long the file must be
    with h5py.File(path) as old, h5py.File(plain, "w") as new:
        for name in set(old) - {"notes"}:
            old.copy(name, new)
        point_away(new, "notes", tmp_path, how)
    (problem,) = verify_dataset.inspect(plain).problems
    assert "'notes' lies outside the file" in problem


def test_verification_does_not_wait_for_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "sample_0.h5")
    (problem,) = verify_dataset.inspect(tmp_path / "sample_0.h5").problems
    assert "is a pipe" in problem


def test_numbers_too_large_once_computed_with_are_named(tmp_path):
    path = sample(tmp_path / "sample_0.h5")
    with h5py.File(path) as old, h5py.File(tmp_path / "sample_1.h5", "w") as new:
        for name in set(old) - {"sentinel2_l2a"}:
            old.copy(name, new)
        new["sentinel2_l2a"] = np.full((8, 8, 3, 12), 3e38, np.float32)  # fits, its sums do not
    path = tmp_path / "sample_1.h5"
    names = ("sentinel2_l2a", "ndvi")
    with (
        open_sample(path, names) as file,
        pytest.raises(ReadError, match=r"sample_1\.h5: 'ndvi' holds values too large"),
    ):
        read_sample(file, names, 8, 3, lambda c: (0, 0, 0))


@pytest.mark.parametrize("storage", [Storage(), Storage("zstd", 3, chunk_px=4, chunk_steps=2)])
def test_arrays_of_no_timestep_are_refused_on_writing(tmp_path, storage):
    none = {"sentinel2_l2a": np.zeros(3, bool)}
    pixels = {"sentinel2_l2a": np.zeros((8, 8, 0, 12), np.uint16)}
    with pytest.raises(ValueError, match="sentinel2_l2a has shape .* holds nothing"):
        write_sample(tmp_path / "a.h5", pixels, STAMPS, none, np.zeros(2), storage)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("col", "row"), [(10**400, 1), (0, -(10**400)), (10**6, 0), (0, 10**5), (-(10**4200), 0)]
)
def test_tiles_beyond_the_earth_are_refused(col, row):
    with pytest.raises(ValueError, match="lies nowhere on earth in EPSG:32633"):
        derived.tile_latlon("EPSG:32633", col, row)


def test_hidden_folders_and_litter_are_no_data(writable_dataset):
    (writable_dataset / "._sample_0.h5").write_bytes(b"litter")
    (writable_dataset / f"._{METADATA_FILE}").write_bytes(b"litter")
    assert len(prepare(writable_dataset, ["sentinel2_l2a"])) == 6
    outer = writable_dataset.parent
    (outer / ".unfinished").mkdir()
    (outer / ".unfinished" / METADATA_FILE).write_text("sample_index\n0\n")
    with pytest.raises(ValueError, match="did you mean") as error:
        prepare(outer, ["sentinel2_l2a"])
    assert str(writable_dataset) in str(error.value)
