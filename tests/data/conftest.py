"""Small synthetic datasets that the data tests share."""

from pathlib import Path

import pytest

from olmoearth_jax.data.h5_writer import Storage
from tools.make_synthetic_dataset import Gaps, make_dataset

TILE_PX = 16


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> Path:
    """24 samples of 16 px with gaps."""
    folder = tmp_path_factory.mktemp("dataset")
    return make_dataset(folder, 24, tile_px=TILE_PX, seed=1, gaps=Gaps(0.3, 0.15))


@pytest.fixture
def writable_dataset(tmp_path) -> Path:
    """6 samples of 16 px, each test its own, to damage."""
    return make_dataset(
        tmp_path, 6, tile_px=TILE_PX, gaps=Gaps(0, 0), storage=Storage("none", None)
    )
