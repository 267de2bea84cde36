"""The training stream: the same for any number of workers and hosts, and robust to bad files."""

import dataclasses
import logging
import os
import signal
import traceback
from pathlib import Path

import h5py
import numpy as np
import pytest

from olmoearth_jax import masking
from olmoearth_jax.data import index
from olmoearth_jax.data.pipeline import TooManyBadSamples, TrainStream
from olmoearth_jax.data.pool import WorkerDied
from olmoearth_jax.modalities import MISSING, OFFICIAL_DECODE_ONLY, OFFICIAL_MODALITIES
from olmoearth_jax.model.config import SupervisedMapConfig, SupervisionHeadConfig
from tests.data.streams import make_stream

STRATEGY = masking.build(
    {
        "type": "modality_cross_random",
        "encode_ratio": 0.5,
        "decode_ratio": 0.5,
        "allow_encoding_decoding_same_bandset": True,
        "only_decode_modalities": OFFICIAL_DECODE_ONLY,
    }
)


def _stream(folder: Path, masks=(STRATEGY, STRATEGY), **options) -> TrainStream:
    return make_stream(index.prepare(folder, OFFICIAL_MODALITIES), masks, **options)


def _flat(group) -> dict[str, np.ndarray]:
    out = {}
    for key, value in group.items():
        nested = value.items() if isinstance(value, dict) else [("", value)]
        out.update({f"{key}/{name}": array for name, array in nested})
    return out


