"""Conversion of GeoTIFF trees: content, restart, bad input."""

from __future__ import annotations

import hashlib
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from olmoearth_jax import modalities as registry
from olmoearth_jax.data import index
from olmoearth_jax.data.convert import Settings, convert, tiles, tree
from olmoearth_jax.data.convert.rasters import resample
from olmoearth_jax.data.convert.tree import Cell, TileJob
from olmoearth_jax.data.derived import to_decibel
from olmoearth_jax.data.errors import ReadError
from olmoearth_jax.data.h5_writer import Storage
from tests.data.trees import add_modality, make_tree, month, write_raster, write_rows

ROOT = Path(__file__).resolve().parents[2]


def _settings(folder: Path, **changes) -> Settings:
    given = {"tree": folder, "output_dir": folder, "storage": Storage("zstd", 1)} | changes
    return Settings(**given)


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(folder.glob("sample_*.h5"))
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def test_a_tree_becomes_a_dataset_that_can_be_read(tmp_path):
    made = make_tree(tmp_path / "tree", tiles=2)
    storage = Storage("zstd", 1, chunk_px=32, chunk_steps=1)
    done = convert(_settings(tmp_path / "tree", output_dir=tmp_path / "out", storage=storage))
    assert done.samples == done.written == 8 and not done.dropped
    got = index.prepare(done.folder, ["sentinel1", "worldcover", "srtm"])
    assert len(got) == 8 and got.tile_px == 128
    cell = Cell("EPSG:32633", 101, -2000)
    (values,) = made["sentinel1"][cell]
    with h5py.File(done.folder / "sample_6.h5") as file:  # second tile, lower left piece
        assert file["sentinel1"].chunks == (32, 32, 1, 2)
        whole = values.reshape(12, 2, 64, 64).repeat(4, 2).repeat(4, 3).transpose(2, 3, 0, 1)
        np.testing.assert_array_equal(file["sentinel1"][()], to_decibel(whole[128:, :128]))
        assert "srtm" not in file and file["worldcover"].shape == (128, 128, 1, 1)
        assert file["missing_timesteps_masks/sentinel1"][()].all()
        assert file["timestamps"][0].tolist() == [1, 0, 2020]
    rows = (done.folder / "sample_tiles.csv").read_text().splitlines()
    assert rows[7] == "6,EPSG:32633,101,-2000,2"


def test_a_second_run_does_nothing_and_a_changed_file_is_noticed(tmp_path):
    make_tree(tmp_path, tiles=1)
    first = convert(_settings(tmp_path))
    before = {p: p.stat().st_mtime_ns for p in first.folder.iterdir()}
    again = convert(_settings(tmp_path))
    assert again.written == 0 and again.folder == first.folder
    assert before == {p: p.stat().st_mtime_ns for p in first.folder.iterdir()}
    with (first.folder / "sample_0.h5").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(ValueError, match="sample_0.h5 is missing or was changed"):
        convert(_settings(tmp_path))
    with pytest.raises(ValueError, match="another dataset is in the way"):
        convert(_settings(tmp_path, storage=Storage("zstd", 1, chunk_px=32)))


