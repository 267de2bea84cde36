"""The shape sampler that a config asks for."""

from __future__ import annotations

from olmoearth_jax.config import ExperimentConfig
from olmoearth_jax.data.shape_sampler import ShapeSampler, token_rates
from olmoearth_jax.modalities import Tokenization

SAMPLER_OPTIONS = (
    "min_tokens_per_instance", "temporal_bias", "time_priority_prob", "patch_size_probs",
    "exclude_only_decode_from_budget", "token_budget_excluded_modalities",
)  # fmt: skip
"""Members of `data_loader` that only this sampler reads."""

_LARGEST_CROP_PX = 128
"""Side of the largest crops, also of larger tiles."""


def shape_sampler(config: ExperimentConfig, tile_px: int) -> ShapeSampler | None:
    """The sampler of `config.data_loader` for tiles of that side; None for the rule before v1.3.

    Raises:
      ValueError: no shape is left, or a number out of range.
    """
    loader = config.data_loader
    if not loader.sample_timesteps:
        return None
    excluded = set(loader.token_budget_excluded_modalities)
    if loader.exclude_only_decode_from_budget:
        for masking in (loader.masking_config, loader.masking_config_b):
            if masking is not None:
                excluded |= set(masking.strategy_config.get("only_decode_modalities") or ())
    tokens = config.model.encoder_config.tokenization
    rates = token_rates(
        config.dataset.training_modalities,
        tokens if loader.match_model_tokenization else Tokenization(),
        excluded,
    )
    probs = loader.patch_size_probs
    return ShapeSampler(
        tuple(range(loader.min_patch_size, loader.max_patch_size + 1)),
        tuple(loader.sampled_hw_p_list),
        rates,
        tile_px=min(_LARGEST_CROP_PX, tile_px),
        token_budget=loader.token_budget,
        min_tokens=loader.min_tokens_per_instance,
        temporal_bias=loader.temporal_bias,
        time_priority=loader.time_priority_prob,
        patch_size_probs=None if probs is None else tuple(probs),
    )
