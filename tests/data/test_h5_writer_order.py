"""Views of arrays that are stored in C order."""

import h5py
import numpy as np
import pytest

from olmoearth_jax.data.convert.rasters import resample
from olmoearth_jax.data.h5_writer import Storage, write_arrays


@pytest.mark.parametrize("dtype", ["uint16", "float32", "int32"])
def test_pictures_of_any_layout_are_stored_as_they_are(dtype, tmp_path):
    x = np.random.default_rng(0).integers(0, 4000, (3, 4, 16, 12)).astype(dtype)
    held = x.transpose(2, 3, 0, 1)
    views = {
        "whole": held, "cut": held[4:8, 6:12], "thin": held[::2, ::2], "ordered": held.copy(),
        "channels": x[:, [3, 1, 0, 2]].transpose(2, 3, 0, 1), "turned": held[::-1, ::-1],
        "single": held[:, :, :1, :1], "flat": x[:, :, 0, 0],
    }  # fmt: skip
    write_arrays(tmp_path / "a.h5", views, Storage("gzip", 1))
    with h5py.File(tmp_path / "a.h5") as file:
        for name, view in views.items():
            np.testing.assert_array_equal(file[name][()], view, err_msg=name)


@pytest.mark.parametrize("side", [1, 3, 9])
def test_coarse_pixels_are_repeated(side):
    x = np.random.default_rng(0).integers(0, 9, (2, 3, 3))
    if side < 3:
        assert np.array_equal(resample(x, side), x[:, ::3, ::3])
        return
    assert np.array_equal(resample(x, side), np.kron(x, np.ones((side // 3, side // 3), int)))
