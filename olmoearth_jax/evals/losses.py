"""Losses of probes and fine-tuning, in float32 (spec/evals.md sections 7.2 and 11).

Labels that must not count are IGNORE (-1) in class rasters and NaN in regression targets, so a
padded sample is one whose labels are all of that kind. Nothing to score gives 0.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from olmoearth_jax.evals.samples import IGNORE


def cross_entropy(
    logits: jax.Array, labels: jax.Array, class_weights: jax.Array | None = None
) -> jax.Array:
    """Mean cross-entropy over labels that are not IGNORE: logits [..., C], labels int [...].

    With `class_weights` [C] each label counts by its class; the mean is still over their number.
    """
    valid = labels != IGNORE
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    if class_weights is not None:
        log_p = log_p * class_weights
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


def masked_mse(predictions: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean squared error over finite targets; 0 if there is none."""
    valid = jnp.isfinite(targets)
    error = predictions.astype(jnp.float32) - jnp.where(valid, targets, 0)
    return jnp.sum(jnp.where(valid, error**2, 0)) / jnp.maximum(valid.sum(), 1)


def multilabel_soft_margin(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Logistic loss of every logit, mean over classes, then over samples: both [B, C].

    Rows with a negative label do not count.
    """
    valid = (labels >= 0).all(-1)
    signed = jnp.where(labels > 0, 1.0, -1.0) * logits.astype(jnp.float32)
    row = jnp.mean(jax.nn.softplus(-signed), axis=-1)
    return jnp.sum(jnp.where(valid, row, 0)) / jnp.maximum(valid.sum(), 1)
