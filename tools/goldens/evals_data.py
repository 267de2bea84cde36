"""Goldens of downstream evaluation data: readers, converters, batching."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from olmoearth_jax.configlib.tasks import DatasetInfo, EvalTaskConfig, dataset_info, modalities_of
from olmoearth_jax.evals.datasets import base, open_split, pretrain, tensors, windowed
from olmoearth_jax.evals.datasets.base import Reader
from olmoearth_jax.evals.datasets.geobench import SLOTS, GeoBench2
from olmoearth_jax.evals.datasets.series import BreizhCrops
from olmoearth_jax.evals.samples import MASK, TIMESTAMPS, EvalSample, collate
from olmoearth_jax.modalities import get

from ..evaldata import mados, pastis
from .common import Checks, Result, load_npz

RTOL, ATOL = 1e-5, 1e-6
"""Float32 outputs: relative to the value, and to the unit scale of normalised data near 0."""

SETTINGS: dict[str, dict[str, Any]] = {
    "pretrained": {},
    "dataset2std": {"norm_stats_from_pretrained": False},
    "minmaxint": {
        "norm_stats_from_pretrained": False, "norm_method": "norm_yes_clip_min_max_int",
    },
    "clip3int": {"norm_stats_from_pretrained": False, "norm_method": "norm_yes_clip_3_std_int"},
}  # fmt: skip
"""Task settings by the last part of a case's name."""

BOTH = ["sentinel1", "sentinel2_l2a"]
LOW_LABEL: dict[str, tuple[str, str, int, dict[str, Any]]] = {
    "pastis_sample_lowlabel": ("pastis", "train", 0, {"label_fraction": 0.5}),
    "mados_sample_lowlabel": (
        "mados", "train", 0, {"label_fraction": 0.5, "norm_stats_from_pretrained": False},
    ),
    "sen1floods11_lowlabel": (
        "sen1floods11", "train", 0, {"label_fraction": 0.2, "norm_stats_from_pretrained": False},
    ),
    "geobench_lowlabel": (
        "m-eurosat", "train", 0, {"label_fraction": 0.5, "norm_stats_from_pretrained": False},
    ),
}  # fmt: skip


@contextlib.contextmanager
def data_folders(root: Path) -> Iterator[None]:
    """Points the variables of the data sets into a golden folder's files."""
    folders = {
        "GEOBENCH_DIR": "geobench", "MADOS_DIR": "mados", "FLOODS_DIR": "floods",
        "PASTIS_DIR": "pastis_processed", "PASTIS_DIR_PARTITION": "pastis_partition",
        "FIFTY_CITIES_DIR": "fifty_cities",
    }  # fmt: skip
    before = {k: os.environ.get(k) for k in folders}
    os.environ.update({k: str(root / "files" / v) for k, v in folders.items()})
    try:
        yield
    finally:
        for key, value in before.items():
            os.environ.pop(key) if value is None else os.environ.update({key: value})


def _task(dataset: str, **settings: Any) -> EvalTaskConfig:
    return EvalTaskConfig(dataset=dataset, probe_lr=0.1, **settings)


def _reader(cls: type[Reader], info: DatasetInfo, **settings: Any) -> Any:
    """A reader without its files, for its conversion alone."""
    reader = cls.__new__(cls)
    reader.task, reader.info, reader.split = _task(info.name, **settings), info, "train"
    reader.modalities = modalities_of(reader.task, info)
    return reader


def _same_sample(
    checks: Checks, sample: EvalSample, label: Any, z: Mapping[str, np.ndarray]
) -> None:
    for key, want in z.items():
        if key == TIMESTAMPS or key.endswith(MASK):
            checks.array(key, sample[key], want, 0, 0)
        elif key in sample:
            checks.equal(f"{key} type", sample[key].dtype, want.dtype)
            checks.array(key, sample[key], want)
    if "label" in z:
        checks.array("label", label, z["label"], 0, 0)
        checks.equal("label type", np.asarray(label).dtype, z["label"].dtype)


def _open(path: Path, dataset: str, split: str, settings: Mapping[str, Any]) -> Reader:
    inputs = settings.get("input_modalities")
    if inputs is None and dataset.startswith(("pastis", "fifty_cities")):
        settings = {**settings, "input_modalities": BOTH}
    with data_folders(path.parent):
        return open_split(dataset, _task(dataset, **settings), split)


def _item(name: str, path: Path, dataset: str, split: str, row: int, settings: Mapping) -> Result:
    checks, z = Checks(RTOL, ATOL), load_npz(path)
    reader = _open(path, dataset, split, settings)
    with data_folders(path.parent):
        sample, label = reader[row]
    if "length" in z:
        checks.equal("length", len(reader), int(z["length"]))
    _same_sample(checks, sample, label, z)
    return checks.result()


