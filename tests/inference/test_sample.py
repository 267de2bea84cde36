"""Samples from arrays: band names, dates, units, gaps, and what is refused."""

import datetime
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from olmoearth_jax import Sample, modalities
from olmoearth_jax.data.values import check_values
from olmoearth_jax.dates import parse_dates
from olmoearth_jax.inference import prepare

S2 = list(modalities.get("sentinel2_l2a").bands)
DATES = ["2021-01-15", "2021-02", "2021-03-31"]


def s2(steps=3, side=8, bands=12, seed=0):
    rng = np.random.Generator(np.random.Philox(seed))
    return rng.integers(100, 4000, (side, side, steps, bands)).astype(np.float32)


def make(x=None, bands=S2, dates=DATES, **kwargs):
    x = s2() if x is None else x
    return Sample.from_arrays({"sentinel2_l2a": x}, dates, bands={"sentinel2_l2a": bands}, **kwargs)


def test_bands_in_any_order_and_case():
    x = s2()
    order = np.random.Generator(np.random.Philox(1)).permutation(12)
    shuffled = make(x[..., order], [S2[i].lower() for i in order])
    np.testing.assert_array_equal(shuffled.data["sentinel2_l2a"], x[None])
    by_name = Sample.from_arrays({"SENTINEL2_L2A": {S2[i]: x[..., i] for i in order}}, DATES)
    np.testing.assert_array_equal(by_name.data["sentinel2_l2a"], x[None])
    assert shuffled.image_size == (8, 8) and shuffled.batch_size == 1


def test_dates():
    stamps = parse_dates(DATES)
    assert stamps.tolist() == [[15, 0, 2021], [15, 1, 2021], [31, 2, 2021]]
    assert parse_dates(np.array([DATES[:1], ["2020-12-31"]]))[1].tolist() == [[31, 11, 2020]]
    assert parse_dates(np.array(["2020-02-29"], "datetime64[D]")).tolist() == [[29, 1, 2020]]
    sample = make(dates=None, timestamps=[[15, 0, 2021], [15, 1, 2021], [31, 2, 2021]])
    np.testing.assert_array_equal(sample.timestamps[0], stamps)


def test_missing_bands_are_noted():
    sample = make(s2(bands=4), ["B02", "B03", "B04", "B08"])
    assert sample.missing_bands["sentinel2_l2a"] == tuple(S2[4:])
    assert np.isnan(sample.data["sentinel2_l2a"][..., 4:]).all()


