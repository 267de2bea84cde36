"""Index preparation, epoch order, budgets, draws and the sample store."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from olmoearth_jax.data import budget, index
from olmoearth_jax.data.draws import rng
from olmoearth_jax.data.errors import ReadError
from olmoearth_jax.data.order import epoch_order, steps_per_pass
from olmoearth_jax.data.sample import IGNORE_LABEL, sample_dataset_dir, sample_labels
from olmoearth_jax.data.store import SampleStore
from olmoearth_jax.modalities import (
    OFFICIAL_MODALITIES,
    SINGLE_BAND_SET_OVERRIDES,
    Tokenization,
)

FEW = settings(max_examples=25, deadline=None)


def _folder(path: Path, csv: str, latlon: int = 8) -> Path:
    path = path / "h5py_data_w_missing_timesteps_16_x_256" / "a" / "4"
    path.mkdir(parents=True)
    (path / "sample_metadata.csv").write_text(csv)
    np.save(path / "latlon_distribution.npy", np.arange(2.0 * latlon).reshape(-1, 2))
    return path


CSV = "sample_index,sentinel2_l2a,worldcover\n0,1,0\n1,0,1\n2,1,1\n3,0,0\n"


def test_a_modality_without_column_is_absent_and_not_an_error(tmp_path):
    folder = _folder(tmp_path, CSV)
    got = index.prepare(folder, ["sentinel1", "SENTINEL2_L2A", "worldcover"])
    assert got.parts[0].numbers.tolist() == [0, 2]
    assert got.modalities == ("sentinel2_l2a", "sentinel1", "worldcover")
    assert got.latlon is not None and got.latlon.tolist() == [[0, 1], [4, 5]]
    assert got.tile_px == 16
    with pytest.raises(ValueError, match="no sample of .* holds any"):
        index.prepare(folder, ["sentinel1", "worldcover"])


def test_filter_file_percentage_and_static_only(tmp_path):
    folder = _folder(tmp_path, CSV)
    np.save(tmp_path / "keep.npy", np.array([3, 2, 99]))
    kept = index.prepare(folder, ["worldcover"], filter_idx_file=tmp_path / "keep.npy")
    assert kept.parts[0].numbers.tolist() == [2, 3]
    half = index.prepare(folder, ["worldcover"], dataset_percentage=0.5, seed=3)
    again = index.prepare(folder, ["worldcover"], dataset_percentage=0.5, seed=3)
    assert len(half) == 2 and half.parts[0].numbers.tolist() == again.parts[0].numbers.tolist()


@pytest.mark.parametrize(
    ("csv", "message"),
    [
        ("", "no column 'sample_index'"),
        ("a,b\n1,2\n", "no column 'sample_index'"),
        ("sample_index,worldcover\n", "is empty"),
        ("sample_index,worldcover\n0,x\n", "not a table of whole numbers"),
        ("sample_index,worldcover\n0,1,1\n", "2 column names but 3"),
        ("sample_index,worldcover\n0,1\n0,1\n", "distinct"),
    ],
)
def test_malformed_metadata_is_explained(tmp_path, csv, message):
    with pytest.raises(ValueError, match=message):
        index.prepare(_folder(tmp_path, csv), ["worldcover"])


def test_wrong_folders_and_options_are_explained(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        index.prepare(tmp_path / "none", ["worldcover"])
    with pytest.raises(ValueError, match="has no sample_metadata.csv"):
        index.prepare(tmp_path, ["worldcover"])
    folder = _folder(tmp_path, CSV)
    with pytest.raises(ValueError, match="did you mean .*/4"):
        index.prepare(tmp_path, ["worldcover"])
    with pytest.raises(ValueError, match="did you mean 'sentinel1'"):
        index.prepare(folder, ["sentinal1"])
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        index.prepare(folder, ["worldcover"], dataset_percentage=1.5)
    with pytest.raises(ValueError, match="leaves none"):
        index.prepare(folder, ["worldcover"], dataset_percentage=0.1)
    with pytest.raises(ValueError, match="sentinel2_l2a"):
        index.prepare(folder, ["ndvi", "worldcover"])
    np.save(tmp_path / "keep.npy", np.array([1000]))
    with pytest.raises(ValueError, match="leaves no sample"):
        index.prepare(folder, ["worldcover"], filter_idx_file=tmp_path / "keep.npy")
    (tmp_path / "text.npy").write_text("1,2,3")
    with pytest.raises(ValueError, match="as a NumPy array"):
        index.prepare(folder, ["worldcover"], filter_idx_file=tmp_path / "text.npy")
    short = _folder(tmp_path / "short", CSV, latlon=2)
    with pytest.raises(ValueError, match="latlon_distribution"):
        index.prepare(short, ["worldcover"])


def test_joined_datasets_are_addressed_in_turn(tmp_path):
    a = index.prepare(_folder(tmp_path / "a", CSV), ["worldcover"])
    b = index.prepare(_folder(tmp_path / "b", CSV), ["worldcover"])
    both = index.concat([a, b])
    assert len(both) == 8 and both.locate(5) == b.locate(1) and both.locate(-1) == b.locate(3)
    assert both.fingerprint != index.concat([b, a]).fingerprint
    with pytest.raises(IndexError):
        both.locate(8)
    other = index.prepare(_folder(tmp_path / "c", CSV), ["sentinel2_l2a"])
    with pytest.raises(ValueError, match="same modalities"):
        index.concat([a, other])


@FEW
@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 9), st.integers(1, 3))
def test_an_epoch_holds_every_sample_at_most_once_per_repeat(size, batch, seed, repeats):
    if batch > size:
        with pytest.raises(ValueError, match="fewer than one global batch"):
            steps_per_pass(size, batch)
        return
    order = epoch_order(size, batch, seed, 1, repeats)
    kept = size // batch * batch
    assert len(order) == kept * repeats
    for part in order.reshape(repeats, kept):
        assert len(set(part.tolist())) == kept
    assert (
        size == 1
        or kept < 8
        or order.tolist() != epoch_order(size, batch, seed, 2, repeats).tolist()
    )


def test_the_budget_fits_the_official_table_and_explains_excess():
    steps = [budget.max_timesteps(OFFICIAL_MODALITIES, g, 2250) for g in range(1, 14)]
    assert steps == [12, 12, 12, 12, 12, 9, 6, 4, 3, 2, 2, 1, 1]
    single = Tokenization.from_mapping(SINGLE_BAND_SET_OVERRIDES)
    assert budget.max_timesteps(OFFICIAL_MODALITIES, 14, 2250, single) == 1
    with pytest.raises(ValueError, match="14 x 14 patches, which needs at least 2352 tokens"):
        budget.max_timesteps(OFFICIAL_MODALITIES, 14, 2250)
    with pytest.raises(ValueError, match="patch size 8 leaves no grid"):
        budget.check_grids(["worldcover"], [1, 8], [4, 5], None, 16)
    with pytest.raises(ValueError, match="positive whole numbers"):
        budget.check_grids(["worldcover"], [], [4], None, 16)


@FEW
@given(st.integers(1, 12), st.integers(1, 5000))
def test_a_crop_never_exceeds_its_budget(grid, tokens):
    per_step, fixed = budget.token_costs(OFFICIAL_MODALITIES, grid)
    try:
        steps = budget.max_timesteps(OFFICIAL_MODALITIES, grid, tokens)
    except ValueError:
        assert fixed + per_step > tokens
    else:
        assert fixed + steps * per_step <= tokens
        assert steps == 12 or fixed + (steps + 1) * per_step > tokens


def test_draws_depend_on_their_whole_key():
    keys = [(0, "a"), (0, "b"), (1, "a"), (0, "a", 1), (0, "a", 1, 2), (0, "a", 12)]
    values = [rng(*k).integers(1 << 62) for k in keys]
    assert len(set(values)) == len(keys)
    assert rng(0, "a", 1).integers(1 << 62) == rng(0, "a", np.int64(1)).integers(1 << 62)


def test_the_cache_keeps_datasets_apart(tmp_path):
    store = SampleStore(tmp_path / "cache", samples_per_sec=1e6)
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "sample_0.h5").write_text(name)
    copies = [store.local(tmp_path / n / "sample_0.h5") for n in "aba"]
    assert [c.read_text() for c in copies] == ["a", "b", "a"]
    with pytest.raises(ReadError, match="does not exist"):
        store.local(tmp_path / "a" / "sample_1.h5")
    assert not list((tmp_path / "cache").rglob("*.tmp"))


def test_the_sample_dataset_is_complete():
    folder, labels = sample_dataset_dir(), sample_labels()
    got = index.prepare(folder, OFFICIAL_MODALITIES)
    assert len(got) == len(labels.labels) == 68 and got.tile_px == 128
    assert all(got.locate(i)[0].is_file() for i in range(68))
    assert sorted(np.concatenate(list(labels.split.values()))) == list(range(68))
    known = labels.labels[labels.labels != IGNORE_LABEL]
    assert set(np.unique(known)) == set(range(len(labels.classes)))


def test_content_is_the_same_wherever_a_dataset_lies(dataset, tmp_path):
    names = ("sentinel2_l2a", "sentinel1")
    moved = tmp_path / "elsewhere" / dataset.name
    shutil.copytree(dataset, moved)
    here, there = index.prepare(dataset, names), index.prepare(moved, names)
    assert here.content == there.content and here.fingerprint != there.fingerprint
    others = [
        index.prepare(moved, names[:1]),
        index.prepare(moved, names, dataset_percentage=0.5),
        index.concat([here, there]),
    ]
    table = moved / "sample_metadata.csv"
    table.write_text(table.read_text().replace(",1", ",0", 1))
    others.append(index.prepare(moved, names))
    assert len({here.content, *(o.content for o in others)}) == 5
