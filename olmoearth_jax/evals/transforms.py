"""Embedding transforms: int8 and percentile quantisation, PCA (spec/evals.md section 10)."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from olmoearth_jax.data.errors import ReadError
from olmoearth_jax.data.hdf5_file import open_hdf5, stored_array

BITS = (1, 2, 4, 8)


def quantize_int8(x: np.ndarray) -> np.ndarray:
    """Signed square root of float embeddings on an int8 grid."""
    x = np.asarray(x, np.float32)
    return np.rint(np.clip(np.sign(x) * np.sqrt(np.abs(x)) * 127.5, -127, 127)).astype(np.int8)


def dequantize_int8(q: np.ndarray) -> np.ndarray:
    """Inverse of `quantize_int8`, float32."""
    q = q.astype(np.float32)
    return np.sign(q) * (q / np.float32(127.5)) ** 2


@dataclasses.dataclass(frozen=True)
class Buckets:
    """Percentile buckets of one bit depth.

    Attributes:
      quantiles: float32 [D, 2^b + 1] sorted boundaries.
      midpoints: float32 [D, 2^b] values that stand for the buckets.
    """

    quantiles: np.ndarray
    midpoints: np.ndarray

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
    if bits not in BITS:
        raise ValueError(f"quantize_bits must be one of {BITS}, got {bits}")


@dataclasses.dataclass(frozen=True)
class PCA:
    """Principal components of train embeddings, centred and not whitened.

    Attributes:
      mean: [D]; components: [k, D]; variance_retained: share of the variance kept.
    """

    mean: np.ndarray
    components: np.ndarray
    variance_retained: float

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """[..., D] -> float32 [..., k]."""
        return ((x - self.mean) @ self.components.T).astype(np.float32)


def fit_pca(x: np.ndarray, dim: int) -> PCA:
    """PCA of embeddings [..., D] to `dim` dimensions; all leading axes are samples.

    The sign of a component makes its entry of largest magnitude positive.

    Raises:
      ValueError: more dimensions than the data has.
    """
    flat = x.reshape(-1, x.shape[-1]).astype(np.float64)
    if not 1 <= dim <= min(flat.shape):
        raise ValueError(f"embedding_dim {dim} must lie in 1...{min(flat.shape)}")
    mean = flat.mean(0)
    flat = flat - mean
    variance, vectors = np.linalg.eigh(flat.T @ flat)
    components = vectors[:, ::-1][:, :dim].T
    largest = np.take_along_axis(components, np.abs(components).argmax(1)[:, None], 1)
    variance = np.maximum(variance[::-1], 0)
    share = float(variance[:dim].sum() / max(variance.sum(), 1e-30))
    return PCA(mean, components * np.sign(largest), share)
