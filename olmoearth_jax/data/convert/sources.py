"""Where a conversion finds its tiles: in a tree with CSV indices, or in any folder of GeoTIFFs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from olmoearth_jax import modalities as registry
from olmoearth_jax.data.checksums import text_digest
from olmoearth_jax.data.convert import tree
from olmoearth_jax.data.convert.index_csv import read_series
from olmoearth_jax.data.convert.rasters import Loaded, load_modality
from olmoearth_jax.data.convert.tree import Cell, TileJob

Say = Callable[[str], None]
Part = tuple[str, Sequence[int], Sequence[int], Any]
"""A file, the timesteps and channels of a modality that it holds, and the type of its values where
that is not that of the loaded ones."""


class Source(Protocol):
    """Tiles to be converted, and what their rasters hold. It is sent to worker processes."""

    def jobs(self, say: Say | None) -> list[TileJob]:
        """All tiles, in the order of their samples; `say` is told what was not as expected.

        Raises:
          ValueError: the listing of the tiles is wrong.
        """
        ...

    def signature(self, job: TileJob) -> str:
        """Changes when a file of the tile or its dates do."""
        ...

    def load(self, job: TileJob, name: str) -> Loaded:
        """A modality of a tile.

        Raises:
          ReadError: a raster cannot be read, or does not belong to the tile.
        """
        ...

    def parts(self, job: TileJob, name: str) -> list[Part]:
        """The files that a modality of a tile comes from."""
        ...

    def centre(self, cell: Cell) -> tuple[float, float]:
        """(lat, lon) in degrees of a tile's centre."""
        ...


@dataclasses.dataclass(frozen=True)
class TreeSource:
    """The tree of the published layout; see `tree`."""

    folder: Path
    modalities: tuple[str, ...]

    def jobs(self, say: Say | None) -> list[TileJob]:
        series = {n: read_series(self.folder, n) for n in self.modalities}
        ignored = {n: s.ignored for n, s in series.items() if s.ignored}
        if say and ignored:
            text = ", ".join(f"{count} of {name}" for name, count in ignored.items())
            say(f"ignored CSV rows that repeat a timestep or are out of order: {text}")
            for name, listed in series.items():
                if listed.lost:
                    first = ", ".join(listed.lost[:3])
                    say(f"{len(listed.lost)} tiles of {name} have no image_idx 0, such as {first}")
        return tree.enumerate_tiles(series)

    def signature(self, job: TileJob) -> str:
        return signature(tree.raster_paths(self.folder, job, job.dates), job)

    def load(self, job: TileJob, name: str) -> Loaded:
        return load_modality(self.folder, job, name)

    def parts(self, job: TileJob, name: str) -> list[Part]:
        modality, steps = registry.get(name), range(len(job.dates[name]))
        cell = job.cell.coarser(modality.tile_resolution_factor)
        return [
            (str(tree.raster_path(self.folder, modality, cell, resolution)), steps, channels, None)
            for resolution, channels in tree.files_of(modality).items()
        ]

    def centre(self, cell: Cell) -> tuple[float, float]:
        return tree.centre(cell)


def signature(paths: Sequence[Path], job: TileJob) -> str:
    """Changes when one of the files or the dates of a tile do."""
    files = []
    for path in paths:
        try:
            status = path.stat()
            files.append((path.name, status.st_size, status.st_mtime_ns))
        except OSError:
            files.append((path.name, None, None))
    return text_digest([files, dict(job.dates)])
