"""Losses, all in float32 (spec/train.md section 3), and the objective they make up.

Where nothing is decoded every loss is 0 with zero gradient; the reference gives NaN or raises for
some of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from olmoearth_jax import registry
from olmoearth_jax.losses.mae import MAE
from olmoearth_jax.losses.objective import NoTokenLoss, Objective, exit_pairs, spread_of
from olmoearth_jax.losses.pooled import InfoNCE, KoLeo
from olmoearth_jax.losses.rows import Groups, Rows, TokenLoss, rows_value
from olmoearth_jax.losses.token_losses import (
    L1,
    L2,
    AdjustedPatchDiscrimination,
    AllDiscrimination,
    CosineSimilarity,
    CrossEntropy,
    MaskedNegatives,
    MaskedNegativesVec,
    ModalityAllDiscrimination,
    ModalityPatchDiscrimination,
    PatchDiscrimination,
)

Loss = TokenLoss | MAE | InfoNCE | KoLeo

LOSSES: dict[str, type] = {
    "patch_discrimination": PatchDiscrimination,
    "patch_discrimination_new": PatchDiscrimination,
    "modality_patch_discrimination": ModalityPatchDiscrimination,
    "modality_patch_discrimination_new": ModalityPatchDiscrimination,
    "modality_patch_discrimination_vec": ModalityPatchDiscrimination,
    "modality_patch_discrimination_masked_negatives": MaskedNegatives,
    "modality_patch_discrimination_masked_negatives_vec": MaskedNegativesVec,
    "adjusted_patch_discrimination": AdjustedPatchDiscrimination,
    "all_discrimination": AllDiscrimination,
    "modality_all_discrimination": ModalityAllDiscrimination,
    "l1": L1,
    "l2": L2,
    "cosine_similarity": CosineSimilarity,
    "cross_entropy": CrossEntropy,
    "mae": MAE,
    "InfoNCE": InfoNCE,
    "KoLeo": KoLeo,
}
"""Loss class of every registered type; '_new' types are deprecated aliases."""


def build(config: Mapping[str, Any], default: str | None = None) -> Loss:
    """The loss of a config {'type': key, **arguments}, which is left unchanged.

    Args:
      config: the config.
      default: type to assume where the config has none, as in configs saved by the reference.

    Raises:
      ValueError: no or unknown type, unknown argument (the nearest one is named), bad value.
    """
    return registry.build(LOSSES, config, "loss", default)


__all__ = [
    "LOSSES",
    "MAE",
    "CrossEntropy",
    "Groups",
    "InfoNCE",
    "KoLeo",
    "Loss",
    "NoTokenLoss",
    "Objective",
    "Rows",
    "TokenLoss",
    "build",
    "exit_pairs",
    "rows_value",
    "spread_of",
]
