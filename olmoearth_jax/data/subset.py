"""From an open file to the arrays of one sample: window, crop, align, derive, normalise.

Results equal those of filling and normalising the whole tile first and cropping afterwards
(spec/data.md sections 6-7), but only the window's pixels are ever read into arrays and cast.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from olmoearth_jax import modalities as registry
from olmoearth_jax.data import derived, timesteps
from olmoearth_jax.data.errors import ReadError
from olmoearth_jax.data.h5 import SampleFile
from olmoearth_jax.data.normalize import normalize
from olmoearth_jax.modalities import MISSING


@dataclasses.dataclass(frozen=True)
class Choices:
    """What the offsets of a crop may be: `starts` (rows of the time axis), and how many rows and
    columns of 10 m pixels the crop can start at."""

    starts: np.ndarray
    rows: int
    cols: int


@dataclasses.dataclass(frozen=True)
class Window:
    """A crop: first timestep, first row and column (10 m pixels), side (10 m pixels), timesteps."""

    start_t: int
    row: int
    col: int
    side: int
    steps: int


@dataclasses.dataclass(frozen=True)
class Sample:
    """One sample.

    Attributes:
      arrays: per modality float32, MISSING where the sample has nothing.
      timestamps: int32 [steps, 3].
      missing: modalities of which the sample has nothing at all.
      length: timesteps of the cut time axis, before padding.
      choices: what the offsets were drawn from.
      window: what was drawn.
    """

    arrays: dict[str, np.ndarray]
    timestamps: np.ndarray
    missing: tuple[str, ...]
    length: int
    choices: Choices
    window: Window


def array_shape(name: str, side: int, steps: int) -> tuple[int, ...]:
    """Shape of one sample's array: [side f, side f, steps or 1, C], [steps, C] or [C]."""
    modality = registry.get(name)
    return (*modality.axes(side * modality.image_factor, steps), modality.num_bands)


def empty_arrays(names: Sequence[str], side: int, steps: int, batch: int | None = None):
    """MISSING-filled float32 arrays per modality, with a leading batch axis if given."""
    lead = () if batch is None else (batch,)
    return {n: np.full((*lead, *array_shape(n, side, steps)), MISSING, np.float32) for n in names}


def draw_offsets(rng: np.random.Generator) -> Callable[[Choices], tuple[int, int, int]]:
    """A chooser of (start_t, row, col), each uniform."""

    def choose(choices: Choices) -> tuple[int, int, int]:
        start = int(choices.starts[rng.integers(len(choices.starts))])
        return start, int(rng.integers(choices.rows)), int(rng.integers(choices.cols))

    return choose


def read_sample(
    file: SampleFile,
    names: Sequence[str],
    side: int | None,
    steps: int,
    choose: Callable[[Choices], tuple[int, int, int]],
    *,
    normalized: bool = True,
    align_time_only: bool = True,
    out: dict[str, np.ndarray] | None = None,
) -> Sample:
    """Reads a crop of a sample.

    Args:
      file: open sample file.
      names: training modalities in sample order.
      side: crop side in 10 m pixels; None for the whole tile.
      steps: timesteps of the crop.
      choose: maps the possible offsets to (start_t, row, col).
      normalized: whether to normalise; False keeps raw values (as float32).
      align_time_only: whether series without a mask (weather) are shifted along when leading
        timesteps are cut. False repeats the reference's misalignment.
      out: MISSING-filled arrays to write into (see `empty_arrays`); made if None.

    Raises:
      ReadError: the file has nothing spatial, is smaller than the crop, or is damaged.
    """
    header = file.header
    if header.tile_px is None:
        raise ReadError(
            file.path,
            f"has none of the trained spatial modalities "
            f"({', '.join(n for n in names if registry.get(n).spatial)})",
        )
    side = header.tile_px if side is None else side
    if side > header.tile_px:
        raise ReadError(file.path, f"is {header.tile_px} px wide, the crop needs {side} px")
    axis = _time_axis(file)
    room = header.tile_px - side + 1
    choices = Choices(timesteps.start_candidates(axis.masks, axis.length, steps), room, room)
    start, row, col = choose(choices)
    window = Window(start, row, col, side, steps)
    arrays = empty_arrays(names, side, steps) if out is None else out
    crop = _Crop(file, axis, window, normalized, align_time_only)
    missing = tuple(n for n in names if not crop.fill(n, names, arrays))
    stamps = axis.timestamps[start : start + steps]
    return Sample(arrays, stamps, missing, axis.length, choices, window)


