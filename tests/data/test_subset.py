"""Cropping, aligning and normalising, held to the plain order of the specification."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from olmoearth_jax import modalities as registry
from olmoearth_jax.data import derived, timesteps, transforms
from olmoearth_jax.data.cutmix import Pieces, gather_patches, read_pieces
from olmoearth_jax.data.h5 import open_sample
from olmoearth_jax.data.h5_writer import Storage, write_sample
from olmoearth_jax.data.normalize import bounds, normalize
from olmoearth_jax.data.subset import draw_offsets, read_sample
from olmoearth_jax.modalities import MISSING, OFFICIAL_MODALITIES
from tools.make_synthetic_dataset import Gaps, make_sample

FEW = settings(max_examples=25, deadline=None)
NAMES = registry.in_sample_order([*OFFICIAL_MODALITIES, "worldcover_onehot", "ndvi", "latlon"])

masks = st.lists(st.booleans(), min_size=12, max_size=12).map(lambda m: np.array(m))


def _plain(arrays, stamps, masks, latlon, names, window):
    """Whole tile first, then the crop: the specification's own order, written the slow way."""
    axis = timesteps.time_axis(stamps, masks)
    side = 16
    whole = {}
    for name in names:
        kind = registry.get(name).kind
        if name == "latlon":
            raw = np.asarray(latlon, np.float32)
        elif name == "worldcover_onehot" and "worldcover" in arrays:
            raw = derived.worldcover_onehot(arrays["worldcover"])
        elif name == "ndvi" and "sentinel2_l2a" in arrays:
            filled = timesteps.scatter(arrays["sentinel2_l2a"], axis.masks["sentinel2_l2a"])
            raw = derived.ndvi(filled)
        elif name not in arrays:
            bands = registry.get(name).num_bands
            raw = np.full((side, side, 12 if kind == "space_time" else 1, bands), MISSING)
        elif kind == "space_time":
            raw = timesteps.scatter(arrays[name], axis.masks[name])
        else:
            raw = arrays[name]
        whole[name] = normalize(raw, name)
    start, row, col, px, steps = window

    def crop(name, x):
        kind = registry.get(name).kind
        if kind == "static":
            return x
        x = x[row : row + px, col : col + px]
        return x[:, :, start : start + steps] if kind == "space_time" else x

    return {n: crop(n, x) for n, x in whole.items()}, axis.timestamps[start : start + steps]


@FEW
@given(
    number=st.integers(0, 30),
    px=st.integers(1, 16),
    steps=st.integers(1, 12),
    seed=st.integers(0, 99),
)
def test_crop_before_cast_equals_fill_then_crop(tmp_path_factory, number, px, steps, seed):
    path = tmp_path_factory.mktemp("one") / "a.h5"
    arrays, stamps, kept, latlon = make_sample(5, number, 16, Gaps(0.5, 0.3))
    write_sample(path, arrays, stamps, kept, latlon, Storage("none", None))
    with open_sample(path, NAMES) as file:
        sample = read_sample(file, NAMES, px, steps, draw_offsets(np.random.default_rng(seed)))
    w = sample.window
    expected, expected_stamps = _plain(
        arrays, stamps, kept, latlon, NAMES, (w.start_t, w.row, w.col, px, steps)
    )
    np.testing.assert_array_equal(sample.timestamps, expected_stamps)
    for name in NAMES:
        assert sample.arrays[name].dtype == np.float32
        np.testing.assert_array_equal(sample.arrays[name], expected[name], err_msg=name)


@FEW
@given(st.dictionaries(st.sampled_from(["a", "b"]), masks, min_size=1), st.integers(1, 12))
def test_windows_start_on_data_and_fit(masks, steps):
    stamps = np.repeat(np.arange(12)[:, None], 3, axis=1)
    if not np.any(list(masks.values())):
        with pytest.raises(ValueError, match="no timestep"):
            timesteps.time_axis(stamps, masks)
        return
    axis = timesteps.time_axis(stamps, masks)
    any_true = np.any(list(axis.masks.values()), axis=0)
    assert any_true[0] and any_true[-1] and len(any_true) == axis.length
    starts = timesteps.start_candidates(axis.masks, axis.length, steps)
    assert len(starts) and (np.diff(starts) > 0).all() and any_true[starts].all()
    assert (starts + steps <= max(axis.length, steps)).all()
    assert (axis.timestamps[axis.length :] == axis.timestamps[axis.length - 1]).all()


@FEW
@given(masks, st.integers(0, 14), st.integers(0, 11), st.integers(1, 12))
def test_placement_agrees_with_scatter(mask, stored, start, steps):
    data = np.arange(stored, dtype=np.float32)[:, None]
    whole = np.pad(timesteps.scatter(data, mask)[:, 0], (0, 12), constant_values=MISSING)
    where, rows = timesteps.placement(mask, stored, start, steps)
    out = np.full(steps, MISSING, np.float32)
    out[rows] = data[where, 0]
    np.testing.assert_array_equal(out, whole[start : start + steps])


