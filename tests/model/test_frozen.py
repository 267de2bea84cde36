"""Poolings by name, and the one place where an encoder is made of a config."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from olmoearth_jax.model import frozen, latent_mim, pooling
from olmoearth_jax.model.config import official_model
from olmoearth_jax.model.pooling import Pooling


def _tokens():
    rng = np.random.default_rng(0)
    shapes = {"sentinel2_l2a": (2, 3, 3, 2, 3), "sentinel1": (2, 3, 3, 2, 1), "latlon": (2, 1)}
    tokens = {n: rng.standard_normal((*s, 4)).astype(np.float32) for n, s in shapes.items()}
    masks = {n: np.zeros(s, np.int8) for n, s in shapes.items()}
    masks["sentinel1"][0] = 3
    return tokens, masks


@pytest.mark.parametrize("how", ["mean", "max"])
def test_a_pooling_does_what_its_name_says(how):
    tokens, masks = _tokens()
    spatial = pooling.pool_spatial(tokens, masks, how)
    for place, wanted, names in (
        ("instance", pooling.pool_instance(tokens, masks, how), None),
        ("spatial", spatial, ("sentinel2_l2a", "sentinel1")),
        ("centre", spatial[:, 1, 1], ("sentinel2_l2a", "sentinel1")),
        ("spatial_concat", pooling.pool_spatial_concat(tokens, masks), ("sentinel2_l2a",)),
    ):
        pool = Pooling(how, place).over(masks)
        assert pool.names == names
        for one in (pool, Pooling(how, place)):
            np.testing.assert_array_equal(one(tokens, masks), wanted)


def test_what_the_encoder_makes_itself_takes_no_modalities():
    for place in pooling.LOCATIONS:
        assert Pooling("mean", place).over(_tokens()[1]).names is None


def test_a_frozen_encoder_takes_two_types():
    config = official_model("nano", "v1_2", ("sentinel1",))
    params = latent_mim.initial_params(config)
    made = frozen.FrozenEncoder(config, params)
    assert made.dtype == jnp.float32 and made.slots.names == ("sentinel1",)
    assert made.embedding_size == config.encoder_config.embedding_size
    assert frozen.encoder_graph(config) == made.graph
    assert frozen.FrozenEncoder(config, params, "bfloat16").dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="dtype must be float32 or bfloat16, got float16"):
        frozen.FrozenEncoder(config, params, "float16")
    wide = dataclasses.replace(config.encoder_config, output_embedding_size=24)
    decoder = dataclasses.replace(config.decoder_config, encoder_embedding_size=24)
    config = dataclasses.replace(config, encoder_config=wide, decoder_config=decoder)
    assert frozen.FrozenEncoder(config, latent_mim.initial_params(config)).embedding_size == 24
