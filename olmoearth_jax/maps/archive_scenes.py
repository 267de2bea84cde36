"""The embeddings of an archive as what maps are learnt from and made of: tokens of scenes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from olmoearth_jax.data.crs import library as rasterio_library
from olmoearth_jax.maps import archive_check, plan
from olmoearth_jax.maps.archive import Archive, Zone
from olmoearth_jax.maps.plan import Period
from olmoearth_jax.maps.run_folder import Task
from olmoearth_jax.maps.samples import Target, Window
from olmoearth_jax.maps.scenes import Scene
from olmoearth_jax.maps.token_head import TokenHead

PIXEL = 10.0
"""Metres per side of the pixels that labels are put on."""
_SAME = ("model_digest", "pooling", "patch_size", "location_size", "normalize", "modalities",
         "pooling_type", "searchlight")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ArchiveOptions:
    """Which embeddings there are.

    Attributes:
      path: of the archive.
      years, periods: those to use; all by default.
      width: the first bands only.
    """

    path: str
    years: Sequence[str] = ()
    periods: Sequence[str] = ()
    width: int | None = None


@dataclasses.dataclass(frozen=True)
class TokenGrid:
    """What a scene has in place of a stack of rasters.

    Attributes:
      crs, transform, shape: of its pixels or tokens.
      dates, names: none.
    """

    crs: Any
    transform: Any
    shape: tuple[int, int]
    dates: tuple[str, ...] = ()
    names: tuple[str, ...] = ()


@dataclasses.dataclass
class ArchiveScene(Scene):
    """One zone and period of an archive.

    Attributes:
      archive, held, at: the archive, the zone's arrays, and the place of the period.
      corner: first row and column of the zone's arrays that belong to the scene.
    """

    archive: Archive = None  # pyright: ignore
    held: Zone = None  # pyright: ignore
    at: int = 0
    corner: tuple[int, int] = (0, 0)

    @property
    def align(self) -> int:
        return step_of(self.archive)

    def tokens(self, rows: slice, cols: slice, width: int | None) -> tuple[np.ndarray, np.ndarray]:
        """(float32 [h, w, D], bool [h, w]) of a window of tokens; 0 without an embedding."""
        top, left = self.corner
        rows = slice(rows.start + top, rows.stop + top)
        cols = slice(cols.start + left, cols.stop + left)
        values, valid = self.archive.window(self.held, self.at, rows, cols, width)
        return np.where(valid[..., None], values, np.float32(0)), valid


def step_of(archive: Archive) -> int:
    """Pixels of 10 m per side of a token."""
    return max(1, round(_metres(archive) / PIXEL))


def _metres(archive: Archive) -> float:
    """Metres per side of a token."""
    return archive.zone(archive.zones[0]).transform[0]


def record_of(archive: Archive, width: int | None) -> dict[str, Any]:
    """What two archives must share for one head to fit both."""
    attrs = archive.attrs
    out: dict[str, Any] = {k: attrs.get(f"olmoearth:{k}") for k in _SAME}
    return out | {
        "model": attrs.get("geoemb:model"), "metres": _metres(archive),
        "width": archive.width_of(width), "data_type": attrs.get("geoemb:data_type"),
        "quantization": archive.rule.method,
    }  # fmt: skip


def source_of(archive: Archive) -> dict[str, Any]:
    """Which values there are now: the job, and how many of its shards are missing."""
    out = {"job": archive.attrs.get("olmoearth:job_digest") or archive.path}
    left = archive_check.missing(Path(archive.path))
    return out | ({"missing_shards": left} if left else {})


def open_scenes(
    o: ArchiveOptions, archive: Archive, by_token: bool
) -> tuple[list[ArchiveScene], list[str]]:
    """The scenes of an archive, on the grid of its tokens or of their pixels; and notes.

    Raises:
      ValueError: a period that the archive has not.
    """
    rasterio, step = rasterio_library(), step_of(archive)
    known = {str(name): at for at, name in enumerate(archive.periods)}
    wanted = [p.name for p in plan.periods_of(o.years, o.periods)] if o.years or o.periods else (
        list(known))  # fmt: skip
    scenes = []
    for name in wanted:
        at = archive.step_of(name)
        period = _period(name)
        for number in archive.zones:
            zone = archive.zone(number)
            rows, cols = zone.span
            a, _, c, _, e, f = zone.place(rows, cols)
            scale = 1 if by_token else step
            height, width = rows.stop - rows.start, cols.stop - cols.start
            transform = rasterio.Affine(a / scale, 0, c, 0, e / scale, f)
            grid = TokenGrid(
                rasterio.crs.CRS.from_string(zone.crs), transform, (height * scale, width * scale)
            )
            several = f"utm{number:02d}" if len(archive.zones) > 1 else ""
            corner = rows.start, cols.start
            scenes.append(ArchiveScene(period, grid, several, archive, zone, at, corner))  # pyright: ignore
    left = source_of(archive).get("missing_shards")
    notes = [f"warning: {left} shards of the archive are missing; they are nodata here"]
    return scenes, notes if left else []


def _period(name: str) -> Period:
    if name.isdigit():
        return plan.periods_of([name])[0]
    return plan.periods_of([], [name.replace("_", "/")])[0]


class ArchiveTokens:
    """Reads the labelled tokens of windows of pixels."""

    def __init__(self, step: int, width: int | None):
        self.step, self.width = step, width

    def labelled_tokens(
        self, scenes: Sequence[Any], target: Target, windows: Sequence[Window], embed: bool
    ) -> dict[str, Any]:
        """See `token_cache.Reader`; there are no raw pixels."""
        del embed
        found = []
        for w in windows:
            row, col = w.row // self.step, w.col // self.step
            rows = slice(row, row + w.labels.shape[0])
            cols = slice(col, col + w.labels.shape[1])
            x, valid = scenes[w.scene].tokens(rows, cols, self.width)
            there = target.labelled(w.labels)
            found.append((x[there], valid[there]))
        x, seen = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return {"x": x, "raw": np.zeros((len(x), 0), np.float32), "seen": seen}


def check(task: Task, archive: Archive, width: int | None) -> None:
    """Checks an archive against a run.

    Raises:
      ValueError: the run is not of an archive, or of one that differs; names the member.
    """
    held = task.about.get("archive")
    if held is None:
        raise ValueError("the run was trained on images, not on an archive: give --inputs")
    now = record_of(archive, held["width"] if width is None else width)
    for key, value in held.items():
        if now.get(key) != value:
            raise ValueError(
                f"the run was trained on an archive with {key} {value}, but this one has "
                f"{now.get(key)}"
            )


def block_maker(
    scenes: Sequence[ArchiveScene], head: TokenHead, width: int, channels: int
) -> Callable[[int, slice, slice], tuple[np.ndarray, np.ndarray]]:
    """A function of scene, rows and columns that gives float32 [H, W, K] and bool [H, W]."""

    def make(number: int, rows: slice, cols: slice) -> tuple[np.ndarray, np.ndarray]:
        x, valid = scenes[number].tokens(rows, cols, width)
        out = np.zeros((*valid.shape, channels), np.float32)
        if valid.any():
            out[valid] = head(x[valid])
        return out, valid

    return make
