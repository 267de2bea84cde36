"""The probe types: initialisation and forward pass (spec/evals.md section 7.1)."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from olmoearth_jax.evals import layers
from olmoearth_jax.evals.layers import Params
from olmoearth_jax.evals.tasks import PROBE_TYPES, SPATIAL_TASKS, known

HEAD_WIDTH = 64


@dataclasses.dataclass(frozen=True)
class Probe:
    """A probe bound to a task; build it with `make_probe`.

    Attributes:
      kind: one of PROBE_TYPES.
      task_type: classification, segmentation, regression or scalar_regression.
      num_classes: outputs per sample or pixel.
      width: embedding size.
      pixels: label pixels per patch side (spatial tasks), else 1.
      bf16: round matrix products to bfloat16, as automatic mixed precision does.
    """

    kind: str
    task_type: str
    num_classes: int
    width: int
    pixels: int = 1
    bf16: bool = True

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
) -> Probe:
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
        return Probe(kind, task_type, num_classes, width, 1, bf16)
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
    return Probe(kind, task_type, num_classes, width, max(pixels, 1), bf16)


def init(probe: Probe, seed: int) -> tuple[Params, Params]:
    """Fresh parameters and running statistics (empty where there is no batch norm)."""
    gen = layers.rng(seed, 0)
    d, patch_out = probe.width, probe.num_classes * probe.pixels**2
    if not probe.spatial:
        params = {
            "norm": {"scale": np.ones(d, np.float32), "bias": np.zeros(d, np.float32)},
            "linear": layers.init_linear(gen, d, probe.num_classes),
        }
        return params, {"mean": np.zeros(d, np.float32), "var": np.ones(d, np.float32)}
    if probe.kind == "attnpool":
        return {
            "query": _truncated_normal(gen, (d,)),
            "kv": {"kernel": _truncated_normal(gen, (d, 2 * d)), "bias": np.zeros(2 * d, "f4")},
            "linear": {
                "kernel": _truncated_normal(gen, (d, patch_out)),
                "bias": np.zeros(patch_out, np.float32),
            },
        }, {}
    out = patch_out if probe.kind == "linear" else probe.num_classes
    return {"linear": layers.init_linear(gen, d, out)}, {}


def _truncated_normal(gen: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Normal of standard deviation 0.02; the cut at +-2 lies a hundred deviations away."""
    return (0.02 * gen.standard_normal(shape)).clip(-2, 2).astype(np.float32)


def forward(
    probe: Probe, params: Params, stats: Params, x: jax.Array, weight: jax.Array | None = None
) -> tuple[jax.Array, Params]:
    """Logits and new running statistics.

    Args:
      x: embeddings; see `make_probe`.
      weight: float [B] while training (1 = sample counts), None while evaluating.

    Returns:
      Classification [B, C]; scalar regression [B]; segmentation [B, h*p, w*p, C]; per-pixel
      regression [B, h*p, w*p].
    """
    x = x.astype(jnp.float32)
    if not probe.spatial:
        x, stats = layers.batch_norm(params["norm"], stats, x, weight)
        out = layers.linear(params["linear"], x, probe.bf16)
        return (out[:, 0] if probe.task_type == "scalar_regression" else out), stats
    if probe.kind == "attnpool":
        out, _ = attention_pool(params, x, probe.bf16)
    else:
        out = layers.linear(params["linear"], x, probe.bf16)
    if probe.kind in ("linear", "attnpool"):
        return layers.unfold_patches(out, probe.num_classes, probe.pixels), stats
    # A linear map commutes with interpolation (its weights sum to 1), and on patches it is far
    # cheaper than on pixels; both interpolating types are therefore one.
    out = layers.resize_bilinear(out, x.shape[1] * probe.pixels, x.shape[2] * probe.pixels)
    return (out[..., 0] if probe.task_type == "regression" else out), stats


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
