"""Values that cannot be, that stand for nothing, or that are in another unit."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from olmoearth_jax import modalities
from olmoearth_jax.data import values
from olmoearth_jax.data.values import check_values

RNG = np.random.default_rng(0)
COUNTS = RNG.integers(200, 4000, (64, 64, 1, 12)).astype(np.float32)
RADAR = RNG.uniform(-25, -5, (64, 64, 1, 2)).astype(np.float32)


def spoilt(x, value, share):
    out = x.copy().reshape(-1)
    out[: max(1, int(share * out.size))] = value
    return out.reshape(x.shape)


def test_usual_values_pass_in_silence():
    for x, name in ((COUNTS, "sentinel2_l2a"), (RADAR, "sentinel1"), (COUNTS[..., :11], "landsat")):
        assert values.warnings_of(x, name) == []


@pytest.mark.parametrize("missing", [np.nan, -99999.0])
def test_what_is_missing_is_not_judged(missing):
    assert values.warnings_of(spoilt(COUNTS, missing, 0.9), "sentinel2_l2a") == []
    assert values.warnings_of(np.full_like(COUNTS, missing), "sentinel2_l2a") == []


@pytest.mark.parametrize(
    ("x", "name", "message"),
    [
        (spoilt(COUNTS, 65535, 0.0001), "sentinel2_l2a", "holds 65535 in .* of its values"),
        (spoilt(COUNTS, -32768, 0.0001), "sentinel2_l2a", "holds -32768"),
        (spoilt(COUNTS, -9999, 0.5), "landsat", "holds -9999 in 50"),
        (spoilt(COUNTS, 40000, 0.01), "sentinel2_l2a", "-1000..30000 .* such as 40000"),
        (spoilt(COUNTS, 65000, 0.01), "sentinel2_l2a", "stored without a sign"),
        (COUNTS / 10000, "sentinel2_l2a", "like reflectance"),
        (COUNTS / 100, "sentinel2_l2a", "like percent: multiply by 100"),
        (np.minimum(COUNTS, 255), "sentinel2_l2a", "8-bit picture"),
        (10 ** (RADAR / 10), "sentinel1", "10 \\* log10"),
        (10 ** (RADAR / 10) - 0.02, "sentinel1", "10 \\* log10"),
        (RADAR * 100, "sentinel1", "hundredths of a decibel"),
        (spoilt(RADAR, 0, 0.01), "sentinel1", "holds 0 in 0.99% of its values"),
        (spoilt(RADAR, -9999, 0.0001), "sentinel1", "-9999"),
        (np.full((8, 8, 1, 1), 12000.0), "srtm", "metres"),
        (np.full((8, 8, 1, 1), 15.0), "worldcover", "one of 10, 20"),
        (np.full((8, 8, 1, 1), 255.0), "wri_canopy_height_map", "holds 255"),
        (np.full((3, 6), 20.0), "era5_10", "must be in K"),
    ],
)
def test_impossible_values_are_named_with_their_share(x, name, message):
    with pytest.raises(ValueError, match=message) as told:
        check_values(x[..., :11] if name == "landsat" else x, name, settle="or say so")
    assert "or say so" in str(told.value)


def test_one_timestep_of_a_large_array_is_seen():
    x = RNG.integers(200, 4000, (200, 200, 12, 12)).astype(np.float32)
    x[:, :, 5] = 65000
    with pytest.raises(ValueError, match="stored without a sign"):
        check_values(x, "sentinel2_l2a")


@pytest.mark.parametrize(("name", "factor"), [("sentinel2_l2a", 1e-4), ("sentinel1", None)])
def test_one_timestep_in_another_unit_is_told(name, factor):
    scene = {"sentinel2_l2a": COUNTS, "sentinel1": RADAR}[name]
    series = np.concatenate([scene] * 12, axis=2)
    assert values.warnings_of(series, name) == []
    series[:, :, 4] = scene[:, :, 0] * factor if factor else 10 ** (scene[:, :, 0] / 10)
    for x in (series, series[None], np.asfortranarray(series)):
        with pytest.raises(ValueError, match=r"like .* \(in timestep 5 of 12\)"):
            check_values(x, name)
    series[:, :, 4] = np.nan
    assert values.warnings_of(series, name) == []


@pytest.mark.parametrize("band", [0, 1])
def test_one_band_of_radar_in_power_is_told(band):
    series = np.concatenate([RADAR] * 12, axis=2)
    series[..., band] = 10 ** (series[..., band] / 10)
    one = series[:, :, 3:4].copy()
    for x in (series, one, one[:, :, 0]):
        with pytest.raises(ValueError, match=rf"like linear power .*in band {band + 1} of 2 alone"):
            check_values(x, "sentinel1")
    series[..., 1 - band] = np.nan  # nothing is known of the other one
    with pytest.raises(ValueError, match="like linear power"):
        check_values(series, "sentinel1")


@pytest.mark.parametrize("dtype", [np.uint16, np.int16, np.int32, np.float64])
def test_counts_of_parts_add_up(dtype):
    whole = spoilt(spoilt(COUNTS, 0, 0.3), 31000, 0.2).reshape(-1, 12).astype(dtype)
    found = values.Tally.of("sentinel2_l2a", whole)
    parts = values.Tally()
    for rows in np.array_split(whole, 7):
        parts.merge(values.Tally.of("sentinel2_l2a", rows))
    assert {f: n for f, n in parts.fills.items() if n} == {
        f: n for f, n in found.fills.items() if n
    }
    assert (parts.total, parts.impossible) == (found.total, found.impossible)
    assert found.impossible == int((whole == 31000).sum())


def test_single_odd_pixels_are_noise():
    assert values.warnings_of(spoilt(COUNTS, 31000, 0.0005), "sentinel2_l2a") == []
    assert values.warnings_of(spoilt(RADAR, -100, 0.0005), "sentinel1") == []


@pytest.mark.parametrize(
    ("x", "newest", "message"),
    [
        (spoilt(COUNTS, 0, 0.3), None, "30% of the values are 0"),
        (np.maximum(COUNTS, 100) + 15000, None, "outside the usual"),
        (COUNTS + 1000, 20230101, "offset of 1000"),
    ],
)
def test_unusual_values_are_told_once(x, newest, message):
    found = values.warnings_of(x, "sentinel2_l2a", newest=newest)
    assert len(found) == 1 and message in found[0]


def test_an_offset_in_some_bands_only_is_none():
    bright = COUNTS + 1000
    bright[..., 0] -= 1000
    assert values.warnings_of(bright, "sentinel2_l2a", newest=20230101) == []


@given(st.sampled_from(modalities.names()), st.floats(-1e6, 1e6, width=32))
def test_any_constant_is_judged_without_surprise(name, value):
    x = np.full((4, 4, 1, modalities.get(name).num_bands), value, np.float32)
    try:
        values.warnings_of(x, name)
    except ValueError as told:
        assert name in str(told)
