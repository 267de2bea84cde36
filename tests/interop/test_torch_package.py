"""The PyTorch package loads what we export and gives the same outputs."""

import warnings

import numpy as np
import pytest

from olmoearth_jax import load_pretrained
from olmoearth_jax.inference.prepare import prepare
from olmoearth_jax.inference.sample import Sample
from olmoearth_jax.interop import checkpoints
from olmoearth_jax.modalities import get
from olmoearth_jax.model import dense, latent_mim
from olmoearth_jax.model.config import AttentionPoolerConfig, ModelConfig, official_model

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def package():
    pytest.importorskip("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("olmoearth_pretrain_minimal")


def _after_training(config: ModelConfig) -> checkpoints.Weights:
    """Weights with no value left at its start."""
    rng = np.random.Generator(np.random.Philox(3))
    flat = {
        path: x + np.float32(0.05) * rng.standard_normal(x.shape, dtype=np.float32)
        for path, x in latent_mim.flatten(latent_mim.initial_params(config, 1))
    }
    params = latent_mim.unflatten(flat)
    target = latent_mim.target_params(params)
    return checkpoints.Weights(config, params, target, {}, ("worldcover",))


def _nano(version: str) -> ModelConfig:
    names = ["sentinel2_l2a", "sentinel1", "worldcover"]
    if version != "v1_3":
        return official_model("nano", version, names)
    config = official_model("nano", "v1_2", names, faster=True)
    config.encoder_config.attention_pooler_config = AttentionPoolerConfig(
        pooler_dim=64, pooler_depth=1, attn_dim=64, student_dims=[32, 16]
    )
    decoder = config.decoder_config
    assert decoder is not None
    decoder.position_encoding, decoder.use_attention_pooler, decoder.pooler_dim = "rope", True, 64
    return config


@pytest.mark.parametrize("version", ["v1", "v1_1", "v1_2", "v1_3"])
def test_outputs_agree(version, tmp_path, package):
    import torch
    from olmoearth_pretrain_minimal.olmoearth_pretrain_v1.utils import datatypes

    config = _nano(version)
    checkpoints.write(_after_training(config), tmp_path / "ours")
    checkpoints.to_reference(checkpoints.read(tmp_path / "ours"), tmp_path / "theirs")
    encoder = package.load_model_from_path(tmp_path / "theirs").encoder.eval()
    model = load_pretrained(tmp_path / "ours")

    rng = np.random.Generator(np.random.Philox(7))
    sample = Sample.from_arrays(
        {
            "sentinel2_l2a": rng.integers(100, 4000, (2, 16, 16, 2, 12)),
            "sentinel1": rng.uniform(-25, -5, (2, 16, 16, 2, 2)),
        },
        ["2021-01-15", "2021-04-15"],
        bands={n: get(n).bands for n in ("sentinel2_l2a", "sentinel1")},
    )
    names = tuple(sample.data)
    ready = prepare(sample, names, model.slots, 4, model.version, model.ranges)
    fields = {}
    for name in names:
        x = torch.from_numpy(ready.data[name])
        fields[name] = x
        fields[f"{name}_mask"] = torch.zeros(*x.shape[:-1], len(model.slots.of(name)))
    masked = datatypes.MaskedOlmoEarthSample(
        timestamps=torch.from_numpy(ready.timestamps).long(), **fields
    )
    with torch.inference_mode():
        out = encoder(masked, fast_pass=True, patch_size=4)
    theirs = out["tokens_and_masks"]
    ours = dense.encode_dense(
        latent_mim.merge(model.graph, model.params),
        ready.data, ready.masks, ready.timestamps, 4, fast_pass=True,
    )  # fmt: skip
    pairs = [(ours.tokens[name], getattr(theirs, name)) for name in names]
    if ours.locations is not None:
        grid = ours.locations
        pairs.append((grid.tokens, out["location_tokens"]))
        pairs.append((grid.student, out["student_location_tokens"]))
    for got, expected in pairs:
        largest = np.abs(expected.numpy()).max()
        assert np.abs(np.asarray(got) - expected.numpy()).max() <= 1e-4 * largest
