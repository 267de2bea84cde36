"""Crops made of scattered patches instead of one square (spec/data.md section 7, CutMix)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from olmoearth_jax import modalities as registry
from olmoearth_jax.data.h5 import SampleFile
from olmoearth_jax.data.subset import Choices, Sample, read_sample


@dataclasses.dataclass(frozen=True)
class Pieces:
    """A draw: first timestep, and the patch rows and columns to take, in this order."""

    start_t: int
    rows: np.ndarray
    cols: np.ndarray


def draw_pieces(rng: np.random.Generator, grid: int) -> Callable[[np.ndarray, int], Pieces]:
    """A chooser of `grid` distinct patch rows and columns among a tile's."""

    def choose(starts: np.ndarray, patches: int) -> Pieces:
        start = int(starts[rng.integers(len(starts))])
        rows = rng.choice(patches, size=grid, replace=False)
        return Pieces(start, rows, rng.choice(patches, size=grid, replace=False))

    return choose


def gather_patches(
    array: np.ndarray, rows: Sequence[int] | np.ndarray, cols: Sequence[int] | np.ndarray, px: int
) -> np.ndarray:
    """The patches of `px` x `px` pixels at each (row, column) of [H, W, ...], side by side."""

    def pixels(patches) -> np.ndarray:
        return (np.asarray(patches)[:, None] * px + np.arange(px)).reshape(-1)

    return array[np.ix_(pixels(rows), pixels(cols))]


def read_pieces(
    file: SampleFile,
    names: Sequence[str],
    patch_size: int,
    steps: int,
    choose: Callable[[np.ndarray, int], Pieces],
    out: dict[str, np.ndarray] | None = None,
    **options,
) -> Sample:
    """Reads a sample and gathers scattered patches, the same ones for every modality.

    Finer modalities give whole patches at their own resolution (the reference decimates them).

    Args:
      file: open sample file.
      names: training modalities in sample order.
      patch_size: in 10 m pixels.
      steps: timesteps of the crop.
      choose: maps (start rows, patches per tile side) to the pieces.
      out: arrays to write into; made if None.
      **options: as of `read_sample`.

    Raises:
      ReadError: as `read_sample`.
    """
    drawn: list[Pieces] = []

    def whole_tile(choices: Choices) -> tuple[int, int, int]:
        drawn.append(choose(choices.starts, (file.header.tile_px or 0) // patch_size))
        return drawn[0].start_t, 0, 0

    sample = read_sample(file, names, None, steps, whole_tile, **options)
    arrays = {}
    for name, array in sample.arrays.items():
        modality = registry.get(name)
        if modality.spatial:
            px = patch_size * modality.image_factor
            array = gather_patches(array, drawn[0].rows, drawn[0].cols, px)
        arrays[name] = array
        if out is not None:
            out[name][...] = array
    return dataclasses.replace(sample, arrays=arrays)
