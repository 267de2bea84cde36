"""Damaged and made-up checkpoints end in the same sentence in everything that reads one."""

import json
import shutil
from pathlib import Path

import pytest
import tensorstore

from olmoearth_jax import load_pretrained
from olmoearth_jax.checkpoints import checkpoint, integrity
from olmoearth_jax.evals import models
from olmoearth_jax.interop import checkpoints, weights
from tools import eval_loss, inspect_checkpoint

from .test_weights import loaded, tiny


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    checkpoints.write(loaded(tiny()), folder)
    return folder


@pytest.fixture
def step(written, tmp_path) -> Path:
    shutil.copytree(written, tmp_path / "run")
    return tmp_path / "run" / "checkpoints" / "0"


def spoil_meta(step: Path, change) -> None:
    """Changes the record and drops the checksums, which would tell."""
    path = step / "meta" / "metadata"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    (step / integrity.CHECKSUMS_FILE).unlink(missing_ok=True)


READERS = {
    "read": checkpoints.read,
    "load_pretrained": load_pretrained,
    "evaluate": models.load_checkpoint,
    "inspect": inspect_checkpoint.report,
    "eval_loss": lambda path: eval_loss.evaluate([checkpoint.find_checkpoint(path)], None, 1, 0),
    "load_path": checkpoint.open_whole,
}


def refused(step: Path, match: str, readers=tuple(READERS)) -> None:
    for name in readers:
        with pytest.raises(ValueError, match=match) as told:
            READERS[name](step.parents[1])
        assert str(step) in str(told.value), name


def test_whole_ones_are_read(step):
    for name in ("read", "load_pretrained", "evaluate", "inspect", "load_path"):
        READERS[name](step.parents[1])


@pytest.mark.parametrize("how", ["cut off", "flipped", "gone", "a folder"])
@pytest.mark.parametrize("item", ["params", "meta"])
def test_damaged_files_are_named_by_all(step, how, item):
    path = max((p for p in (step / item).rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    raw = path.read_bytes()
    path.unlink()
    if how == "a folder":
        path.mkdir()
    elif how != "gone":
        half = len(raw) // 2
        path.write_bytes(raw[:half] + (bytes([raw[half] ^ 1]) + raw[half + 1 :]) * (how[0] == "f"))
    refused(step, f"is damaged: {item}/.* (has changed since it was written|is missing or no file)")


@pytest.mark.parametrize(
    "sums",
    [
        {"/dev/zero": [1, 2]}, {"../../../run/checkpoints/0/meta/metadata": [1, 2]},
        {"params/../../1": [1, 2]}, {"a" * 5000: [1, 2]}, {"\ud800": [1, 2]}, {"a\0": [1, 2]},
        {"": [1, 2]}, {"params": [1, 2]}, {"a": 1}, {"a": [1]}, {"a": ["x", 2]}, [], 5, None,
        {"a": [1e999, 2]}, {"a": [[], {}]},
    ],
)  # fmt: skip
def test_lists_of_checksums_name_only_files_of_the_checkpoint(step, sums):
    (step / integrity.CHECKSUMS_FILE).write_text(json.dumps(sums))
    refused(step, "is damaged: .", ("read", "load_path"))


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "null", "5", '"x"', "{}"])
def test_records_that_are_none(step, text):
    (step / "meta" / "metadata").write_text(text)
    refused(step, "is damaged: meta/metadata", ("read", "load_path"))
    (step / integrity.CHECKSUMS_FILE).unlink()
    refused(step, "cannot be read|was not written by", ("read", "evaluate", "inspect", "load_path"))
    (step / "meta" / "metadata").unlink()
    refused(step, "cannot be read", ("read", "load_path"))


ODD = (None, 5, "x", [], {}, [1], {"a": 1}, 1e999, -1)
MEMBERS = (
    "format", "step", "epoch", "seed", "steps_per_epoch", "normalization", "config", "items",
    "saved_on",
)  # fmt: skip


@pytest.mark.parametrize("member", MEMBERS)
def test_records_with_odd_members(step, member):
    good = (step / "meta" / "metadata").read_text()
    for value in (*ODD, "dropped"):
        (step / "meta" / "metadata").write_text(good)

        def change(record, value=value):
            record[member] = value
            if value == "dropped":
                del record[member]

        spoil_meta(step, change)
        for read in (checkpoints.read, models.load_checkpoint, inspect_checkpoint.report):
            try:
                read(step)
            except ValueError as told:
                assert str(step) in str(told)
            else:
                plain = read is inspect_checkpoint.report and value == {"a": 1}
                assert (value in (5, -1, {}) or plain) and member != "format", (value, read)


@pytest.mark.parametrize("value", [*ODD, {"encoder_config": 5}, {"nothing": 1}])
def test_odd_models_and_ranges(step, value):
    def model(record):
        record["config"]["model"] = value

    def ranges(record):
        record["config"]["model"] = kept
        record["normalization"]["sentinel2_l2a"] = {"bands": [], "lo": value, "hi": value}

    def size(record):
        record["config"]["model"] = {**kept, "encoder_config": {
            **kept["encoder_config"], "embedding_size": value, "depth": 10**6}}  # fmt: skip

    kept = json.loads((step / "meta" / "metadata").read_text())["config"]["model"]
    spoil_meta(step, model)
    refused(step, "model", ("read", "evaluate"))
    spoil_meta(step, size)
    refused(step, "model", ("read",))
    if value != []:
        spoil_meta(step, ranges)
        refused(step, "ranges of 'sentinel2_l2a'", ("read",))


LARGE = 2**31
DECLARED = {
    "an array": {"shape": [LARGE]},
    "an array that is filled": {"shape": [2**40], "chunks": [2**40], "fill_value": 0.0},
    "an array of one chunk": {"shape": [LARGE], "chunks": [LARGE]},
    "a chunk": {"chunks": [LARGE]},
}


@pytest.mark.parametrize("what", DECLARED)
def test_arrays_larger_than_the_files_are_refused_before_they_are_made(step, what):
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": f"file://{step}/params/"}).result()
    key = next(k for k in store.list().result() if k.endswith(b"norm.bias/.zarray"))
    record = json.loads(store.read(key).result().value) | DECLARED[what]
    store.write(key, json.dumps(record).encode()).result()
    (step / integrity.CHECKSUMS_FILE).unlink()
    refused(step, "its params cannot be read .*(declares|chunks larger)", ("read",))


@pytest.mark.parametrize("item", ["params", "target"])
def test_arrays_that_cannot_be_read_without_checksums(step, item):
    (step / integrity.CHECKSUMS_FILE).unlink()
    (step / item / "_METADATA").unlink()
    refused(step, f"damaged: its {item} cannot be read", ("read",))


def test_other_folders_are_named_for_what_they_are(step, tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    for file in (weights.TORCH_FILE, weights.SAFETENSORS_FILE):
        (raw / file).write_bytes(b"x")
        with pytest.raises(ValueError, match=r"tools\.convert_weights import --source=.*raw"):
            checkpoint.open_whole(raw)
        (raw / file).unlink()
    with pytest.raises(ValueError, match="Give a run folder"):
        checkpoint.open_whole(raw)
    (raw / "²").mkdir()
    with pytest.raises(ValueError, match="Give a run folder"):
        checkpoint.open_whole(raw)
