"""Small layers shared by probes and fine-tuning heads, on plain parameter dicts."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

Params = dict

BN_MOMENTUM = 0.1
BN_EPS = 1e-5
_ADAM: Any = optax.scale_by_adam()
_DECAY = 0.01


def rng(seed: int, *purpose: int) -> np.random.Generator:
    """Host generator keyed by a seed and the place it is used at."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, *purpose])))


def init_linear(gen: np.random.Generator, fan_in: int, fan_out: int) -> Params:
    """Kernel [in, out] and bias, uniform in +-1/sqrt(fan_in)."""
    bound = 1 / math.sqrt(fan_in)
    return {
        "kernel": gen.uniform(-bound, bound, (fan_in, fan_out)).astype(np.float32),
        "bias": gen.uniform(-bound, bound, fan_out).astype(np.float32),
    }


def linear(params: Params, x: jax.Array, bf16: bool = False) -> jax.Array:
    """x [..., in] -> [..., out]; with bf16 inputs, weights and result are rounded to bfloat16."""
    kernel, bias = params["kernel"], params["bias"]
    if not bf16:
        return jnp.matmul(x, kernel, precision="highest") + bias
    out = jnp.matmul(round_bf16(x), round_bf16(kernel), precision="highest")
    return round_bf16(out + round_bf16(bias))


def init_conv(gen: np.random.Generator, fan_in: int, out: int) -> Params:
    """Kernel [3, 3, in, out] and bias, uniform in +-1/sqrt(9 fan_in)."""
    flat = init_linear(gen, 9 * fan_in, out)
    return {"kernel": flat["kernel"].reshape(3, 3, fan_in, out), "bias": flat["bias"]}


def conv3x3(params: Params, x: jax.Array) -> jax.Array:
    """3x3 convolution, zero padding: [B, H, W, in] -> [B, H, W, out]."""
    out = jax.lax.conv_general_dilated(
        x, params["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision="highest",
    )  # fmt: skip
    return out + params["bias"]


def round_bf16(x: jax.Array) -> jax.Array:
    """Rounds float32 to bfloat16 precision; unlike a pair of casts it is never optimised away."""
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def batch_norm(
    params: Params, stats: Params, x: jax.Array, weight: jax.Array | None
) -> tuple[jax.Array, Params]:
    """Batch norm over rows of x [B, D], and the running statistics after it.

    Args:
      weight: float [B], 1 for samples that count, or None to use the running statistics.
    """
    if weight is None:
        mean, var = stats["mean"], stats["var"]
    else:
        n = jnp.maximum(weight.sum(), 1)
        mean = jnp.einsum("b,bd->d", weight, x) / n
        var = jnp.einsum("b,bd->d", weight, (x - mean) ** 2) / n
        unbiased = var * n / jnp.maximum(n - 1, 1)
        stats = {
            "mean": (1 - BN_MOMENTUM) * stats["mean"] + BN_MOMENTUM * mean,
            "var": (1 - BN_MOMENTUM) * stats["var"] + BN_MOMENTUM * unbiased,
        }
    out = (x - mean) * jax.lax.rsqrt(var + BN_EPS) * params["scale"] + params["bias"]
    return out, stats


@functools.lru_cache(maxsize=64)
def _corner_weights(size: int, out: int) -> np.ndarray:
    """Bilinear weights [out, size] with the corner samples aligned."""
    weights = np.zeros((out, size), np.float32)
    place = np.arange(out) * (size - 1) / max(out - 1, 1)
    low = np.minimum(np.floor(place).astype(int), max(size - 2, 0))
    part = place - low
    weights[np.arange(out), low] += 1 - part
    weights[np.arange(out), np.minimum(low + 1, size - 1)] += part
    return weights


def resize_bilinear(x: jax.Array, height: int, width: int) -> jax.Array:
    """[B, H, W, C] -> [B, height, width, C], bilinear with aligned corners."""
    if x.shape[1:3] == (height, width):
        return x
    rows, columns = _corner_weights(x.shape[1], height), _corner_weights(x.shape[2], width)
    x = jnp.einsum("ih,bhwc->biwc", rows, x, precision="highest")
    return jnp.einsum("jw,biwc->bijc", columns, x, precision="highest")


def unfold_patches(x: jax.Array, num_classes: int, p: int) -> jax.Array:
    """Patch logits [B, h, w, C*p*p], class-major then row then column -> [B, h*p, w*p, C]."""
    b, h, w, _ = x.shape
    x = x.reshape(b, h, w, num_classes, p, p)
    return x.transpose(0, 1, 4, 2, 5, 3).reshape(b, h * p, w * p, num_classes)


def adamw_init(params: Any) -> tuple[Any, Any]:
    """The two moments before the first step."""
    state = _ADAM.init(params)
    return state.mu, state.nu


def adamw_update(params, grads, moments, step, lr):
    """One AdamW step (betas 0.9/0.999, eps 1e-8) on all parameters; `step` counts from 1."""
    state = optax.ScaleByAdamState(jnp.asarray(step - 1, jnp.int32), *moments)
    direction, state = _ADAM.update(grads, state)
    params = jax.tree.map(lambda p, d: p * (1 - lr * _DECAY) - lr * d, params, direction)
    return params, (state.mu, state.nu)
