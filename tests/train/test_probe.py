"""What the headers of a dataset say before anything is trained."""

import pytest

from olmoearth_jax.data.index import prepare
from olmoearth_jax.data.sample import sample_dataset_dir
from olmoearth_jax.train import probe


def test_a_dataset_without_trained_images_is_refused():
    folder = sample_dataset_dir()
    probe.check_images(prepare(folder, ["sentinel2_l2a", "naip"]))
    with pytest.raises(ValueError, match=r"\(naip\); its samples have .*sentinel2_l2a"):
        probe.check_images(prepare(folder, ["naip"]))