def _assert_equal(a, b) -> None:
    a, b = _flat(a), _flat(b)
    assert list(a) == list(b)
    for key in a:
        assert type(a[key]) is type(b[key]) is np.ndarray
        assert a[key].dtype == b[key].dtype
        np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def test_a_group_has_the_documented_form(dataset):
    stream = _stream(dataset)
    assert stream.steps_per_epoch == 3 and stream.groups_per_step == 2
    names = index.prepare(dataset, OFFICIAL_MODALITIES).modalities
    for step, groups in enumerate(stream.batches(0, 4)):
        assert [int(g["epoch"]) for g in groups] == [1 + step // 3] * 2
        for i, group in enumerate(groups):
            patch, grid, steps = stream.shapes(step)[i]
            assert (group["patch_size"], group["grid"]) == (patch, grid) and patch * grid <= 16
            assert group["position"].tolist() == list(
                range(step % 3 * 8 + i * 4, step % 3 * 8 + i * 4 + 4)
            )
            assert tuple(group["data"]) == tuple(group["mask_a"]) == names
            assert group["timestamps"].shape == (4, steps, 3)
            s2, mask = group["data"]["sentinel2_l2a"], group["mask_a"]["sentinel2_l2a"]
            assert s2.shape == (4, patch * grid, patch * grid, steps, 12)
            assert s2.dtype == np.float32 and mask.dtype == np.int8
            assert mask.shape == (4, grid, grid, steps, 3)
            missing = masking.missing_tokens(group["data"], patch)
            for name in names:
                for key in ("mask_a", "mask_b"):
                    np.testing.assert_array_equal(group[key][name] == 3, missing[name])
            assert any((group["mask_a"][n] != group["mask_b"][n]).any() for n in names)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(dataset, workers):
    alone = _stream(dataset).batches(1, 4)
    shared = _stream(dataset, num_workers=workers).batches(1, 4)
    for a, b in zip(alone, shared, strict=True):
        for group_a, group_b in zip(a, b, strict=True):
            _assert_equal(group_a, group_b)


def test_a_stream_goes_on_where_it_was_left(dataset):
    whole = list(_stream(dataset).batches(0, 7))
    for start in (2, 3, 5):
        rest = _stream(dataset).batches(start, 7)
        for a, b in zip(whole[start:], rest, strict=True):
            for group_a, group_b in zip(a, b, strict=True):
                _assert_equal(group_a, group_b)
    endless = _stream(dataset).batches(6)
    _assert_equal(next(endless)[0], whole[6][0])
    endless.close()


def test_hosts_together_read_what_one_reads(dataset):
    whole = _stream(dataset, group_size=8, samples_per_shape=8).group(4)
    for hosts in (2, 3):
        joined = {k: np.empty_like(v) for k, v in _flat(whole).items()}
        for host in range(hosts):
            part = _stream(dataset, group_size=8, samples_per_shape=8, hosts=(host, hosts)).group(4)
            for key, value in _flat(part).items():
                place = slice(host, None, hosts) if value.ndim else ...
                joined[key][place] = value
        for key, value in _flat(whole).items():
            np.testing.assert_array_equal(joined[key], value, err_msg=key)


def test_positions_share_shapes_in_blocks(dataset):
    stream = _stream(dataset, samples_per_shape=8, global_batch_size=24)
    for epoch in range(4):
        shapes = stream.shapes(epoch)
        assert shapes[0::2] == shapes[1::2]
    assert len({s for epoch in range(9) for s in stream.shapes(epoch)}) > 3
    assert {p * g <= 16 for epoch in range(9) for p, g, _ in stream.shapes(epoch)} == {True}


def test_one_view_and_transforms(dataset):
    flips = {"type": "flip_and_rotate"}
    stream = _stream(dataset, masks=[STRATEGY], transform_config=flips, apply_cutmix=True)
    group = stream.group(1)
    assert "mask_b" not in group and group["ok"].all()
    mixup = {"type": "mixup", "alpha": 1.0}
    mixed = _stream(dataset, transform_config=mixup).group(1)
    assert mixed["ok"].all()
    with pytest.raises(ValueError, match="Mixup needs all samples"):
        _stream(dataset, transform_config=mixup, hosts=(0, 2))


def _spoil(folder: Path, number: int, how: str) -> None:
    path = folder / f"sample_{number}.h5"
    if how == "truncate":
        path.write_bytes(path.read_bytes()[:1000])
    elif how == "delete":
        path.unlink()
    elif how == "nan":
        with h5py.File(path, "a") as f:
            f["sentinel1"][...] = np.nan
    else:
        with h5py.File(path, "a") as f:
            del f["landsat"]
            f["landsat"] = np.zeros((16, 16, 12, 4), np.uint16)


@pytest.mark.parametrize("how", ["truncate", "delete", "nan", "shape"])
def test_bad_samples_become_holes(writable_dataset, caplog, how):
    options = {"global_batch_size": 6, "group_size": 6, "samples_per_shape": 6}
    good = _stream(writable_dataset, **options).group(0)
    _spoil(writable_dataset, 2, how)
    stream = _stream(writable_dataset, **options)
    with caplog.at_level(logging.WARNING):
        group = stream.group(0)
    hole = group["index"] == 2
    np.testing.assert_array_equal(group["ok"], ~hole)
    assert "sample_2.h5" in caplog.text and (stream.samples_read, stream.samples_bad) == (6, 1)
    for name, array in group["data"].items():
        assert (array[hole] == MISSING).all() and np.isfinite(array).all()
        np.testing.assert_array_equal(array[~hole], good["data"][name][~hole])
        for key in ("mask_a", "mask_b"):
            assert (group[key][name][hole] == 3).all()
            np.testing.assert_array_equal(group[key][name][~hole], good[key][name][~hole])


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_bad_samples_stop_the_run(writable_dataset, workers):
    _spoil(writable_dataset, 1, "truncate")
    _spoil(writable_dataset, 4, "delete")
    stream = _stream(
        writable_dataset,
        global_batch_size=6,
        group_size=6,
        samples_per_shape=6,
        num_workers=workers,
    )
    with pytest.raises(TooManyBadSamples, match=r"8 of 24 samples.*sample_[14]\.h5"):
        list(stream.batches(0, 9))
    assert stream.samples_read == 24


def test_a_sample_without_visible_token_becomes_a_hole(dataset):
    @dataclasses.dataclass(frozen=True)
    class Blind:
        def __call__(self, missing, ctx):
            masks = {n: np.where(m, 3, 0).astype(np.int8) for n, m in missing.items()}
            for mask in masks.values():
                mask[1][mask[1] == 0] = 2
            return masks

    stream = _stream(dataset, masks=[STRATEGY, Blind()])
    group = stream.group(0)
    assert group["ok"].tolist() == [True, False, True, True] and stream.samples_bad == 0
    assert all((m[1] == 3).all() for m in group["mask_a"].values())


@pytest.mark.parametrize("supervised", [False, True])
def test_patches_that_lack_pixels_are_missing(writable_dataset, supervised):
    """Whichever pixels they lack; and no fill value is left in an image that has values."""
    names = ("sentinel2_l2a", "worldcover")
    for path in writable_dataset.glob("sample_*.h5"):
        with h5py.File(path, "r+") as file:
            for name in set(names) & set(file):
                values = file[name][...].astype(np.int32)
                values[2::5, 3::7] = int(MISSING)
                del file[name]
                file[name] = values
    stream = _stream(writable_dataset, global_batch_size=4)
    if supervised:
        heads = {"worldcover": SupervisedMapConfig()}
        stream.config.model.supervision_head_config = SupervisionHeadConfig(heads)
    count = dict.fromkeys(names, 0)
    for group in (stream.group(n) for n in range(6)):
        side = int(group["patch_size"])
        for name in names:
            x, mask = group["data"][name], group["mask_a"][name]
            frame = (x == MISSING).all((1, 2, 4))[:, None, None]  # nothing of that date
            left = (x == MISSING).any(-1) & ~frame
            told = supervised and name == "worldcover"
            holes = left if told else (x == 0).any(-1)
            assert told or not left.any()
            batch, height, width, steps = holes.shape
            cut = holes.reshape(batch, height // side, side, width // side, side, steps)
            broken = cut.any((2, 4))
            assert (mask[broken] == 3).all() and (mask[~broken & ~frame] != 3).any()
            count[name] += int(broken.sum())
    assert all(count.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"global_batch_size": 400}, "24 samples, fewer than one global batch of 400"),
        ({"repeats": 10**8}, "repeats=100000000 makes an epoch of 2400000000 samples"),
        ({"token_budget": 100}, "token budget 100 is too small for a grid of 4 x 4"),
        ({"patch_sizes": (20,)}, "patch size 20 leaves no grid that fits the 16 px tiles"),
        ({"hosts": (2, 2)}, "host 2 is not one of 2"),
        ({"hosts": (0, 5)}, "5 hosts cannot share groups of 4"),
        ({"training_modalities": ["sentinel1"]}, "the index was prepared for"),
    ],
)
def test_impossible_settings_are_explained(dataset, options, message):
    with pytest.raises(ValueError, match=message):
        _stream(dataset, **options)


