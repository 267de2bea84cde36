"""How large the numbers of a config may be: far beyond use, yet small enough to be tried out.

Without these, a slip such as an additional zero fills the memory, overflows, or yields NaN long
after the start. What a number means is judged by `olmoearth_jax.check`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from olmoearth_jax.config import ExperimentConfig


def _up_to(most: float) -> tuple[float, float]:
    """A bound on the size alone, where `check` says what the sign must be."""
    return -most, most


_SEED = (0, 2**63 - 1)
_STEPS = _up_to(10**12)
_SIDE = _up_to(10**4)
_RATE = _up_to(1e6)

_LIMITS: dict[str, tuple[float, float]] = {
    # By the whole path ...
    "dataset.cache_size_gb": (0, 1e9),
    "dataset.samples_per_sec": _up_to(1e9),
    "dataset.seed": _SEED,
    "data_loader.seed": _SEED,
    "data_loader.global_batch_size": _up_to(2**24),
    "data_loader.samples_per_shape": _up_to(2**24),
    "data_loader.num_workers": _up_to(1024),
    "data_loader.prefetch_factor": _up_to(1024),
    "data_loader.token_budget": _up_to(10**9),
    "data_loader.min_tokens_per_instance": _up_to(10**9),
    "data_loader.temporal_bias": _up_to(100),
    "data_loader.repeats": _up_to(10**6),
    "train_module.rank_microbatch_size": _up_to(2**20),
    "train_module.max_grad_norm": _up_to(1e30),
    "trainer.host_timeout_s": _up_to(1e8),
    "trainer.callbacks.validation.interval": _STEPS,
    "trainer.callbacks.validation.samples": _up_to(10**9),
    "trainer.profile.num_steps": _up_to(10**6),
    "init_seed": _SEED,
    "mesh.data": _up_to(10**6),
    "mesh.fsdp": _up_to(10**6),
    # ... or by the name of the member, wherever it stands.
    "alpha": _up_to(1e6),
    "attn_dim": (0, 2**16),
    "back_projection_hidden": _up_to(2**16),
    "bootstrap_seed": _SEED,
    "decoder_embedding_size": _up_to(2**16),
    "depth": _up_to(1000),
    "embedding_size": _up_to(2**16),
    "encoder_embedding_size": _up_to(2**16),
    "ephemeral_save_interval": _STEPS,
    "eps": (1e-30, 1e6),  # float32 divides by it where a gradient is 0
    "gram_max_tokens": _up_to(2**20),
    "image_interval": _STEPS,
    "layer_scale_init": _RATE,
    "lr": _RATE,
    "max_patch_size": _SIDE,
    "max_sequence_length": _up_to(10**4),
    "metrics_collect_interval": _STEPS,
    "min_patch_size": _SIDE,
    "mlp_ratio": _up_to(256),
    "n_bootstrap": (0, 10**6),
    "num_heads": _up_to(1024),
    "num_projection_layers": _up_to(1000),
    "num_register_tokens": _up_to(10**4),
    "num_output_channels": _up_to(2**16),
    "output_embedding_size": (0, 2**16),
    "patch_embed_hidden_sizes": (1, 2**16),
    "pooler_depth": (0, 1000),
    "pooler_dim": (0, 2**16),
    "rope_base": (1e-6, 1e12),
    "rope_coordinate_scale": _RATE,
    "rope_mixed_base": (1e-6, 1e12),
    "rope_temporal_base": (1e-6, 1e12),
    "rope_temporal_coordinate_scale": _RATE,
    "sampled_hw_p_list": _SIDE,
    "save_interval": _STEPS,
    "spatial_unfold": _SIDE,
    "start_step": _STEPS,
    "student_dims": (1, 2**16),
    "t_max": _STEPS,
    "tau": _RATE,
    "temporal_rope_dim_frac": (0, 1),
    "value": _STEPS,
    "warmup": _STEPS,
    "warmup_min_lr": (0, 1e6),
    "weight": _RATE,
    "weight_decay": _RATE,
}
"""Path, or name of a member -> lowest and highest value; numbers in a list are held to it each."""

_OTHERS = _up_to(1e30)
"""Limits of a number that is not named above."""


def _numbers(tree: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """(path, number) for every number in nested mappings and lists."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _numbers(value, f"{path}.{key}" if path else str(key))
    elif isinstance(tree, list | tuple):
        for i, value in enumerate(tree):
            yield from _numbers(value, f"{path}[{i}]")
    elif isinstance(tree, int | float) and not isinstance(tree, bool):
        yield path, tree


def problems(cfg: ExperimentConfig) -> dict[str, str]:
    """Path -> sentence for every number that is not finite or beyond its limits."""
    values = cfg.to_dict()
    del values["common"]["extra_modalities"]  # judged when they are registered
    return judge(values)


def judge(values: Mapping[str, Any], where: str = "") -> dict[str, str]:
    """As `problems`, for nested plain values that stand at `where`."""
    out = {}
    for path, value in _numbers(values, where):
        named = path.partition("[")[0]
        low, high = _LIMITS.get(named) or _LIMITS.get(named.rpartition(".")[2]) or _OTHERS
        if isinstance(value, float) and not math.isfinite(value):
            out[path] = f"{path} must be a finite number, got {value}"
        elif value > high:
            out[path] = f"{path} must be at most {_short(high)}, got {_short(value)}"
        elif value < low:
            out[path] = f"{path} must be at least {_short(low)}, got {_short(value)}"
    return out


def _short(value: float) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) < 40 else f"{text[:20]}... ({len(text)} digits)"