def test_maps_and_batches():
    arrays = {
        "sentinel2_l2a": np.stack([s2(), s2(seed=1)]),
        "worldcover": np.full((2, 8, 8), 10.0)[..., None, None],
    }
    sample = Sample.from_arrays(arrays, DATES, bands={"sentinel2_l2a": S2})
    assert sample.data["worldcover"].shape == (2, 8, 8, 1, 1)
    assert sample.timestamps.shape == (2, 3, 3)
    both = Sample.concatenate([sample.rows(0, 1), make()])
    assert np.isnan(both.data["worldcover"][1]).all() and both.batch_size == 2
    with pytest.raises(ValueError, match="embed them in separate calls"):
        Sample.concatenate([sample, make(s2(side=4))])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bands": None}, "name the bands of the array"),
        ({"bands": [*S2[:-1], "B2"]}, "more than once"),  # B02 by another name
        ({"bands": [*S2[:-1], "SCL"]}, "take no band SCL"),
        ({"bands": [*S2[:-1], "B13"]}, "unknown band 'B13' of sentinel2_l2a; known: B02"),
        ({"x": s2()[:0]}, "sentinel2_l2a is empty"),
        ({"x": np.moveaxis(s2(side=8), 2, 0)}, r"is it time\? Then pass np.moveaxis\(x, -4, -2\)"),
        ({"x": s2().astype(np.float64) * 1e300}, "float32 cannot"),
        ({"bands": [*S2[:-1], "B02"]}, "more than once"),
        ({"bands": S2[:3]}, "must have 3 entries"),
        ({"x": np.moveaxis(s2(), -1, 0)}, r"channels first\? Then pass np.moveaxis\(x, 0, -1\)"),
        ({"x": s2(steps=1)[:, :, 0].transpose(2, 0, 1), "dates": DATES[:1]}, "channels first"),
        ({"x": s2().astype(np.uint8)}, "8-bit picture"),
        ({"x": np.where(s2() > 3000, np.inf, s2())}, "infinite values"),
        ({"x": s2(steps=2)}, "3 dates were given for 2 timesteps"),
        ({"dates": None}, "give dates="),
        ({"dates": ["2021-03-01", "2021-01-01", "2021-02-01"]}, "not in ascending order; sort"),
        ({"dates": ["2021-13-01", *DATES[1:]]}, "ISO texts"),
        ({"dates": [[1, 1, 2021]] * 3}, "go into timestamps="),
        ({"dates": None, "timestamps": [[1, 10, 2021], [1, 11, 2021], [1, 12, 2021]]},
         "did you pass 1-based months|Did you pass 1-based months"),
        ({"dates": None, "timestamps": [[2021, 1, 1]] * 3}, "in this order"),
        ({"nan_pixels": "skip"}, "unknown nan_pixels"),
        ({"x": s2() / 10000}, "like reflectance in 0..1: multiply by 10000"),
        ({"x": np.minimum(s2(), 255)}, "8-bit picture"),
        ({"normalized": True}, "leave out normalized=True"),
    ],
)  # fmt: skip
def test_refused(change, message):
    if change.get("bands", "") is None:
        with pytest.raises(ValueError, match=message):
            Sample.from_arrays({"sentinel2_l2a": s2()}, DATES)
        return
    with pytest.raises(ValueError, match=message):
        make(**change)


def test_unknown_modality_and_differing_timesteps():
    with pytest.raises(ValueError, match="did you mean 'sentinel2_l2a'"):
        Sample.from_arrays({"sentinel2_l2": s2()}, DATES)
    with pytest.raises(ValueError, match="different numbers of timesteps"):
        Sample.from_arrays(
            {"sentinel2_l2a": s2(), "sentinel1": np.full((8, 8, 2, 2), -12.0)},
            DATES,
            bands={"sentinel2_l2a": S2, "sentinel1": ["vv", "vh"]},
        )
    with pytest.raises(ValueError, match="different image sizes"):
        Sample.from_arrays(
            {"sentinel2_l2a": s2(), "worldcover": np.full((4, 4, 1), 10.0)},
            DATES,
            bands={"sentinel2_l2a": S2},
        )


def test_nan_pixels():
    x = s2()
    x[0, 0, 1, 3] = np.nan
    with pytest.raises(ValueError, match="pass nan_pixels='mask'"):
        make(x)
    assert make(x, nan_pixels="mask").nan_pixels == "mask"
    assert make(x, nan_pixels="fill").nan_pixels == "fill"
    x[0, 0, 1, 3] = modalities.MISSING  # says by itself that it is meant
    assert np.isnan(make(x).data["sentinel2_l2a"][0, 0, 0, 1, 3])
    x[:, :, 1] = np.nan  # a whole timestep
    assert make(x).nan_pixels == "mask"


def test_units_of_radar_and_offset():
    with pytest.raises(ValueError, match=r"10 \* log10"):
        check_values(np.full((4, 4), 0.05), "sentinel1")
    check_values(np.full((4, 4), -15.0), "sentinel1")
    with pytest.warns(UserWarning, match="offset of 1000"):
        make(s2() + 1000, dates=["2023-01-01", "2023-02-01", "2023-03-01"])
    with pytest.warns(UserWarning, match="made again since 2022 hold an offset of 1000"):
        make(s2() + 1000)  # of before the offset was introduced
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(s2())
    make(s2() / 10000, check_units=False)


@pytest.mark.parametrize(
    ("name", "band", "nearest"),
    [
        ("sentinel2_l2a", "B01", "B02"),
        ("sentinel2_l2a", "B8A", "B08"),
        ("landsat", "B10", "B11"),
        ("landsat", "B8", "B3"),
    ],
)
def test_stand_ins(name, band, nearest):
    bands = modalities.get(name).bands
    assert bands[prepare.stand_ins(name, band)[0]] == nearest


