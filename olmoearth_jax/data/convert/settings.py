"""What is converted and how, and what of that a dataset depends on."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from olmoearth_jax import modalities as registry
from olmoearth_jax.data.checksums import text_digest
from olmoearth_jax.data.convert import folder, tiles, tree
from olmoearth_jax.data.convert.sources import Source, TreeSource
from olmoearth_jax.data.h5_writer import Storage
from olmoearth_jax.modalities import IMAGE_TILE_PX, MAX_TIMESTEPS

OVER = ("refuse", "select")
GRIDS = ("tile", "raster")
_NEWER = {"min_timesteps": MAX_TIMESTEPS, "over": "refuse", "name": "", "grid": "tile"}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is converted and how.

    Attributes:
      tree: folder of the GeoTIFFs and CSVs.
      output_dir: folder in which the dataset's own folder is made.
      modalities: to convert, in the order of the metadata's columns; () for all in the tree.
      required: modalities without which a tile is dropped.
      tile_px: side of a sample in pixels of the tile grid; divides 256.
      storage: compression and chunks.
      keep_unmatched: see `tiles.plan_time`.
      min_timesteps: fewest timesteps of a tile's longest series.
      over: what becomes of a longer series than the models take: its tile is dropped ('refuse'), or
        it keeps per calendar month the date nearest its middle ('select').
      name: form of the names of GeoTIFFs, such as '{modality}_{date}_{tile}.tif', where `tree` is
        a folder of them and no tree; see `folder`.
      grid: 'tile' or 'raster', how such files are cut; see `folder.FolderSource`.
    """

    tree: Path
    output_dir: Path
    modalities: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    tile_px: int = 128
    storage: Storage = dataclasses.field(default_factory=Storage)
    keep_unmatched: bool = False
    min_timesteps: int = MAX_TIMESTEPS
    over: str = "refuse"
    name: str = ""
    grid: str = "tile"

    def __post_init__(self) -> None:
        if not 1 <= self.min_timesteps <= MAX_TIMESTEPS:
            raise ValueError(
                f"min_timesteps must lie in 1..{MAX_TIMESTEPS}, got {self.min_timesteps}"
            )
        if self.over not in OVER:
            raise ValueError(f"over must be one of {', '.join(OVER)}, got {self.over!r}")
        if self.over == "select" and self.keep_unmatched:
            raise ValueError(
                "a series cannot keep timesteps on dates that the longest one lacks "
                "(keep_unmatched) where that is shortened (over=select)"
            )
        if not self.tree.is_dir():
            raise ValueError(f"folder of GeoTIFFs does not exist: {self.tree}")
        if self.tile_px < 1 or IMAGE_TILE_PX % self.tile_px:
            raise ValueError(f"tile size must divide {IMAGE_TILE_PX}, got {self.tile_px}")
        if self.grid not in GRIDS:
            raise ValueError(f"grid must be one of {', '.join(GRIDS)}, got {self.grid!r}")
        if self.grid != "tile" and not self.name:
            raise ValueError(
                "the files of a tree lie on the tile grid; grid=raster is for a folder of files "
                "that are found by their names (name)"
            )
        if self.modalities:
            found = self.modalities
        elif self.name:
            found = folder.find_modalities(self.tree, self.name)
        else:
            found = tree.find_modalities(self.tree)
        if not found:
            raise ValueError(
                f"{self.tree} holds no index such as 10_sentinel2_l2a_monthly.csv; for files "
                "without one give the form of their names, --name='{modality}_{date}.tif'"
            )
        names = tree.check_names(found)
        required = tree.check_names(self.required)
        extra = [n for n in required if n not in names]
        if extra:
            raise ValueError(f"required modality {extra[0]!r} is not among the converted ones")
        object.__setattr__(self, "modalities", names)
        object.__setattr__(self, "required", required)

    @property
    def pieces(self) -> int:
        """Samples per tile."""
        return 1 if self.name else (IMAGE_TILE_PX // self.tile_px) ** 2

    def scan_digest(self) -> str:
        """Identifies what the scan of a tile depends on, besides the tile's files."""
        records = {n: dataclasses.asdict(registry.get(n)) for n in self.modalities}
        how = [self.name, self.grid, self.tile_px, self.over] if self.name else []
        return text_digest([str(self.tree.absolute()), records, *how])

    def digest(self) -> str:
        """Identifies what the content of the dataset depends on, besides the files."""
        parts = [self.required, self.tile_px, dataclasses.asdict(self.storage), self.keep_unmatched]
        newer = self.changed()
        extra = [newer] if newer else []
        return text_digest([self.scan_digest(), list(self.modalities), *parts, *extra])

    def changed(self) -> dict[str, Any]:
        """The settings of later versions that differ from what earlier ones did."""
        return {k: getattr(self, k) for k, v in _NEWER.items() if getattr(self, k) != v}

    def record(self) -> dict[str, Any]:
        """All settings, for the dataset's record; later ones only where they were used."""
        known = dataclasses.asdict(self)
        return {k: v for k, v in known.items() if k not in _NEWER} | self.changed()

    @property
    def length(self) -> tiles.Length:
        """How many timesteps a tile must have."""
        return tiles.Length(self.min_timesteps, self.over == "select")

    def source(self) -> Source:
        """Where the tiles come from."""
        if not self.name:
            return TreeSource(self.tree, self.modalities)
        monthly = self.over == "select"
        return folder.FolderSource(
            self.tree, self.name, self.modalities, self.grid, self.tile_px, monthly
        )
