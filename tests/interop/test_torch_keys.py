"""Reference state dicts: strict, complete, and the same after a round trip."""

import dataclasses

import numpy as np
import pytest

from olmoearth_jax.interop import torch_keys
from olmoearth_jax.model import latent_mim
from olmoearth_jax.model.config import ReconstructorConfig
from tests.model.builders import NAMES, random_params, small_config


def _state(config, seed=0):
    rng = np.random.Generator(np.random.Philox(seed))
    return {
        key: torch_keys._tables(config).get(key, rng.standard_normal(shape).astype(np.float32))
        for key, shape in torch_keys.state_dict_shapes(config).items()
    }


def _configs():
    convolution = small_config(
        "rope_3d_mixed", use_linear_patch_embed=False, num_register_tokens=2, qk_norm=True
    )
    hidden = small_config(
        "rope",
        patch_embed_hidden_sizes=[6, 5],
        post_proj_hidden_sizes=[20, 32],
        output_embedding_size=16,
        num_projection_layers=2,
    )
    inner = small_config().decoder_config
    pixels = ReconstructorConfig(inner, NAMES, max_patch_size=4)
    return {
        "convolution": convolution,
        "hidden": hidden,
        "projection_only": dataclasses.replace(hidden, projection_only_target=True),
        "reconstructor": dataclasses.replace(
            small_config(), kind="mae", decoder_config=None, reconstructor_config=pixels
        ),
        "galileo": small_config(kind="galileo"),
    }


CONFIGS = _configs()


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip_is_bit_exact(name):
    config = CONFIGS[name]
    state = _state(config)
    params, target, extras = torch_keys.from_state_dict(state, config)
    back = torch_keys.to_state_dict(params, config, target, extras)
    assert sorted(back) == sorted(state)
    for key, value in state.items():
        np.testing.assert_array_equal(back[key], value)
    assert (target is None) == (config.kind == "mae")


@pytest.mark.parametrize("name", CONFIGS)
def test_export_then_import_gives_the_parameters(name):
    config = CONFIGS[name]
    params = random_params(config)
    state = torch_keys.to_state_dict(params, config)
    again, target, _ = torch_keys.from_state_dict(state, config)
    ours, theirs = (dict(latent_mim.flatten(p)) for p in (params, again))
    assert ours.keys() == theirs.keys()
    for path, value in ours.items():
        np.testing.assert_array_equal(theirs[path], value)
    if target is not None:
        for path, value in latent_mim.flatten(target):
            np.testing.assert_array_equal(value, ours["encoder", *path])


def test_whole_target_on_request():
    config = CONFIGS["hidden"]
    state = _state(config)
    _, target, extras = torch_keys.from_state_dict(state, config, full_target=True)
    assert target is not None and "blocks" in target
    assert set(extras) == set(torch_keys._tables(config))
    with pytest.raises(ValueError, match="only the target's projection"):
        torch_keys.from_state_dict({}, CONFIGS["projection_only"], full_target=True)


def test_misfits_list_both_sides():
    config = CONFIGS["galileo"]
    state = _state(config)
    state["stale.composite_encodings.pos_embed"] = np.zeros((12, 8), np.float32)
    torch_keys.from_state_dict(state, config)
    del state["encoder.norm.bias"]
    state["encoder.surprise"] = np.zeros(3, np.float32)
    state["encoder.norm.weight"] = np.zeros(3, np.float32)
    with pytest.raises(ValueError) as error:
        torch_keys.from_state_dict(state, config)
    for text in ("encoder.norm.bias", "encoder.surprise", "encoder.norm.weight is (3,)"):
        assert text in str(error.value)


def test_changed_month_table_is_refused():
    config = CONFIGS["galileo"]
    state = _state(config)
    state["encoder.composite_encodings.month_embed.weight"] = np.ones((12, 8), np.float32)
    with pytest.raises(ValueError, match="fixed month table"):
        torch_keys.from_state_dict(state, config)


def test_missing_parameters_are_refused():
    config = CONFIGS["galileo"]
    params = random_params(config)
    del params["encoder"]["norm"]
    with pytest.raises(ValueError, match="encoder/norm/"):
        torch_keys.to_state_dict(params, config)
    with pytest.raises(ValueError, match="extra tensor nonsense"):
        torch_keys.to_state_dict(random_params(config), config, extras={"nonsense": np.zeros(1)})
