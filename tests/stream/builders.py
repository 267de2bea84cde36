"""Small models, groups and streams shared by the engine tests."""

from __future__ import annotations

import dataclasses

import numpy as np

from olmoearth_jax import masking, modalities
from olmoearth_jax.modalities import MISSING, Tokenization
from olmoearth_jax.model.config import EncoderConfig, ModelConfig, PredictorConfig
from olmoearth_jax.stream.ladder import cheapest, fitting_rungs
from olmoearth_jax.stream.stream_shape import MicroStepSize, StreamSpec
from olmoearth_jax.stream.token_counts import Need
from olmoearth_jax.train.assemble import StreamNeeds, stream_spec

NAMES = ("sentinel2_l2a", "sentinel1", "worldcover", "landsat")
ONLY_DECODE = ("worldcover",)
DEFAULT_TOKENS = Tokenization()
GRID_TIMESTEPS = {1: 4, 2: 4, 3: 3, 4: 2}


def small_model(names=NAMES, **changes) -> ModelConfig:
    """A two-block encoder and one-block decoder of width 32, base patch size 4."""
    shared = {
        "supported_modality_names": list(names),
        "num_heads": 2,
        "mlp_ratio": 2.0,
        "tokenization_overrides": changes.pop("tokenization_overrides", {}),
        "position_encoding": changes.pop("position_encoding", "absolute"),
        "qk_norm": changes.pop("qk_norm", False),
        "rope_mixed_base": 10000.0,
        "rope_temporal_coordinate_scale": 1 / 30,
    }
    output = changes.get("output_embedding_size")
    encoder = EncoderConfig(
        **shared, embedding_size=32, depth=2, max_patch_size=4, drop_path=0.0, **changes
    )
    decoder = PredictorConfig(
        **shared, encoder_embedding_size=output or 32, decoder_embedding_size=32, depth=1
    )
    return ModelConfig(encoder_config=encoder, decoder_config=decoder)


def make_group(
    rng: np.random.Generator,
    size: int,
    grid: int,
    patch_size: int,
    first: int = 0,
    names=NAMES,
    tokenization: Tokenization = DEFAULT_TOKENS,
    strategy: masking.Strategy | None = None,
    missing: float = 0.3,
    holes: tuple[int, ...] = (),
):
    """A group of random pixels with random missing timesteps and modalities, masked twice."""
    steps = GRID_TIMESTEPS[grid]
    strategy = strategy or masking.build(
        {
            "type": "modality_cross_random",
            "allow_encoding_decoding_same_bandset": True,
            "only_decode_modalities": [n for n in ONLY_DECODE if n in names],
        }
    )
    data = {}
    for name in modalities.in_sample_order(names):
        m = modalities.get(name)
        side = grid * patch_size * m.image_factor
        shape = (size, *m.axes(side, steps), m.num_bands)
        x = rng.standard_normal(shape).astype(np.float32)
        if m.multitemporal:
            gone = rng.random((size, steps)) < missing
            at = (slice(None), slice(None)) if m.kind == "space_time" else ()
            for b, t in np.argwhere(gone):
                x[b][(*at, t)] = MISSING
        for b in np.flatnonzero(rng.random(size) < missing / 2):
            x[b] = MISSING
        data[name] = x
    missing_map = masking.missing_tokens(data, patch_size, tokenization)
    day, month, year = (
        rng.integers(low, high, (size, steps)) for low, high in ((1, 28), (0, 12), (2017, 2023))
    )
    stamps = np.stack([day, month, year], -1).astype(np.int32)
    seeds = rng.integers(0, 2**31, 2)
    ok = np.ones(size, bool)
    ok[list(holes)] = False
    position = np.arange(first, first + size)
    group = {
        "position": position,
        "index": position + 100,
        "ok": ok,
        "patch_size": np.int32(patch_size),
        "grid": np.int32(grid),
        "timestamps": stamps,
        "data": data,
    }
    for key, seed in zip(("mask_a", "mask_b"), seeds, strict=True):
        group[key] = strategy(missing_map, masking.MaskContext.whole_group(int(seed), size))
    return group, strategy


def pick_rung(ladder, need: Need) -> int:
    """Number of the cheapest rung that holds a need."""
    return cheapest(fitting_rungs(ladder, need))


def make_spec(
    config: ModelConfig,
    strategy: masking.Strategy,
    samples: int,
    devices: int = 1,
    groups: int = 1,
) -> StreamSpec:
    """The stream of a small model."""
    size = MicroStepSize(samples, devices, groups)
    spec = stream_spec(config, [strategy], GRID_TIMESTEPS, size, StreamNeeds())
    return dataclasses.replace(spec, chunk=2)
