"""Goldens of the data path that need sample files: reading, cropping, batches, CutMix.

The tables that need none are in `data_tables`.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from olmoearth_jax import modalities as registry
from olmoearth_jax.data import derived, index
from olmoearth_jax.data.budget import max_timesteps
from olmoearth_jax.data.cutmix import Pieces, read_pieces
from olmoearth_jax.data.h5 import open_sample
from olmoearth_jax.data.subset import Choices, Sample, read_sample
from olmoearth_jax.masking import missing_tokens
from olmoearth_jax.modalities import (
    MAX_TIMESTEPS,
    MISSING,
    OFFICIAL_DECODE_ONLY,
    SINGLE_BAND_SET_OVERRIDES,
    Tokenization,
)

from . import data_convert, data_tables
from .common import Case, Checks, Result, load_json, load_npz

ATOL = 1e-6
"""Where bits differ: absolute, on values of unit scale (manifest)."""


def cases(folder: Path) -> Iterator[Case]:
    """All cases of a data golden folder.

    Raises:
      ValueError: malformed folder.
    """
    manifest = load_json(folder / "manifest.json")
    listed = manifest.get("files", {})
    makers: dict[str, Callable[[Path], Iterator[Case]]] = {
        "raw_samples.json": _raw_cases,
        "full_normalized.json": _full_cases,
        "subset_cases.json": _subset_cases,
        "cutmix_cases.json": _cutmix_cases,
        "collated_batches.json": _collated_cases,
        **data_tables.MAKERS,
    }
    for file, maker in makers.items():
        if file in listed or (folder / file).exists():
            yield from maker(folder)
    if (folder / "geotiff_tree").is_dir():
        yield from data_convert.cases(folder)


def tokenization_named(name: str | None) -> Tokenization:
    """The tokenisation a golden names: v1 (or none) or v1_1, v1_2.

    Raises:
      ValueError: another name.
    """
    if name in (None, "none", "v1"):
        return Tokenization()
    if name in ("v1_1", "v1_2"):
        return Tokenization.from_mapping(SINGLE_BAND_SET_OVERRIDES)
    raise ValueError(f"unknown tokenization {name!r} in the golden; known: v1, v1_1, v1_2")


def h5_dir(folder: Path, key: str = "zstd") -> Path:
    """Folder of the sample files of one kind."""
    return folder / load_json(folder / "manifest.json")["h5_dirs"][key]


def _set(folder: Path, name: str) -> tuple[str, ...]:
    wanted = load_json(folder / "manifest.json")["modality_sets"][name]
    return registry.in_sample_order(registry.resolve(wanted))


@functools.lru_cache(maxsize=8)
def _index(folder: Path, names: tuple[str, ...]) -> index.DatasetIndex:
    return index.prepare(h5_dir(folder), names)


def _read(
    folder: Path,
    number: int,
    names: tuple[str, ...],
    side: int | None,
    steps: int,
    choose: Callable[[Choices], tuple[int, int, int]],
) -> Sample:
    # The goldens hold the reference's unshifted weather series.
    with open_sample(h5_dir(folder) / f"sample_{number}.h5", names) as file:
        return read_sample(file, names, side, steps, choose, align_time_only=False)


def _summary(checks: Checks, what: str, array: np.ndarray, recorded: Mapping[str, Any]) -> None:
    """Holds an array to its recorded checksum, or else to its recorded sums."""
    checks.equal(f"{what} dtype", str(array.dtype), recorded["dtype"])
    checks.equal(f"{what} shape", list(array.shape), list(recorded["shape"]))
    if hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest() == recorded["sha256"]:
        return
    present = array[array != MISSING].astype(np.float64)
    checks.equal(f"{what} missing elements", int(array.size - present.size), recorded["n_missing"])
    if present.size:
        mean = recorded["sum_not_missing"] / present.size
        checks.array(f"{what} mean", present.mean(), mean, rtol=1e-6)
        checks.array(f"{what} min", present.min(), recorded["min_not_missing"], rtol=1e-6)
        checks.array(f"{what} max", present.max(), recorded["max_not_missing"], rtol=1e-6)


def _raw_cases(folder: Path) -> Iterator[Case]:
    for number in load_json(folder / "raw_samples.json"):
        yield Case(f"raw_samples/{number}", functools.partial(_raw, folder, int(number)))


def _raw(folder: Path, number: int) -> Result:
    record = load_json(folder / "raw_samples.json")[str(number)]
    strided = load_npz(folder / "raw_samples_stride16.npz")
    names = _set(folder, "all")
    checks = Checks()
    with open_sample(h5_dir(folder) / f"sample_{number}.h5", names) as file:
        arrays = {n: file.read(n) for n in file.header.shapes}
        header = file.header
    if "worldcover" in arrays and "worldcover_onehot" in names:
        arrays["worldcover_onehot"] = derived.worldcover_onehot(arrays["worldcover"])
    stamps = record["arrays"]["timestamps"]
    arrays["timestamps"] = header.timestamps.astype(stamps["dtype"])
    checks.equal("arrays", sorted(arrays), sorted(record["arrays"]))
    checks.equal("timestamps", header.timestamps.tolist(), record["timestamps"])
    masks = {n: m.astype(int).tolist() for n, m in header.masks.items()}
    checks.equal("masks", masks, record["missing_timesteps_masks"])
    for name, array in arrays.items():
        if name in record["arrays"]:
            _summary(checks, name, array, record["arrays"][name])
            _strided(checks, name, array, strided.get(f"{number}/{name}"))
    return checks.result()


def _strided(checks: Checks, name: str, array: np.ndarray, recorded: np.ndarray | None) -> None:
    if recorded is not None:
        spatial = name != "timestamps" and registry.get(name).spatial
        checks.array(name, array[::16, ::16] if spatial else array, recorded)


def _full_cases(folder: Path) -> Iterator[Case]:
    for key in load_json(folder / "full_normalized.json"):
        yield Case(f"full_normalized/{key}", functools.partial(_full, folder, key))


def _full(folder: Path, key: str) -> Result:
    record = load_json(folder / "full_normalized.json")[key]
    strided = load_npz(folder / "full_normalized_stride16.npz")
    set_name, dataset_idx = key.rsplit("/", 1)
    names = _set(folder, set_name)
    checks = Checks(atol=ATOL)
    number = _index(folder, names).locate(int(dataset_idx))[1]
    checks.equal("sample number", number, record["h5_index"])
    whole = lambda choices: (int(choices.starts[0]), 0, 0)  # noqa: E731
    sample = _read(folder, number, names, None, MAX_TIMESTEPS, whole)
    arrays = {**sample.arrays, "timestamps": sample.timestamps}
    checks.equal("field order", list(arrays), record["field_order"])
    for name, recorded in record["arrays"].items():
        _summary(checks, name, arrays[name], recorded)
        _strided(checks, name, arrays[name], strided.get(f"{set_name}/{number}/{name}"))
    return checks.result()


def _subset_cases(folder: Path) -> Iterator[Case]:
    for record in load_json(folder / "subset_cases.json"):
        name = f"subset_cases/{record['case']}"
        yield Case(name, functools.partial(_subset, folder, record))


def _subset(folder: Path, record: Mapping[str, Any]) -> Result:
    names = _set(folder, record["set"])
    checks = Checks(atol=ATOL)
    steps = max_timesteps(
        names,
        record["sampled_hw_p"],
        record["token_budget"],
        tokenization_named(record["tokenization"]),
    )
    number = _index(folder, names).locate(record["dataset_idx"])[1]
    side = record["patch_size"] * record["sampled_hw_p"]
    offsets = (record["start_t"], record["start_h"], record["start_w"])
    sample = _read(folder, number, names, side, steps, lambda _: offsets)
    checks.equal("sample number", number, record["h5_index"])
    checks.equal("timesteps", steps, record["T"])
    checks.equal("current length", sample.length, record["current_length"])
    checks.equal("valid starts", sample.choices.starts.tolist(), record["valid_start_ts"])
    checks.equal("row choices", sample.choices.rows, record["n_start_h"])
    checks.equal("column choices", sample.choices.cols, record["n_start_w"])
    arrays = {**sample.arrays, "timestamps": sample.timestamps}
    checks.equal("fields", list(arrays), list(record["shapes"]))
    checks.equal("dtypes", {n: str(a.dtype) for n, a in arrays.items()}, record["dtypes"])
    _recorded_arrays(checks, arrays, folder / "subset_cases.npz", f"{record['case']}/")
    return checks.result()


def _recorded_arrays(
    checks: Checks, arrays: Mapping[str, np.ndarray], path: Path, prefix: str
) -> None:
    recorded = {k[len(prefix) :]: v for k, v in load_npz(path).items() if k.startswith(prefix)}
    checks.true(f"{path.name} has no arrays {prefix}*", recorded)
    for name, expected in recorded.items():
        checks.true(f"{name} is missing", name in arrays)
        if name in arrays:
            checks.array(name, arrays[name], expected)
            checks.true(
                f"{name}: other elements are missing",
                np.array_equal(arrays[name] == MISSING, expected == MISSING),
            )


def _cutmix_cases(folder: Path) -> Iterator[Case]:
    for record in load_json(folder / "cutmix_cases.json"):
        name = f"cutmix_cases/{record['case']}"
        yield Case(name, functools.partial(_cutmix, folder, record))


def _cutmix(folder: Path, record: Mapping[str, Any]) -> Result:
    path, prefix = folder / "cutmix_cases.npz", f"{record['case']}/"
    fields = [k[len(prefix) :] for k in load_npz(path) if k.startswith(prefix)]
    names = registry.in_sample_order(f for f in fields if f != "timestamps")
    if any(registry.get(n).image_factor != 1 for n in names):
        return Result(
            status="skipped",
            reason="the reference decimates finer modalities here; this code keeps whole patches",
        )
    steps = max_timesteps(names, record["sampled_hw_p"], record["token_budget"])
    start, rows, cols = record["draws"]
    checks = Checks(atol=ATOL)

    def choose(starts: np.ndarray, patches: int) -> Pieces:
        checks.equal("valid starts", starts.tolist(), start["a"])
        checks.equal("patches per side", [patches, patches], [rows["a"], cols["a"]])
        return Pieces(start["drawn"], np.asarray(rows["drawn"]), np.asarray(cols["drawn"]))

    with open_sample(h5_dir(folder) / f"sample_{record['h5_index']}.h5", names) as file:
        sample = read_pieces(
            file, names, record["patch_size"], steps, choose, align_time_only=False
        )
    arrays = {**sample.arrays, "timestamps": sample.timestamps}
    _recorded_arrays(checks, arrays, path, prefix)
    return checks.result()


def _collated_cases(folder: Path) -> Iterator[Case]:
    for record in load_json(folder / "collated_batches.json"):
        name = f"collated_batches/{record['case']}"
        yield Case(name, functools.partial(_collated, folder, record))


def _collated(folder: Path, record: Mapping[str, Any]) -> Result:
    fields = record["views"][0]
    names = registry.in_sample_order(
        f for f in fields if f != "timestamps" and not f.endswith("_mask")
    )
    steps = fields["timestamps"][1][1]
    checks = Checks(atol=ATOL)
    samples = []
    for i, (idx, patch, grid) in enumerate(record["items_idx_patch_hwp"]):
        number = _index(folder, names).locate(idx)[1]
        checks.equal("sample number", number, record["dataset_h5_indices"][i])
        draws = record["np_choice_draws"][3 * i : 3 * i + 3]
        offsets = tuple(d["drawn"] for d in draws)
        sample = _read(folder, number, names, patch * grid, steps, lambda _, o=offsets: o)
        c = sample.choices
        checks.equal("choices", [c.starts.tolist(), c.rows, c.cols], [d["a"] for d in draws])
        samples.append(sample)
    arrays = {n: np.stack([s.arrays[n] for s in samples]) for n in names}
    stamps = np.stack([s.timestamps for s in samples])
    recorded = load_npz(folder / "collated_batches.npz")
    for name, array in {**arrays, "timestamps": stamps}.items():
        checks.array(name, array, recorded[f"{record['case']}/view0/{name}"])
    tokenization = tokenization_named(record["masking"])
    for view in range(len(record["views"])):
        prefix = f"{record['case']}/view{view}"
        masks = {n: recorded[f"{prefix}/{n}_mask"] for n in names}
        _mask_invariants(checks, arrays, masks, record["patch_size"], tokenization)
    return checks.result()


def _mask_invariants(
    checks: Checks,
    arrays: Mapping[str, np.ndarray],
    masks: Mapping[str, np.ndarray],
    patch_size: int,
    tokenization: Tokenization,
) -> None:
    """What every draw of masks keeps to: codes, missing exactly where data is, whole patches."""
    tokens = missing_tokens(arrays, patch_size, tokenization)
    for name, mask in masks.items():
        sets = tokenization.band_sets(name)
        gone = np.stack([(arrays[name][..., list(s)] == MISSING).any(-1) for s in sets], -1)
        checks.true(f"{name} mask: codes are not 0 to 3", mask.max() <= 3)
        checks.equal(f"{name} mask shape", mask.shape, gone.shape)
        if mask.shape != gone.shape:
            continue
        checks.true(
            f"{name} mask: 3 is not exactly where data is missing", np.array_equal(mask == 3, gone)
        )
        corner = mask
        if registry.get(name).spatial:
            px = patch_size * registry.get(name).image_factor
            corner = mask[:, ::px, ::px]
            spread = np.repeat(np.repeat(corner, px, 1), px, 2)
            whole = (mask == spread) | (mask == 3) | (spread == 3)
            checks.true(f"{name} mask: varies inside a patch", whole.all())
        checks.true(
            f"{name} mask: our missing tokens differ", np.array_equal(tokens[name], corner == 3)
        )
        if name in OFFICIAL_DECODE_ONLY:
            checks.true(f"{name} mask: a decode-only token is encoded", (mask != 0).all())
