"""Probes on frozen embeddings and heads of fine-tuned models: layers, losses and forms.

Layers work on plain parameter dicts (spec/evals.md sections 7.1, 7.2, 11). Labels that must not
count are IGNORE (-1) in class rasters and NaN in regression targets, so a padded sample is one
whose labels are all of that kind. Nothing to score gives 0.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from olmoearth_jax.configlib.tasks import PROBE_TYPES, SPATIAL_TASKS
from olmoearth_jax.evals.samples import IGNORE
from olmoearth_jax.proposals import known

Params = dict

_BN_MOMENTUM = 0.1
_BN_EPS = 1e-5
_ADAM: Any = optax.scale_by_adam()
_DECAY = 0.01


def rng(seed: int, *purpose: int) -> np.random.Generator:
    """Host generator keyed by a seed and the place it is used at."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, *purpose])))


def _init_linear(gen: np.random.Generator, fan_in: int, fan_out: int) -> Params:
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


def _init_conv(gen: np.random.Generator, fan_in: int, out: int) -> Params:
    """Kernel [3, 3, in, out] and bias, uniform in +-1/sqrt(9 fan_in)."""
    flat = _init_linear(gen, 9 * fan_in, out)
    return {"kernel": flat["kernel"].reshape(3, 3, fan_in, out), "bias": flat["bias"]}


