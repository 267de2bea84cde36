"""Random token sets for the loss tests."""

import jax.numpy as jnp
import numpy as np

from olmoearth_jax import losses

SHAPES = {"sentinel2_l2a": 7, "worldcover": 4, "landsat": 5}
TOKEN_LOSSES = {
    "patch_discrimination": {"tau": 0.2},
    "modality_patch_discrimination": {
        "pred2unit": True,
        "weight": 0.5,
        "modality_weights": dict.fromkeys(SHAPES, 2),
    },
    "modality_patch_discrimination_masked_negatives_vec": {
        "same_target_threshold": 0.9,
        "mask_negatives_for_modalities": ["worldcover"],
    },
    "adjusted_patch_discrimination": {},
    "all_discrimination": {},
    "modality_all_discrimination": {"pred2unit": True},
    "l2": {},
    "cosine_similarity": {},
}
"""Token losses of every kind with some settings."""


def build(key: str):
    return losses.build({"type": key, **TOKEN_LOSSES[key]})


def tokens(seed: int, batch: int = 6, dim: int = 6, decoded: float = 0.5):
    """(preds, targets, masks) with repeated targets in worldcover and random roles."""
    rng = np.random.default_rng(seed)
    preds = {m: rng.normal(size=(batch, n, dim)).astype(np.float32) for m, n in SHAPES.items()}
    targets = {m: rng.normal(size=(batch, n, dim)).astype(np.float32) for m, n in SHAPES.items()}
    targets["worldcover"][:, 1] = targets["worldcover"][:, 0]
    masks = {
        m: np.where(rng.random((batch, n)) < decoded, 2, rng.choice([0, 1, 3], (batch, n)))
        for m, n in SHAPES.items()
    }
    return tuple({m: jnp.asarray(a) for m, a in d.items()} for d in (preds, targets, masks))
