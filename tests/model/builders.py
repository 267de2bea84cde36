"""Small models and random batches for the model tests."""

from __future__ import annotations

import numpy as np

from olmoearth_jax import modalities
from olmoearth_jax.model import latent_mim
from olmoearth_jax.model.config import EncoderConfig, ModelConfig, PredictorConfig

NAMES = ["sentinel2_l2a", "sentinel1", "worldcover", "era5_10", "latlon"]


def small_config(mode: str = "absolute", kind: str = "latent_mim", **encoder) -> ModelConfig:
    """A model of width 32 with two encoder blocks and one decoder block."""
    common = {"supported_modality_names": NAMES, "mlp_ratio": 2.0, "position_encoding": mode}
    return ModelConfig(
        kind=kind,
        encoder_config=EncoderConfig(
            **common, embedding_size=32, num_heads=2, depth=2, max_patch_size=4, **encoder
        ),
        decoder_config=PredictorConfig(
            **common,
            encoder_embedding_size=encoder.get("output_embedding_size") or 32,
            decoder_embedding_size=32,
            num_heads=2,
            depth=1,
        ),
    )


def random_params(config: ModelConfig, seed: int = 0) -> dict:
    """Parameters with non-trivial norms, biases and embeddings."""
    rng = np.random.Generator(np.random.Philox(seed))
    leaves = {
        path: (x + 0.1 * rng.standard_normal(x.shape)).astype(np.float32)
        for path, x in latent_mim.flatten(latent_mim.initial_params(config, seed))
    }
    return latent_mim.unflatten(leaves)


def random_batch(config: ModelConfig, seed: int = 0, batch: int = 3, grid=(2, 3), steps: int = 2):
    """(data, token masks, timestamps) at patch size 2; every sample has visible tokens."""
    rng = np.random.Generator(np.random.Philox(seed))
    slots = latent_mim.slot_table(config.encoder_config)
    data, masks = {}, {}
    for name in slots.names:
        m = modalities.get(name)
        t = steps if m.multitemporal else 1
        lead = (batch, 2 * grid[0], 2 * grid[1], t) if m.spatial else (batch, t)[: 1 + (t > 1)]
        data[name] = rng.standard_normal((*lead, m.num_bands)).astype(np.float32)
        sets = len(slots.of(name))
        shape = (batch, *grid, t, sets) if m.spatial else (*lead, sets)
        masks[name] = rng.integers(0, 4, shape).astype(np.int8)
    masks["sentinel1"][:, 0, 0] = 0
    stamps = np.stack(
        [
            rng.integers(1, 29, (batch, steps)),
            rng.integers(0, 12, (batch, steps)),
            rng.integers(2016, 2025, (batch, steps)),
        ],
        axis=-1,
    ).astype(np.int32)
    return data, masks, stamps