def test_reversed_ranges_are_explained(dataset):
    with pytest.raises(ValueError, match="from 3 to 2"):
        _stream(dataset).batches(3, 2)


@dataclasses.dataclass(frozen=True)
class _Failing:
    """Masking that raises, or ends its process, in the second group."""

    kill: bool
    error: type = ZeroDivisionError

    def __call__(self, missing, ctx):
        if ctx.step == 1:
            if self.kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise self.error("no such masks")
        return STRATEGY(missing, ctx)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("error", [ZeroDivisionError, RuntimeError, RecursionError])
def test_an_error_in_a_worker_ends_the_run_with_its_traceback(dataset, error, workers):
    stream = _stream(dataset, masks=[_Failing(False, error)], num_workers=workers)
    with pytest.raises(Exception, match="no such masks") as caught:
        list(stream.batches(0, 3))
    assert not isinstance(caught.value, WorkerDied)
    assert "test_pipeline.py" in "".join(traceback.format_exception(caught.value))


def test_a_killed_worker_ends_the_run(dataset):
    stream = _stream(dataset, masks=[_Failing(True)], num_workers=2)
    with pytest.raises(WorkerDied, match=r"a reader process was killed.*exit code -9"):
        list(stream.batches(0, 6))


def test_two_hosts_with_two_workers_each_read_what_one_host_reads(dataset):
    settings = {"group_size": 8, "samples_per_shape": 8}
    whole = list(_stream(dataset, **settings).batches(0, 4))
    for host in (0, 1):
        part = _stream(dataset, **settings, hosts=(host, 2), num_workers=2)
        for groups, own in zip(whole, part.batches(0, 4), strict=True):
            for group, half in zip(groups, own, strict=True):
                mine = {k: v[host::2] if v.ndim else v for k, v in _flat(group).items()}
                _assert_equal(mine, _flat(half))


def test_a_folder_without_permission_is_named(writable_dataset, monkeypatch):
    def refuse(self, *_, **__):
        raise PermissionError(13, "Permission denied", str(self))

    path = writable_dataset / "sample_1.h5"
    stream = _stream(writable_dataset, global_batch_size=6, group_size=6, samples_per_shape=6)
    if os.geteuid():
        path.chmod(0)
    else:  # nothing is refused to root
        real = os.open
        monkeypatch.setattr(
            "olmoearth_jax.data.h5.os.open",
            lambda p, *a, **k: refuse(p) if str(p) == str(path) else real(p, *a, **k),
        )
    stream.group(0)
    assert stream.samples_bad == 1
    assert "sample_1.h5" in str(stream._health._seen) and "Permission" in str(stream._health._seen)
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ValueError, match=r"sample_metadata.csv: .*Permission denied"):
        index.prepare(writable_dataset, OFFICIAL_MODALITIES)
    monkeypatch.setattr(Path, "is_dir", refuse)
    with pytest.raises(ValueError, match="cannot look into the dataset folder .*Permission"):
        index.prepare(writable_dataset, OFFICIAL_MODALITIES)
