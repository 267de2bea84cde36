"""Random draws that depend only on what they are for, never on how the work is divided."""

from __future__ import annotations

import hashlib

import numpy as np


def rng(seed: int, purpose: str, *ints: int) -> np.random.Generator:
    """A generator keyed by (seed, purpose, ints...), independent of every other key.

    The key is hashed (BLAKE2b) into a Philox key, so that neighbouring seeds, epochs or positions
    share nothing, and so that any process can make the draws of any position on its own.
    """
    text = repr((int(seed), str(purpose), *(int(i) for i in ints)))
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    key = np.frombuffer(digest, dtype="<u8").astype(np.uint64)
    return np.random.Generator(np.random.Philox(key=key))
