"""Goldens of the data path that are tables: budgets, orders, filters, names, small functions."""

from __future__ import annotations

import functools
import hashlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from olmoearth_jax import modalities as registry
from olmoearth_jax.data import derived, index, order, timesteps, transforms
from olmoearth_jax.data.budget import max_timesteps, token_costs
from olmoearth_jax.data.normalize import normalize
from olmoearth_jax.data.stats import StreamingStats
from olmoearth_jax.data.subset import array_shape
from olmoearth_jax.modalities import MISSING, SINGLE_BAND_SET_OVERRIDES, Tokenization

from .common import Case, Checks, Result, load_json, load_npz, skipped

Record = Mapping[str, Any]


def _each(file: str, key: str | None, check: Callable[[Path, Any], Result]) -> Any:
    """A maker of one case per element of a list in a JSON file."""

    def make(folder: Path) -> Iterator[Case]:
        document = load_json(folder / file)
        items = document if key is None else document.get(key, [])
        stem = Path(file).stem + (f"/{key}" if key else "")
        for i, item in enumerate(items):
            yield Case(f"{stem}/{i}", functools.partial(check, folder, item))

    return make


def _budget_cases(folder: Path) -> Iterator[Case]:
    document = load_json(folder / "token_budget.json")
    sets = {**load_json(folder / "manifest.json")["modality_sets"], **document["extra_sets"]}
    for row in document["rows"]:
        record = dict(zip(document["columns"], row, strict=True))
        name = "token_budget/{modality_set}/{tokenization}/hw{hw_p}/{budget}".format(**record)
        yield Case(name, functools.partial(_budget, sets, record))


def _budget(sets: Mapping[str, list[str]], record: Record) -> Result:
    names = sets[record["modality_set"]]
    overrides = {} if record["tokenization"] == "v1" else SINGLE_BAND_SET_OVERRIDES
    tokenization = Tokenization.from_mapping(overrides)
    checks = Checks()
    cost = token_costs(names, record["hw_p"], tokenization)
    checks.equal("tokens", list(cost), [record["tokens_per_timestep"], record["static_tokens"]])
    try:
        got: int | str = max_timesteps(names, record["hw_p"], record["budget"], tokenization)
    except ValueError:
        got = "error"
    checks.equal("max_t", got, record["max_t"])
    return checks.result()


def _order_file_name(size: int, seed: int, epoch: int, shuffle: bool) -> str:
    """Name under which the reference keeps an epoch's order of `size` indices."""
    epoch_part = f"_epoch{epoch}_seed{seed}" if shuffle else ""
    return f"global_indices{epoch_part}_size{size}.npy"


def _rank_part(whole: np.ndarray, record: Record) -> np.ndarray:
    """What one loader worker of one rank gets in the reference; groups are contiguous here."""
    rows = whole.reshape(-1, record["global_batch_size"])[record["batches_processed"] :]
    workers = max(1, record["num_workers"])
    return rows[record["worker"] :: workers, record["rank"] :: record["world_size"]].reshape(-1)