def test_fill_rules():
    lo, hi = np.zeros(12), np.full(12, 2.0)
    x = np.full((1, 12), 1.0)
    x[0, S2.index("B01")] = np.nan
    later, lost = prepare.fill(x, "sentinel2_l2a", "v1_2", (lo, hi))
    assert later[0, S2.index("B01")] == 0 and lost.sum() == 1
    first, lost = prepare.fill(x, "sentinel2_l2a", "v1", (lo, hi))
    assert first[0, S2.index("B01")] == 0.5 and not lost.any()
    x[0, :5] = np.nan
    with pytest.warns(UserWarning, match="were set to 0"):
        prepare.fill(x, "sentinel2_l2a", "v1_1", (lo, hi))
    with pytest.warns(UserWarning, match="were copied"):
        prepare.fill(x, "sentinel2_l2a", "v1", (lo, hi))
    with pytest.raises(ValueError, match="unknown model version"):
        prepare.fill(x, "sentinel2_l2a", "v9", (lo, hi))


@pytest.mark.parametrize(
    ("arrays", "bands", "message"),
    [
        ({"sentinel2_l2a": s2()}, S2, r"bands=\{'sentinel2_l2a': \[...\]\}"),
        ({"sentinel2_l2a": s2()}, {"sentinel2_l2a": 5}, "must be a list of names, got 5"),
        ({"sentinel2_l2a": s2()}, {"sentinel2_l2a": "B02"}, "must be a list of names"),
        ({"sentinel2_l2a": {}}, None, "the mapping holds no bands"),
        ({"sentinel2_l2a": {"B02": s2()[..., 0], "B03": s2()[:4, ..., 0]}}, None,
         "differ in shape"),
    ],
)  # fmt: skip
def test_slips_with_bands_are_told(arrays, bands, message):
    with pytest.raises(ValueError, match=message):
        Sample.from_arrays(arrays, DATES, bands=bands)


def test_slips_with_the_mapping_are_told():
    with pytest.raises(ValueError, match=r"say which modality.*got ndarray"):
        Sample.from_arrays(s2(), DATES)  # pyright: ignore[reportArgumentType]
    one = dict.fromkeys(S2, s2()[..., 0])
    with pytest.raises(ValueError, match="sentinel2_l2a is given twice"):
        Sample.from_arrays({"sentinel2_l2a": one, "Sentinel2_L2A": one}, DATES)


def test_the_way_to_move_the_time_axis_works():
    for x in (s2(steps=3, side=8), np.stack([s2(), s2()])):
        for axis in (-4, -3):
            odd = np.moveaxis(x, -2, axis)
            with pytest.raises(ValueError, match=rf"np\.moveaxis\(x, {axis}, -2\)"):
                make(odd)
            np.testing.assert_array_equal(np.moveaxis(odd, axis, -2), x)


def test_nothing_to_put_together():
    with pytest.raises(ValueError, match="no samples"):
        Sample.concatenate([])


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32, np.float64])
@pytest.mark.parametrize("by_band", [False, True])
def test_what_a_mask_hides_is_missing(dtype, by_band):
    values = s2().astype(dtype)
    values[:4] = 30000
    hidden = np.zeros(values.shape, bool)
    hidden[:4] = True
    x = np.ma.array(values, mask=hidden)
    arrays = {b: x[..., i] for i, b in enumerate(S2)} if by_band else x
    bands = None if by_band else {"sentinel2_l2a": S2}
    with pytest.raises(ValueError, match="pass nan_pixels"):
        Sample.from_arrays({"sentinel2_l2a": arrays}, DATES, bands=bands)
    got = Sample.from_arrays({"sentinel2_l2a": arrays}, DATES, bands=bands, nan_pixels="mask")
    values = got.data["sentinel2_l2a"][0]
    assert np.isnan(values[:4]).all() and not np.isnan(values[4:]).any()
    np.testing.assert_array_equal(values[4:], make().data["sentinel2_l2a"][0, 4:])


