"""Probes on frozen embeddings and heads of fine-tuned models (spec/evals.md sections 7.1, 11)."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from olmoearth_jax.configlib.tasks import PROBE_TYPES, SPATIAL_TASKS, known
from olmoearth_jax.evals import layers
from olmoearth_jax.evals.layers import Params

HEAD_TYPES = ("linear", "unet")
HEAD_WIDTH = 64


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
    if kind == "attnpool" and width % HEAD_WIDTH:
        raise ValueError(f"probe_type 'attnpool' needs an embedding size divisible by {HEAD_WIDTH}")
    if height_width is None:
        raise ValueError(f"a {task_type} task needs the dataset's height_width")
    pixels = int(math.sqrt(height_width**2 / (embedding_shape[1] * embedding_shape[2])))
    return Head(kind, task_type, num_classes, width, max(pixels, 1), bf16=bf16)


def make_head(kind: str, task_type: str, num_classes: int, width: int, patch_size: int) -> Head:
    """The head of a model that is fine-tuned.

    Raises:
      ValueError: an unknown head, or one that does not fit.
    """
    known("ft_head_type", kind, HEAD_TYPES)
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
    gen, d = layers.rng(seed, purpose), head.width
    out = head.num_classes
    if head.kind == "unet":
        widths = [d] * (int(math.log2(head.pixels)) + 1) + [out]
        return {f"conv{i}": layers.init_conv(gen, d, n) for i, n in enumerate(widths)}, {}
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
    params, stats = {"linear": layers.init_linear(gen, d, out)}, {}
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
        x, stats = layers.batch_norm(params["norm"], stats, x, weight)
    if head.kind == "attnpool":
        out, _ = attention_pool(params, x, head.bf16)
    else:
        out = layers.linear(params["linear"], x, head.bf16)
    if not head.spatial:
        return (out[:, 0] if head.task_type == "scalar_regression" else out), stats
    if head.kind in ("linear", "attnpool"):
        return layers.unfold_patches(out, head.num_classes, head.pixels), stats
    # A linear map commutes with interpolation (its weights sum to 1), and on patches it is far
    # cheaper than on pixels; both interpolating types are therefore one.
    return layers.resize_bilinear(out, x.shape[1] * head.pixels, x.shape[2] * head.pixels), stats


def at_labels(head: Head, out: jax.Array, size: tuple[int, ...] | None) -> jax.Array:
    """Logits of per-pixel tasks at the size of the labels, [B, *size(, C)]; others as they are."""
    if not head.spatial or size is None:
        return out
    out = layers.resize_bilinear(out, *size)
    return out[..., 0] if head.task_type == "regression" else out


def attention_pool(params: Params, x: jax.Array, bf16: bool) -> tuple[jax.Array, jax.Array]:
    """Pools N tokens per position: [B, h, w, N, D] -> ([B, h, w, C*p*p], [B*h*w, heads, 1, N])."""
    b, h, w, n, d = x.shape
    heads = d // HEAD_WIDTH
    kv = layers.linear(params["kv"], x.reshape(b * h * w, n, d), bf16)
    keys, values = (a.reshape(-1, n, heads, HEAD_WIDTH) for a in jnp.split(kv, 2, axis=-1))
    query = params["query"].reshape(heads, HEAD_WIDTH)
    scores = jnp.einsum("hd,bnhd->bhn", query, keys, precision="highest") / math.sqrt(HEAD_WIDTH)
    attention = jax.nn.softmax(scores, axis=-1)
    pooled = jnp.einsum("bhn,bnhd->bhd", attention, values, precision="highest")
    out = layers.linear(params["linear"], pooled.reshape(b, h, w, d), bf16)
    return out, attention[:, :, None, :]


def _unet(params: Params, x: jax.Array) -> jax.Array:
    last = len(params) - 1
    for i in range(last):
        if i:
            x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
        x = jax.nn.relu(layers.conv3x3(params[f"conv{i}"], x))
    return layers.conv3x3(params[f"conv{last}"], x)
