"""Embeddings as small integers, of maps and archives, and by percentiles (spec/evals.md 10)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

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
            edges, middles = (stored_array(f, f"{bits}bit/{n}") for n in ("quantiles", "midpoints"))
    except (OSError, ReadError) as e:
        raise ValueError(f"{path} holds no quantile table for {bits} bits: {e}") from e
    shapes, n = (edges.shape, middles.shape), 2**bits
    if edges.ndim != 2 or shapes != ((len(edges), n + 1), (len(edges), n)):
        raise ValueError(
            f"the table of {path} for {bits} bits must be [D, {n + 1}] and [D, {n}], got {shapes}"
        )
    return Buckets(edges, middles)


def check_bits(bits: int) -> None:
    """Raises ValueError for a number of bits that nothing is quantised to."""
    if bits not in BITS:
        raise ValueError(f"quantize_bits must be one of {BITS}, got {bits}")


DTYPES = ("int8", "float16", "float32")
_LEAST, _MOST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
METHODS = ("signed_power", "per_pixel_scale", "linear")
_FORMULAS = {
    "signed_power": "x = sign(q) * (q / 127.5)^2; nodata: q = -128",
    "per_pixel_scale": "x = q * scales; nodata: q = -128",
    "linear": "x = q * scale + offset; nodata: q = -128",
    "": "x as stored; nodata: NaN",
}


@dataclasses.dataclass(frozen=True)
class Rule:
    """How float32 embeddings become stored values.

    Attributes:
      dtype: 'int8', 'float16' or 'float32'.
      method: of int8, else ''.
      normalize: 'l2' or 'none'.
      scale, offset: of 'linear'.
    """

    dtype: str = "int8"
    method: str = "signed_power"
    normalize: str = "l2"
    scale: float = 1.0
    offset: float = 0.0

    @property
    def formula(self) -> str:
        """How to get the values back."""
        return _FORMULAS[self.method]

    @property
    def fill(self) -> float:
        """What is stored where there is no embedding."""
        return NO_VALUE if self.dtype == "int8" else float("nan")


def rule_of(
    dtype: str,
    method: str | None,
    normalize: str | None,
    scale: float | None = None,
    offset: float | None = None,
    short: bool = True,
) -> Rule:
    """The rule of flags, with defaults.

    Args:
      dtype, method, normalize, scale, offset: as given.
      short: the embeddings are the unit-length ones of a student head; decides the default.

    Raises:
      ValueError: choices that do not go together, with the pair that does.
    """
    if dtype == "bfloat16":
        raise ValueError("Zarr has no bfloat16: take --dtype=float16, or float32")
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
    if dtype != "int8":
        if method is not None:
            raise ValueError(f"--quantization goes with --dtype=int8, not {dtype}")
        return Rule(dtype, "", normalize or ("l2" if short else "none"))
    if method is None:
        method = {"l2": "signed_power", "none": "per_pixel_scale", None: None}[normalize]
        method = method or ("signed_power" if short else "per_pixel_scale")
    if method not in METHODS:
        raise ValueError(f"unknown quantization {method!r}; known: {', '.join(METHODS)}")
    fitting = "l2" if method == "signed_power" else "none"
    if normalize is None:
        normalize = fitting
    if method == "signed_power" and normalize != "l2":
        raise ValueError(
            "signed_power holds values of -1 to 1: take --normalize=l2, or "
            "--quantization=per_pixel_scale with --normalize=none"
        )
    if method == "per_pixel_scale" and normalize != "none":
        raise ValueError(
            "per_pixel_scale keeps lengths: take --normalize=none, or "
            "--quantization=signed_power with --normalize=l2"
        )
    if method == "linear" and not (
        scale is not None and _LEAST <= scale <= _MOST and abs(offset or 0.0) <= _MOST
    ):
        raise ValueError(
            "linear needs a --scale above 0 (and an --offset), both float32, for the whole "
            "archive; per_pixel_scale needs none"
        )
    if method != "linear" and (scale is not None or offset is not None):
        raise ValueError(f"--scale and --offset go with --quantization=linear, not {method}")
    return Rule(dtype, method, normalize, 1.0 if scale is None else scale, offset or 0.0)


def unit(x: np.ndarray) -> np.ndarray:
    """x [..., D] / max(|x|, 1e-8), lengths summed in float64, float32."""
    length = np.sqrt((x.astype(np.float64) ** 2).sum(-1, keepdims=True))
    return (x / np.maximum(length, 1e-8)).astype(np.float32)


def quantize(x: np.ndarray, valid: np.ndarray, rule: Rule) -> tuple[np.ndarray, Any, int]:
    """Stored values of embeddings.

    Args:
      x: float32 [..., D].
      valid: bool [...]; the rest becomes nodata.
      rule: see `Rule`.

    Returns:
      (values [..., D] in the rule's dtype, scales float32 [...] of per_pixel_scale or None, number
      of vectors that were clipped).

    Raises:
      ValueError: a value that is not finite where there is data.
    """
    x = np.where(valid[..., None], x, np.float32(0)).astype(np.float32)
    if not np.isfinite(x).all():
        raise ValueError("the model gave values that are not finite")
    if rule.normalize == "l2":
        x = unit(x)
    scales, clipped = None, 0
    if rule.method == "signed_power":
        out = quantize_int8(x)
    elif rule.method == "per_pixel_scale":
        largest = np.abs(x).max(-1)
        scales = np.where(largest > 0, largest / np.float32(127), np.float32(1)).astype(np.float32)
        # The smallest floats have no inverse: their scale may be 0.
        scales = np.where(scales > 0, scales, np.float32(1))
        out = np.clip(np.rint(x / scales[..., None]), -127, 127).astype(np.int8)
        scales = np.where(valid, scales, np.float32(np.inf))
    elif rule.method == "linear":
        raw = np.rint((x - np.float32(rule.offset)) / np.float32(rule.scale))
        clipped = int(((np.abs(raw) > 127).any(-1) & valid).sum())
        out = np.clip(raw, -127, 127).astype(np.int8)
    else:
        with np.errstate(over="ignore"):
            out = x.astype(rule.dtype)
        if not np.isfinite(out).all():
            raise ValueError("the model gave values that float16 cannot hold: --dtype=float32")
    return np.where(valid[..., None], out, np.array(rule.fill, out.dtype)), scales, clipped


def restore(q: Any, rule: Rule, scales: Any = None) -> Any:
    """float32 of stored values [..., D], NaN where there are none.

    Args:
      q: NumPy array, bands last.
      rule: of the archive.
      scales: float32 [...] of per_pixel_scale.
    """
    if rule.dtype != "int8":
        return q.astype(np.float32)
    if rule.method == "signed_power":
        out = dequantize_int8(q)
    elif rule.method == "per_pixel_scale":
        with np.errstate(invalid="ignore"):
            out = q.astype(np.float32) * scales[..., None]
    else:
        out = q.astype(np.float32) * np.float32(rule.scale) + np.float32(rule.offset)
    return np.where(q == NO_VALUE, np.float32(np.nan), out)
