"""Quantities computed from stored ones: one-hot land cover, NDVI, decibels, tile centres."""

from __future__ import annotations

import math
import re

import numpy as np

from olmoearth_jax import modalities as registry
from olmoearth_jax.modalities import BASE_RESOLUTION_M, IMAGE_TILE_PX, MISSING, WORLDCOVER_CODES

_DB_FLOOR = 1e-10
_NDVI_EPS = 1e-10
_HALF_ROUND_M = 20_037_508.0
"""Half the way round the earth in metres."""


def worldcover_onehot(codes: np.ndarray) -> np.ndarray:
    """Land-cover codes [..., 1] as float32 [..., 11] in the order of WORLDCOVER_CODES.

    Unknown codes give zeros, MISSING gives MISSING in every channel.
    """
    out = (codes == np.asarray(WORLDCOVER_CODES, np.float64)).astype(np.float32)
    return np.where(codes.astype(np.float64) == MISSING, np.float32(MISSING), out)


def ndvi(sentinel2: np.ndarray) -> np.ndarray:
    """NDVI float32 [..., 1] of raw Sentinel-2 values [..., 12] in band order.

    0 where B08 + B04 vanishes, MISSING where either band is.
    """
    bands = registry.get("sentinel2_l2a").bands
    nir = sentinel2[..., bands.index("B08")].astype(np.float32)
    red = sentinel2[..., bands.index("B04")].astype(np.float32)
    total = nir + red
    empty = np.abs(total) < _NDVI_EPS
    value = np.where(empty, np.float32(0), (nir - red) / np.where(empty, np.float32(1), total))
    missing = (nir == MISSING) | (red == MISSING)
    return np.where(missing, np.float32(MISSING), value)[..., None].astype(np.float32)


def to_decibel(power: np.ndarray) -> np.ndarray:
    """Linear backscatter as 10 log10(max(x, 1e-10)), in float32."""
    return (10 * np.log10(np.maximum(power.astype(np.float32), np.float32(_DB_FLOOR)))).astype(
        np.float32
    )


def is_decibel(values: np.ndarray) -> bool:
    """Whether backscatter is in decibel: linear power below -1 is rare, decibel above it too.

    Noise removal makes linear power slightly negative, so the sign alone says nothing.
    """
    return bool(values.size) and float((values < -1).mean()) > 0.1


def tile_latlon(crs: str, col: int, row: int, resolution_factor: int = 16) -> tuple[float, float]:
    """(lat, lon) in degrees of the centre of a tile of the grid (spec/data.md section 3).

    `crs` is 'EPSG:326zz' (northern UTM zone zz) or 'EPSG:327zz' (southern); tiles are 2560 m wide
    at the default pixel size of 16 units of 0.625 m; `row` is negative where the northing is
    positive.

    Raises:
      ValueError: `crs` is not a UTM zone on WGS 84, or the tile is farther away than earth is wide.
    """
    match = re.fullmatch(r"EPSG:32([67])(\d\d)", crs)
    if not match or not 1 <= int(match[2]) <= 60:
        raise ValueError(f"crs must be a UTM zone (EPSG:326zz or EPSG:327zz), got {crs}")
    side = BASE_RESOLUTION_M * resolution_factor * IMAGE_TILE_PX
    if max(abs(col), abs(row)) > _HALF_ROUND_M / side:  # before whole numbers become floats
        raise ValueError(f"tile ({_short(col)}, {_short(row)}) lies nowhere on earth in {crs}")
    northing = -(row + 0.5) * side - (10_000_000.0 if match[1] == "7" else 0.0)
    return _inverse_utm((col + 0.5) * side, northing, int(match[2]))


def _short(number: int) -> str:
    """A number for a message; Python refuses to write out the longest ones."""
    return str(number) if abs(number) < 10**12 else "beyond 10**12"


def _inverse_utm(easting: float, northing: float, zone: int) -> tuple[float, float]:
    """UTM on WGS 84 to (lat, lon) degrees by Krueger's series to sixth order (about 1e-9 m)."""
    f = 1 / 298.257223563
    n = f / (2 - f)
    radius = 6378137.0 / (1 + n) * (1 + n**2 / 4 + n**4 / 64 + n**6 / 256)
    beta = (
        n / 2
        - 2 * n**2 / 3
        + 37 * n**3 / 96
        - n**4 / 360
        - 81 * n**5 / 512
        + 96199 * n**6 / 604800,
        n**2 / 48 + n**3 / 15 - 437 * n**4 / 1440 + 46 * n**5 / 105 - 1118711 * n**6 / 3870720,
        17 * n**3 / 480 - 37 * n**4 / 840 - 209 * n**5 / 4480 + 5569 * n**6 / 90720,
        4397 * n**4 / 161280 - 11 * n**5 / 504 - 830251 * n**6 / 7257600,
        4583 * n**5 / 161280 - 108847 * n**6 / 3991680,
        20648693 * n**6 / 638668800,
    )
    xi, eta = northing / (0.9996 * radius), (easting - 500000.0) / (0.9996 * radius)
    terms = list(enumerate(beta, start=1))
    xi_p = xi - sum(b * math.sin(2 * j * xi) * math.cosh(2 * j * eta) for j, b in terms)
    eta_p = eta - sum(b * math.cos(2 * j * xi) * math.sinh(2 * j * eta) for j, b in terms)
    tau_p = math.sin(xi_p) / math.hypot(math.sinh(eta_p), math.cos(xi_p))
    e2 = f * (2 - f)
    e = math.sqrt(e2)
    tau = tau_p
    for _ in range(5):  # Newton's method; converges to rounding in two or three steps
        root = math.hypot(1, tau)
        sigma = math.sinh(e * math.atanh(e * tau / root))
        guess = tau * math.hypot(1, sigma) - sigma * root
        tau += (tau_p - guess) / math.hypot(1, guess) * (1 + (1 - e2) * tau**2) / ((1 - e2) * root)
    lon = math.degrees(math.atan2(math.sinh(eta_p), math.cos(xi_p))) + 6 * zone - 183
    return math.degrees(math.atan(tau)), lon
