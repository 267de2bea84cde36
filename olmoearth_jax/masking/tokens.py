"""Which tokens of a batch are missing."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from olmoearth_jax import modalities
from olmoearth_jax.masking.context import Tokens
from olmoearth_jax.modalities import MISSING, Tokenization


def missing_tokens(
    data: Mapping[str, np.ndarray], patch_size: int, tokenization: Tokenization | None = None
) -> Tokens:
    """Flags, per modality, the tokens whose band set lacks any band at the patch's first pixel.

    Args:
      data: per modality float [B, H*f, W*f, T or 1, C], [B, T, C] or [B, C]; missing elements
        hold -99999 exactly. A remainder of H or W beyond whole patches is ignored.
      patch_size: patch side p in 10 m pixels.
      tokenization: band sets in force; None means the default ones.

    Returns:
      Per modality bool [B, h, w, T or 1, S], [B, T, S] or [B, S] (spec/train.md 2.1a).

    Raises:
      ValueError: patch size below 1 or an unknown modality.
    """
    if patch_size < 1:
        raise ValueError(f"the patch size must be at least 1, got {patch_size}")
    tokenization = tokenization or Tokenization()
    out = {}
    for name, values in data.items():
        spec = modalities.get(name)
        if spec.spatial:
            edge = patch_size * spec.image_factor
            h, w = values.shape[1] // edge, values.shape[2] // edge
            values = values[:, : h * edge : edge, : w * edge : edge]
        gaps = values == MISSING
        sets = tokenization.band_sets(name)
        flags = np.empty((*gaps.shape[:-1], len(sets)), bool)
        for k, bands in enumerate(sets):
            flags[..., k] = gaps[..., list(bands)].any(axis=-1)
        out[name] = flags
    return out
