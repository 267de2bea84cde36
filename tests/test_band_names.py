"""Names of bands, as products write them."""

import pytest

from olmoearth_jax import band_names, modalities


def test_a_band_is_found_whatever_its_spelling():
    for name in ("B02", "b02", "B2", "blue", "BLUE", " Blue "):
        assert band_names.canonical(name, "sentinel2_l2a") == "B02"
    for name in ("red_edge_1", "RedEdge1", "red edge 1", "red-edge-1"):
        assert band_names.canonical(name, "sentinel2_l2a") == "B05"
    assert band_names.canonical("VV", "sentinel1") == "vv"


def test_own_names_go_before_those_of_other_products():
    assert band_names.canonical("B8", "landsat") == "B8"
    assert band_names.canonical("B8A", "sentinel2_l2a") == "B8A"
    for name in modalities.names():
        for band in modalities.get(name).bands:
            assert band_names.canonical(band, name) == band


@pytest.mark.parametrize("names", [["B2", "B3", "B4", "B8"], ["B4", "B3", "B2"], ["red", "nir"]])
def test_names_of_two_sensors_decide_nothing(names):
    assert [m for m, _ in band_names.identify(names)] == ["sentinel2_l2a", "landsat"]


def test_names_of_one_sensor_decide():
    assert band_names.identify(["B02", "B2A"]) == []
    assert band_names.identify(["B04", "B8A"]) == [("sentinel2_l2a", ("B04", "B8A"))]
    assert band_names.identify(["VH", "VV"]) == [("sentinel1", ("vh", "vv"))]
    assert band_names.identify(["B2", "B02"]) == []
    assert band_names.identify([]) == []


def test_proposals_are_right_or_none():
    assert band_names.propose("B1", "sentinel2_l2a") == "did you mean 'B01'?"
    assert "no band SCL" in band_names.propose("SCL", "sentinel2_l2a")
    assert band_names.propose("B13", "sentinel2_l2a") == ""
    assert band_names.propose("B2") == ""
    assert band_names.propose("rededge1") == "did you mean 'B05' of sentinel2_l2a?"