def _sample(name: str, path: Path) -> Result:
    settings = SETTINGS[name.rsplit("_", 1)[1]]
    if name.startswith("geobench_"):
        return _item(name, path, name.split("_")[1], "train", 1, settings)
    dataset = name.split("_sample_")[0]
    split, row = {"pastis": ("train", 1), "mados": ("valid", 2), "sen1floods11": ("valid", 1)}[
        dataset
    ]
    return _item(name, path, dataset, split, row, settings)


def _low_label(name: str, path: Path) -> Result:
    dataset, split, row, settings = LOW_LABEL[name]
    if dataset == "pastis":
        settings = {**settings, "input_modalities": ["sentinel2_l2a"]}
    return _item(name, path, dataset, split, row, settings)


def _pastis_processed(name: str, path: Path) -> Result:
    """Both the stored files and what our converter makes of the raw ones."""
    checks, z = Checks(rtol=1e-6), load_npz(path)
    split = name.rsplit("_", 1)[1]
    raw = path.parent / "files" / "pastis_raw"
    found = [pastis.convert_patch(raw, p, dates) for p, dates in pastis.patches(raw, split)]
    kept = [f for f in found if f is not None]
    for i, key in enumerate(("s2", "s1", "months", "targets")):
        checks.array(f"converted {key}", np.stack([f[i] for f in kept]), z[key])
    reader = _open(path, "pastis", split, {})
    assert isinstance(reader, tensors.Pastis)
    checks.array("stored months", reader.months, z["months"], 0, 0)
    checks.array("stored targets", reader.targets, z["targets"], 0, 0)
    return checks.result()


