"""Which tokens of a group are missing."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from olmoearth_jax import modalities as registry
from olmoearth_jax.modalities import MISSING, Tokenization


def missing_tokens(
    arrays: Mapping[str, np.ndarray], patch_size: int, tokenization: Tokenization | None = None
) -> dict[str, np.ndarray]:
    """Per modality, bool tokens [B,h,w,T,S], [B,T,S] or [B,S]: true where data is missing.

    A token counts as missing if any band of its band set equals MISSING at the top-left pixel of
    its patch.

    Args:
      arrays: per modality [B, ...] (spatial ones [B, H, W, T, C]).
      patch_size: in 10 m pixels.
      tokenization: the model's band sets; None for the registry's.
    """
    tokenization = tokenization or Tokenization()
    out = {}
    for name, x in arrays.items():
        modality = registry.get(name)
        if modality.spatial:
            step = patch_size * modality.image_factor
            x = x[:, ::step, ::step]
        gone = x == MISSING
        sets = tokenization.band_sets(name)
        out[name] = np.stack([gone[..., list(s)].any(axis=-1) for s in sets], axis=-1)
    return out
