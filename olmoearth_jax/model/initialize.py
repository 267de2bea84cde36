"""Initial values of every parameter, by its path (spec section 11)."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

from olmoearth_jax import modalities
from olmoearth_jax.model.rope import RopeConfig, mixed_frequencies

if TYPE_CHECKING:
    from olmoearth_jax.model.config import EncoderConfig, ModelConfig, PredictorConfig


_HEADS = ("supervision_head", "location_token_distillation_head")
"""Parts of the parameter tree that the encoder's rule does not reach."""


def _rng(seed: int, path: tuple[str, ...]) -> np.random.Generator:
    text = f"init/{seed}/{'/'.join(path)}"
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def _uniform(rng: np.random.Generator, shape: tuple[int, ...], bound: float) -> np.ndarray:
    out = rng.random(shape, dtype=np.float32)
    out *= np.float32(2.0 * bound)
    out -= np.float32(bound)
    return out


def _part(path: tuple[str, ...], config: ModelConfig) -> EncoderConfig | PredictorConfig:
    """The encoder or decoder config that a path belongs to."""
    if path[0] == "reconstructor":
        assert config.reconstructor_config is not None
        return config.reconstructor_config.decoder_config
    part = config.encoder_config if path[0] in ("encoder", *_HEADS) else config.decoder_config
    assert part is not None
    return part


def _plain_bound(path: tuple[str, ...], kernel_shape: tuple[int, ...]) -> float | None:
    """1 / sqrt(fan_in) for layers outside the Xavier rule, else None.

    These are the layers of spatial patch embeddings, the reconstruction heads, and the heads of
    v1.3. A transposed convolution counts its outputs (channels times pixels) as fan-in.
    """
    if path[0] in _HEADS:
        return kernel_shape[0] ** -0.5
    if path[1] == "patch_embeddings" and modalities.get(path[3]).spatial:
        return kernel_shape[0] ** -0.5
    if path[:2] == ("reconstructor", "heads"):
        fan_in = kernel_shape[1] if modalities.get(path[2]).spatial else kernel_shape[0]
        return fan_in**-0.5
    return None


def initial_value(
    path: tuple[str, ...],
    shape: tuple[int, ...],
    kernel_shape: tuple[int, ...] | None,
    config: ModelConfig,
    seed: int,
) -> np.ndarray:
    """float32 initial value of one parameter.

    Args:
      path: its path in the parameter tree.
      shape: its shape.
      kernel_shape: shape of the kernel of the same layer, if there is one.
      config: the model config.
      seed: seed of the run; the stream is keyed by the seed and the path.
    """
    rng = _rng(seed, path)
    leaf = path[-1]
    part = _part(path, config)
    if leaf == "scale":
        return np.ones(shape, np.float32)
    if leaf.startswith("layer_scale"):
        return np.full(shape, part.layer_scale_init, np.float32)
    if leaf == "register_tokens":
        return _uniform(rng, shape, float(np.sqrt(6.0 / sum(shape))))
    if leaf == "rope_freqs":
        rope = RopeConfig.of(part)
        assert rope is not None
        axes, heads, half = shape
        return mixed_frequencies(rng, axes, heads, 2 * half, part.rope_mixed_base)
    if leaf == "learned_query":
        return (0.02 * rng.standard_normal(shape)).astype(np.float32)
    if "channel" in path:
        if part.random_channel_embeddings:
            return rng.random(shape, dtype=np.float32)
        return np.zeros(shape, np.float32)
    if kernel_shape is not None:
        bound = _plain_bound(path, kernel_shape)
        if bound is not None:
            return _uniform(rng, shape, bound)
        if leaf == "kernel":
            return _uniform(rng, shape, float(np.sqrt(6.0 / sum(shape))))
    return np.zeros(shape, np.float32)