def _quadrants(name: str, path: Path) -> Result:
    checks, z = Checks(), load_npz(path)
    rows, columns = np.mgrid[:128, :128]
    target = (7 * rows + 3 * columns + int(z["offset"])) % 20
    target[target == pastis.VOID] = -1
    checks.array("targets", np.stack(pastis.quadrants(target)), z["targets"])
    image = np.stack(pastis.quadrants((rows // 2 + columns)[None, None]))[:, 0, 0]
    checks.array("s2_first_band", image, z["s2_first_band"])
    return checks.result()


def _mados_convert(name: str, path: Path) -> Result:
    """Our converter writes channels last and labels shifted by one (documented difference)."""
    checks, z = Checks(atol=1e-6), load_npz(path)
    root = path.parent / "files" / "mados_raw"
    images, labels = mados.convert(root, root / "splits" / "test_X.txt")
    images, labels = np.moveaxis(images, -1, 1), labels + 1
    checks.equal("n", len(images), int(z["n"]))
    step = images.shape[-1] // z["images_strided"].shape[-1]
    checks.array("images", images[..., ::step, ::step], z["images_strided"])
    step = labels.shape[-1] // z["labels_strided"].shape[-1]
    checks.array("labels", labels[:, ::step, ::step], z["labels_strided"], 0, 0)
    checks.array("label_sum", labels.sum((1, 2)), z["label_sum"], 0, 0)
    checks.array("channel_means", images.mean((0, 2, 3), dtype=np.float64), z["channel_means"])
    return checks.result()


def _breizhcrops(name: str, path: Path) -> Result:
    checks, z = Checks(RTOL, ATOL), load_npz(path)
    settings = SETTINGS[name.rsplit("_", 1)[1]]
    reader = _reader(BreizhCrops, dataset_info("breizhcrops"), patch_size=1, **settings)
    sample, label = reader.convert(reader.monthly(z["series"], int(z["label"])))
    _same_sample(checks, sample, label, z)
    return checks.result()


def _city_splits(name: str, path: Path) -> Result:
    checks, z = Checks(), load_npz(path)
    counts = json.loads(str(z["counts_json"]))
    for key, want in json.loads(str(z["index_json"])).items():
        mode, _, split = key.partition("/")
        split, _, fraction = split.partition("@")
        units = tensors.split_units(counts, mode)[split]
        if fraction:
            units = base.label_subset(units, float(fraction))
        checks.equal(key, [list(u) for u in units], want)
    return checks.result()


def _city_sample(name: str, path: Path) -> Result:
    checks, z = Checks(RTOL, ATOL), load_npz(path)
    reader = _open(path, "fifty_cities", "train", SETTINGS[name.rsplit("_", 1)[1]])
    assert isinstance(reader, tensors.FiftyCities)
    _same_sample(checks, *reader.convert(reader.read(("Berlin", 1))), z)
    return checks.result()


def _pretrain(name: str, path: Path) -> Result:
    checks, z = Checks(), load_npz(path)
    for key in ("worldcover", "osm", "cdl", "worldcereal"):
        function = {
            "worldcover": pretrain.worldcover_label, "osm": pretrain.osm_label,
            "cdl": pretrain.cdl_label, "worldcereal": pretrain.worldcereal_label,
        }[key]  # fmt: skip
        checks.array(f"{key} label", function(z[f"{key}_raw"]), z[f"{key}_label"])
    for key in (k.rsplit("_", 1)[0] for k in z if k.endswith("_train") and k[0].isdigit()):
        total, *sizes, seed = (int(v) for v in key.split("_"))
        want = {s: z[f"{key}_{s}"] for s in ("train", "valid", "test")}
        _same_split(
            checks,
            key,
            want,
            lambda t=total, n=sizes, s=seed: pretrain.random_split(
                np.arange(t), (n[0], n[1], n[2]), s
            ),
        )
    want = {s: z[f"geo_{s}"] for s in ("train", "valid", "test")}
    _same_split(
        checks,
        "geo",
        want,
        lambda: pretrain.geographic_split(z["candidates"], z["latlons"], (60, 12, 12), 25.0, 42),
    )
    return checks.result()


def _same_split(checks: Checks, what: str, want: Mapping[str, np.ndarray], make: Callable) -> None:
    """A recorded [-1] stands for an error about an empty split."""
    empty = [s for s, rows in want.items() if rows.tolist() == [-1]]
    try:
        got = make()
    except ValueError as e:
        checks.true(f"{what}: {e}", bool(empty) and "empty" in str(e))
        return
    checks.true(f"{what}: an empty split is no error", not empty)
    for split, rows in want.items():
        checks.array(f"{what} {split}", got[split], rows)


def _pretrain_mask(name: str, path: Path) -> Result:
    checks, z = Checks(), load_npz(path)
    got = pretrain.missing_mask("sentinel2_l2a", z["sentinel2_l2a"])
    checks.array("mask", got, z["sentinel2_l2a_mask"])
    return checks.result()


def _windowed(name: str, path: Path) -> Result:
    checks, z = Checks(RTOL, ATOL), load_npz(path)
    task_type = name.rsplit("_", 1)[1]
    inputs = {k.removeprefix("in_"): v for k, v in z.items() if k.startswith("in_")}
    info = dataclasses.replace(
        dataset_info("nandi_crop_map"), task_type=task_type, modalities=tuple(inputs)
    )
    own = task_type == "classification"
    reader = _reader(windowed.Windowed, info, norm_stats_from_pretrained=not own)
    # The recorded run used statistics 1000 + position and 300 for every band.
    bands = get("sentinel2_l2a").bands
    table = {b: {"mean": 1000.0 + i, "std": 300.0} for i, b in enumerate(bands)}
    reader.stats = {"sentinel2_l2a": table} if own else None
    key = {"segmentation": "classes", "regression": "values"}.get(task_type, "label")
    arrays = {**inputs, "label": z[key]} | ({"valid": z["valid"]} if "valid" in z else {})
    sample, label = reader.convert(reader.arranged(arrays))
    _same_sample(checks, sample, label, z)
    return checks.result()


def _collate(name: str, path: Path) -> Result:
    checks, z = Checks(), load_npz(path)
    samples: list[EvalSample] = []
    for i in range(len(z["label"])):
        start = f"item{i}_"
        samples.append({k.removeprefix(start): v for k, v in z.items() if k.startswith(start)})
    for key, value in collate(samples).items():
        checks.array(key, value, z[key])
    return checks.result()


def _geobench2(name: str, path: Path) -> Result:
    checks, z = Checks(rtol=1e-4, atol=1e-5), load_npz(path)
    for key in SLOTS:
        info = dataset_info(f"gb2-{key}")
        raw = {k.split("/")[2]: v for k, v in z.items() if k.startswith(f"{key}/in/")}
        for part in ("pretrained", "dataset"):
            own = part == "dataset"
            reader = _reader(GeoBench2, info, norm_stats_from_pretrained=not own)
            sample, _ = reader.convert(reader.slotted(raw, np.asarray(0)))
            for full, want in z.items():
                if full.startswith(f"{key}/{part}/"):
                    checks.array(full, sample[full.split("/")[2]], want)
    return checks.result()


CHECKS: dict[str, Callable[[str, Path], Result]] = {
    **dict.fromkeys(LOW_LABEL, _low_label),
    "pastis_processed_": _pastis_processed,
    "pastis_quadrants": _quadrants,
    "mados_convert": _mados_convert,
    "pastis_sample_": _sample,
    "mados_sample_": _sample,
    "sen1floods11_sample_": _sample,
    "geobench_v2_mapping": _geobench2,
    "geobench_": _sample,
    "breizhcrops_sample_": _breizhcrops,
    "fifty_cities_splits": _city_splits,
    "fifty_cities_sample_": _city_sample,
    "pretrain_subset_mask": _pretrain_mask,
    "pretrain_subset": _pretrain,
    "rslearn_": _windowed,
    "collate_variable_time": _collate,
}
"""Which check runs a case, by the beginning of its name; the first match counts."""


def check_of(name: str) -> Callable[[str, Path], Result] | None:
    """The check of a case, None if there is none."""
    return next((f for prefix, f in CHECKS.items() if name.startswith(prefix)), None)
