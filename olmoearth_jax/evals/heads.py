"""Heads of fine-tuned models (spec/evals.md section 11)."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from olmoearth_jax.evals import layers
from olmoearth_jax.evals.layers import Params
from olmoearth_jax.evals.tasks import SPATIAL_TASKS, known

HEAD_TYPES = ("linear", "unet")


@dataclasses.dataclass(frozen=True)
class Head:
    """A head bound to a task; build it with `make_head`.

    Attributes:
      kind: 'linear' or 'unet'.
      task_type: classification, segmentation or regression.
      num_classes: outputs per sample or pixel.
      width: embedding size.
      patch_size: pixels per patch side.
    """

    kind: str
    task_type: str
    num_classes: int
    width: int
    patch_size: int

    @property
    def spatial(self) -> bool:
        return self.task_type in SPATIAL_TASKS


def make_head(kind: str, task_type: str, num_classes: int, width: int, patch_size: int) -> Head:
    """The head for a task.

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
    return Head(kind, task_type, num_classes, width, patch_size)


def init(head: Head, seed: int) -> Params:
    """Fresh parameters."""
    gen = layers.rng(seed, 4)
    if head.kind == "linear":
        out = head.num_classes * (head.patch_size**2 if head.task_type == "segmentation" else 1)
        return {"linear": layers.init_linear(gen, head.width, out)}
    steps = int(math.log2(head.patch_size))
    widths = [head.width] * (steps + 1) + [head.num_classes]
    return {f"conv{i}": _init_conv(gen, head.width, out) for i, out in enumerate(widths)}


def _init_conv(gen: np.random.Generator, fan_in: int, out: int) -> Params:
    flat = layers.init_linear(gen, 9 * fan_in, out)
    return {"kernel": flat["kernel"].reshape(3, 3, fan_in, out), "bias": flat["bias"]}


def conv3x3(params: Params, x: jax.Array) -> jax.Array:
    """3x3 convolution, zero padding: [B, H, W, in] -> [B, H, W, out]; kernel [3, 3, in, out]."""
    out = jax.lax.conv_general_dilated(
        x, params["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision="highest",
    )  # fmt: skip
    return out + params["bias"]


def forward(head: Head, params: Params, x: jax.Array, size: tuple[int, int] | None) -> jax.Array:
    """Logits of embeddings [B, D] or [B, h, w, D].

    Args:
      size: height and width of the labels (per-pixel tasks).

    Returns:
      [B, C], segmentation [B, H, W, C], regression [B, H, W].
    """
    if head.kind == "unet":
        out = _unet(params, x)
    else:
        out = layers.linear(params["linear"], x)
        if head.task_type == "segmentation":
            out = layers.unfold_patches(out, head.num_classes, head.patch_size)
    if not head.spatial:
        return out
    assert size is not None
    out = layers.resize_bilinear(out, *size)
    return out[..., 0] if head.task_type == "regression" else out


def _unet(params: Params, x: jax.Array) -> jax.Array:
    last = len(params) - 1
    for i in range(last):
        if i:
            x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
        x = jax.nn.relu(conv3x3(params[f"conv{i}"], x))
    return conv3x3(params[f"conv{last}"], x)
