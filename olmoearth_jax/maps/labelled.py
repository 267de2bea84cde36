"""From a label file and images to split windows, with every label that is left out counted."""

from __future__ import annotations

import dataclasses
import math
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from olmoearth_jax.maps import label_files, plan, samples
from olmoearth_jax.maps import labels as label_grids
from olmoearth_jax.maps import split as splitting
from olmoearth_jax.maps.label_rasters import LabelRaster
from olmoearth_jax.maps.plan import Period
from olmoearth_jax.maps.samples import Grid, Places, Target, Window
from olmoearth_jax.maps.scenes import Scene

_LEAST = 5
"""Samples that a class needs."""


@dataclasses.dataclass(frozen=True)
class LabelOptions:
    """What is said of the labels and their split.

    Attributes:
      path: of the file.
      label_column, value_column: one of them, or none for a raster.
      values: a raster holds values, not classes; by its type if None.
      classes: names and their order.
      colors: file of colours.
      drop_rare: leave out classes with too few samples.
      all_touched: polygons take every pixel they touch.
      ignore_values: numbers of a raster that are no label.
      resample: 'nearest' for a raster on another grid.
      block: metres per side of a block, or 'auto'.
      gap: metres between training samples and the other blocks.
      fractions: share of each split.
      unit: of values.
      months: window of months around the date of each label that it sees, see `plan.months_of`.
    """

    path: str
    label_column: str | None = None
    value_column: str | None = None
    values: bool | None = None
    classes: Sequence[str] | None = None
    colors: str | None = None
    drop_rare: bool = False
    all_touched: bool = False
    ignore_values: Sequence[float] = ()
    resample: str | None = None
    block: str = "auto"
    gap: float | None = None
    fractions: Mapping[str, str] = dataclasses.field(
        default_factory=lambda: dict(splitting.FRACTIONS)
    )
    unit: str = ""
    months: tuple[int, int] | None = None

    @property
    def column(self) -> str:
        """The column of the labels.

        Raises:
          ValueError: there are two, or none.
        """
        if (self.label_column is None) == (self.value_column is None):
            raise ValueError(
                "give --label_column for classes or --value_column for values, one of them"
            )
        return self.label_column or self.value_column or ""

    def check(self) -> None:
        """Raises ValueError for what has no meaning, or none for labels of this kind."""
        if not Path(self.path).expanduser().is_file():
            raise ValueError(f"there is no label file {self.path}")
        if self.gap is not None and not 0 <= self.gap < math.inf:
            raise ValueError(f"--gap is a distance in metres, got {self.gap:g}")
        if self.colors:
            label_grids.read_colors(Path(self.colors))
        kinds = []
        if self.value_column is not None:
            named = {"classes": self.classes, "class_colors": self.colors,
                     "drop_rare": self.drop_rare}  # fmt: skip
            kinds.append(("--value_column", named))
        if not _is_raster(self.path):
            named = {"ignore_values": self.ignore_values, "resample_labels": self.resample}
            kinds.append(("labels in a table", named))
        elif self.all_touched:
            raise ValueError("--all_touched is for polygons, and the labels are a raster")
        for what, flags in kinds:
            for name, value in flags.items():
                if value:
                    raise ValueError(f"--{name} does not go with {what}")

    def windows(self) -> list[Period]:
        """The windows of months around the dates of the labels, ascending.

        Raises:
          ValueError: the labels have no dates.
        """
        assert self.months is not None
        if _is_raster(self.path):
            raise ValueError("--months needs labels with dates; a raster has none")
        features = label_files.read(Path(self.path), self.column, self.value_column is not None)
        days = samples.days_of(features, True) or []
        found = {plan.around(day, self.months) for day in days if day is not None}
        return sorted(found, key=lambda p: p.first)


@dataclasses.dataclass
class Labelled:
    """Split windows.

    Attributes:
      target: what the labels mean.
      windows, places, split: of each sample, in one order.
      counts: of labels, by what became of them.
      notes: sentences for the user.
    """

    target: Target
    windows: list[Window]
    places: Places
    split: splitting.Split
    counts: dict[str, int]
    notes: list[str]

    def blocks(self) -> np.ndarray:
        """Number of the block of each window, int [N]; without blocks each window is one."""
        if not self.split.blocks:
            return np.arange(len(self.windows))
        p = self.places
        own = splitting.blocks_of(p.zone, p.easting, p.northing, self.split.side)
        numbers = {b: i for i, b in enumerate(sorted(set(own)))}
        return np.array([numbers[b] for b in own])