@pytest.mark.parametrize(
    "text", ["x" * 200_000, "a,b\n1,2\n", "sample_index,blake2b\nx,y\n", "\xff"]
)
def test_damaged_checksums_of_a_finished_dataset_are_told(tmp_path, text):
    make_tree(tmp_path, tiles=1)
    folder = convert(_settings(tmp_path)).folder
    (folder / "checksums.csv").write_bytes(text.encode("latin1"))
    with pytest.raises(ValueError, match=r"checksums.csv cannot be read .* to convert again"):
        convert(_settings(tmp_path))
    (folder / "conversion.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="another dataset is in the way"):
        convert(_settings(tmp_path))


def test_numbers_follow_the_tiles_and_not_the_order_of_the_csv(tmp_path):
    folder = tmp_path / "a"
    make_tree(folder, tiles=3)
    first = convert(_settings(folder, tile_px=256))
    path = folder / "10_sentinel1_monthly.csv"
    header, *rows = path.read_text().splitlines()
    path.write_text("\n".join([header, *rows[24:], *rows[:24]]) + "\n")
    second = convert(_settings(folder, output_dir=tmp_path / "b", tile_px=256))
    assert _digests(first.folder) == _digests(second.folder)


def test_repeated_and_unordered_rows_are_ignored_and_told(tmp_path):
    make_tree(tmp_path, tiles=1)
    path = tmp_path / "10_sentinel1_monthly.csv"
    header, *rows = path.read_text().splitlines()
    path.write_text("\n".join([header, *rows, *rows]) + "\n")
    said: list[str] = []
    done = convert(_settings(tmp_path), say=said.append)
    assert done.samples == 4 and "12 of sentinel1" in said[0]
    path.write_text("\n".join([header, rows[1], rows[0], *rows[2:]]) + "\n")
    with pytest.raises(ValueError, match="tiles cannot be used: .* has 24 bands, expected 2"):
        convert(_settings(tmp_path))


def test_tiles_that_make_no_sample_are_reported_with_the_reason(tmp_path):
    make_tree(tmp_path, tiles=1)
    cells = [Cell("EPSG:32633", c, -2000) for c in (100, 101, 102)]
    add_modality(tmp_path, "sentinel1", cells[:1], [month(i) for i in range(12)])
    rows = (tmp_path / "10_sentinel1_monthly.csv").read_text()
    add_modality(tmp_path, "sentinel1", cells[1:2], [month(i) for i in range(11)])
    short = (tmp_path / "10_sentinel1_monthly.csv").read_text().split("\n", 1)[1]
    add_modality(tmp_path, "sentinel1", cells[2:], [month(i) for i in range(13)])
    long = (tmp_path / "10_sentinel1_monthly.csv").read_text().split("\n", 1)[1]
    (tmp_path / "10_sentinel1_monthly.csv").write_text(rows + short + long)
    done = convert(_settings(tmp_path))
    assert "11 timesteps" in done.dropped["EPSG:32633_101_-2000"]
    assert "13 timesteps" in done.dropped["EPSG:32633_102_-2000"]
    assert "101" in (done.folder / "dropped.csv").read_text()
    write_rows(tmp_path, "srtm", [])
    with pytest.raises(ValueError, match="no tile of .* can be used .*lacks the required srtm"):
        convert(_settings(tmp_path, required=("srtm",)))


def test_faulty_modalities_are_left_out_of_their_tile():
    power = np.ones((4, 4, 12, 2), np.float32)
    assert tiles.fault("sentinel1", power) is None
    power[0, 0, 0, 0] = -32768
    assert tiles.fault("sentinel1", power) == "holds the fill value -32768"
    power[0, 0, 0, 0] = np.nan
    assert tiles.fault("worldcereal", power) == "holds NaN"
    assert tiles.fault("openstreetmap_raster", np.zeros((2, 2), np.uint8)) == "is all zero"
    assert tiles.fault("era5_10", np.zeros((12, 6), np.float32)) == "is all zero"
    assert tiles.fault("worldcover", np.zeros((2, 2), np.uint8)) is None


def _dates(*months: int) -> tuple[tree.Date, ...]:
    return tuple((1, m, 2020) for m in months)


def test_series_are_aligned_by_date():
    year = _dates(*range(12))
    stray = (*_dates(0), (9, 4, 2020), *_dates(5, 6))
    dates = {"landsat": year, "sentinel1": stray, "era5_10": year[::-1]}
    plan = tiles.plan_time(dates, list(dates))
    assert np.flatnonzero(plan.masks["sentinel1"]).tolist() == [0, 5, 6]
    assert plan.steps["sentinel1"].tolist() == [0, 2, 3] and plan.unmatched == {"sentinel1": 1}
    assert plan.steps["era5_10"].tolist() == list(range(11, -1, -1))
    reference = tiles.plan_time(dates, list(dates), keep_unmatched=True)
    assert reference.steps["sentinel1"].tolist() == [0, 1, 2, 3]
    dates["era5_10"] = _dates(*range(11))
    assert tiles.plan_time(dates, list(dates)).removed == {"era5_10": "lacks 1 of the tile's dates"}
    dates["sentinel1"] = ((9, 4, 2020),)
    assert "sentinel1" in tiles.plan_time(dates, list(dates)).removed
    twice = TileJob(Cell("EPSG:32633", 0, 0), {"landsat": (*_dates(*range(11)), (1, 3, 2020))})
    assert "same date" in str(tiles.drop_reason(twice, ["landsat"], (), False))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_stored_step_is_on_its_own_date(data):
    """Whatever the order of the series, with several images of a day, and with empty ones."""
    lead = data.draw(st.permutations(range(12)))
    other = data.draw(st.lists(st.integers(0, 11), max_size=11))
    gone = {"landsat": data.draw(st.lists(st.sampled_from(range(12)), unique=True, max_size=4))}
    if other:
        gone["sentinel1"] = data.draw(st.lists(st.sampled_from(range(len(other))), unique=True))
    dates = {"landsat": _dates(*lead), "sentinel1": _dates(*other)}
    plan = tiles.plan_time(dates, list(dates), empty=gone)
    assert [tuple(row) for row in plan.timestamps.tolist()] == list(_dates(*range(12)))
    for name, mask in plan.masks.items():
        on = [tuple(row) for row in plan.timestamps[mask].tolist()]
        assert [dates[name][k] for k in plan.steps[name]] == on
        live = {d for k, d in enumerate(dates[name]) if k not in gone.get(name, ())}
        assert set(on) == live and not set(plan.steps[name].tolist()) & set(gone.get(name, ()))


def test_finer_and_coarser_rasters_and_grids():
    fine = np.arange(16).reshape(1, 4, 4)
    np.testing.assert_array_equal(resample(fine, 2), [[[0, 2], [8, 10]]])
    assert resample(fine, 8)[0, 1].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    with pytest.raises(ReadError, match="no whole fraction"):
        resample(np.zeros((1, 3, 3)), 4)
    series = {
        "naip": tree.Series({Cell("EPSG:32633", 17, -1, 1): _dates(0)}, 0),
        "sentinel1": tree.Series({Cell("EPSG:32633", 1, -1): _dates(*range(12))}, 0),
        "worldcover": tree.Series({Cell("EPSG:32633", 5, 5): _dates(0)}, 0),
    }
    fine_job, coarse_job = sorted(tree.enumerate_tiles(series), key=lambda j: j.cell.factor)
    assert set(fine_job.dates) == {"naip", "sentinel1"} and fine_job.cell.factor == 1
    assert set(coarse_job.dates) == {"sentinel1"}


def test_coordinate_systems(tmp_path):
    lat, lon = tree.centre(Cell("EPSG:3857", 0, -1))
    assert lat == pytest.approx(0.0115, abs=1e-3) and lon == pytest.approx(0.0115, abs=1e-3)
    make_tree(tmp_path, tiles=1)
    path = tmp_path / "10_sentinel1_monthly.csv"
    path.write_text(path.read_text().replace("EPSG:32633", "EPSG:99999"))
    with pytest.raises(ValueError, match=r"monthly.csv, line 2: unknown coordinate .*EPSG:99999"):
        convert(_settings(tmp_path))


def test_wrong_csvs_are_named(tmp_path):
    make_tree(tmp_path, tiles=1)
    path = tmp_path / "10_sentinel1_monthly.csv"
    text = path.read_text()
    for bad, message in (
        (text.replace("image_idx", "number"), "has no column 'image_idx'"),
        (text.replace(",100,", ",x,", 1), "line 2: invalid literal"),
        (text.replace(f",0,{month(0)}", ",0,yesterday", 1), "line 2: Invalid isoformat"),
    ):
        path.write_text(bad)
        with pytest.raises(ValueError, match=message):
            convert(_settings(tmp_path))
    path.unlink()
    with pytest.raises(ValueError, match="'sentinel1' has no index"):
        convert(_settings(tmp_path, modalities=("sentinel1",)))
    with pytest.raises(ValueError, match="'latlon' is not converted"):
        _settings(tmp_path, modalities=("latlon",))
    with pytest.raises(ValueError, match="must divide 256"):
        _settings(tmp_path, tile_px=100)
    with pytest.raises(ValueError, match="does not exist"):
        _settings(tmp_path / "none")
    with pytest.raises(ValueError, match="'srtm' is not among"):
        _settings(tmp_path, modalities=("worldcover",), required=("srtm",))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no index"):
        _settings(tmp_path / "empty")


@pytest.mark.parametrize("damage", ["truncated", "missing", "oblong", "bands", "text"])
def test_damaged_rasters_are_named_and_can_be_skipped(tmp_path, damage):
    make_tree(tmp_path, tiles=2)
    modality = registry.get("sentinel1")
    path = tree.raster_path(tmp_path, modality, Cell("EPSG:32633", 101, -2000), 16)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:4000])
    elif damage == "missing":
        path.unlink()
    elif damage == "oblong":
        write_raster(path, np.ones((24, 64, 32), np.float32))
    elif damage == "bands":
        write_raster(path, np.ones((23, 64, 64), np.float32))
    else:
        path.write_text("no image")
    with pytest.raises(ValueError, match=r"1 of 2 tiles cannot be used: .*101_-2000_10.tif"):
        convert(_settings(tmp_path))
    assert not list(tmp_path.rglob("sample_*.h5"))
    done = convert(_settings(tmp_path), skip_unreadable=True)
    assert done.samples == 4 and list(done.dropped) == ["EPSG:32633_101_-2000"]