def _time_axis(file: SampleFile) -> timesteps.TimeAxis:
    try:
        return timesteps.time_axis(file.header.timestamps, file.header.masks)
    except ValueError as e:
        raise ReadError(file.path, str(e)) from e


@dataclasses.dataclass
class _Crop:
    """Fills the arrays of one window, modality by modality."""

    file: SampleFile
    axis: timesteps.TimeAxis
    window: Window
    normalized: bool
    align_time_only: bool

    def fill(self, name: str, names: Sequence[str], arrays: dict[str, np.ndarray]) -> bool:
        """Writes modality `name` into its array; False if the sample has nothing of it.

        Raises:
          ReadError: as `SampleFile.read`, or numbers that are too large once normalised.
        """
        try:
            with np.errstate(over="raise"):
                return self._fill(name, names, arrays)
        except FloatingPointError:
            problem = f"{name!r} holds values too large for float32"
            raise ReadError(self.file.path, problem) from None

    def _fill(self, name: str, names: Sequence[str], arrays: dict[str, np.ndarray]) -> bool:
        if name == "worldcover_onehot":
            found = self._read("worldcover", derived.worldcover_onehot)
        elif name == "ndvi":
            found = self._read("sentinel2_l2a", derived.ndvi) if "sentinel2_l2a" in names else None
        else:
            found = self._read(name, None)
        if found is None:
            return False
        values, rows = found
        if rows is None:
            self._write(values, name, arrays[name])
        elif len(rows) and rows[-1] - rows[0] + 1 == len(rows):
            # Stored steps are in order, so a gapless run can be written as a slice.
            self._write(values, name, arrays[name][..., rows[0] : rows[-1] + 1, :])
        elif len(rows):
            whole = np.empty(values.shape, np.float32)
            self._write(values, name, whole)
            arrays[name][..., rows, :] = whole
        return True

    def _write(self, values: np.ndarray, name: str, out: np.ndarray) -> None:
        """Writes `values` as they are trained on into float32 `out` of their shape."""
        if self.normalized:
            normalize(values, name, out=out)
        else:
            out[...] = values

    def _read(self, source: str, derive) -> tuple[np.ndarray, np.ndarray | None] | None:
        """(raw values, rows of the window they belong to), None if the file lacks `source`."""
        shape = self.file.header.shapes.get(source)
        if shape is None:
            return None
        modality, window = registry.get(source), self.window
        steps = rows = None
        if modality.multitemporal:
            steps, rows = self._place(source, shape[-2])
        f = modality.image_factor
        px_rows = slice(window.row * f, (window.row + window.side) * f)
        px_cols = slice(window.col * f, (window.col + window.side) * f)
        values = self.file.read(source, px_rows, px_cols, steps)
        if source in self.axis.masks and values.dtype.itemsize > 4:
            values = values.astype(np.float32)  # masked series are cast before normalising
        return (values if derive is None else derive(values)), rows

    def _place(self, name: str, stored: int) -> tuple[slice, np.ndarray]:
        window = self.window
        mask = self.axis.masks.get(name)
        if mask is not None:
            return timesteps.placement(mask, stored, window.start_t, window.steps)
        shift = self.axis.first if self.align_time_only else 0
        start = shift + window.start_t
        rows = np.arange(max(0, min(window.steps, stored - start)))
        return slice(start, start + len(rows)), rows
