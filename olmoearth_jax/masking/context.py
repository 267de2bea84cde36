"""Where a masking strategy takes its random numbers from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Tokens = dict[str, np.ndarray]
"""One array per modality at token level: [B, h, w, T, S], [B, h, w, 1, S], [B, T, S] or [B, S]."""


@dataclass(frozen=True)
class MaskContext:
    """Random sources and place of the samples being masked.

    A draw about one sample uses only that sample's generator, and a draw about the whole group
    only `group_rng`, so a mask never depends on which other samples are masked beside it.

    Attributes:
      rngs: one generator per sample of this call, keyed by (view, position).
      group_rng: generator of the group, the same wherever a part of the group is masked.
      group_size: samples in the whole group (`rank_microbatch_size`).
      members: int64 [B], index of each sample of this call within its group.
      step: number of groups masked before this one since training began; only
        `random_increasing` reads it (None counts as 0).
    """

    rngs: Sequence[np.random.Generator]
    group_rng: np.random.Generator
    group_size: int
    members: np.ndarray
    step: int | None = None

    @classmethod
    def whole_group(cls, seed: int, size: int, step: int | None = None) -> MaskContext:
        """A context for one complete group of `size` samples, keyed by `seed` alone."""
        streams = [np.random.Generator(np.random.Philox(key=[seed, i])) for i in range(size + 1)]
        return cls(streams[1:], streams[0], size, np.arange(size), step)