def _is_raster(path: str) -> bool:
    return Path(path).suffix.lower() in (".tif", ".tiff")


def read(
    o: LabelOptions, scenes: Sequence[Scene], side: int, patch: int, step: int, seed: int
) -> Labelled:
    """Reads, places and splits the labels.

    Args:
      side, patch: pixels per side of a window and of a patch.
      step: pixels per side of what carries a label.
      seed: of the split.

    Raises:
      ValueError: labels that cannot be used.
    """
    counts: dict[str, int] = {}
    if _is_raster(o.path):
        target, grids, notes = _from_raster(o, scenes, side, patch, counts)
    else:
        target, grids, notes = _from_features(o, scenes, counts)
    windows = []
    for number, grid in grids:
        windows += samples.windows_of(grid, number, scenes[number], target, side, patch, step)
        counts["labelled_pixels"] = counts.get("labelled_pixels", 0) + int(
            target.labelled(grid.codes).sum()
        )
    counts["samples"] = sum(int(target.labelled(w.labels).sum()) for w in windows)
    if not windows:
        raise ValueError(f"no label of {o.path} lies on the images ({_shown(counts)})")
    if target.classes is not None:
        windows = _check_classes(o, target, windows, counts, notes)
    else:
        found = np.concatenate([w.labels[np.isfinite(w.labels)] for w in windows])
        if np.ptp(found) == 0:
            raise ValueError(f"all values of {o.path} are {found[0]:g}: there is nothing to learn")
    places = samples.locate(windows, scenes)
    split, more = _split(o, target, windows, places, scenes, side, seed)
    return Labelled(target, windows, places, split, counts, notes + more)


def _shown(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in counts.items() if v) or "none"


def _from_features(o: LabelOptions, scenes: Sequence[Scene], counts: dict[str, int]):
    column, numeric = o.column, o.value_column is not None
    features = label_files.read(Path(o.path), column, numeric)
    total = len(features.shapes) + sum(features.dropped.values())
    counts["features"] = total
    counts |= {k.replace(" ", "_"): v for k, v in features.dropped.items()}
    notes = list(features.notes)
    classes = None
    if not numeric:
        colors = label_grids.read_colors(Path(o.colors)) if o.colors else None
        classes = label_grids.classes_of(features.values, o.classes, colors)
        notes += _alike([c.name for c in classes])
    target = Target(classes, o.unit)
    periods = list(dict.fromkeys(scene.period for scene in scenes))
    rows = samples.by_period(features, periods, o.months)
    notes += _of_other_years(features, scenes)
    counts["without_period"] = len(features.shapes) - sum(map(len, rows.values()))
    grids: list[tuple[int, Grid]] = []
    inside = 0
    for at, period in enumerate(periods):
        if at not in rows:
            continue
        mine = samples.subset(features, rows[at])
        own = [i for i, scene in enumerate(scenes) if scene.period == period]
        found = []
        for number in own:
            grid, got = samples.burn_scene(mine, target, scenes[number], o.all_touched)
            grids += _by_split(mine, target, scenes[number], number, grid, o.all_touched)
            found.append(got)
        # A feature need be on one grid only.
        outside = np.all([got.outside for got in found], 0)
        covers = np.any([[len(p) > 0 for p in got.pixels] for got in found], 0)
        empty = [mine.columns["id"][i] for i in np.flatnonzero(~outside & ~covers)]
        if empty:
            notes.append(f"{len(empty)} polygons cover no pixel's centre: {_few(empty)}")
        for key, count in {
            "empty": len(empty), "repaired": max(got.report["repaired"] for got in found),
            "conflict_pixels": sum(got.report["conflict_pixels"] for got in found),
            "outside": int(outside.sum()),
        }.items():  # fmt: skip
            counts[key] = counts.get(key, 0) + count
        inside += int((~outside).sum())
    lost = len(features.shapes) - inside
    told = f"{lost} of {len(features.shapes)} labels cannot be used ({_shown(counts)})"
    if 2 * lost > len(features.shapes):
        raise ValueError(f"{told}: are the labels and the images of one place and time?")
    if lost:
        notes.append(told)
    return target, grids, notes


def _alike(names: Sequence[str]) -> list[str]:
    """A note on names that a reader takes for one."""
    groups: dict[str, list[str]] = {}
    for name in names:
        plain = " ".join(unicodedata.normalize("NFKC", name).casefold().split())
        groups.setdefault(plain, []).append(ascii(name))
    same = [" and ".join(group) for group in groups.values() if len(group) > 1]
    if not same:
        return []
    return [f"classes that differ only in how they are written are several: {', '.join(same)}"]