def _reference_draws(seed: int, record: Record, count: int) -> list[list[int]]:
    """The first (patch size, grid) draws of one worker in the reference, on 256 px tiles."""
    draw = np.random.Generator(np.random.PCG64(seed))
    sizes = np.arange(record["min_patch"], record["max_patch"] + 1)
    out = []
    for _ in range(count):
        patch = int(draw.choice(sizes))
        fitting = [g for g in record["hw_p_list"] if 0 < g <= 256 // patch]
        out.append([patch, int(draw.choice(fitting))])
    return out


def _global_indices(_: Path, record: Record) -> Result:
    checks = Checks()
    got = order.epoch_order(
        record["n"],
        record["global_batch_size"],
        record["seed"],
        record["epoch"],
        record["repeats"],
        record["shuffle"],
    )
    checks.equal("length", len(got), record["length"])
    checks.equal("batches", len(got) // record["global_batch_size"], record["total_batches"])
    checks.array("first indices", got[:64], np.asarray(record["first_64"]))
    checks.equal(
        "sha256",
        hashlib.sha256(got.astype(np.uint32).tobytes()).hexdigest(),
        record["sha256_uint32"],
    )
    name = _order_file_name(len(got), record["seed"], record["epoch"], record["shuffle"])
    checks.equal("file name", name, record["index_file_name"])
    return checks.result()


def _rank_indices(_: Path, record: Record) -> Result:
    checks = Checks()
    whole = order.epoch_order(
        record["n"], record["global_batch_size"], record["seed"], record["epoch"]
    )
    got = _rank_part(whole, record)
    checks.array("indices", got, np.asarray(record["indices"]))
    return checks.result()


def _shape_draws(_: Path, record: Record) -> Result:
    checks = Checks()
    workers = max(1, record["num_workers"])
    seed = record["seed"] + record["epoch"] + record["rank"] * workers + record["worker"]
    checks.equal("seed", seed, record["pcg64_seed"])
    draws = record["draws_patch_hwp"]
    got = _reference_draws(seed, record, len(draws))
    checks.equal("draws", got, draws)
    return checks.result()


def _prepare(folder: Path, key: str, names: list[str], options: Record) -> index.DatasetIndex:
    h5 = folder / load_json(folder / "manifest.json")["h5_dirs"][key]
    kwargs: dict[str, Any] = dict(options)
    with tempfile.TemporaryDirectory() as temporary:
        if kwargs.get("filter_idx_file") is not None:
            path = Path(temporary) / "filter.npy"
            np.save(path, np.asarray(kwargs["filter_idx_file"]))
            kwargs["filter_idx_file"] = path
        return index.prepare(h5, names, **kwargs)


def _filtering(folder: Path, record: Record) -> Result:
    checks = Checks()
    names, options = record["training_modalities"], record["options"]
    try:
        got = _prepare(folder, "zstd", names, options)
    except ValueError as e:
        if "sample_indices" not in record:
            return Result(tolerance="an error", reason=f"reports: {e}")
        raise
    if "sample_indices" not in record:  # the reference stops; a missing column is no error here
        return Result(tolerance="an error or a defined value")
    expected, note = record["sample_indices"], ""
    static_only = not any(registry.get(n).kind == "space_time" for n in names)
    if static_only and options.get("filter_idx_file") is not None:
        # The reference ignores the filter file here; this code honours it.
        expected = sorted(set(expected) & set(options["filter_idx_file"]))
        note = "the filter file is honoured, unlike in the reference"
    checks.equal("sample numbers", got.parts[0].numbers.tolist(), expected)
    checks.equal("length", len(got), len(expected))
    centres = record.get("latlon_distribution_first3")
    if centres is not None and not note:
        assert got.latlon is not None
        checks.array("latlon", got.latlon[:3], np.asarray(centres))
    result = checks.result()
    return result if result.status == "failed" else Result(0.0, result.tolerance, reason=note)


def _concat_cases(folder: Path) -> Iterator[Case]:
    yield from _each("filtering.json", "single", _filtering)(folder)
    record = load_json(folder / "filtering.json").get("concat")
    if record:
        yield Case("filtering/concat", functools.partial(_concat, folder, record))


def _concat(folder: Path, record: Record) -> Result:
    checks = Checks()
    names = record.get("training_modalities", ["sentinel2_l2a", "sentinel1"])
    options = {k: record[k] for k in ("dataset_percentage", "seed")}
    parts = [_prepare(folder, key, names, options) for key in record["order"]]
    joined = index.concat(parts)
    checks.equal("length", len(joined), record["len"])
    sizes = np.cumsum([len(p.numbers) for p in joined.parts]).tolist()
    checks.equal("cumulative sizes", sizes, record["cumulative_sizes"])
    numbers = [p.numbers.tolist() for p in joined.parts]
    checks.equal("sample numbers", numbers, record["sub_sample_indices"])
    flat = [n for part in numbers for n in part]
    located = [joined.locate(i)[1] for i in range(-len(joined), len(joined))]
    checks.equal("addressing", located, flat + flat)
    return checks.result()


def _dir_name(_: Path, record: Record) -> Result:
    checks = Checks()
    got = index.directory_name(
        record["supported"],
        record["num_samples"],
        tile_px=record["tile_size"],
        compression=record["compression"],
        level=record["compression_opts"],
        shuffle=record["shuffle"],
        required=record["required"],
    )
    checks.equal("folder", got, record["dir"])
    return checks.result()


def _fingerprint(_: Path, record: Record) -> Result:
    checks = Checks()
    got = index.fingerprint(record["h5py_dir"], record["filter_idx_file"], record["dtype_repr"])
    checks.equal("fingerprint", got, record["fingerprint"])
    checks.equal("version", index.FINGERPRINT_VERSION, record["version"])
    return checks.result()


def _naming_cases(folder: Path) -> Iterator[Case]:
    yield from _each("naming.json", "h5_dir_names", _dir_name)(folder)
    yield from _each("naming.json", "fingerprints", _fingerprint)(folder)


def _index_cases(folder: Path) -> Iterator[Case]:
    yield from _each("index_streams.json", "global_indices", _global_indices)(folder)
    yield from _each("index_streams.json", "rank_worker_indices", _rank_indices)(folder)
    yield from _each("index_streams.json", "patch_hwp_draws", _shape_draws)(folder)


def _normalize_cases(folder: Path) -> Iterator[Case]:
    for name, record in load_json(folder / "normalize_cases.json").items():
        yield Case(f"normalize_cases/{name}", functools.partial(_normalize, name, record))


def _normalize(name: str, record: Record) -> Result:
    checks = Checks()
    values = np.asarray(record["input"], np.float32)
    for key in ("dataset_rule", "computed", "predefined"):
        try:
            got = normalize(values, name, key.removesuffix("_rule"))
        except ValueError:
            checks.true(f"{key}: raises where the reference gives values", "error" in record[key])
            continue
        checks.true(f"{key}: gives values where the reference raises", "values" in record[key])
        if "values" in record[key]:
            # The dataset casts the reference's float64 result to float32.
            checks.array(key, got, np.asarray(record[key]["values"]).astype(np.float32))
    return checks.result()


def _piece_cases(folder: Path) -> Iterator[Case]:
    document = load_json(folder / "pieces.json")
    single = {
        "convert_to_db": _decibel,
        "worldcover_onehot": _onehot,
        "ndvi": _ndvi,
        "streaming_stats": _streaming,
    }
    several = {
        "crop_pad_valid_start": _crop_pad,
        "tile_latlon": _tile_latlon,
        "fill_missing_timesteps": _fill,
    }
    for key, record in document.items():
        if key in single:
            yield Case(f"pieces/{key}", functools.partial(single[key], record))
        elif key in several:
            for i, item in enumerate(record):
                yield Case(f"pieces/{key}/{i}", functools.partial(several[key], item))
        else:
            yield skipped(f"pieces/{key}", "unknown kind of record")


def _decibel(record: Record) -> Result:
    checks = Checks(rtol=1e-6)  # logarithms differ in the last bit between libraries
    checks.array(
        "dB",
        derived.to_decibel(np.asarray(record["input"], np.float32)),
        np.asarray(record["output"], np.float32),
    )
    return checks.result()


def _onehot(record: Record) -> Result:
    checks = Checks()
    got = derived.worldcover_onehot(np.asarray(record["codes"])[:, None])
    checks.array("one-hot", got, np.asarray(record["output"]))
    return checks.result()


def _ndvi(record: Record) -> Result:
    checks = Checks()
    bands = registry.get("sentinel2_l2a").bands
    values = np.zeros((len(record["red"]), len(bands)), np.float32)
    values[:, bands.index("B04")], values[:, bands.index("B08")] = record["red"], record["nir"]
    got = derived.ndvi(values)[:, 0]
    checks.array("ndvi", got, np.asarray(record["output"], np.float32))
    return checks.result()


def _streaming(record: Record) -> Result:
    checks = Checks(rtol=1e-12)
    stats = StreamingStats()
    for batch, expected in zip(record["batches"], record["count_mean_m2"], strict=True):
        stats.update(np.asarray(batch))
        checks.array("count, mean, M2", [stats.count, stats.mean, stats.m2], expected)
    return checks.result()


def _crop_pad(record: Record) -> Result:
    checks = Checks()
    masks = {n: np.asarray(m, bool) for n, m in record["masks"].items()}
    rows = len(next(iter(masks.values()))) if masks else len(record["timestamp_rows_kept"])
    stamps = np.repeat(np.arange(rows)[:, None], 3, axis=1)
    span = timesteps.cut_range(masks) or (0, rows - 1)
    kept = stamps[span[0] : span[1] + 1]
    cut = {n: m[span[0] : span[1] + 1] for n, m in masks.items()}
    checks.equal("rows kept", kept[:, 0].tolist(), record["timestamp_rows_kept"])
    checks.equal(
        "cut masks", {n: m.astype(int).tolist() for n, m in cut.items()}, record["cropped_masks"]
    )
    checks.equal("length", len(kept), record["current_length"])
    for max_t, starts in record["valid_start_ts"].items():
        got = timesteps.start_candidates(cut, len(kept), int(max_t))
        checks.equal(f"starts for {max_t}", got.tolist(), starts)
    try:
        axis = timesteps.time_axis(stamps, masks)
    except ValueError:
        checks.true("padding raises", "pad_error" in record)
    else:
        checks.equal("padded", axis.timestamps[:, 0].tolist(), record.get("padded_first_col"))
        checks.equal("axis", [axis.first, axis.length], [span[0], len(kept)])
    return checks.result()


def _tile_latlon(record: Record) -> Result:
    checks = Checks(atol=1e-9)
    got = derived.tile_latlon(record["crs"], record["col"], record["row"])
    checks.array("degrees", got, record["latlon"])
    return checks.result()


def _fill(record: Record) -> Result:
    checks = Checks()
    data = np.asarray(record["data_t"], np.float32)[:, None]
    got = timesteps.scatter(data, np.asarray(record["mask"], bool), len(record["output"]))
    checks.array("filled", got[:, 0], np.asarray(record["output"], np.float32))
    return checks.result()


def _transform_cases(folder: Path) -> Iterator[Case]:
    names = sorted({k.rsplit("/", 1)[0] for k in load_npz(folder / "transforms.npz")})
    for name in names:
        if name != "flip/input":
            yield Case(f"transforms/{name}", functools.partial(_transform, folder, name))


def _transform(folder: Path, name: str) -> Result:
    recorded = load_npz(folder / "transforms.npz")

    def group(prefix: str) -> dict[str, np.ndarray]:
        return {
            k.rsplit("/", 1)[1]: v for k, v in recorded.items() if k.rsplit("/", 1)[0] == prefix
        }

    given, expected = group("flip/input"), group(name)
    kind, argument = name.split("/")
    if kind == "flip":
        checks = Checks()
        for field, array in transforms.flip(given, argument).items():
            checks.array(field, array, expected[field])
        return checks.result()
    checks = Checks(rtol=1e-6, atol=1e-6)
    stamps = expected.pop("timestamps")
    source = {n: given[n].copy() for n in expected}
    source["sentinel1"].reshape(-1)[0] = MISSING
    mixed, got = transforms.mixup(
        source, np.arange(stamps.size).reshape(stamps.shape), float(argument)
    )
    checks.array("timestamps", got, stamps)
    for field, array in mixed.items():
        # Where a sample lacks data the reference blends in the fill value; here it stays missing.
        gone = (source[field] == MISSING) | (np.roll(source[field], -1, 0) == MISSING)
        checks.true(f"{field}: missing elements stay missing", (array[gone] == MISSING).all())
        checks.array(field, array[~gone], expected[field][~gone])
    return checks.result()


def _mock_cases(folder: Path) -> Iterator[Case]:
    record = load_json(folder / "mock_batch.json")
    yield Case("mock_batch", functools.partial(_mock_batch, record))


def _mock_batch(record: Record) -> Result:
    """Shapes only: 6 x 6 patches within 1500 tokens (spec/data.md section 8.9)."""
    checks = Checks()
    fields = {n: shape for n, (_, shape) in record["fields"].items()}
    names = [n for n in fields if n != "timestamps" and not n.endswith("_mask")]
    batch = fields["timestamps"][0]
    steps = max_timesteps(names, 6, 1500)
    checks.equal("timestamps", fields["timestamps"], [batch, steps, 3])
    for name in names:
        shape = [batch, *array_shape(name, 6 * record["patch_size"], steps)]
        checks.equal(name, fields[name], shape)
        sets = registry.get(name).num_band_sets
        checks.equal(f"{name} mask", fields[f"{name}_mask"], [*shape[:-1], sets])
    return checks.result()


MAKERS: dict[str, Callable[[Path], Iterator[Case]]] = {
    "token_budget.json": _budget_cases,
    "index_streams.json": _index_cases,
    "filtering.json": _concat_cases,
    "naming.json": _naming_cases,
    "normalize_cases.json": _normalize_cases,
    "pieces.json": _piece_cases,
    "transforms.npz": _transform_cases,
    "mock_batch.json": _mock_cases,
}
