"""The target's parameters: where they start and how they follow (spec/model.md section 10)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, cast

import jax
from flax.traverse_util import flatten_dict, unflatten_dict

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


def ema_decay_at(step: int, max_steps: int, bounds: Sequence[float]) -> float | None:
    """Decay at the 1-based `step`, linear from start to end; None if both are exactly 1.

    None means no update and no metric. Online parameters at that point are those after
    step - 1 updates.
    """
    start, end = bounds
    if start == 1.0 and end == 1.0:
        return None
    return start + step * (end - start) / max_steps


def ema_update(target: Any, online: Any, decay: jax.Array | float) -> Any:
    """decay * target + (1 - decay) * online for each leaf of `target`, paired by path.

    Raises:
      ValueError: `online` lacks a leaf of `target`.
    """
    sources = cast(dict[tuple, Any], flatten_dict(online))
    out, leaves = {}, cast(dict[tuple, Any], flatten_dict(target))
    for path, leaf in leaves.items():
        if path not in sources:
            raise ValueError(f"target parameter {'/'.join(path)!r} has no online counterpart")
        out[path] = (decay * leaf + (1.0 - decay) * sources[path]).astype(leaf.dtype)
    return unflatten_dict(out)
