"""The time axis of a sample: cut, pad, and place stored steps (spec/data.md section 6).

Files store only the timesteps a modality has; a mask per modality says which of the sample's
timesteps those are. Nothing here touches pixels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from olmoearth_jax.modalities import MAX_TIMESTEPS, MISSING


@dataclasses.dataclass(frozen=True)
class TimeAxis:
    """A sample's time axis after cutting the empty ends.

    Attributes:
      first: row of the file's timestamps that became row 0.
      length: rows left (at most 12).
      timestamps: int32 [12, 3] (day, month 0-11, year), the last row repeated as padding.
      masks: per modality, bool [length], true where it has a timestep.
    """

    first: int
    length: int
    timestamps: np.ndarray
    masks: dict[str, np.ndarray]


DATE_RANGE = ((1, 31), (0, 11), (1970, 2100))
"""Lowest and highest day, month (from 0) and year of a timestamp."""


def cut_range(masks: Mapping[str, np.ndarray]) -> tuple[int, int] | None:
    """(first, last) row where any mask is true; None without masks; (0, -1) if all are false."""
    if not masks:
        return None
    true = np.concatenate([np.flatnonzero(m) for m in masks.values()])
    return (int(true.min()), int(true.max())) if true.size else (0, -1)


def _pad_timestamps(timestamps: np.ndarray) -> np.ndarray:
    """`timestamps` [t, 3] padded to [12, 3] by repeating the last row, as int32.

    Raises:
      ValueError: no rows, or more than 12.
    """
    rows = len(timestamps)
    if rows == 0:
        raise ValueError("no timestep is present in any of the trained modalities")
    if rows > MAX_TIMESTEPS:
        raise ValueError(f"has {rows} timesteps, at most {MAX_TIMESTEPS} are supported")
    pad = np.repeat(timestamps[-1:], MAX_TIMESTEPS - rows, axis=0)
    return np.concatenate([timestamps, pad]).astype(np.int32)


def time_axis(timestamps: np.ndarray, masks: Mapping[str, np.ndarray]) -> TimeAxis:
    """Cuts rows before the first and after the last present timestep, and pads to 12.

    `timestamps` are whole numbers [t, 3], masks bool [t]; modalities without a mask are left out.

    Raises:
      ValueError: no timestep is left, or more than 12.
    """
    span = cut_range(masks)
    first, last = span if span is not None else (0, len(timestamps) - 1)
    kept = timestamps[first : last + 1]
    cut = {name: np.asarray(m, bool)[first : last + 1] for name, m in masks.items()}
    return TimeAxis(first, len(kept), _pad_timestamps(kept), cut)


def start_candidates(masks: Mapping[str, np.ndarray], length: int, max_t: int) -> np.ndarray:
    """Rows (ascending) where a window of `max_t` timesteps may start.

    Row 0 only, if the whole axis fits; else every row that leaves room and, where there are masks,
    holds data of at least one modality.
    """
    if length <= max_t:
        return np.zeros(1, np.int64)
    rows = np.arange(length - max_t + 1)
    if not masks:
        return rows
    present = np.zeros(length, bool)
    for mask in masks.values():
        present |= mask[:length]
    return rows[present[rows]]


def placement(
    mask: Sequence[bool] | np.ndarray, stored: int, start: int, max_t: int
) -> tuple[slice, np.ndarray]:
    """Which stored steps fall in the window [start, start + max_t), and where they go.

    The k-th stored step belongs to the k-th true entry of `mask`; surplus ones are dropped.

    Returns:
      (slice of stored steps, their rows within the window).
    """
    rows = np.flatnonzero(mask)[:stored]
    lo, hi = np.searchsorted(rows, (start, start + max_t))
    return slice(int(lo), int(hi)), rows[lo:hi] - start


def scatter(data: np.ndarray, mask: np.ndarray, length: int = MAX_TIMESTEPS) -> np.ndarray:
    """`data` [..., t, c] spread over `length` timesteps by `mask`, MISSING elsewhere (float32)."""
    out = np.full((*data.shape[:-2], length, data.shape[-1]), MISSING, np.float32)
    steps, rows = placement(mask, data.shape[-2], 0, length)
    out[..., rows, :] = data[..., steps, :]
    return out