def _of_other_years(features: label_files.Features, scenes: Sequence[Scene]) -> list[str]:
    """A note on labels whose year is none of the images', where no period leaves them out."""
    days = samples.days_of(features) or []
    shown = sorted({day[:4] for scene in scenes for day in scene.stack.dates})
    if not shown or any(scene.period.name for scene in scenes):
        return []
    years = [str(day.year) for day in days if day is not None]
    odd = [year for year in years if year not in shown]
    if not odd:
        return []
    return [
        f"{len(odd)} labels are of {', '.join(sorted(set(odd)))}, but learn from the images of "
        f"{', '.join(shown)}; with --years only labels of those years are used"
    ]


def _by_split(
    features: label_files.Features, target: Target, scene: Scene, number: int, grid: Grid,
    all_touched: bool,
) -> list[tuple[int, Grid]]:  # fmt: skip
    """The grid of a scene, or one for each split that polygons are said to be of."""
    texts = features.columns.get("split")
    if texts is None or grid.points is not None:
        return [(number, grid)]
    out = []
    for text in sorted(set(texts)):
        rows = np.flatnonzero(np.array(texts) == text)
        part, _ = samples.burn_scene(samples.subset(features, rows), target, scene, all_touched)
        # What contradicts a label of another split is none here either.
        kept = np.isin(grid.cells, part.cells)
        weights = None if grid.weights is None else grid.weights[kept]
        out.append((number, Grid(grid.cells[kept], grid.codes[kept], None, text, weights)))
    return out


def _from_raster(
    o: LabelOptions, scenes: Sequence[Scene], side: int, patch: int, counts: dict[str, int]
) -> tuple[Target, Iterator[tuple[int, Grid]], list[str]]:
    """The target, and the labelled pixels of one part of a scene after the other."""
    if o.label_column or o.value_column:
        raise ValueError("a raster of labels has no columns: leave out --label_column")
    if len({scene.period for scene in scenes}) > 1:
        raise ValueError(
            "a raster of labels has no dates: choose one period of the images with --years"
        )
    numbers: set[int] = set()
    values = o.values
    for _, _, found in _raster_parts(o, scenes, side, patch):
        values = found.dtype.kind == "f" if values is None else values
        if values:
            break
        numbers.update(map(int, np.unique(found)))
    classes = None
    if not values:
        if not numbers:
            raise ValueError(f"no label of {o.path} lies on the images")
        odd = sorted(n for n in numbers if not 0 <= n <= label_grids.MOST)
        if odd:
            raise ValueError(
                f"{o.path} holds {_few(odd)}, and classes are numbers from 0 to "
                f"{label_grids.MOST}: --ignore_values={odd[0]} leaves out {odd[0]}"
            )
        colors = label_grids.read_colors(Path(o.colors)) if o.colors else None
        classes = label_grids.classes_of(sorted(numbers), o.classes, colors, naming=True)
    target = Target(classes, o.unit)

    def grids() -> Iterator[tuple[int, Grid]]:
        for number, cells, found in _raster_parts(o, scenes, side, patch):
            codes = target.index(found)
            good = target.labelled(codes)
            if not good.all():  # infinite values
                counts["not_finite"] = counts.get("not_finite", 0) + int((~good).sum())
            yield number, Grid(cells[good], codes[good])

    return target, grids(), []


def _few(found: Sequence[Any]) -> str:
    return ", ".join(map(str, found[:10])) + (" ..." if len(found) > 10 else "")


