"""Values as colours, and colours as PNG files."""

from __future__ import annotations

import struct
import zlib

import numpy as np

from olmoearth_jax import modalities, outputs

RGB = {
    "sentinel2_l2a": ("B04", "B03", "B02"),
    "landsat": ("B4", "B3", "B2"),
    "naip": ("R", "G", "B"),
    "naip_10": ("R", "G", "B"),
}
"""Bands shown as red, green and blue; of other modalities the first three, or the first one."""


def stretched(name: str, values: np.ndarray, grey: float) -> np.ndarray:
    """Colours float64 [..., 3] in 0..1 of values [..., bands], stretched by percentiles.

    Args:
      name: modality.
      values: MISSING where there is none.
      grey: shade of missing pixels.
    """
    bands = modalities.get(name).bands
    wanted = RGB.get(name, bands[:3] if len(bands) >= 3 else bands[:1])
    picked = values[..., [bands.index(b) for b in wanted]].astype(np.float64)
    gone = (picked == modalities.MISSING).any(-1)
    if not gone.all():
        low, high = np.percentile(picked[~gone], (2, 98))
        picked = np.clip((picked - low) / max(high - low, 1e-9), 0, 1)
    picked = np.broadcast_to(picked, (*picked.shape[:-1], 3)).copy()
    picked[gone] = grey
    return picked


def png(image: np.ndarray) -> bytes:
    """A PNG file of an image uint8 [H, W, 3]."""
    height, width = image.shape[:2]
    lines = np.zeros((height, 1 + 3 * width), np.uint8)  # each begins with its filter: none
    lines[:, 1:] = image.reshape(height, -1)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = (
        chunk(b"IHDR", head)
        + chunk(b"tEXt", b"Software\0" + outputs.SOFTWARE.encode())
        + chunk(b"IDAT", zlib.compress(lines.tobytes()))
        + chunk(b"IEND", b"")
    )
    return b"\x89PNG\r\n\x1a\n" + body
