"""Location embeddings and maps of models with an attention pooler."""

import numpy as np
import pytest

from olmoearth_jax import Sample
from olmoearth_jax.inference.model import PretrainedModel
from olmoearth_jax.interop import checkpoints
from olmoearth_jax.model import latent_mim
from olmoearth_jax.model.config import (
    AttentionPoolerConfig,
    EncoderConfig,
    ModelConfig,
    PredictorConfig,
)


@pytest.fixture(scope="module")
def model() -> PretrainedModel:
    common = {"supported_modality_names": ["sentinel1"], "num_heads": 2, "depth": 1}
    pooler = AttentionPoolerConfig(pooler_dim=8, pooler_depth=1, student_dims=[6])
    config = ModelConfig(
        encoder_config=EncoderConfig(
            **common,
            embedding_size=16,
            max_patch_size=2,
            position_encoding="rope",
            attention_pooler_config=pooler,
        ),
        decoder_config=PredictorConfig(
            **common, position_encoding="rope", use_attention_pooler=True, pooler_dim=8
        ),
        projection_only_target=True,
    )
    params = latent_mim.initial_params(config, 4)
    return PretrainedModel(checkpoints.Weights(config, params, None, {}, ()), "small")


def radar(side: int, gap: bool = False) -> Sample:
    rng = np.random.Generator(np.random.Philox(2))
    x = rng.uniform(-25, -5, (side, side, 2, 2))
    if gap:
        x[:, :, 1] = np.nan
    return Sample.from_arrays(
        {"sentinel1": x}, ["2021-01-15", "2021-04-15"], bands={"sentinel1": ["vv", "vh"]}
    )


def test_locations(model):
    assert model.version == "v1_3"
    one = radar(4)
    assert model.embed(one, 2, "location").shape == (1, 2, 2, 8)
    fine = model.embed(one, 2, "student", location_size=1)
    assert fine.shape == (1, 4, 4, 6) and np.isfinite(fine).all()
    gap = model.embed(radar(4, gap=True), 2, "student")
    assert np.isfinite(gap).all() and gap.shape == (1, 2, 2, 6)
    with pytest.raises(ValueError, match="location_size goes with"):
        model.embed(one, 2, "spatial", location_size=1)


def test_domain(model):
    area = radar(8, gap=True)
    whole = model.embed_domain(area, 2, location_size=1, window_px=4)
    assert whole.shape == (8, 8, 6)
    tiled = model.embed_domain(area, 2, location_size=1, window_px=4, crop_px=6, overlap_px=4)
    assert np.abs(tiled - whole).max() < 0.5  # too small a halo: near, not equal
    with pytest.raises(ValueError, match="takes one sample, got 2"):
        model.embed_domain(Sample.concatenate([area, area]), 2, window_px=4)


def test_a_single_window_equals_embed(model):
    area = radar(4)
    lit = model.embed_domain(area, 2, window_px=4, output="location")
    np.testing.assert_allclose(lit, model.embed(area, 2, "location")[0], atol=1e-5)
