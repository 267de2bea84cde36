"""How fine the location grid of a training group is (spec/train_v1_3.md section 9)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from olmoearth_jax.config import ExperimentConfig
from olmoearth_jax.data.draws import rng


@dataclasses.dataclass(frozen=True)
class QueryStride:
    """Draws the pixels per side of a location, one number for all samples of a group."""

    most: int
    """Most locations of a sample; one per patch is always allowed."""
    seed: int

    def sizes(self, patch_size: int, grid: int) -> list[int]:
        """What may be drawn: divisors of the patch size, ascending."""
        return [
            size
            for size in range(1, patch_size + 1)
            if patch_size % size == 0
            and (size == patch_size or (grid * patch_size // size) ** 2 <= self.most)
        ]

    def draw(self, patch_size: int, grid: int, epoch: int, group: int) -> int:
        """Pixels per side of a location of that group."""
        sizes = self.sizes(patch_size, grid)
        return sizes[int(rng(self.seed, "query stride", epoch, group).integers(len(sizes)))]

    def per_patch(self, group: Mapping[str, Any]) -> int:
        """Locations per side of a patch of a training group."""
        patch = int(group["patch_size"])
        place = int(group["epoch"]), int(group["group"])
        return patch // self.draw(patch, int(group["grid"]), *place)


def query_stride(config: ExperimentConfig) -> QueryStride | None:
    """What `config.train_module` asks for; None is one location per patch."""
    module = config.train_module
    if not module.random_query_stride:
        return None
    return QueryStride(module.max_location_queries, config.data_loader.seed)
