"""Simulates the sampler and the masking on real presence patterns, to size the ladder.

Only file headers are read: which modalities and timesteps a sample has. Sized by the draws alone,
capacities would be far too large for data with gaps.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from olmoearth_jax import modalities
from olmoearth_jax.data.draws import rng
from olmoearth_jax.data.errors import ReadError
from olmoearth_jax.data.h5 import open_sample
from olmoearth_jax.data.index import DatasetIndex
from olmoearth_jax.data.timesteps import start_candidates, time_axis
from olmoearth_jax.masking import MaskContext, Strategy, checked_masks
from olmoearth_jax.modalities import DERIVED, MAX_TIMESTEPS
from olmoearth_jax.stream.stream_shape import StreamSpec
from olmoearth_jax.stream.token_counts import (
    Need,
    TokenCounts,
    balance_devices,
    count_tokens,
    needs,
)

_FILES = 192
"""Headers read at most; they stand for the data set."""


@dataclasses.dataclass(frozen=True)
class Presence:
    """What one sample has.

    Attributes:
      length: timesteps after cutting the empty ends.
      steps: per multitemporal modality present, bool [12].
      masks: per modality with a mask, bool [length], where a window may start.
      static: modalities without time axis that are present.
    """

    length: int
    steps: dict[str, np.ndarray]
    masks: dict[str, np.ndarray]
    static: frozenset[str]


class Shape(NamedTuple):
    """What the samples of a simulated group share."""

    grid: int
    timesteps: int
    per_patch: int = 1
    """Locations per side of a patch, where there is a pooler."""


def complete(names: Sequence[str]) -> Presence:
    """A sample that has everything."""
    timed = [n for n in names if modalities.get(n).multitemporal]
    steps = {n: np.ones(MAX_TIMESTEPS, bool) for n in timed}
    return Presence(MAX_TIMESTEPS, steps, {}, frozenset(set(names) - set(timed)))


def read_presence(index: DatasetIndex, limit: int = _FILES) -> list[Presence]:
    """Presence of up to `limit` samples, spread evenly; unreadable ones are left out."""
    count = min(limit, len(index))
    out = []
    for i in np.linspace(0, len(index) - 1, count).astype(int):
        path, _ = index.locate(int(i))
        try:
            with open_sample(path, index.modalities) as file:
                header = file.header
                axis = time_axis(header.timestamps, header.masks)
        except (ReadError, ValueError):
            continue
        out.append(_presence(index.modalities, header.shapes, axis))
    return out


def check_images(index: DatasetIndex, limit: int = 32) -> None:
    """Checks that the dataset has images of the trained modalities.

    Raises:
      ValueError: none of up to `limit` samples, spread evenly, has any; it lists what they have.
    """
    spatial = [n for n in modalities.names() if modalities.get(n).spatial]
    found: set[str] = set()
    for i in np.linspace(0, len(index) - 1, min(limit, len(index))).astype(int):
        path, _ = index.locate(int(i))
        try:
            with open_sample(path, index.modalities) as file:
                if file.header.tile_px is not None:
                    return
            with open_sample(path, spatial) as file:
                found.update(n for n in spatial if DERIVED.get(n, n) in file.header.shapes)
        except (ReadError, ValueError):
            continue
    if found:  # else nothing could be read, which the loader reports file by file
        raise ValueError(
            f"the dataset has no images of the trained modalities ({', '.join(index.modalities)}); "
            f"its samples have {', '.join(sorted(found))}: set common.training_modalities"
        )


def _presence(names: Sequence[str], shapes: Mapping[str, tuple], axis) -> Presence:
    steps, static = {}, set()
    for name in names:
        source = DERIVED.get(name, name)
        if source not in shapes:
            continue
        if not modalities.get(name).multitemporal:
            static.add(name)
            continue
        have = np.zeros(MAX_TIMESTEPS, bool)
        mask = axis.masks.get(source)
        if mask is None:
            have[: axis.length] = True
        else:
            have[: len(mask)] = mask
        steps[name] = have
    return Presence(axis.length, steps, axis.masks, frozenset(static))


def _missing(
    spec: StreamSpec,
    samples: Sequence[Presence],
    grid: int,
    timesteps: int,
    draw: np.random.Generator,
) -> dict[str, np.ndarray]:
    """bool token arrays: what a group of such samples lacks in random windows."""
    sets: dict[str, int] = {}
    for slot in spec.slots:
        sets[slot.modality] = sets.get(slot.modality, 0) + 1
    windows = []
    for s in samples:
        starts = start_candidates(s.masks, s.length, timesteps)
        start = int(starts[draw.integers(len(starts))]) if len(starts) else 0
        windows.append(slice(start, start + timesteps))
    out = {}
    for name in spec.modalities:
        shape = (*modalities.get(name).axes(grid, timesteps), sets[name])
        gone = np.empty((len(samples), *shape), bool)
        for b, (s, window) in enumerate(zip(samples, windows, strict=True)):
            if name in s.steps:
                have = s.steps[name][window]
                have = np.pad(have, (0, timesteps - len(have)))
                gone[b] = ~have[:, None] if len(shape) > 1 else True
            else:
                gone[b] = name not in s.static
        out[name] = gone
    return out


def simulate(
    spec: StreamSpec,
    presence: Sequence[Presence],
    strategies: Sequence[Strategy],
    shapes: Mapping[int, int] | Sequence[Shape],
    seed: int,
    micro_steps: int,
    pool: int | None = None,
) -> Iterator[tuple[list[TokenCounts], Need]]:
    """Simulated micro-steps, dealt over the devices: (token counts, need).

    Args:
      spec: the stream.
      presence: patterns to draw samples from.
      strategies: masking per view.
      shapes: grid side -> timesteps, each as likely; or shapes, each as often as it is likely.
      seed: of the simulation.
      micro_steps: how many to simulate.
      pool: draw micro-steps from so many groups of each shape instead of new ones; drawing masks
        is what takes time, and groups can be combined in many ways.
    """
    if isinstance(shapes, Mapping):
        shapes = [Shape(grid, shapes[grid]) for grid in sorted(shapes)]

    def draw_group(shape: Shape, draw: np.random.Generator) -> TokenCounts:
        group = _group(spec, presence, strategies, *shape[:2], spec.group_size, draw)
        return count_tokens(group, spec, shape.per_patch)

    @functools.cache
    def from_pool(shape: Shape, number: int) -> TokenCounts:
        more = shape[1:] if listed else ()
        return draw_group(shape, rng(seed, "pool", shape.grid, *more, number))

    listed = len({shape.grid for shape in shapes}) < len(shapes)
    earlier = [shapes[:n].count(shape) for n, shape in enumerate(shapes)]
    for n in range(micro_steps):
        draw = rng(seed, "ladder", n)
        counts = []
        for g in range(spec.groups):
            # The first group walks through the shapes, so that each is met as often as it should.
            place = n % len(shapes) if g == 0 else int(draw.integers(len(shapes)))
            if pool is None:
                counts.append(draw_group(shapes[place], draw))
                continue
            # A lone group walks through the pool; several are combined at random.
            walked = n // len(shapes) + earlier[place]
            one = walked % pool if spec.groups == 1 else int(draw.integers(pool))
            counts.append(from_pool(shapes[place], one))
        owner = balance_devices(np.concatenate([c.loads for c in counts]), spec.devices)
        yield counts, needs(counts, owner, spec, spec.devices)


def simulate_needs(
    spec: StreamSpec,
    presence: Sequence[Presence],
    strategies: Sequence[Strategy],
    shapes: Mapping[int, int] | Sequence[Shape],
    seed: int,
    micro_steps: int,
    pool: int | None = None,
) -> list[Need]:
    """Needs of `simulate`, the input of `build_ladder`."""
    drawn = simulate(spec, presence, strategies, shapes, seed, micro_steps, pool)
    return [need for _, need in drawn]


def _group(spec, presence, strategies, grid, timesteps, size, draw) -> dict:
    """A group without pixels: shapes, masks and nothing else."""
    chosen = [presence[i] for i in draw.integers(len(presence), size=size)]
    missing = _missing(spec, chosen, grid, timesteps, draw)
    group = {
        "position": np.arange(size),
        "ok": np.ones(size, bool),
        "grid": grid,
        "timestamps": np.zeros((size, timesteps, 3), np.int32),
    }
    keys = ("mask_a", "mask_b")[: spec.views]
    for key, strategy in zip(keys, strategies, strict=True):
        seeds = draw.integers(0, 2**63, size=size + 1, dtype=np.uint64)
        streams = [np.random.Generator(np.random.Philox(key=int(s))) for s in seeds]
        context = MaskContext(streams[1:], streams[0], size, np.arange(size))
        group[key] = checked_masks(strategy, missing, strategy(missing, context))
    return group
