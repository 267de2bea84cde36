"""Split of labelled samples by blocks on the ground, so that no test pixel is a neighbour in
training.

A block is a square of the UTM zone of its samples, with northings that are negative in the south.
The result depends on positions, classes and the seed alone, not on the order of the samples.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from olmoearth_jax.modalities import closest
from olmoearth_jax.proposals import known

SPLITS = ("train", "valid", "test")
FRACTIONS = {"train": "0.7", "valid": "0.15", "test": "0.15"}
BLOCK_SIDES = (10240, 5120, 2560, 1280, 640)
"""Metres per side that 'auto' chooses from."""
_MANY, _FEW = 20, 3

Block = tuple[int, int, int]
"""Zone, column and row of a block."""


def blocks_of(zone: Any, easting: Any, northing: Any, side: float) -> list[Block]:
    """The block of each sample.

    Args:
      zone: int [N].
      easting, northing: metres in EPSG:326zz, float [N].
      side: metres.
    """
    east = np.floor(np.asarray(easting, np.float64) / side).astype(int)
    north = np.floor(np.asarray(northing, np.float64) / side).astype(int)
    return list(zip(np.asarray(zone).tolist(), east.tolist(), north.tolist(), strict=True))


def auto_side(zone: Any, easting: Any, northing: Any) -> int:
    """The largest side with at least 20 blocks that hold labels, else with at least 3.

    Raises:
      ValueError: all labels lie in fewer than 3 blocks of any side.
    """
    counts = {s: len(set(blocks_of(zone, easting, northing, s))) for s in BLOCK_SIDES}
    for least in (_MANY, _FEW):
        for side, count in counts.items():
            if count >= least:
                return side
    side, count = min(counts.items())
    raise ValueError(
        f"the labels lie in {count} blocks of {side} m, but a split needs at least {_FEW}: give "
        "a smaller --block, or a column 'split'"
    )


def fractions_of(texts: Mapping[str, str]) -> dict[str, Fraction]:
    """Exact shares of the splits; those of 0 are left out.

    Raises:
      ValueError: an unknown split, no number, or shares that do not sum to 1.
    """
    out = {}
    for name, text in texts.items():
        known("split", name, SPLITS)
        try:
            out[name] = Fraction(str(text))
        except (ValueError, ZeroDivisionError):
            raise ValueError(f"the share of {name} must be a number, got {text!r}") from None
    if any(f < 0 for f in out.values()) or sum(out.values()) != 1 or not out.get("train"):
        shown = ", ".join(f"{n} {t}" for n, t in texts.items())
        raise ValueError(
            f"the shares must be at least 0, sum to 1 and leave training some: {shown}"
        )
    return {s: out[s] for s in SPLITS if out.get(s)}


def assign(
    counts: Mapping[Block, Mapping[Any, int]], seed: int, fractions: Mapping[str, str] = FRACTIONS
) -> dict[Block, str]:
    """The split of each block, in the order in which they were given away.

    Every block goes where its classes are wanted most; sums are exact.

    Args:
      counts: per block the number of samples of each class it holds.
      seed: orders the blocks.
      fractions: share of each split as a decimal text.
    """
    shares = fractions_of(fractions)
    totals: dict[Any, int] = {}
    for held in counts.values():
        for c, n in held.items():
            totals[c] = totals.get(c, 0) + n
    everything = sum(totals.values())
    have = {s: dict.fromkeys(totals, 0) for s in shares}
    out = {}
    for block in sorted(counts, key=lambda b: _key(seed, b)):
        held = {c: n for c, n in counts[block].items() if n}

        def want(split: str, held: Mapping[Any, int] = held) -> tuple[Fraction, Fraction]:
            share, mine = shares[split], have[split]
            gain = sum(
                (Fraction(n, totals[c]) * (1 - Fraction(mine[c]) / (share * totals[c]))
                 for c, n in held.items()), Fraction(0),
            )  # fmt: skip
            return -gain, Fraction(sum(mine.values())) / (share * max(everything, 1))

        best = min(shares, key=want)  # the first of equal ones, in the order of SPLITS
        out[block] = best
        for c, n in held.items():
            have[best][c] += n
    return out


def _key(seed: int, block: Block) -> tuple[bytes, Block]:
    text = ":".join(map(str, (seed, *block)))
    return hashlib.sha256(text.encode()).digest()[:8], block


def distances(
    zone: np.ndarray, low: np.ndarray, high: np.ndarray, blocks: Iterable[Block], side: float
) -> np.ndarray:
    """Chebyshev distance in metres of boxes to the nearest of some blocks of their zone.

    Args:
      zone: int [N].
      low, high: float [N, 2], (easting, northing) of the boxes' corners; equal for points.

    Returns:
      float [N]: inf without a block in the zone, 0 touching, negative by how far they overlap.
    """
    out = np.full(len(zone), np.inf)
    for number, east, north in blocks:
        rows = np.flatnonzero(zone == number)
        if not len(rows):
            continue
        corner = np.array([east, north]) * side
        apart = np.maximum(corner - high[rows], low[rows] - (corner + side)).max(1)
        out[rows] = np.minimum(out[rows], apart)
    return out


@dataclasses.dataclass(frozen=True)
class Split:
    """Where each sample went.

    Attributes:
      names: the split of each sample.
      dropped: bool [N], training samples left out because they lie too near.
      blocks: the split of each block.
      side: metres per side of a block.
      notes: sentences on what a user should know.
    """

    names: list[str]
    dropped: np.ndarray
    blocks: dict[Block, str]
    side: float
    notes: list[str] = dataclasses.field(default_factory=list)

    def rows(self, name: str) -> np.ndarray:
        """Numbers of the samples that a split uses, ascending."""
        mine = np.array([n == name for n in self.names], bool)
        return np.flatnonzero(mine & ~self.dropped)


def split_blocks(
    zone: Any,
    easting: Any,
    northing: Any,
    counts: Sequence[Mapping[Any, int]],
    side: float,
    seed: int = 0,
    fractions: Mapping[str, str] = FRACTIONS,
    gap: float = 0.0,
    boxes: tuple[np.ndarray, np.ndarray] | None = None,
    across: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None = None,
) -> Split:
    """Splits samples by the blocks that hold them.

    Args:
      zone, easting, northing: place of each sample, [N]; metres in EPSG:326zz.
      counts: of each sample, how many labels of each class it carries.
      side: metres per side of a block.
      gap: training samples nearer than so many metres to a valid or test block are left out.
      boxes: (low, high) float [N, 2], what each sample sees of the ground; training samples that
        see a valid or test block are left out too.
      across: (rows, zone, low, high), what some samples see of other zones than their own.

    Raises:
      ValueError: no samples, or shares that are none.
    """
    zone = np.asarray(zone)
    if not len(zone):
        raise ValueError("there are no labelled samples to split")
    place = np.stack([np.asarray(easting, float), np.asarray(northing, float)], 1)
    own = blocks_of(zone, place[:, 0], place[:, 1], side)
    held: dict[Block, dict[Any, int]] = {}
    for block, labels in zip(own, counts, strict=True):
        mine = held.setdefault(block, {})
        for c, n in labels.items():
            mine[c] = mine.get(c, 0) + n
    where = assign(held, seed, fractions)
    names = [where[b] for b in own]
    apart = [b for b, s in where.items() if s != "train"]
    near = distances(zone, place, place, apart, side) < gap
    if boxes is not None:
        near |= distances(zone, *boxes, apart, side) < -1e-6
    if across is not None:
        rows, others, low, high = across
        near[rows[distances(others, low, high, apart, side) < -1e-6]] = True
    near &= np.array([n == "train" for n in names], bool)
    return Split(names, near, where, side, _notes(held, where, fractions, near))


def _notes(held, where, fractions, near) -> list[str]:
    out, shares = [], fractions_of(fractions)
    sizes = dict.fromkeys(shares, 0)
    for block, labels in held.items():
        sizes[where[block]] += sum(labels.values())
    total = sum(sizes.values())
    for name, size in sizes.items():
        got = size / max(total, 1)
        if abs(got - float(shares[name])) > 0.5 * float(shares[name]):
            out.append(
                f"the {name} split holds {got:.0%} of the labels instead of "
                f"{float(shares[name]):.0%}: the labels lie in {len(held)} blocks"
            )
    if near.any():
        out.append(
            f"{int(near.sum())} training samples left out: too near to a valid or test block"
        )
    spread: dict[Any, int] = {}
    for labels in held.values():
        for c, n in labels.items():
            spread[c] = spread.get(c, 0) + bool(n)
    few = [str(c) for c, n in spread.items() if n < len(shares)]
    if few and len(spread) > 1:
        out.append(f"in fewer than {len(shares)} blocks, so not in every split: {', '.join(few)}")
    return out


def given_split(
    texts: Sequence[str],
    zone: Any,
    boxes: tuple[np.ndarray, np.ndarray],
    across: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None = None,
) -> Split:
    """The split that a column of the labels says, as it is.

    Samples of different splits whose boxes overlap are counted in a note.

    Args:
      texts: 'train', 'valid', 'val' or 'test' per sample.
      zone: int [N].
      boxes, across: as in `split_blocks`.

    Raises:
      ValueError: another text, or no training samples.
    """
    names = ["valid" if t == "val" else t for t in texts]
    for name in names:
        if name not in SPLITS:
            raise ValueError(f"the column 'split' holds {name!r}; {closest(name, SPLITS)}")
    if "train" not in names:
        raise ValueError("the column 'split' names no sample 'train'")
    rows, zone, (low, high) = np.arange(len(names)), np.asarray(zone), boxes
    if across is not None:
        rows, zone, low, high = (
            np.concatenate(pair) for pair in zip((rows, zone, low, high), across, strict=True)
        )
    kinds, met = np.array(names)[rows], np.zeros(len(names), bool)
    for number in np.unique(zone):
        mine = np.flatnonzero(zone == number)
        mine = mine[np.argsort(low[mine, 0], kind="stable")]
        # Of those that begin later, the ones that begin before a box ends.
        ends = np.searchsorted(low[mine, 0], high[mine, 0])
        for at, (i, end) in enumerate(zip(mine, ends, strict=True)):
            others = mine[at + 1 : end]
            others = others[kinds[others] != kinds[i]]
            touch = (low[others, 1] < high[i, 1]) & (low[i, 1] < high[others, 1])
            if touch.any():
                met[rows[i]] = met[rows[others[touch]]] = True
    notes = []
    if met.any():
        notes = [
            f"{int(met.sum())} samples see ground that samples of another split see: their scores "
            "are better than those elsewhere"
        ]
    return Split(names, np.zeros(len(names), bool), {}, 0.0, notes)
