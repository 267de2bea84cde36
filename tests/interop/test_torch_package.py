"""The PyTorch package loads what we export and gives the same outputs, trained or not."""

import subprocess
import sys
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest

from olmoearth_jax import Sample, load_pretrained
from olmoearth_jax.interop import checkpoints, weights
from olmoearth_jax.modalities import get
from olmoearth_jax.model import latent_mim
from olmoearth_jax.model.config import AttentionPoolerConfig, ModelConfig, official_model
from olmoearth_jax.model.uniform_batch import UniformBatch, encode_batch

pytestmark = pytest.mark.torch
ROOT = Path(__file__).resolve().parents[2]
ENCODED = ("sentinel2_l2a", "sentinel1")
INSTALLED = "make test-torch installs PyTorch and the packages to compare with"


@pytest.fixture(scope="module")
def package():
    pytest.importorskip("torch", reason=INSTALLED)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("olmoearth_pretrain_minimal", reason=INSTALLED)


def _after_training(config: ModelConfig) -> checkpoints.Weights:
    """Weights with no value left at its start."""
    rng = np.random.Generator(np.random.Philox(3))
    params = jax.tree.map(
        lambda x: x + np.float32(0.05) * rng.standard_normal(x.shape, dtype=np.float32),
        latent_mim.initial_params(config, 1),
    )
    target = latent_mim.target_params(params)
    return checkpoints.Weights(config, params, target, {}, ("worldcover",))


def _nano(version: str) -> ModelConfig:
    names = [*ENCODED, "worldcover"]
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


def _sample() -> Sample:
    rng = np.random.Generator(np.random.Philox(7))
    return Sample.from_arrays(
        {
            "sentinel2_l2a": rng.integers(100, 4000, (2, 16, 16, 2, 12)),
            "sentinel1": rng.uniform(-25, -5, (2, 16, 16, 2, 2)),
        },
        ["2021-01-15", "2021-04-15"],
        bands={n: get(n).bands for n in ENCODED},
    )


def _outputs_agree(ours: Path, theirs: Path, package) -> None:
    """Tokens, and grids where there are any, to 1e-4 of the largest; patch sizes 4 and 8."""
    import torch
    from olmoearth_pretrain_minimal.olmoearth_pretrain_v1.utils import datatypes

    encoder = package.load_model_from_path(theirs).encoder.eval()
    model = load_pretrained(ours)
    assert load_pretrained(theirs).digest == model.digest
    for patch_size in (4, 8):
        ready = model.prepare(_sample(), patch_size)
        fields = {}
        for name, x in ready.data.items():
            fields[name] = torch.from_numpy(x)
            fields[f"{name}_mask"] = torch.zeros(*x.shape[:-1], len(model.slots.of(name)))
        masked = datatypes.MaskedOlmoEarthSample(
            timestamps=torch.from_numpy(ready.timestamps).long(), **fields
        )
        with torch.inference_mode():
            out = encoder(masked, fast_pass=True, patch_size=patch_size)
        batch = UniformBatch(ready.data, ready.masks, ready.timestamps, patch_size)
        got = encode_batch(latent_mim.merge(model.graph, model.params), batch, fast_pass=True)
        pairs = [(got.tokens[n], getattr(out["tokens_and_masks"], n)) for n in ENCODED]
        if got.locations is not None:
            pairs.append((got.locations.tokens, out["location_tokens"]))
            pairs.append((got.locations.student, out["student_location_tokens"]))
        for value, expected in pairs:
            largest = np.abs(expected.numpy()).max()
            assert np.abs(np.asarray(value) - expected.numpy()).max() <= 1e-4 * largest


@pytest.mark.parametrize("version", ["v1", "v1_1", "v1_2", "v1_3"])
def test_outputs_agree(version, tmp_path, package):
    checkpoints.write(_after_training(_nano(version)), tmp_path / "ours")
    checkpoints.to_reference(checkpoints.read(tmp_path / "ours"), tmp_path / "theirs")
    _outputs_agree(tmp_path / "ours", tmp_path / "theirs", package)


@pytest.mark.slow
@pytest.mark.parametrize("version", ["v1", "v1_1", "v1_2", "v1_3"])
def test_a_trained_run_is_read(version, tmp_path, package):
    """Two steps of the real trainer on the packaged sample, exported by the command."""
    commands = (
        ["launch.train", f"--config=configs/nano.py:smoke,version={version}", "--run_name=run",
         f"--config.common.save_folder={tmp_path / 'run'}", "--config.trainer.max_duration.steps=2",
         "--config.data_loader.num_workers=0",
         "--config.trainer.callbacks.downstream_evaluator.enabled=False"],
        ["tools.convert_weights", "export", f"--checkpoint={tmp_path / 'run'}",
         f"--target={tmp_path / 'theirs'}"],
    )  # fmt: skip
    for command in commands:
        done = subprocess.run(
            [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
    recorded = weights.read_folder(tmp_path / "theirs").decode_only
    assert recorded and not set(recorded) & set(ENCODED)
    _outputs_agree(tmp_path / "run", tmp_path / "theirs", package)


def test_both_accept_the_same_modalities(tmp_path, package):
    checkpoints.to_reference(_after_training(_nano("v1_2")), tmp_path)
    theirs = package.load_model_from_path(tmp_path).encoder
    assert sorted(theirs.encoder_input_modality_names) == sorted(ENCODED)
    assert load_pretrained(tmp_path).modalities == ENCODED


def test_rslearn_embeds_alike(tmp_path, package):
    """rslearn's own normalisation, timesteps and pooling, on raw values."""
    import datetime

    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reader = pytest.importorskip("rslearn.models.olmoearth_pretrain.model", reason=INSTALLED)
        context = pytest.importorskip("rslearn.train.model_context", reason=INSTALLED)
        checkpoints.to_reference(_after_training(_nano("v1_2")), tmp_path)
        theirs = reader.OlmoEarth(
            4, model_path=str(tmp_path), autocast_dtype=None, embedding_size=128,
            use_legacy_timestamps=False, normalize=True,
        ).eval()  # fmt: skip
    sample = _sample()
    dates = [datetime.datetime(y, m + 1, d) for d, m, y in sample.timestamps[0].tolist()]
    times = [(d, d) for d in dates]
    inputs = [
        {
            n: context.RasterImage(
                torch.from_numpy(np.ascontiguousarray(x[i].transpose(3, 2, 0, 1))), times
            )
            for n, x in sample.data.items()
        }
        for i in range(2)
    ]
    with torch.inference_mode():
        got = theirs(context.ModelContext(inputs=inputs, metadatas=[])).feature_maps[0]
    expected = load_pretrained(tmp_path).embed(sample, 4, "spatial")
    difference = np.abs(got.permute(0, 2, 3, 1).numpy() - expected).max()
    assert difference <= 1e-4 * np.abs(expected).max()
