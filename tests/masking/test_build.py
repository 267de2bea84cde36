"""Configs of masking strategies, and missing tokens from data."""

import numpy as np
import pytest

from olmoearth_jax import masking, modalities
from olmoearth_jax.modalities import MISSING, SINGLE_BAND_SET_OVERRIDES, Tokenization


def test_every_key_builds_with_its_name():
    for key in masking.STRATEGIES:
        strategy = masking.build({"type": key})
        assert strategy.name == key.replace("_", "")
        assert 0 <= strategy.encode_ratio <= 1 and 0 <= strategy.decode_ratio <= 1


def test_build_leaves_the_config_alone():
    config = {"type": "random_with_decode", "only_decode_modalities": ["WORLDCOVER"]}
    strategy = masking.build(config)
    assert strategy.only_decode_modalities == ("worldcover",)
    assert config == {"type": "random_with_decode", "only_decode_modalities": ["WORLDCOVER"]}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "needs a 'type'"),
        ({"type": "randm"}, "did you mean 'random'"),
        ({"type": "random", "encode_ration": 0.5}, "did you mean 'encode_ratio'"),
        ({"type": "random", "encode_ratio": 0.7, "decode_ratio": 0.5}, "more than 1"),
        ({"type": "random", "encode_ratio": "a"}, "encode_ratio must be a number"),
        ({"type": "random_fixed_modality", "decoded_modalities": 3}, "wrong type"),
        ({"type": "random_range", "encode_ratio": 0.5}, "no argument 'encode_ratio'"),
        ({"type": "random_range", "min_decode_ratio": 0.2}, "or neither"),
        ({"type": "random_time_with_decode", "random_ratio": 1.5}, "random_ratio"),
        ({"type": "random_with_decode", "only_decode_modalities": ["srtn"]}, "'srtm'"),
        ({"type": "modality_cross_random", "min_encoded_bandsets": 1}, "greater than 1"),
        ({"type": "modality_cross_random", "max_decoded_bandsets": 3}, "needs min_decoded"),
        ({"type": "modality_cross_random", "max_encoded_bandsets": 0}, "at least 1, or None"),
        ({"type": "modality_cross_space", "max_encoded_bandsets": -1}, "at least 1, or None"),
        ({"type": "modality_cross_random", "max_encoded_bandsets": "a"}, "must be a whole number"),
        ({"type": "modality_cross_random", "min_decoded_bandsets": 2.5}, "must be a whole number"),
    ],
)
def test_errors_name_what_is_wrong(config, message):
    with pytest.raises(ValueError, match=message):
        masking.build(config)


def test_missing_tokens_reads_the_first_pixel_of_each_patch():
    s2 = np.zeros((2, 9, 8, 3, 12), np.float32)
    s2[0, 4, 0, 1, 5] = MISSING  # one band of the second band set, at a patch's first pixel
    s2[1, 5, 5, 2, :] = MISSING  # inside a patch: not seen
    data = {
        "sentinel2_l2a": s2,
        "latlon": np.array([[1.0, 2.0], [MISSING, 0.0]], np.float32),
        "era5_10": np.zeros((2, 3, 6), np.float32),
    }
    data["era5_10"][1, 2, 0] = MISSING
    flags = masking.missing_tokens(data, 4)
    assert flags["sentinel2_l2a"].shape == (2, 2, 2, 3, 3)
    assert np.argwhere(flags["sentinel2_l2a"]).tolist() == [[0, 1, 0, 1, 1]]
    assert flags["latlon"].tolist() == [[False], [True]]
    assert np.argwhere(flags["era5_10"]).tolist() == [[1, 2, 0]]
    single = Tokenization.from_mapping(SINGLE_BAND_SET_OVERRIDES)
    assert masking.missing_tokens(data, 4, single)["sentinel2_l2a"].shape == (2, 2, 2, 3, 1)


def test_missing_tokens_of_a_finer_modality():
    factor = modalities.get("naip_10").image_factor
    image = np.zeros((1, 4 * factor, 4 * factor, 1, 4), np.float32)
    image[0, 2 * factor, 0] = MISSING
    flags = masking.missing_tokens({"naip_10": image}, 2)["naip_10"]
    assert flags.shape[1:3] == (2, 2) and np.argwhere(flags[..., 0]).tolist() == [[0, 1, 0, 0]]
