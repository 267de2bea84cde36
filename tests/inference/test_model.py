"""Loading a converted folder and embedding samples with it."""

import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from huggingface_hub import constants

import olmoearth_jax
from olmoearth_jax import Sample, modalities
from olmoearth_jax.inference import model as inference
from olmoearth_jax.interop import checkpoints
from olmoearth_jax.model import latent_mim
from olmoearth_jax.model.config import EncoderConfig, ModelConfig, PredictorConfig
from olmoearth_jax.model.uniform_batch import UniformBatch, encode_batch

NAMES = ["sentinel2_l2a", "sentinel1", "worldcover"]
S2 = list(modalities.get("sentinel2_l2a").bands)
DATES = ["2021-01-15", "2021-04-15"]


def weights_of(**encoder) -> checkpoints.Weights:
    common = {"supported_modality_names": NAMES, "num_heads": 2, "depth": 1}
    config = ModelConfig(
        encoder_config=EncoderConfig(**common, max_patch_size=4, mlp_ratio=2.0, **encoder),
        decoder_config=PredictorConfig(**common),
    )
    params = latent_mim.initial_params(config, 5)
    return checkpoints.Weights(config, params, None, {}, ("worldcover",))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A converted run folder of a small model."""
    out = tmp_path_factory.mktemp("models")
    checkpoints.write(weights_of(), out / "ours")
    return out / "ours"


@pytest.fixture(scope="module")
def model(folder):
    return olmoearth_jax.load_pretrained(folder)


def sample(batch=1, side=8, seed=0, **kwargs) -> Sample:
    rng = np.random.Generator(np.random.Philox(seed))
    x = rng.integers(100, 4000, (batch, side, side, 2, 12)).astype(np.float32)
    radar = rng.uniform(-25, -5, (batch, side, side, 2, 2))
    return Sample.from_arrays(
        {"sentinel2_l2a": x, "sentinel1": radar},
        DATES,
        bands={"sentinel2_l2a": S2, "sentinel1": ["vv", "vh"]},
        **kwargs,
    )


def test_embeds_like_the_dense_engine(model):
    one = sample(2)
    got = model.embed(one, patch_size=4, pooling="spatial")
    data = {
        n: ((one.data[n] - model.ranges[n][0]) / np.subtract(*model.ranges[n][::-1]))
        for n in one.data
    }
    masks = {n: np.zeros((2, 2, 2, 2, len(model.slots.of(n))), np.int8) for n in data}
    encoder = latent_mim.merge(model.graph, model.params)
    tokens = encode_batch(encoder, UniformBatch(data, masks, one.timestamps, 4)).tokens
    expected = sum(np.asarray(x).mean((3, 4)) for x in tokens.values()) / 2
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    assert model.embed(one, patch_size=4).shape == (2, model.embedding_size)
    assert model.embed(one, 4, "spatial_concat").shape == (2, 2, 2, 4, 16)


def _programs():
    return sum(inference._compiled(one_core)._cache_size() for one_core in (False, True))


def test_batches_do_not_change_results_or_recompile(model):
    many = sample(5)
    whole = model.embed(many, patch_size=4)
    compiled = _programs()
    for size in (1, 2, 3):
        some = model.embed(many.rows(0, size), patch_size=4, batch_size=1)
        np.testing.assert_allclose(some, whole[:size], rtol=1e-4, atol=1e-5)
    assert _programs() <= compiled + 2  # of one sample: for all cores, and for one core each
    listed = model.embed([many.rows(i, i + 1) for i in range(5)], patch_size=4)
    np.testing.assert_array_equal(listed, whole)


def test_missing_timesteps_are_masked(model):
    full = sample()
    x = full.data["sentinel2_l2a"].copy()
    x[:, :, :, 1] = np.nan
    gap = Sample.from_arrays({"sentinel2_l2a": x}, DATES, bands={"sentinel2_l2a": S2})
    short = Sample.from_arrays(
        {"sentinel2_l2a": x[:, :, :, :1]}, DATES[:1], bands={"sentinel2_l2a": S2}
    )
    for pooling in ("instance", "spatial"):
        np.testing.assert_allclose(
            model.embed(gap, 4, pooling), model.embed(short, 4, pooling), rtol=1e-4, atol=1e-5
        )


def test_missing_pixels_are_masked_or_filled(model):
    x = sample().data["sentinel2_l2a"].copy()
    x[:, 0, 0, 0, 0] = np.nan
    bands = {"sentinel2_l2a": S2}
    masked = Sample.from_arrays({"sentinel2_l2a": x}, DATES, bands=bands, nan_pixels="mask")
    filled = Sample.from_arrays({"sentinel2_l2a": x}, DATES, bands=bands, nan_pixels="fill")
    a, b = model.embed(masked, 4, "spatial"), model.embed(filled, 4, "spatial")
    assert np.isfinite(a).all() and np.isfinite(b).all() and not np.allclose(a[0, 0, 0], b[0, 0, 0])
    x[:] = np.nan
    empty = Sample.from_arrays({"sentinel2_l2a": x}, DATES, bands=bands)
    with pytest.raises(ValueError, match="hold no data at all"):
        model.embed(empty, 4)


def test_missing_bands_are_filled_with_a_warning(model):
    x = sample().data["sentinel2_l2a"][..., :4]
    few = Sample.from_arrays({"sentinel2_l2a": x}, DATES, bands={"sentinel2_l2a": S2[:4]})
    assert model.version == "v1_1"
    with pytest.warns(UserWarning, match="were set to 0"):
        assert np.isfinite(model.embed(few, 4)).all()


def test_refused(model):
    one = sample(side=8)
    with pytest.raises(ValueError, match="crop it to 6 x 6, or use a patch size of 1, 2, 4"):
        model.embed(one, patch_size=3)
    with pytest.raises(ValueError, match=r"whole number 1\.\.4"):
        model.embed(one, patch_size=8)
    with pytest.raises(ValueError, match="did you mean 'spatial'"):
        model.embed(one, 4, pooling="spatal")
    with pytest.raises(ValueError, match="needs an attention pooler"):
        model.embed(one, 4, pooling="location")
    with pytest.raises(ValueError, match="unknown pooling_type"):
        model.embed(one, 4, pooling_type="sum")
    alien = Sample.from_arrays({"srtm": np.full((8, 8, 1), 100.0)})
    with pytest.raises(ValueError, match="does not take srtm"):
        model.embed(alien, 4)
    only = Sample.from_arrays({"worldcover": np.full((8, 8, 1), 10.0)})
    with (
        pytest.warns(UserWarning, match="left out worldcover"),
        pytest.raises(ValueError, match="nothing that the encoder takes"),
    ):
        model.embed(only, 4)


@pytest.mark.parametrize(
    ("given", "what"),
    [
        (np.zeros((8, 8, 1, 12)), r"ndarray of shape \[8, 8, 1, 12\]"),
        ([np.zeros((8, 8, 1, 12))], "ndarray of shape"),
        ({"sentinel2_l2a": np.zeros((8, 8, 1, 12))}, "a mapping of sentinel2_l2a"),
        ("sample.h5", "str"),
        (None, "NoneType"),
        (5, "int"),
    ],
)
def test_what_is_no_sample_is_told_how_to_become_one(model, given, what):
    with pytest.raises(ValueError, match=rf"{what}.*Sample\.from_arrays"):
        model.embed(given, 4)


def test_restriction_can_be_switched_off(folder):
    free = olmoearth_jax.load_pretrained(folder, restrict_inputs=False)
    only = Sample.from_arrays({"worldcover": np.full((8, 8, 1), 10.0)})
    assert free.embed(only, 4).shape == (1, 16)


def test_bfloat16(folder, model):
    half = olmoearth_jax.load_pretrained(folder, dtype=jnp.bfloat16)
    one = sample()
    np.testing.assert_allclose(half.embed(one, 4), model.embed(one, 4), rtol=0.1, atol=0.1)
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        olmoearth_jax.load_pretrained(folder, dtype=jnp.float16)


def test_reference_folder_and_hub_cache(folder, tmp_path, monkeypatch):
    loaded = checkpoints.read(folder)
    repo = tmp_path / "models--allenai--OlmoEarth-v1_1-Nano"
    checkpoints.to_reference(loaded, repo / "snapshots" / "abc")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc")
    direct = olmoearth_jax.load_pretrained(repo / "snapshots" / "abc")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    cached = olmoearth_jax.load_pretrained("OlmoEarth-v1_1-nano")
    assert cached.digest == direct.digest == loaded.digest
    assert cached.modalities == ("sentinel2_l2a", "sentinel1")


def test_nothing_to_load_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="neither published weights"):
        olmoearth_jax.load_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no published model"):
        olmoearth_jax.load_pretrained(tmp_path / "absent")


def test_import_is_light():
    code = "import sys, olmoearth_jax; sys.exit('jax' in sys.modules or 'flax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
