"""Codes of a token's part in a view: in this module alone (spec/model.md section 1.2)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np


class _MaskCode(NamedTuple):
    """A code's name in metrics, its words in legends, and its colour."""

    name: str
    words: str
    colour: str

    @property
    def rgb(self) -> tuple[int, int, int]:
        """Red, green and blue, 0..255."""
        red, green, blue = bytes.fromhex(self.colour.lstrip("#"))
        return red, green, blue


VISIBLE, TARGET_ONLY, DECODE, MISSING_TOKEN = range(4)
"""Seen by the online encoder; seen by the target only; predicted; absent from the data."""

CODES = (
    _MaskCode("encoded", "encode", "#2a6fbb"),
    _MaskCode("target_only", "target only", "#9bbfe0"),
    _MaskCode("decoded", "decode", "#e08a2a"),
    _MaskCode("missing", "missing", "#d9d9d9"),
)
"""By code."""


def living(ok: np.ndarray, views: Iterable[Iterable[np.ndarray]]) -> np.ndarray:
    """bool [B]: the good samples with a token to encode in every view; the others are holes.

    Args:
      ok: [B], what could be read.
      views: per view its masks, each [B, ...].
    """
    out = np.array(ok, bool)
    for masks in views:
        seen = [(m == VISIBLE).reshape(len(out), -1).any(1) for m in masks]
        out &= np.any(seen, axis=0)
    return out
