"""The target's parameters: where they start and how they follow (spec/model.md section 10)."""

from __future__ import annotations

import hashlib
from typing import Any

from olmoearth_jax.losses import Objective
from olmoearth_jax.model import latent_mim
from olmoearth_jax.model.config import ModelConfig


def start_of(params: Any, objective: Objective) -> Any:
    """The target at the start: the encoder, its patch projection, or nothing (MAE)."""
    if not objective.keeps_target:
        return {}
    return latent_mim.target_params(params, objective.full_target)


def drawn_anew(model: ModelConfig, objective: Objective, seed: int) -> Any:
    """A target with initial values of its own, patch embeddings included.

    The reference leaves the patch embeddings as they are, so that at exit depth 0 nothing
    changes at all; here they are drawn anew.
    """
    digest = hashlib.blake2b(f"target/{seed}".encode(), digest_size=7).digest()
    other = latent_mim.initial_params(model, int.from_bytes(digest, "little"))
    return start_of(other, objective)