def test_masks_of_arrays_in_lists_are_kept():
    x = np.ma.array(s2(), mask=np.zeros(s2().shape, bool))
    x[:4] = np.ma.masked
    steps = [np.ma.stack([x, x]), np.ma.stack([x, x])]
    batch = [[x, x], (x, x)]
    for value in (list(x), [list(part) for part in x]):
        got = make(value, nan_pixels="mask").data["sentinel2_l2a"][0]
        assert np.isnan(got[:4]).all() and not np.isnan(got[4:]).any()
    assert np.isnan(make([x, x], nan_pixels="mask").data["sentinel2_l2a"][:, :4]).all()
    with pytest.raises(ValueError, match="must have the axes"):
        make(batch, nan_pixels="mask")
    with pytest.raises(ValueError, match="must have the axes"):
        make(steps, nan_pixels="mask")
    with pytest.raises(ValueError, match="differ in shape"):
        make([x, x[:4]])
    with pytest.raises(ValueError, match="rows of different lengths"):
        make([s2(), s2(side=4)])


def test_a_band_of_bytes_beside_counts_is_no_picture():
    bands: dict[str, np.ndarray] = {b: s2()[..., i].astype(np.uint16) for i, b in enumerate(S2)}
    bands["B01"] = np.minimum(bands["B01"], 250).astype(np.uint8)
    Sample.from_arrays({"sentinel2_l2a": bands}, DATES)


@pytest.mark.parametrize(
    ("dtype", "fill"), [(np.int16, -32768), (np.int32, -9999), (np.uint16, 65535)]
)
@pytest.mark.parametrize("share", [1, 2])
def test_undeclared_fills_are_refused(dtype, fill, share):
    x = s2().astype(dtype)
    x[: 8 // share] = fill
    with pytest.raises(ValueError, match=f"{fill} in {100 / share:.2f}%.*check_units=False"):
        make(x)
    make(x, check_units=False)


@pytest.mark.parametrize(
    "text",
    ["2023-06-15", "20230615", 20230615, "2023/06/15", "2023-06", "2023/06", "20230615T103031",
     "2023-06-15T10:30:31.024Z", "2023-06-15 10:30", "2023-06-14T23:30:00-05:00",
     datetime.date(2023, 6, 15), datetime.datetime(2023, 6, 15, 23),
     np.datetime64("2023-06-15T10"), np.datetime64("2023-06")],
)  # fmt: skip
def test_dates_as_products_write_them(text):
    assert parse_dates([text]).tolist() == [[15, 5, 2023]]


@pytest.mark.parametrize(
    "text", ["2023", "230615", "now", "today", "", "NaT", "2023-02-30", "15.06.2023", "2023-6-1",
             "20231306", "1e9", 2023, 1.5, None, "202306",
             "20230601-20230630", "2023-W24", np.datetime64("2023"), np.datetime64("NaT", "D")],
)  # fmt: skip
def test_what_is_no_date_is_shown(text):
    with pytest.raises(ValueError) as told:
        parse_dates([text])
    assert str(text) in str(told.value) or not isinstance(text, str)


def test_a_masked_date_is_none():
    with pytest.raises(ValueError, match="must not be masked"):
        parse_dates(np.ma.array([20230615, 20230715], mask=[True, False]))


@given(st.dates(datetime.date(1900, 1, 1), datetime.date(2200, 12, 31)))
def test_every_form_of_a_day_is_the_same_day(day):
    forms = [day.isoformat(), day.strftime("%Y%m%d").zfill(8), f"{day.isoformat()}T12:00:00Z", day]
    got = {tuple(parse_dates([form])[0].tolist()) for form in forms}
    assert got == {(day.day, day.month - 1, day.year)}


def test_modalities_that_models_do_not_take_are_never_dropped_in_silence():
    with pytest.raises(ValueError, match="take no sentinel2; did you mean 'sentinel2_l2a'"):
        Sample.from_arrays(
            {"sentinel2": s2(), "sentinel1": np.full((8, 8, 1, 2), -12.0)},
            ["2024-06-15"],
            bands={"sentinel1": ["vv", "vh"]},
        )
