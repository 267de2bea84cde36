"""Embeddings of labelled tokens, computed once and kept until the run is finished."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from olmoearth_jax import modalities
from olmoearth_jax.maps import run_folder
from olmoearth_jax.maps.labelled import Labelled
from olmoearth_jax.maps.samples import Target, Window
from olmoearth_jax.maps.scenes import Scene
from olmoearth_jax.maps.tokens import TokenEncoder, raw_tokens

_CHUNK = 64
"""Windows per file."""


@dataclasses.dataclass
class Tokens:
    """The labelled tokens of a split that have data, [N] each.

    Attributes:
      x: embeddings float32 [N, D]; D = 0 where they were not asked for.
      raw: normalised pixels float32 [N, P].
      labels: class indices int64, or values float32.
      scene, window: number of the scene, and of the window among all.
      row, col: a pixel in the middle of the token, or the one of its point.
      ids: names.
      weights: float32, how much each counts in training; None: alike.
      lost: labelled tokens without data.
    """

    x: np.ndarray
    raw: np.ndarray
    labels: np.ndarray
    scene: np.ndarray
    window: np.ndarray
    row: np.ndarray
    col: np.ndarray
    ids: list[str]
    weights: np.ndarray | None = None
    lost: int = 0

    def where(self, kept: np.ndarray) -> Tokens:
        """Those that a bool [N] names; the others are counted as lost."""
        names = ("x", "raw", "labels", "scene", "window", "row", "col")
        parts = {name: getattr(self, name)[kept] for name in names}
        ids = [name for name, so in zip(self.ids, kept, strict=True) if so]
        weights = None if self.weights is None else self.weights[kept]
        return Tokens(**parts, ids=ids, weights=weights, lost=self.lost + int((~kept).sum()))


class Reader(Protocol):
    """What gives the embeddings of labelled tokens."""

    @property
    def step(self) -> int:
        """Pixels per side of what carries a label."""
        ...

    def labelled_tokens(
        self, scenes: Sequence[Any], target: Target, windows: Sequence[Window], embed: bool
    ) -> dict[str, Any]:
        """Arrays x, raw and seen of `Tokens`, for every labelled token of some windows."""
        ...


def read_tokens(
    reader: Reader,
    scenes: Sequence[Scene],
    found: Labelled,
    split: str,
    folder: Path,
    embed: bool,
    say: Callable[[str], None],
) -> Tokens:
    """The labelled tokens of a split; chunks that the folder holds are not computed again.

    Args:
      folder: of the cache, which is of this run alone.
      embed: with embeddings, not raw pixels alone.
    """
    rows = found.split.rows(split)
    parts = [rows[i : i + _CHUNK] for i in range(0, len(rows), _CHUNK)]
    chunks = []
    for number, part in enumerate(parts):
        path = folder / f"{split}_{number:05d}.npz"
        if path.is_file():
            chunks.append(run_folder.load_arrays(path))
            continue
        windows = [found.windows[i] for i in part]
        chunk = reader.labelled_tokens(scenes, found.target, windows, embed)
        run_folder.save_arrays(path, chunk)
        chunks.append(chunk)
        say(f"{split}: {min((number + 1) * _CHUNK, len(rows))} of {len(rows)} windows")
    return _collect(chunks, rows, found, reader.step)


@dataclasses.dataclass(frozen=True)
class ImageTokens:
    """Embeds windows of images."""

    encoder: TokenEncoder

    @property
    def step(self) -> int:
        return self.encoder.settings.step

    def labelled_tokens(
        self, scenes: Sequence[Scene], target: Target, windows: Sequence[Window], embed: bool
    ) -> dict[str, Any]:
        """See `Reader`."""
        out: list[Any] = [None] * len(windows)
        # Of all scenes: not every period need have every modality.
        held = {n for scene in scenes for n in scene.stack.names}
        names = modalities.in_sample_order(held.intersection(self.encoder.model.modalities))
        groups: dict[Any, list[tuple[int, Any]]] = {}
        for i, w in enumerate(windows):
            sample = scenes[w.scene].sample(w.row, w.col, *w.size)
            if sample is not None:
                steps = tuple(sample.data), sample.timestamps.shape
                groups.setdefault((w.size, steps), []).append((i, sample))
        for group in groups.values():
            for start in range(0, len(group), self.encoder.batch):
                part = group[start : start + self.encoder.batch]
                ready = self.encoder.prepare([s for _, s in part])
                x, seen = self.encoder.embed(ready) if embed else (None, self.encoder.seen(ready))
                raw = raw_tokens(ready, self.encoder.settings, names)
                for k, (i, _) in enumerate(part):
                    there = target.labelled(windows[i].labels)
                    own = x[k][there] if x is not None else np.zeros((there.sum(), 0), np.float32)
                    out[i] = own, raw[k][there], seen[k][there]
        width = next((o[0].shape[-1] for o in out if o is not None and o[0].shape[-1]), 0)
        pixels = next((o[1].shape[-1] for o in out if o is not None), 0)
        for i, w in enumerate(windows):
            count = int(target.labelled(w.labels).sum())
            if out[i] is None or out[i][0].shape[-1] != width:
                empty = np.zeros((count, width), np.float32), np.zeros((count, pixels), np.float32)
                out[i] = *empty, np.zeros(count, bool)
        keys = ("x", "raw", "seen")
        return {k: np.concatenate([o[j] for o in out]) for j, k in enumerate(keys)}


def _collect(
    chunks: Sequence[dict[str, Any]], rows: np.ndarray, found: Labelled, step: int
) -> Tokens:
    labels, scene, window, row, col, ids, weights = [], [], [], [], [], [], []
    for i in rows:
        w = found.windows[i]
        for r, c in np.argwhere(found.target.labelled(w.labels)):
            labels.append(w.labels[r, c])
            weights.append(1.0 if w.weights is None else w.weights[r, c])
            scene.append(w.scene)
            window.append(i)
            at = w.row + r * step + step // 2, w.col + c * step + step // 2
            name, at = w.ids.get((int(r), int(c)), (f"{w.scene}_{at[0]}_{at[1]}", at))
            row.append(at[0])
            col.append(at[1])
            ids.append(name)
    seen = np.concatenate([c["seen"] for c in chunks])
    kind = np.float32 if found.target.classes is None else np.int64
    found_x, found_raw = (
        np.concatenate([_widened(c[k], max(o[k].shape[-1] for o in chunks)) for c in chunks])
        for k in ("x", "raw")
    )
    at = [np.array(a) for a in (scene, window, row, col)]
    every = Tokens(found_x, found_raw, np.array(labels, kind), at[0], at[1], at[2], at[3], ids)
    if any(found.windows[i].weights is not None for i in rows):
        every.weights = np.array(weights, np.float32)
    return every.where(seen)


def _widened(x: np.ndarray, width: int) -> np.ndarray:
    """x [N, D], or zeros of a width where nothing was seen."""
    return x if x.shape[-1] == width else np.zeros((len(x), width), np.float32)
