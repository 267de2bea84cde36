"""Pictures of samples, and the preparation of a run."""

from __future__ import annotations

import json

import numpy as np
import pytest

from launch import _app, _pictures, prep, visualize
from olmoearth_jax import outputs
from olmoearth_jax.data.index import prepare
from olmoearth_jax.images import stretched
from olmoearth_jax.modalities import MISSING, OFFICIAL_MODALITIES, Tokenization
from olmoearth_jax.train.build import build_stream

PNG = b"\x89PNG"


def _config(folder):
    return _app.load(
        "configs/nano.py",
        None,
        "pictures",
        [
            f"dataset.h5py_dir={folder}",
            "data_loader.global_batch_size=8",
            "data_loader.num_workers=0",
            "train_module.rank_microbatch_size=4",
            "data_loader.sampled_hw_p_list=[1,2]",
        ],
    )


@pytest.fixture
def parts(dataset):
    config = _config(dataset)
    index = prepare(dataset, OFFICIAL_MODALITIES)
    return index, build_stream(config, index)


def test_sheets_and_map_are_written(parts, tmp_path):
    index, stream = parts
    chosen = visualize.positions_of([], 2, index, stream)
    files = list(visualize.draw(tmp_path, chosen, index, stream))
    assert [f.name for f in files][-1] == "sample_map.png" and len(files) == 3
    assert all(f.read_bytes()[:4] == PNG for f in files)
    number = files[0].stem.removeprefix("sample_")
    assert visualize.positions_of([number], 1, index, stream) == [0]


def test_pictures_replace_pictures_of_ours_only(parts, tmp_path):
    index, stream = parts
    chosen = visualize.positions_of([], 2, index, stream)
    named = visualize.files_of(tmp_path, chosen, index, stream)
    assert list(visualize.draw(tmp_path, chosen, index, stream)) == named
    assert all(outputs.is_ours(path) for path in named)
    named[0].write_bytes(b"a map of mine")
    assert not outputs.is_ours(named[0])


def test_wrong_numbers_are_explained(parts):
    index, stream = parts
    with pytest.raises(_app.UserError, match="takes sample numbers"):
        visualize.positions_of(["x"], 1, index, stream)
    with pytest.raises(_app.UserError, match="sample 999 is not read"):
        visualize.positions_of(["999"], 1, index, stream)


def test_the_crop_shown_is_the_one_that_is_trained_on(parts):
    index, stream = parts
    group = stream.group(0)
    member = int(np.flatnonzero(group["ok"])[0])
    position = int(group["position"][member])
    _, shown = visualize.picture(position, group, index, stream)
    row, col, side, first, last = shown.crop
    trained = group["data"]["srtm"][member][..., 0]
    whole = shown.arrays["srtm"][row : row + side, col : col + side, :, 0]
    present = whole != MISSING
    assert np.array_equal(present, trained != MISSING)
    if present.all():
        assert np.corrcoef(whole.ravel(), trained.ravel())[0, 1] > 0.99 or side < 2
    assert last - first == group["timestamps"].shape[1]


def test_every_kind_of_map_is_drawn():
    from matplotlib.figure import Figure

    for name, bands in (("worldcover", 1), ("gse", 64), ("worldcereal", 8), ("eurocrops", 1)):
        values = np.arange(16.0 * bands).reshape(4, 4, bands) % 50
        _pictures._map(Figure().add_subplot(), name, values)
        _pictures._map(Figure().add_subplot(), name, values * 0 + MISSING)
    grey = stretched("sentinel1", np.full((2, 2, 3, 2), MISSING), 0.93)
    assert (grey == 0.93).all()
    masks = {"srtm": np.zeros((2, 2, 1, 1), int), "era5_10": np.ones((3, 1), int)}
    masks["latlon"] = np.full((1,), 2)
    _pictures._masks(Figure().add_subplot(), "A", masks, Tokenization())


def test_prep_checks_files_and_writes_the_index(parts, writable_dataset, tmp_path):
    index, stream = parts
    path = prep.write_index(tmp_path / "run", index, stream)
    about = json.loads(path.read_text())
    assert about["samples"] == 24 and about["steps_per_epoch"] == 3
    said: list[str] = []
    prep.check_files(writable_dataset, 3, said.append)
    (writable_dataset / "sample_0.h5").write_bytes(b"")
    with pytest.raises(_app.UserError, match="sample_0.h5: cannot be read"):
        prep.check_files(writable_dataset, 6, said.append)
    shapes = dict(prep.one_of_each_shape(stream))
    assert len(set(shapes.values())) == len(shapes) == 16
    empty = prep.empty_group(stream.group(0))
    assert not empty["ok"].any() and (empty["mask_a"]["srtm"] == 3).all()
