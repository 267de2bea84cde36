"""What models, samples and archives say of themselves, and what completion finds."""

import subprocess
import sys

import numpy as np
import pytest

import olmoearth_jax
from olmoearth_jax.inference import quantize
from olmoearth_jax.inference.model import PretrainedModel
from olmoearth_jax.maps import plan
from olmoearth_jax.model.versions import PUBLISHED
from tests.inference.test_model import sample, weights_of
from tests.maps import stores


@pytest.fixture(scope="module")
def model():
    return PretrainedModel(weights_of(), "mine")


def test_completion_finds_what_the_package_offers():
    code = """
import sys, olmoearth_jax
names = dir(olmoearth_jax)
assert set(olmoearth_jax.__all__) <= set(names), names
assert not {"annotations", "exported", "sys", "TYPE_CHECKING", "_"} & set(names), names
assert "data" not in names
import olmoearth_jax.data
assert "data" in dir(olmoearth_jax)
assert olmoearth_jax.list_models("*v1_3*") == ["OlmoEarth-v1_3-Base"]
assert "jax" not in sys.modules and "flax" not in sys.modules
for name in olmoearth_jax.__all__:
    getattr(olmoearth_jax, name)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    with pytest.raises(AttributeError, match="has no attribute 'load_model'"):
        _ = olmoearth_jax.load_model


def test_models_are_listed_by_pattern():
    assert tuple(olmoearth_jax.list_models()) == PUBLISHED
    assert olmoearth_jax.list_models("*-nano") == [n for n in PUBLISHED if n.endswith("Nano")]
    assert olmoearth_jax.list_models("resnet*") == []


def test_a_model_says_what_it_takes(model, capsys):
    text = repr(model)
    for part in ("mine", "v1_1", "embeddings of 16", "1 to 4", "sentinel2_l2a, sentinel1"):
        assert part in text
    assert "\n" not in text and len(text) < 200
    assert model.summary() is None
    shown = capsys.readouterr().out
    for part in (model.digest, "sentinel1: vv vh", "never saw", "worldcover", "up to 12"):
        assert part in shown
    total = sum(x.size for x in __import__("jax").tree.leaves(model.params))
    assert f"{total:,} in the encoder" in shown
    assert max(map(len, shown.splitlines())) < 100


def test_the_default_patch_size_is_one_of_the_model(model):
    one = sample(side=8)
    np.testing.assert_array_equal(model.embed(one), model.embed(one, patch_size=4))
    assert model.default_patch_size == 4


def test_a_sample_says_what_it_holds():
    text = repr(sample(2))
    assert text == (
        "<Sample 2 places, 8 x 8 pixels, 2 dates 2021-01-15 to 2021-04-15, "
        "sentinel2_l2a 12 bands, sentinel1 2 bands>"
    )
    few = olmoearth_jax.Sample.from_arrays(
        {"sentinel2_l2a": np.full((4, 4, 1, 9), 900.0)},
        ["2021-06-01"],
        bands={"sentinel2_l2a": ["B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11"]},
    )
    assert "1 date 2021-06-01" in repr(few) and "9 bands (without B12, B01, B09)" in repr(few)
    place = olmoearth_jax.Sample.from_arrays({"srtm": np.full((4, 4, 1), 100.0)})
    assert repr(place) == "<Sample 1 place, 4 x 4 pixels, srtm 1 band>"


def test_an_archive_says_what_it_holds(tmp_path):
    rule = quantize.rule_of("int8", "signed_power", None)
    grids = {33: stores.grid(33, 300_000, 5_800_000)}
    stores.make(tmp_path / "embeddings.zarr", rule, grids, plan.periods_of(["2023", "2024"]))
    text = repr(olmoearth_jax.open_archive(tmp_path))
    for part in ("embeddings.zarr", "UTM zone 33", "2023, 2024", "8 values of int8"):
        assert part in text