def _conv3x3(params: Params, x: jax.Array) -> jax.Array:
    """3x3 convolution, zero padding: [B, H, W, in] -> [B, H, W, out]."""
    out = jax.lax.conv_general_dilated(
        x, params["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision="highest",
    )  # fmt: skip
    return out + params["bias"]


def round_bf16(x: jax.Array) -> jax.Array:
    """Rounds float32 to bfloat16 precision; unlike a pair of casts it is never optimised away."""
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def _batch_norm(
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
            "mean": (1 - _BN_MOMENTUM) * stats["mean"] + _BN_MOMENTUM * mean,
            "var": (1 - _BN_MOMENTUM) * stats["var"] + _BN_MOMENTUM * unbiased,
        }
    out = (x - mean) * jax.lax.rsqrt(var + _BN_EPS) * params["scale"] + params["bias"]
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


def cross_entropy(
    logits: jax.Array, labels: jax.Array, class_weights: jax.Array | None = None,
    weights: jax.Array | None = None,
) -> jax.Array:  # fmt: skip
    """Mean cross-entropy over labels that are not IGNORE: logits [..., C], labels int [...].

    With `class_weights` [C] each label counts by its class, with `weights` [...] by its own; the
    mean is still over their number.
    """
    valid = labels != IGNORE
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    if class_weights is not None:
        log_p = log_p * class_weights
    if weights is not None:
        log_p = log_p * weights[..., None]
    # Not a gather, whose gradient would be a scatter, slow on a CPU. IGNORE is no class.
    picked = labels[..., None] == jnp.arange(logits.shape[-1])
    return -jnp.sum(jnp.where(picked, log_p, 0)) / jnp.maximum(valid.sum(), 1)


def dice_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """1 - weighted soft dice over the batch, plus `cross_entropy`: logits [B, H, W, C]."""
    num_classes = logits.shape[-1]
    valid = (labels != IGNORE)[..., None]
    probs = jnp.where(valid, jax.nn.softmax(logits.astype(jnp.float32)), 0)
    truth = jnp.where(valid, jax.nn.one_hot(labels, num_classes), 0)
    axes = tuple(range(logits.ndim - 1))
    overlap, guessed, count = (probs * truth).sum(axes), probs.sum(axes), truth.sum(axes)
    dice = (2 * overlap + 1) / (guessed + count + 1)
    weights = jnp.where(count > 0, count.sum() / (num_classes * jnp.maximum(count, 1)), 1.0)
    weights = weights / (weights.sum() + 1e-8)
    return 1 - jnp.sum(weights * dice) + cross_entropy(logits, labels)


def masked_mse(
    predictions: jax.Array, targets: jax.Array, weights: jax.Array | None = None
) -> jax.Array:
    """Mean squared error over finite targets, each times its weight; 0 if there is none."""
    valid = jnp.isfinite(targets)
    error = jnp.square(predictions.astype(jnp.float32) - jnp.where(valid, targets, 0))
    error = error if weights is None else error * weights
    return jnp.sum(jnp.where(valid, error, 0)) / jnp.maximum(valid.sum(), 1)


def multilabel_soft_margin(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Logistic loss of every logit, mean over classes, then over samples: both [B, C].

    Rows with a negative label do not count.
    """
    valid = (labels >= 0).all(-1)
    signed = jnp.where(labels > 0, 1.0, -1.0) * logits.astype(jnp.float32)
    row = jnp.mean(jax.nn.softplus(-signed), axis=-1)
    return jnp.sum(jnp.where(valid, row, 0)) / jnp.maximum(valid.sum(), 1)


_HEAD_TYPES = ("linear", "unet")
_HEAD_WIDTH = 64


@dataclasses.dataclass(frozen=True)
class Head:
    """A probe or head bound to a task; build it with `make_probe` or `make_head`.

    Attributes:
      kind: one of PROBE_TYPES or HEAD_TYPES.
      task_type: classification, segmentation, regression or scalar_regression.
      num_classes: outputs per sample or pixel.
      width: embedding size.
      pixels: label pixels per patch side (spatial tasks), else 1.
      norm: batch norm before the linear layer.
      bf16: round matrix products to bfloat16, as automatic mixed precision does.
    """

    kind: str
    task_type: str
    num_classes: int
    width: int
    pixels: int = 1
    norm: bool = False
    bf16: bool = False

    @property
    def spatial(self) -> bool:
        return self.task_type in SPATIAL_TASKS


def make_probe(
    kind: str,
    task_type: str,
    num_classes: int,
    embedding_shape: tuple[int, ...],
    height_width: int | None = None,
    bf16: bool = True,
) -> Head:
    """The probe for embeddings of `embedding_shape` ([B, D], [B, h, w, D] or [B, h, w, N, D]).

    Args:
      height_width: pixels per side the data set is declared with (spatial tasks).

    Raises:
      ValueError: a probe type that does not exist or does not fit the task.
    """
    known("probe_type", kind, PROBE_TYPES)
    width = embedding_shape[-1]
    if task_type not in SPATIAL_TASKS:
        if kind != "linear":
            raise ValueError(f"probe_type {kind!r} needs a per-pixel task, not {task_type}")
        return Head(kind, task_type, num_classes, width, norm=True, bf16=bf16)
    if task_type == "regression":
        if kind == "attnpool":
            raise ValueError("probe_type 'attnpool' does not do regression")
        # One value per pixel from a patch-wise linear map would be blocky: always interpolated.
        kind = "bilinear_conv"
    if kind == "attnpool" and width % _HEAD_WIDTH:
        raise ValueError(
            f"probe_type 'attnpool' needs an embedding size divisible by {_HEAD_WIDTH}"
        )
    if height_width is None:
        raise ValueError(f"a {task_type} task needs the dataset's height_width")
    pixels = int(math.sqrt(height_width**2 / (embedding_shape[1] * embedding_shape[2])))
    return Head(kind, task_type, num_classes, width, max(pixels, 1), bf16=bf16)


def make_head(kind: str, task_type: str, num_classes: int, width: int, patch_size: int) -> Head:
    """The head of a model that is fine-tuned.

    Raises:
      ValueError: an unknown head, or one that does not fit.
    """
    known("ft_head_type", kind, _HEAD_TYPES)
    if task_type == "scalar_regression":
        raise ValueError("fine-tuning does not do scalar regression; use linear_probe")
    if kind == "unet" and task_type not in SPATIAL_TASKS:
        raise ValueError(f"ft_head_type 'unet' needs a per-pixel task, not {task_type}")
    if kind == "unet" and patch_size & (patch_size - 1):
        raise ValueError(f"ft_head_type 'unet' needs a power of two, not patch_size {patch_size}")
    if kind == "linear" and task_type == "regression":
        return Head("bilinear_conv", task_type, num_classes, width)
    pixels = patch_size if task_type in SPATIAL_TASKS else 1
    return Head(kind, task_type, num_classes, width, pixels)


def init(head: Head, seed: int, purpose: int = 0) -> tuple[Params, Params]:
    """Fresh parameters and running statistics (empty where there is no batch norm)."""
    gen, d = rng(seed, purpose), head.width
    out = head.num_classes
    if head.kind == "unet":
        widths = [d] * (int(math.log2(head.pixels)) + 1) + [out]
        return {f"conv{i}": _init_conv(gen, d, n) for i, n in enumerate(widths)}, {}
    if head.kind in ("linear", "attnpool"):
        out *= head.pixels**2
    if head.kind == "attnpool":

        def small(*shape: int) -> np.ndarray:
            # Truncated at +-2, which lies a hundred standard deviations away.
            return (0.02 * gen.standard_normal(shape)).clip(-2, 2).astype(np.float32)

        return {
            "query": small(d),
            "kv": {"kernel": small(d, 2 * d), "bias": np.zeros(2 * d, np.float32)},
            "linear": {"kernel": small(d, out), "bias": np.zeros(out, np.float32)},
        }, {}
    params, stats = {"linear": _init_linear(gen, d, out)}, {}
    if head.norm:
        zeros, ones = np.zeros(d, np.float32), np.ones(d, np.float32)
        params["norm"], stats = {"scale": ones, "bias": zeros}, {"mean": zeros, "var": ones}
    return params, stats


def forward(
    head: Head, params: Params, stats: Params, x: jax.Array, weight: jax.Array | None = None
) -> tuple[jax.Array, Params]:
    """Logits and new running statistics.

    Args:
      x: embeddings; see `make_probe`.
      weight: float [B] while training (1 = sample counts), None while evaluating.

    Returns:
      Classification [B, C]; scalar regression [B]; per-pixel tasks [B, h*p, w*p, C].
    """
    x = x.astype(jnp.float32)
    if head.kind == "unet":
        return _unet(params, x), stats
    if head.norm:
        x, stats = _batch_norm(params["norm"], stats, x, weight)
    if head.kind == "attnpool":
        out, _ = attention_pool(params, x, head.bf16)
    else:
        out = linear(params["linear"], x, head.bf16)
    if not head.spatial:
        return (out[:, 0] if head.task_type == "scalar_regression" else out), stats
    if head.kind in ("linear", "attnpool"):
        return unfold_patches(out, head.num_classes, head.pixels), stats
    # A linear map commutes with interpolation (its weights sum to 1), and on patches it is far
    # cheaper than on pixels; both interpolating types are therefore one.
    return resize_bilinear(out, x.shape[1] * head.pixels, x.shape[2] * head.pixels), stats


def at_labels(head: Head, out: jax.Array, size: tuple[int, ...] | None) -> jax.Array:
    """Logits of per-pixel tasks at the size of the labels, [B, *size(, C)]; others as they are."""
    if not head.spatial or size is None:
        return out
    out = resize_bilinear(out, *size)
    return out[..., 0] if head.task_type == "regression" else out


def loss(
    head: Head, out: jax.Array, labels: jax.Array, dice: bool = False,
    class_weights: jax.Array | None = None, multilabel: bool = False,
    weights: jax.Array | None = None,
) -> jax.Array:  # fmt: skip
    """The loss of a head's task on logits at the labels' size, see `at_labels`.

    `weights` [N]: how much each of labels [N] counts; the mean is still over their number.
    """
    if "regression" in head.task_type:
        return masked_mse(out, labels, weights)
    if multilabel:
        return multilabel_soft_margin(out, labels)
    if dice:
        return dice_cross_entropy(out, labels)
    return cross_entropy(out, labels, class_weights, weights)


def attention_pool(params: Params, x: jax.Array, bf16: bool) -> tuple[jax.Array, jax.Array]:
    """Pools N tokens per position: [B, h, w, N, D] -> ([B, h, w, C*p*p], [B*h*w, heads, 1, N])."""
    b, h, w, n, d = x.shape
    heads = d // _HEAD_WIDTH
    kv = linear(params["kv"], x.reshape(b * h * w, n, d), bf16)
    keys, values = (a.reshape(-1, n, heads, _HEAD_WIDTH) for a in jnp.split(kv, 2, axis=-1))
    query = params["query"].reshape(heads, _HEAD_WIDTH)
    scores = jnp.einsum("hd,bnhd->bhn", query, keys, precision="highest") / math.sqrt(_HEAD_WIDTH)
    attention = jax.nn.softmax(scores, axis=-1)
    pooled = jnp.einsum("bhn,bnhd->bhd", attention, values, precision="highest")
    out = linear(params["linear"], pooled.reshape(b, h, w, d), bf16)
    return out, attention[:, :, None, :]


def _unet(params: Params, x: jax.Array) -> jax.Array:
    last = len(params) - 1
    for i in range(last):
        if i:
            x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
        x = jax.nn.relu(_conv3x3(params[f"conv{i}"], x))
    return _conv3x3(params[f"conv{last}"], x)
