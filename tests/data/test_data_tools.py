"""The synthetic dataset and the loader benchmark."""

import json

import h5py
import numpy as np
import pytest

from olmoearth_jax.data import index
from olmoearth_jax.data.h5_writer import Storage
from olmoearth_jax.modalities import OFFICIAL_MODALITIES
from tools import make_synthetic_dataset
from tools.bench import data_loader
from tools.make_synthetic_dataset import Gaps, make_dataset, make_sample


def test_samples_depend_on_seed_and_number_only(tmp_path):
    first = make_sample(3, 5, 12, Gaps())
    again = make_sample(3, 5, 12, Gaps())
    other = make_sample(3, 6, 12, Gaps(0, 0))
    for name, array in first[0].items():
        assert array.tobytes() == again[0][name].tobytes()
    assert set(other[0]) == set(OFFICIAL_MODALITIES)
    assert other[0]["sentinel2_l2a"].shape == (12, 12, 12, 12)
    assert not np.array_equal(first[1], other[1])


def test_the_published_layout(tmp_path):
    folder = make_dataset(
        tmp_path, 3, tile_px=32, storage=Storage("gzip", 6, True, 8), int64_timestamps=True
    )
    assert folder.parent.parent.name == "h5py_data_w_missing_timesteps_gzip_6_shuffle_32_x_64"
    settings = json.loads((folder / "compression_settings.json").read_text())
    assert settings == {"compression": "gzip", "compression_opts": 6, "shuffle": True}
    with h5py.File(folder / "sample_0.h5") as f:
        assert f["timestamps"].dtype == np.int64 and f["latlon"].dtype == np.float32
        assert f["worldcover"].chunks == (8, 8, 1, 1)
    got = index.prepare(folder, OFFICIAL_MODALITIES)
    assert len(got) == 3 and got.tile_px == 32
    with pytest.raises(ValueError, match="exists already"):
        make_dataset(tmp_path, 3, tile_px=32, storage=Storage("gzip", 6, True, 8))


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def fails(*_):
        raise OSError("disk full")

    monkeypatch.setattr(make_synthetic_dataset, "write_tables", fails)
    with pytest.raises(OSError, match="disk full"):
        make_dataset(tmp_path, 1, tile_px=16)
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Storage("zip"), "did you mean 'gzip'"),
        (lambda: Storage("zstd", None), "needs a level"),
        (lambda: make_dataset("x", 0), "at least 1 sample"),
        (lambda: make_dataset("x", 1, gaps=Gaps(1.0)), "missing shares"),
    ],
)
def test_impossible_requests_are_explained(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_seasons_and_cover_shape_the_data():
    arrays, _, _, _ = make_sample(0, 1, 64, Gaps(0, 0))
    cover, s2 = arrays["worldcover"][:, :, 0, 0], arrays["sentinel2_l2a"].astype(float)
    red, nir = s2[..., 2], s2[..., 3]
    assert len(np.unique(cover)) > 2
    ndvi = np.median((nir - red) / (nir + red), axis=-1)
    means = [ndvi[cover == c].mean() for c in np.unique(cover)]
    assert np.ptp(means) > 0.1


def test_the_benchmark_reports_its_figures(dataset):
    result = data_loader.run(dataset, "v1", 4, 2, 0, 1)
    json.dumps(result)
    assert result["samples_per_second"] > 0 and result["cpu_ms_per_sample"] > 0
    assert set(result["stage_cpu_ms_per_sample"]) >= {"decode", "normalize", "mask", "other"}
