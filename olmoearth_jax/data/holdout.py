"""Which samples of a dataset are kept out of training: whole blocks of the map, by a hash.

Neighbouring tiles look alike, so a split by sample would let a model be judged on what it has seen.
A block's lot depends on the seed and its place alone: more data, another share of it, or another
folder that covers the same place never moves a block from one side to the other.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np

_BLOCKS_PER_DEGREE = 10


def held_out(latlon: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """bool [N]: which samples are for validation.

    Args:
      latlon: float [N, 2] of latitude and longitude in degrees.
      fraction: of the blocks of 0.1 degrees, at least 0 and below 1.
      seed: of the draw.

    Raises:
      ValueError: places that are no numbers.
    """
    places = np.asarray(latlon, np.float64)
    if not np.isfinite(places).all():
        raise ValueError("a split by location needs the place of every sample; some are no numbers")
    # 0.1 is no binary number: the small step keeps 52.3 degrees in the block that begins there.
    cells = np.floor(places * _BLOCKS_PER_DEGREE + 1e-4).astype(np.int64)
    blocks, of = np.unique(cells, axis=0, return_inverse=True)
    lots = np.array([_lot(seed, *block) for block in blocks.tolist()])
    return (lots < fraction)[of.reshape(-1)] if len(lots) else np.zeros(0, bool)


def _lot(seed: int, row: int, column: int) -> float:
    """A number in [0, 1) that a seed and a block always have."""
    digest = hashlib.sha256(f"{seed}:{row}:{column}".encode()).digest()
    return math.ldexp(int.from_bytes(digest[:8], "big") >> 11, -53)
