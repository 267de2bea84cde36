"""Accelerators: what they hold, and how fast they train, from what was measured on one."""

from __future__ import annotations

import dataclasses
import re

GIB = 2.0**30


@dataclasses.dataclass(frozen=True)
class Card:
    """An accelerator, by its vendor's figures.

    Attributes:
      memory_gib: what its driver offers to programs.
      tflops: dense bfloat16 products with float32 sums, TFLOP/s.
      bandwidth: of its memory, TB/s.
    """

    memory_gib: float
    tflops: float
    bandwidth: float


CARDS = {
    "b200": Card(179.0, 2250, 8.0),
    "h200": Card(140.4, 989, 4.8),
    "h100": Card(79.6, 989, 3.35),
    "a100-80": Card(79.2, 312, 2.04),
    "a100-40": Card(39.4, 312, 1.56),
    "l40s": Card(44.9, 362, 0.86),
    "rtx4090": Card(23.9, 165, 1.01),
    "a10g": Card(22.5, 70, 0.6),
    "l4": Card(22.5, 121, 0.3),
}

_KINDS = {
    r"B200\b": "b200",
    r"H200\b": "h200",
    r"H100 80GB HBM3": "h100",
    r"A100.*80GB": "a100-80",
    r"A100.*40GB": "a100-40",
    r"L40S\b": "l40s",
    r"RTX 4090$": "rtx4090",
    r"A10G\b": "a10g",
    r"L4\b": "l4",
}
"""What drivers call the cards; slower ones of the same name (H100 PCIe and NVL) are left out."""


def card_of(device_kind: str) -> str | None:
    """The name in `CARDS` of what a driver calls a device, as 'NVIDIA H100 80GB HBM3'; or None."""
    found = (name for kind, name in _KINDS.items() if re.search(rf"\b{kind}", device_kind))
    return next(found, None)


def rate_of(device_kind: str, devices: int) -> float | None:
    """TFLOP/s of bfloat16 products that so many devices are sold with, or None if not known."""
    card = card_of(device_kind)
    return None if card is None else devices * CARDS[card].tflops


MEASURED_CARD = "h200"
MEASURED_SAMPLES_PER_S = 477.0
"""Of v1.2 Base with official settings on one such card (docs/performance.md)."""
MEASURED_MODEL = "v1.2 Base"
_MEASURED_FLOPS = 0.39e12
"""Operations on real tokens of a sample of that run."""

DEFAULT_SHARE, LARGEST_SHARE = 0.75, 0.92
"""Of a card's memory: what JAX takes if nothing is set, and what can be set without harm."""

READER_CORES_S = (0.0193, 0.0096)
"""CPU seconds to read and mask a sample: published files, and rechunked ones."""


@dataclasses.dataclass(frozen=True)
class Speed:
    """Samples per second of one card.

    Attributes:
      low, high: equal where the rate was measured.
      measured: whether it was, for this very model and card.
    """

    low: float
    high: float
    measured: bool


def speed(card: str, flops_per_sample: float, official: bool) -> Speed:
    """What a card is likely to do.

    A card is taken to be slower than the measured one by its rate of products, or by its memory
    bandwidth: training is bound by either, at times by both.

    Args:
      card: name in `CARDS`.
      flops_per_sample: of an optimiser step, real tokens only.
      official: whether it is the model that was measured.
    """
    at, ours = CARDS[MEASURED_CARD], CARDS[card]
    per_s = MEASURED_SAMPLES_PER_S
    if not official:
        per_s *= _MEASURED_FLOPS / flops_per_sample
    ratios = ours.tflops / at.tflops, ours.bandwidth / at.bandwidth
    return Speed(per_s * min(ratios), per_s * max(ratios), official and card == MEASURED_CARD)


def fit(card: str, needed: float) -> str:
    """Whether so many bytes fit a card: 'yes', 'set' (JAX must be told to take more), or 'no'."""
    share = needed / (CARDS[card].memory_gib * GIB)
    return "yes" if share <= DEFAULT_SHARE else "set" if share <= LARGEST_SHARE else "no"
