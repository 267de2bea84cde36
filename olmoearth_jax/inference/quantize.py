"""Embeddings as small integers: of maps, and by percentiles (spec/evals.md section 10)."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from olmoearth_jax.data.errors import ReadError
from olmoearth_jax.data.hdf5_file import open_hdf5, stored_array

BITS = (1, 2, 4, 8)
QUANTIZATIONS = ("linear", "power")
"""Rules of `Quantizer`."""
NO_VALUE = -128
"""The int8 of embeddings that are missing."""


def quantize_int8(x: np.ndarray) -> np.ndarray:
    """Signed square root of float embeddings on an int8 grid."""
    x = np.asarray(x, np.float32)
    return np.rint(np.clip(np.sign(x) * np.sqrt(np.abs(x)) * 127.5, -127, 127)).astype(np.int8)


def dequantize_int8(q: np.ndarray) -> np.ndarray:
    """Inverse of `quantize_int8`, float32."""
    q = q.astype(np.float32)
    return np.sign(q) * (q / np.float32(127.5)) ** 2


@dataclasses.dataclass(frozen=True)
class Quantizer:
    """Embeddings as int8 in -127..127; -128 means no data.

    'linear': x = q * scale + offset of its band, which spread the range found over the 8 bits.
    'power': s = q / 127.5, x = s * |s|, the same for all bands (spec/evals.md 10); clips beyond 1.
    """

    lo: np.ndarray
    hi: np.ndarray
    """Range of each band, float [D]."""
    kind: str = "linear"

    @property
    def rule(self) -> str:
        """How to get the values back."""
        return "x = q * scale + offset" if self.kind == "linear" else "s = q / 127.5; x = s * |s|"

    @property
    def scale(self) -> np.ndarray:
        return np.where(self.hi > self.lo, self.hi - self.lo, 1.0) / 254

    @property
    def offset(self) -> np.ndarray:
        return (self.hi + self.lo) / 2

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """int8 of x [..., D]; NaN becomes -128."""
        gone, x = np.isnan(x), np.nan_to_num(x)
        if self.kind == "power":
            out = quantize_int8(x)
        else:
            out = np.clip(np.rint((x - self.offset) / self.scale), -127, 127).astype(np.int8)
        return np.where(gone, np.int8(NO_VALUE), out)


@dataclasses.dataclass(frozen=True)
class Buckets:
    """Percentile buckets of one bit depth."""

    quantiles: np.ndarray
    """float32 [D, 2^b + 1], sorted boundaries."""
    midpoints: np.ndarray
    """float32 [D, 2^b], values that stand for the buckets."""

    def quantize(self, x: np.ndarray) -> np.ndarray:
        """Bucket numbers int8 of x [..., D] (with 8 bits the upper half wraps to negative)."""
        self._check(x)
        out = np.empty(x.shape, np.int64)
        for d, edges in enumerate(self.quantiles):
            out[..., d] = np.searchsorted(edges, x[..., d], side="left") - 1
        return np.clip(out, 0, self.midpoints.shape[1] - 1).astype(np.uint8).view(np.int8)

    def dequantize(self, q: np.ndarray) -> np.ndarray:
        """Midpoints float32 of bucket numbers int8 [..., D]."""
        self._check(q)
        return self.midpoints[np.arange(q.shape[-1]), q.view(np.uint8)]

    def _check(self, x: np.ndarray) -> None:
        if x.shape[-1] != len(self.quantiles):
            raise ValueError(
                f"the quantile table is for {len(self.quantiles)} dimensions, the embeddings "
                f"have {x.shape[-1]}"
            )


def load_buckets(path: str | Path, bits: int) -> Buckets:
    """Reads the table of one bit depth.

    Raises:
      ValueError: missing file or bit depth.
    """
    check_bits(bits)
    try:
        with open_hdf5(Path(path)) as f:
            parts = (stored_array(f, f"{bits}bit/{n}") for n in ("quantiles", "midpoints"))
            return Buckets(*parts)
    except (OSError, ReadError) as e:
        raise ValueError(f"{path} holds no quantile table for {bits} bits: {e}") from e


def check_bits(bits: int) -> None:
    """Raises ValueError for a number of bits that nothing is quantised to."""
    if bits not in BITS:
        raise ValueError(f"quantize_bits must be one of {BITS}, got {bits}")
