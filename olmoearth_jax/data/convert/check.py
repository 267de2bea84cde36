"""Whether the values of a tile can be measurements at all, before any sample is written."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from olmoearth_jax.data import values
from olmoearth_jax.data.convert.rasters import Loaded
from olmoearth_jax.data.convert.sources import Part, Source
from olmoearth_jax.data.convert.tree import TileJob
from olmoearth_jax.data.derived import is_decibel
from olmoearth_jax.data.errors import ReadError

_SAMPLED = 400_000
_PER_FILE = 1024
_HIGHEST = 30.0
"""Power above which most of an image never is: 15 dB."""
_MANY_ZEROS = 0.05
_AVERAGED = {"worldcereal": (0, 100)}
"""Maps whose published rasters hold averages of their two codes too: told, never refused."""
_POWER_FILLS = (-9999.0,)
"""Of linear radar. -32768 is looked for where its modality is left out."""


def unusual(source: Source, job: TileJob, name: str, loaded: Loaded) -> str:
    """What is odd about the values of a modality of a tile, in words; '' for nothing.

    Raises:
      ReadError: values that cannot be, or in another unit; it names a file that holds them.
    """
    days = [year * 10_000 + (month + 1) * 100 + day for day, month, year in job.dates[name]]
    parts = source.parts(job, name)
    _one_unit(name, loaded, parts)
    try:
        said = _told(name, loaded.values, loaded.missing, max(days, default=None))
    except ValueError as e:
        for path, values_of, gone in _files(loaded, parts):
            try:
                _told(name, values_of, gone)
            except ValueError as found:
                raise ReadError(path, str(found)) from None
        more = f" or one of {len(parts) - 1} other files" if len(parts) > 1 else ""
        raise ReadError(f"{parts[0][0]}{more}", str(e)) from None
    return "; ".join(said)


def _files(
    loaded: Loaded, parts: Sequence[Part], step: int = 1
) -> Iterator[tuple[str, np.ndarray, np.ndarray | None]]:
    """(path, values, missing ones) of each file, of every `step`-th row and column."""
    for path, steps, channels, _ in parts:
        part = (*(slice(None, None, step),) * (loaded.values.ndim - 2), *np.ix_(steps, channels))
        yield path, loaded.values[part], None if loaded.missing is None else loaded.missing[part]


def _one_unit(name: str, loaded: Loaded, parts: Sequence[Part]) -> None:
    """Holds every timestep of every file to the unit, for one has no weight among all values."""
    pixels = math.prod(loaded.values.shape[:-2])
    decibel = set()
    thin = _files(loaded, parts, max(1, math.isqrt(pixels // _PER_FILE)))
    for (path, held, gone), (_, _, _, dtype) in zip(thin, parts, strict=True):
        for step in range(held.shape[-2]):
            flat = held[..., step, :].reshape(-1)
            flat = flat if gone is None else flat[~gone[..., step, :].reshape(-1)]
            if not flat.size:
                continue
            if name == "sentinel1":
                decibel.update(_decibel(held[..., step, :], gone, step))
                wrong = "is decibel in some timesteps or bands and linear power in others"
                wrong = wrong if len(decibel) > 1 else ""
            else:
                wrong = (values.wrong_unit(name, flat, dtype or held.dtype) or ("", ""))[1]
            if wrong:
                raise ReadError(path, f"{name} {wrong}; {values.FLAG_TO_SETTLE}")


def _decibel(held: np.ndarray, gone: np.ndarray | None, step: int) -> set[bool]:
    """Whether each band of radar values [..., bands] of a timestep is decibel."""
    missing = np.zeros(held.shape, bool) if gone is None else gone[..., step, :]
    bands = (held[..., c][~missing[..., c]] for c in range(held.shape[-1]))
    return {is_decibel(band) for band in bands if band.size}


def _told(
    name: str, held: np.ndarray, gone: np.ndarray | None, newest: int | None = None
) -> Sequence[str]:
    """The warnings of `values.check_values` of values [..., T, C], of which some are missing."""
    dtype = held.dtype
    if gone is not None and gone.any():
        held = np.where(gone, np.float32(np.nan), held.astype(np.float32))
    if name == "sentinel1":
        power = held if gone is None else held[~gone]
        if power.size and not is_decibel(power):
            return _judge_power(power)
    odd = []
    if name in _AVERAGED:
        held, odd = _without_averages(name, held)
    how = {"newest": newest, "dtype": dtype, "each_timestep": False}  # `_one_unit` does it
    try:
        return [*odd, *(values.for_rasters(text) for text in values.warnings_of(held, name, **how))]
    except ValueError as e:
        raise ValueError(values.for_rasters(str(e))) from None


def _without_averages(name: str, held: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """(the values with a code where they lie between them, what to say of these)."""
    low, high = _AVERAGED[name]
    between = (held > low) & (held < high)
    if not between.any():
        return held, []
    text = f"{name}: {between.mean():.2%} of the values lie between its codes {low} and {high}"
    return np.where(between, held.dtype.type(low), held), [text]


def _judge_power(power: np.ndarray) -> list[str]:
    """What is odd about linear power; noise removal makes some of it negative.

    Raises:
      ValueError: values that stand for missing data, or counts that are not calibrated.
    """
    for fill in _POWER_FILLS:
        share = float((power == fill).mean())
        if share:
            raise ValueError(
                f"sentinel1 holds {fill:g} in {share:.2%} of its values, which stands for missing "
                f"data: declare it as the nodata value of the file; {values.FLAG_TO_SETTLE}"
            )
    flat = power.ravel(order="K")
    few = flat[:: values.stride(flat.size // _SAMPLED)]
    if (middle := float(np.median(few))) > _HIGHEST:
        raise ValueError(
            f"sentinel1 is neither decibel nor linear power (about 0 to 1): its median is "
            f"{middle:.3g}, like counts that are not calibrated; {values.FLAG_TO_SETTLE}"
        )
    zeros = float((few == 0).mean())
    if zeros > _MANY_ZEROS:
        return [f"sentinel1: {zeros:.0%} of the power is 0, which becomes -100 dB"]
    return []
