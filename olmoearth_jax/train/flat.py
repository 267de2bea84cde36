"""Gradients as one vector: on a CPU, a program that adds and checks one array instead of one per
parameter compiles in half the time.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp


def ravel(tree: Any) -> jax.Array:
    """All leaves in float32, one after the other: [sum of their sizes]."""
    return jnp.concatenate([x.astype(jnp.float32).reshape(-1) for x in jax.tree.leaves(tree)])


def unravel(flat: jax.Array, like: Any) -> Any:
    """The float32 tree of a vector from `ravel`; `like` has the tree's form and shapes."""
    leaves, form = jax.tree.flatten(like)
    out, start = [], 0
    for leaf in leaves:
        size = math.prod(leaf.shape)
        out.append(flat[start : start + size].reshape(leaf.shape))
        start += size
    return jax.tree.unflatten(form, out)
