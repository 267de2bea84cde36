"""Tiles over an axis and their blending."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from olmoearth_jax.maps import tile_map


@given(st.integers(1, 200), st.integers(1, 40), st.data())
def test_tiles_cover_the_axis(side, tile, data):
    overlap = data.draw(st.integers(0, tile - 1))
    at = tile_map.starts(side, tile, overlap)
    covered = np.zeros(side, int)
    for start in at:
        covered[start : start + tile] += 1
    assert covered.all() and at == sorted(set(at))
    if side >= tile:
        assert at[-1] == side - tile
    assert all(b - a <= tile - overlap for a, b in zip(at, at[1:], strict=False))


@pytest.mark.parametrize("tile", [1, 2, 7, 64])
def test_weights_are_never_zero(tile):
    weights = tile_map.weights(tile)
    assert (weights > 0).all() and np.allclose(weights, weights[::-1])


@given(st.integers(0, 2**32 - 1), st.integers(1, 30))
def test_parts_of_a_map_agree(seed, cut):
    """Whatever the blocks, the values of a pixel are the same to the last bit."""
    rng = np.random.default_rng(seed)
    side, tile = 31, 8
    at = tile_map.starts(side, tile, 3)
    tiles = {(r, c): rng.normal(size=(tile, tile, 2)) for r in at for c in at}
    valid = {key: rng.random((tile, tile)) > 0.1 for key in tiles}

    def mapped(rows, cols):
        part = tile_map.Blend(rows, cols, 2, (tile, tile))
        for (r, c), x in tiles.items():
            part.add(r, c, x, valid[r, c])
        return part.result()

    whole, there = mapped(slice(0, side), slice(0, side))
    for rows in (slice(0, cut), slice(cut, side)):
        for cols in (slice(0, cut), slice(cut, side)):
            part, seen = mapped(rows, cols)
            np.testing.assert_array_equal(part, whole[rows, cols])
            np.testing.assert_array_equal(seen, there[rows, cols])


def test_pixels_without_data_do_not_count():
    tile = np.full((4, 4, 1), 5.0)
    tile[0, 0] = np.nan
    valid = np.ones((4, 4), bool)
    valid[0, 0] = False
    part = tile_map.Blend(slice(0, 5), slice(0, 5), 1, (4, 4))
    part.add(0, 0, tile, valid)
    got, there = part.result()
    assert there.sum() == 15 and np.allclose(got[there], 5) and not got[~there].any()


@pytest.mark.parametrize("given_", [(0, 4, 1), (5, 0, 0), (5, 4, 4), (5, 4, -1)])
def test_sizes_that_do_not_fit(given_):
    with pytest.raises(ValueError, match="pixels"):
        tile_map.starts(*given_)
