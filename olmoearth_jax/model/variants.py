"""Other ways to compute the same blocks, which nobody has judged on an accelerator yet.

What a user sets is in the config. These are for benchmarks (`tools.bench.gpu_ladder`): each is
equal to what is done today as far as rounding allows, and one that wins becomes what is done.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

ALL = 0
"""Of `Variant.unroll`: every block, without any loop."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """How the blocks of encoder, decoder and pooler are computed in training."""

    unroll: int = 1
    """Blocks that a turn of the loop over blocks holds; `ALL`: all of them, without a loop."""
    narrow: bool = False
    """The residual stream, and what is kept of it for the backward pass, in bfloat16. Norms,
    softmax, losses, sums of products and gradients of parameters stay in float32."""
    keep_hidden: bool = False
    """Keeps what leaves the GELU for the backward pass instead of computing it again."""
    joined: bool = False
    """Projections of the same tokens (queries, keys and values) as one product."""
    norm_once: bool = False
    """Norms find mean and variance in one pass and keep them for the backward pass."""
    turn_again: bool = False
    """Computes rotations (angles, sines, cosines) again in the backward pass."""
    open_again: bool = False
    """Lets the compiler merge what is computed again in the backward pass with what is around it:
    in a loop nothing can be mistaken for the forward pass, which is all that the barriers prevent.
    """

    @property
    def stream_dtype(self) -> Any:
        """Type of the residual stream."""
        return jnp.bfloat16 if self.narrow else jnp.float32

    def again(self, function: Any) -> Any:
        """The function, computed again in the backward pass from its arguments."""
        return jax.checkpoint(function, prevent_cse=not self.open_again)


TODAY = Variant()
"""What training does."""
