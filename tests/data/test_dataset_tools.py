"""Rechunking, verification and statistics of whole datasets."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from olmoearth_jax.data import quality
from olmoearth_jax.data import verify as verify_dataset
from olmoearth_jax.data.h5_writer import Storage
from olmoearth_jax.data.hdf5_file import every_array
from olmoearth_jax.data.index import prepare, read_metadata
from olmoearth_jax.data.stats import StreamingStats
from tools import compute_norm_stats, rechunk_h5
from tools.make_synthetic_dataset import Gaps, make_dataset

ROOT = Path(__file__).resolve().parents[2]
SMALL_CHUNKS = Storage("gzip", 1, None, 8, 1)


def _all_arrays(path: Path) -> dict[str, bytes]:
    with h5py.File(path) as file:
        return {n: d[()].tobytes() for n, d in every_array(file).items()}


def test_a_rechunked_dataset_is_equal_and_restartable(dataset, tmp_path, monkeypatch):
    real, calls = rechunk_h5.rewrite, []

    def stops_after_five(source, target, storage):
        if len(calls) == 5:
            raise KeyboardInterrupt
        calls.append(target.name)
        real(source, target, storage)

    monkeypatch.setattr(rechunk_h5, "rewrite", stops_after_five)
    with pytest.raises(KeyboardInterrupt):
        rechunk_h5.rechunk(dataset, tmp_path, SMALL_CHUNKS)
    assert not [p for p in tmp_path.rglob("24") if p.name == "24"]
    monkeypatch.setattr(rechunk_h5, "rewrite", real)
    folder, written = rechunk_h5.rechunk(dataset, tmp_path, SMALL_CHUNKS)
    assert written == 19 and "_gzip_1_16_x_256" in str(folder)
    for path in dataset.glob("sample_*.h5"):
        assert _all_arrays(path) == _all_arrays(folder / path.name)
    with h5py.File(folder / "sample_0.h5") as file:
        name = next(n for n in ("sentinel2_l2a", "landsat", "sentinel1") if n in file)
        assert file[name].chunks[:3] == (8, 8, 1)
    assert not verify_dataset.verify(folder).errors
    assert rechunk_h5.rechunk(dataset, tmp_path, SMALL_CHUNKS) == (folder, 0)
    with pytest.raises(ValueError, match="in the way"):
        rechunk_h5.rechunk(dataset, tmp_path, Storage("gzip", 1, None, 4, 1))
    with pytest.raises(ValueError, match="leads back to the original"):
        storage = Storage("gzip", 1, None, 4, 1)
        rechunk_h5.rechunk(folder, folder.parents[2], storage)


def test_rechunking_names_a_damaged_file(writable_dataset, tmp_path):
    with (writable_dataset / "sample_3.h5").open("r+b") as file:
        file.truncate(5000)
    with pytest.raises(ValueError, match="sample_3.h5: cannot be read"):
        rechunk_h5.rechunk(writable_dataset, tmp_path / "out", SMALL_CHUNKS)


def test_a_sound_dataset_passes(dataset):
    report = verify_dataset.verify(dataset)
    assert not report.errors and len(report.digests) == 24
    assert report.digests == verify_dataset.verify(dataset, workers=1).digests
    assert len(verify_dataset.verify(dataset, max_files=5).digests) == 5
    assert any("sentinel2_l2a" in line for line in verify_dataset.table_lines(report))


def _change(path: Path, name: str, change) -> None:
    with h5py.File(path, "r+") as file:
        values = change(file[name][()])
        del file[name]
        file[name] = values


def _errors(folder: Path) -> str:
    return "\n".join(verify_dataset.verify(folder).errors)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("sentinel2_l2a", lambda x: (x / 1e4).astype(np.float32), "looks like reflectance 0 to 1"),
        ("landsat", lambda x: (x / 300).astype(np.uint8), "looks like 8-bit"),
        ("sentinel1", lambda x: 10 ** (x / 10), "looks like linear power"),
        ("sentinel2_l2a", lambda x: np.maximum(x, 1) + np.uint16(1000), "offset of 1000"),
        ("sentinel2_l2a", lambda x: x.astype(np.int16) - 3000, "subtracted twice"),
        ("worldcover", lambda x: x + np.uint8(1), "codes that do not exist"),
        ("srtm", lambda x: x * 0 - 32768, "holds many values of -32768"),
        ("srtm", lambda x: x * 0 + 9500, "values are not in -500..9000"),
        ("sentinel1", lambda x: x * 100, "hundredths of a decibel"),
        ("sentinel1", lambda x: x * 0 - 100, "holds many values of -100"),
        ("sentinel2_l2a", lambda x: x * 0 + np.uint16(65535), "holds many values of 65535"),
    ],
)
def test_wrong_units_are_suspected(writable_dataset, name, change, message):
    for path in writable_dataset.glob("sample_*.h5"):
        _change(path, name, change)
    assert message in _errors(writable_dataset)


def test_a_few_files_in_the_wrong_unit_are_counted(writable_dataset):
    for number in (2, 4):
        path = writable_dataset / f"sample_{number}.h5"
        _change(path, "sentinel2_l2a", lambda x: (x / 1e4).astype(np.float32))
    assert "reflectance x 10000) are expected (2 of 6 files, such as sample_2.h5)" in _errors(
        writable_dataset
    )


def test_a_few_fills_are_a_warning(writable_dataset):
    path = writable_dataset / "sample_2.h5"

    def few(x):
        x[0, 0, 0, 0] = 65535
        return x

    _change(path, "sentinel2_l2a", few)
    report = verify_dataset.verify(writable_dataset)
    assert not report.errors
    assert any("sentinel2_l2a: holds 65535 in 0.00%" in w for w in report.warnings)


@pytest.mark.parametrize(
    "odd",
    [np.array([["1", "2"]] * 6), np.zeros((6, 2), "M8[D]"), np.zeros((6, 2), complex),
     np.zeros(()), np.zeros((6, 5)), {"a": np.zeros((6, 2))}],
    ids=["texts", "dates", "complex", "one number", "five columns", "an archive"],
)  # fmt: skip
def test_centres_that_are_none_are_an_error_and_never_taken(writable_dataset, odd):
    path = writable_dataset / "latlon_distribution.npy"
    with path.open("wb") as file:
        if isinstance(odd, dict):
            np.savez(file, **odd)
        else:
            np.save(file, odd)
    assert "latlon_distribution.npy" in _errors(writable_dataset)
    with pytest.raises(ValueError, match=r"latlon_distribution\.npy"):
        prepare(writable_dataset, ["sentinel2_l2a"])


def test_spaces_in_the_table_of_samples_do_not_count(writable_dataset):
    table = writable_dataset / "sample_metadata.csv"
    header = read_metadata(writable_dataset)[0]
    table.write_text(table.read_text().replace(",", ", "))
    assert read_metadata(writable_dataset)[0] == header


def test_damage_in_files_and_tables_is_found(writable_dataset):
    folder = writable_dataset
    path = folder / "sample_0.h5"
    _change(path, "timestamps", lambda t: t + np.int32([0, 12, 0]))
    assert "impossible date" in _errors(folder)
    _change(path, "timestamps", lambda t: t[::-1] - np.int32([0, 12, 0]))
    assert "not in order" in _errors(folder)
    _change(path, "latlon", lambda x: x + np.float32(300))
    assert "impossible place" in _errors(folder) and "gives another place" in _errors(folder)
    with h5py.File(path, "r+") as file:
        file["missing_timesteps_masks/sentinel1"][0] = False
        del file["latlon"]
        del file["srtm"]
    found = _errors(folder)
    assert "sentinel1 holds 12 timesteps, but its mask has 11" in found
    assert "has no latlon" in found and "srtm=1, it lacks it" in found
    shutil.copy(folder / "sample_1.h5", folder / "sample_2.h5")
    assert "sample_2.h5 holds the same as sample_1.h5" in _errors(folder)
    (folder / "sample_3.h5").write_bytes(b"no HDF5")
    (folder / "sample_4.h5").unlink()
    _change(folder / "sample_5.h5", "worldcereal", lambda x: x * np.nan)
    found = _errors(folder)
    assert "sample_3.h5: cannot be read" in found and "sample_4.h5" in found
    assert "'worldcereal' holds values that are not finite" in found
    (folder / "latlon_distribution.npy").unlink()
    shutil.copy(folder / "sample_1.h5", folder / "sample_77.h5")
    report = verify_dataset.verify(folder)
    assert any("latlon_distribution.npy is missing" in e for e in report.errors)
    assert any("sample_77.h5" in w for w in report.warnings)
    shutil.move(folder, folder.with_name("9"))
    assert "9 samples by its name, 6 in its table" in _errors(folder.with_name("9"))


def test_the_tools_exit_codes_and_manifest(writable_dataset, tmp_path):
    manifest = tmp_path / "manifest.csv"
    command = [sys.executable, "-m", "tools.verify_dataset", f"--h5py_dir={writable_dataset}"]
    command += ["--num_workers=0", f"--manifest={manifest}"]
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert first.returncode == 0 and "6 files read, 0 errors" in first.stdout
    with manifest.open() as file:
        assert len(list(csv.DictReader(file))) == 6
    _change(writable_dataset / "sample_2.h5", "cdl", lambda x: x[::-1])
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert second.returncode == 1 and "error: sample_2.h5 has changed" in second.stdout
    with pytest.raises(ValueError, match="cannot be read"):
        verify_dataset.read_manifest(writable_dataset / "sample_0.h5")
    manifest.write_text("sample_index,blake2b\n0," + "x" * 200_000)
    with pytest.raises(ValueError, match="manifest"):
        verify_dataset.read_manifest(manifest)


@pytest.mark.parametrize(
    ("name", "told"),
    [("sample_metadata.csv", "is no manifest of checksums: it has no column 'blake2b'"),
     ("sample_metadata.csv/m.csv", "is a file, so nothing can be written"),
     ("../", "is a folder; the output must be a file"), ("pipe", "is a pipe or device")],
)  # fmt: skip
def test_a_manifest_that_cannot_be_is_told_before_the_files_are_read(writable_dataset, name, told):
    dataset = writable_dataset
    os.mkfifo(dataset / "pipe")
    command = [sys.executable, "-m", "tools.verify_dataset", f"--h5py_dir={dataset}"]
    command += ["--num_workers=0", f"--manifest={dataset / name}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and told in done.stderr and "files" not in done.stdout
    assert " files (" not in done.stderr


def test_a_rechunked_dataset_is_not_put_into_the_original(writable_dataset, tmp_path):
    dataset = writable_dataset
    storage = Storage("zstd", 3, None, 8, 3)
    with pytest.raises(ValueError, match="lies in the original"):
        rechunk_h5.rechunk(dataset, dataset, storage)
    (tmp_path / "a").write_bytes(b"")
    with pytest.raises(ValueError, match="a is a file, so nothing can be written"):
        rechunk_h5.rechunk(dataset, tmp_path / "a", storage)


def test_a_rechunked_dataset_has_the_names_of_its_folder(writable_dataset, tmp_path, monkeypatch):
    """However the original is named: the names of the copy say of what it is."""
    storage = Storage("zstd", 3, None, 8, 3)
    for place, name in ((writable_dataset, "."), (writable_dataset.parent, writable_dataset.name)):
        monkeypatch.chdir(place)
        out = tmp_path / f"out_{name}"
        final, _ = rechunk_h5.rechunk(Path(name), out, storage)
        assert final.relative_to(out).parts[1:] == writable_dataset.parts[-2:]
    for left in final.iterdir():
        left.unlink()
    with pytest.raises(ValueError, match="another dataset is in the way"):
        rechunk_h5.rechunk(Path(name), out, storage)


def test_no_compression_at_all_is_a_level_too(writable_dataset, tmp_path):
    final, _ = rechunk_h5.rechunk(writable_dataset, tmp_path, Storage("gzip", 0, None, 8, 3))
    assert "_gzip_0_" in final.parents[1].name


def test_files_that_a_manifest_and_a_folder_do_not_know(tmp_path):
    recorded, found = {1: "a", 2: "b"}, {1: "a", 2: "c", 3: "d"}
    (tmp_path / "sample_2.h5").touch()
    lost, *told = verify_dataset.compare_manifest("m.csv", recorded, found, tmp_path)
    assert lost == "1 files of m.csv are gone, such as sample_1.h5"
    assert told == verify_dataset.compare_manifest("m.csv", recorded, found)
    assert told == [
        "sample_2.h5 has changed since m.csv was written",
        "sample_3.h5 is not in m.csv",
    ]


@pytest.mark.parametrize(("compression", "level"), [("zstd", 0), ("zstd", 23), ("gzip", 10)])
def test_levels_that_are_none_are_refused(compression, level):
    with pytest.raises(ValueError, match=f"level of {compression} must lie in"):
        Storage(compression, level)


def test_statistics_are_those_of_the_whole_and_of_any_worker_count(dataset, tmp_path):
    alone = compute_norm_stats.compute(dataset, partial=True)
    several = compute_norm_stats.compute(dataset, partial=True, workers=2)
    assert json.dumps(alone) == json.dumps(several)
    values = []
    for path in dataset.glob("sample_*.h5"):
        with h5py.File(path) as file:
            if "sentinel1" in file:
                values.append(file["sentinel1"][..., 0].reshape(-1).astype(np.float64))
    joined = np.concatenate(values)
    found = alone["sentinel1"]["vv"]
    assert found["count"] == len(joined)
    np.testing.assert_allclose([found["mean"], found["std"]], [joined.mean(), joined.std()])
    assert "latlon" not in alone and alone["total_n"] == 24
    few = compute_norm_stats.compute(dataset, estimate_from=5, seed=1)
    assert few["sampled_n"] == 5
    full = compute_norm_stats.compute(dataset)
    assert full["sentinel2_l2a"]["B02"]["count"] < alone["sentinel2_l2a"]["B02"]["count"]


def test_merging_streams_equals_one_stream():
    draw = np.random.default_rng(0)
    parts = [draw.normal(5, 2, n) for n in (1, 10, 1000)]
    one, merged = StreamingStats(), StreamingStats()
    for part in parts:
        one.update(part)
        other = StreamingStats()
        other.update(part)
        merged.merge(other)
    merged.merge(StreamingStats())
    np.testing.assert_allclose(
        [merged.count, merged.mean, merged.std], [one.count, one.mean, one.std], rtol=1e-12
    )


def test_means_far_from_the_statistics_are_a_warning(tmp_path):
    folder = make_dataset(tmp_path, 2, tile_px=16, gaps=Gaps(0, 0), storage=Storage("none", None))
    for path in folder.glob("sample_*.h5"):
        _change(path, "landsat", lambda x: x * 0 + np.uint16(65535))
    assert any("landsat: band B" in w for w in verify_dataset.verify(folder).warnings)
    assert quality.suspicions("cdl", quality.Values()) == []