def test_a_full_disk_leaves_nothing_under_a_final_name(tmp_path):
    make_tree(tmp_path, tiles=1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    storage = Storage("none", None)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        with pytest.raises((OSError, RuntimeError)):
            convert(_settings(tmp_path, storage=storage))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous)
    assert not list(tmp_path.rglob("sample_*"))
    assert convert(_settings(tmp_path, storage=storage)).written == 4


@pytest.mark.parametrize(
    ("method", "refused"),
    [
        ("open", "10_sentinel1_monthly.csv"),
        ("mkdir", ".h5_conversion"),
        ("mkdir", "claims"),
    ],
)
def test_refused_permissions_are_named_and_nothing_is_left(tmp_path, monkeypatch, method, refused):
    make_tree(tmp_path / "tree", tiles=1)
    settings = _settings(tmp_path / "tree", output_dir=tmp_path / "out")
    real = getattr(Path, method)

    def refuse(self, *args, **options):  # changed modes would not stop root
        if self.name == refused:
            raise PermissionError(13, "Permission denied", str(self))
        return real(self, *args, **options)

    monkeypatch.setattr(Path, method, refuse)
    with pytest.raises((ValueError, OSError), match=f"Permission denied.*{refused}"):
        convert(settings)
    assert not list(tmp_path.rglob("*.h5"))


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_at_random_it_ends_with_the_same_bytes(tmp_path, kills):
    folder = tmp_path / "tree"
    make_tree(folder, tiles=6)
    whole = convert(_settings(folder, output_dir=tmp_path / "whole"))
    draw = np.random.default_rng(kills)
    command = [sys.executable, "-m", "tools.convert_to_h5", f"--tile_path={folder}"]
    command += [f"--output_dir={tmp_path / 'killed'}", "--compression_opts=1", "--num_workers=1"]
    for _ in range(kills):
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        wanted, begun = draw.integers(0, 12), time.monotonic()
        partial = tmp_path / "killed"
        while process.poll() is None and time.monotonic() - begun < 60:
            if len(list(partial.rglob("sample_*.h5"))) >= wanted:
                break
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        finals = [p for p in partial.rglob("24") if p.name == "24"]
        assert all(len(list(p.glob("sample_*.h5"))) == 24 for p in finals)
    time.sleep(1.5)  # the workers of a killed process end by themselves
    done = convert(_settings(folder, output_dir=tmp_path / "killed"))
    assert _digests(done.folder) == _digests(whole.folder) and done.samples == 24
    assert not list((tmp_path / "killed").rglob("*.tmp"))


def test_the_tool_reports_and_exits(tmp_path):
    make_tree(tmp_path, tiles=1)
    command = [sys.executable, "-m", "tools.convert_to_h5", f"--tile_path={tmp_path}"]
    run = subprocess.run(
        [*command, "--num_workers=0", "--tile_size=256", "--chunk_hw=64", "--chunk_t=3"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert Path(run.stdout.splitlines()[-1]).name == "1" and "1 samples" in run.stdout
    shutil.rmtree(tmp_path / "10_worldcover")
    run = subprocess.run([*command, "--num_workers=0"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1 and run.stderr.startswith("error: 1 of 1 tiles cannot be used")