def _raster_parts(
    o: LabelOptions, scenes: Sequence[Scene], side: int, patch: int
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(number of the scene, flat numbers of its pixels, their labels) of parts with labels."""
    for number, scene in enumerate(scenes):
        s = scene.stack
        with LabelRaster(
            Path(o.path), s.crs, s.transform, s.shape, o.ignore_values, o.resample
        ) as file:
            for rows, cols in samples.parts_of(scene, side, patch):
                values, there = file.read(rows, cols)
                at = np.nonzero(there)
                if len(at[0]):
                    cells = (at[0] + rows.start) * s.shape[1] + at[1] + cols.start
                    yield number, cells, values[at]


def _check_classes(o, target: Target, windows, counts, notes) -> list[Window]:
    """Windows without rare classes, which are refused or dropped; a class must have a rival."""
    assert target.classes is not None
    sizes = np.zeros(len(target.classes), int)
    for w in windows:
        good = w.labels[w.labels != samples.NONE]
        sizes += np.bincount(good, minlength=len(sizes))
    rare = [i for i, n in enumerate(sizes) if n < _LEAST]
    if rare:
        shown = ", ".join(f"{target.classes[i].name} {sizes[i]}" for i in rare)
        if not o.drop_rare:
            raise ValueError(
                f"classes need at least {_LEAST} samples: {shown}; label more, or pass --drop_rare"
            )
        notes.append(f"classes left out because they are rare: {shown}")
        counts["of_rare_classes"] = int(sizes[rare].sum())
        windows = _without(target, windows, rare)
    if len(target.classes) < 2:
        only = target.classes[0].name if target.classes else "none"
        raise ValueError(f"all labels are of one class ({only}): there is nothing to tell apart")
    return windows


def _without(target: Target, windows: Sequence[Window], rare: Sequence[int]) -> list[Window]:
    """Takes classes out of the target and the labels."""
    assert target.classes is not None
    new = np.full(len(target.classes) + 1, samples.NONE)
    kept = [i for i in range(len(target.classes)) if i not in rare]
    new[kept] = np.arange(len(kept))
    target.classes = [target.classes[i] for i in kept]
    out = [dataclasses.replace(w, labels=new[w.labels]) for w in windows]
    return [w for w in out if (w.labels != samples.NONE).any()]


def _split(o: LabelOptions, target, windows, places: Places, scenes, side: int, seed: int):
    texts = [w.split for w in windows]
    if any(texts):
        if not all(texts):
            raise ValueError(
                f"{sum(not t for t in texts)} labels have nothing in their column 'split'"
            )
        split = splitting.given_split(texts, places.zone, places.boxes, places.across)
        _check_training(target, windows, split)
        return split, ["split as the labels say", *split.notes]
    centred = all(w.ids for w in windows)
    pixel = abs(scenes[0].stack.transform.a)
    whole = 1 if centred else side * pixel
    block = _block(o.block, places)
    block = -(-block // whole) * whole
    gap = o.gap if o.gap is not None else (side * pixel / 2 if centred else 0.0)
    split = splitting.split_blocks(
        places.zone, places.easting, places.northing, samples.counts_of(windows, target), block,
        seed, o.fractions, gap, places.boxes, places.across,
    )  # fmt: skip
    shares = splitting.fractions_of(o.fractions)
    if len(split.blocks) < len(shares):
        raise ValueError(
            f"the labels lie in {len(split.blocks)} blocks of {block:g} m, but a split needs at "
            f"least {len(shares)}: {_smaller(places, whole, len(shares))}"
        )
    _check_training(target, windows, split)
    return split, [f"blocks of {block:g} m: {len(split.blocks)}", *split.notes]


def _block(text: str, places: Places) -> float:
    if text == "auto":
        return splitting.auto_side(places.zone, places.easting, places.northing)
    try:
        side = float(text)
    except ValueError:
        side = 0.0
    if not 0 < side < math.inf:
        raise ValueError(f"--block is a side in metres or 'auto', got {text!r}")
    return side


def _smaller(places: Places, whole: float, least: int) -> str:
    """A side of blocks that would work, in words."""
    for side in splitting.BLOCK_SIDES:
        fitted = -(-side // whole) * whole
        own = splitting.blocks_of(places.zone, places.easting, places.northing, fitted)
        if len(set(own)) >= least:
            return f"take --block={fitted:g}"
    return "label a larger area, take a smaller --window, or give a column 'split'"


def _check_training(target: Target, windows: Sequence[Window], split: splitting.Split) -> None:
    """Every class must be in training."""
    rows = split.rows("train")
    if not len(rows):
        raise ValueError(
            "no training samples are left beside the gap: take a larger --block or a smaller --gap"
        )
    if target.classes is None:
        return
    counts: dict[str, dict[str, int]] = {c.name: {} for c in target.classes}
    held = samples.counts_of(windows, target)
    for i, name in enumerate(split.names):
        kind = "left out" if split.dropped[i] else name
        for c, n in held[i].items():
            counts[c][kind] = counts[c].get(kind, 0) + n
    lacking = [c for c, n in counts.items() if not n.get("train")]
    if lacking:
        shown = "; ".join(
            f"{c}: " + ", ".join(f"{s} {n}" for s, n in counts[c].items()) for c in lacking
        )
        raise ValueError(
            f"classes without training samples ({shown}): "
            + ("take a smaller --block, or " if split.blocks else "")
            + "leave them out of the labels"
        )


def unused(labelled: Labelled) -> dict[str, Any]:
    """Counts of what the split leaves out."""
    return {"left_out_by_the_gap": int(labelled.split.dropped.sum())}