@FEW
@given(st.sampled_from([n for n in registry.names() if n != "worldcover_onehot"]), st.data())
def test_normalisation_keeps_missing_and_is_affine(name, data):
    bands = registry.get(name).num_bands
    x = np.array(data.draw(st.lists(st.floats(-1e4, 1e4), min_size=bands, max_size=bands)))
    lo, hi = registry.get(name).norm_range()
    np.testing.assert_allclose(normalize(x, name), (x - lo) / (hi - lo), rtol=1e-6, atol=1e-6)
    x[0] = MISSING
    assert normalize(x, name)[0] == np.float32(MISSING)
    assert normalize(x.astype(np.float32), name)[0] == np.float32(MISSING)


def test_series_without_mask_follow_the_cut(tmp_path):
    stamps = np.array([[1, month, 2020] for month in range(12)], np.int32)
    mask = np.array([0, 0, 0, 1, 1, 1, 1, 1, 0, 0, 0, 0], bool)
    weather = np.repeat(np.arange(12, dtype=np.float32)[:, None], 6, axis=1)
    arrays = {"sentinel1": np.zeros((16, 16, 5, 2), np.float32), "era5_10": weather}
    write_sample(
        tmp_path / "a.h5", arrays, stamps, {"sentinel1": mask}, np.zeros(2), Storage("none", None)
    )
    names = ("sentinel1", "era5_10")
    with open_sample(tmp_path / "a.h5", names) as file:
        for align, expected in ((True, [4, 5, 6]), (False, [1, 2, 3])):
            sample = read_sample(
                file, names, 4, 3, lambda _: (1, 0, 0), normalized=False, align_time_only=align
            )
            assert sample.timestamps[:, 1].tolist() == [4, 5, 6]
            assert sample.arrays["era5_10"][:, 0].tolist() == expected
        late = read_sample(file, names, 4, 12, lambda _: (0, 0, 0), normalized=False)
    assert late.arrays["era5_10"][:, 0].tolist() == [*range(3, 12), *[MISSING] * 3]


def test_cutmix_takes_whole_patches_of_finer_modalities(tmp_path):
    base = np.arange(256).reshape(16, 16, 1, 1).astype(np.float32)
    naip = np.repeat(np.arange(64 * 64).reshape(64, 64, 1, 1), 4, axis=-1).astype(np.uint8)
    stamps = np.int32([[1, 1, 2020]])
    arrays = {"srtm": base, "naip_10": naip}
    write_sample(tmp_path / "a.h5", arrays, stamps, {}, np.zeros(2), Storage())
    names = ("srtm", "naip_10")
    with open_sample(tmp_path / "a.h5", names) as file:
        sample = read_pieces(
            file,
            names,
            4,
            1,
            lambda starts, n: Pieces(0, np.array([3, 0]), np.array([1, 2])),
            normalized=False,
        )
    assert sample.arrays["srtm"].shape == (8, 8, 1, 1)
    assert sample.arrays["naip_10"].shape == (32, 32, 1, 4)
    np.testing.assert_array_equal(sample.arrays["srtm"][:4, 4:], base[12:16, 8:12])
    np.testing.assert_array_equal(sample.arrays["naip_10"][16:, :16], naip[:16, 16:32])
    np.testing.assert_array_equal(gather_patches(base, range(4), range(4), 4), base)


def test_flips_undo_themselves_and_leave_series_alone():
    rng = np.random.default_rng(0)
    arrays = {
        "sentinel1": rng.random((2, 4, 4, 3, 2)),
        "era5_10": rng.random((2, 3, 6)),
    }
    seen = set()
    for name in transforms.FLIPS:
        turned = transforms.flip(arrays, name)
        assert turned["era5_10"] is arrays["era5_10"]
        assert turned["sentinel1"].shape == arrays["sentinel1"].shape
        seen.add(turned["sentinel1"].tobytes())
    assert len(seen) == 8
    with pytest.raises(ValueError, match="did you mean 'hflip'"):
        transforms.flip(arrays, "hflipp")


def test_mixup_never_blends_the_fill_value():
    x = np.array([[1.0], [3.0], [MISSING]], np.float32)
    stamps = np.arange(9).reshape(3, 1, 3)
    mixed, when = transforms.mixup({"latlon": x}, stamps, 0.25)
    assert mixed["latlon"][:, 0].tolist() == [1.5, MISSING, MISSING]
    assert when is stamps
    np.testing.assert_array_equal(transforms.mixup({}, stamps, 0.5)[1], np.roll(stamps, -1, 0))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(5, 7, 3), (1, 1, 12), (40, 2, 1), (3, 3, 0), (4,), ()])
def test_normalising_row_by_row_is_exact(dtype, shape):
    rng = np.random.default_rng(len(shape))
    for name in ("sentinel2_l2a", "sentinel1", "srtm", "worldcover"):
        bands = registry.get(name).num_bands
        x = rng.uniform(0, 250, (*shape, bands)).astype(dtype)
        if x.size and x.dtype.kind in "fi":
            x.flat[0] = MISSING
        limits = bounds(name)
        expected = x.astype(np.float32)
        if limits is not None:
            expected = ((x.astype(np.float64) - limits[0]) / (limits[1] - limits[0])).astype("f4")
            if x.dtype.kind in "fi":
                expected[x == MISSING] = MISSING
        turned = np.ascontiguousarray(x.T).T
        into = np.full((*shape, bands), np.nan, np.float32)
        assert normalize(x, name, out=into) is into
        for found in (normalize(x, name), normalize(turned, name), into):
            assert found.dtype == np.float32 and found.tobytes() == expected.tobytes()
