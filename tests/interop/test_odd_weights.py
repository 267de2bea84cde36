"""Weights that are no attack but odd: short numbers, pointers, mistyped folders, killed exports."""

import json
import os
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from olmoearth_jax import files, load_pretrained
from olmoearth_jax.checkpoints import checkpoint, integrity
from olmoearth_jax.checkpoints.folders import NoCheckpoint
from olmoearth_jax.evals import models
from olmoearth_jax.interop import checkpoints, torch_file, weights
from tools import convert_weights, inspect_checkpoint

from .test_hostile_weights import OP, archive, storage, tensor, text
from .test_weights import loaded, tiny

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
KINDS = {"HalfStorage": np.float16, "BFloat16Storage": ml_dtypes.bfloat16,
         "DoubleStorage": np.float64}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """A reference folder."""
    checkpoints.to_reference(loaded(tiny()), tmp_path / "reference")
    return tmp_path / "reference"


def save_as(folder, kind: str) -> None:
    """Replaces the weights by the same in other numbers, as PyTorch saves them."""
    state = torch_file.read(folder / weights.TORCH_FILE)
    rows = b""
    with zipfile.ZipFile(folder / weights.TORCH_FILE, "w") as out:
        for i, (key, x) in enumerate(state.items()):
            out.writestr(f"archive/data/{i}", np.ascontiguousarray(x, KINDS[kind]).tobytes())
            strides = tuple(s // 4 for s in np.empty(x.shape, np.float32).strides)
            held = storage(x.size, kind, str(i))
            rows += text(key) + tensor(held, 0, x.shape, strides) + OP.SETITEM
        out.writestr("archive/data.pkl", OP.PROTO + b"\x02" + OP.EMPTY_DICT + rows + OP.STOP)


def check_rounded(folder, before, kind) -> None:
    found = checkpoints.from_reference(folder)
    load_pretrained(folder)
    flat = integrity.leaf_paths(found.params)
    for path, x in integrity.leaf_paths(before.params).items():
        assert flat[path].dtype == np.float32
        np.testing.assert_array_equal(flat[path], x.astype(kind).astype(np.float32))


@pytest.mark.parametrize("kind", KINDS)
def test_torch_weights_of_other_numbers(folder, kind):
    before = checkpoints.from_reference(folder)
    save_as(folder, kind)
    check_rounded(folder, before, KINDS[kind])


@pytest.mark.parametrize("kind", KINDS.values())
def test_safetensors_of_other_numbers(folder, kind):
    before = checkpoints.from_reference(folder)
    state = {k: np.ascontiguousarray(v, kind) for k, v in weights.read_folder(folder).state.items()}
    safetensors.numpy.save_file(state, folder / weights.SAFETENSORS_FILE)
    (folder / weights.TORCH_FILE).unlink()
    check_rounded(folder, before, kind)


def test_numbers_beyond_float32_are_named(folder, recwarn):
    body = OP.PROTO + b"\x02" + OP.EMPTY_DICT + text("w")
    body += tensor(storage(1, "DoubleStorage"), 0, (1,), (1,)) + OP.SETITEM + OP.STOP
    archive(folder / weights.TORCH_FILE, body, np.array([1e300]).tobytes())
    with pytest.raises(ValueError, match="not finite in 1 tensors: w"):
        weights.read_folder(folder)
    assert not recwarn.list


@pytest.mark.parametrize("kind", ["ComplexFloatStorage", "Float8_e4m3fnStorage", "QInt8Storage"])
def test_numbers_that_are_not_read_are_told(folder, kind):
    body = OP.PROTO + b"\x02" + OP.EMPTY_DICT + text("w")
    body += tensor(storage(2, kind), 0, (2,), (1,)) + OP.SETITEM + OP.STOP
    archive(folder / weights.TORCH_FILE, body)
    with pytest.raises(ValueError, match=f"{kind}.*save them as float32, float16 or bfloat16"):
        weights.read_folder(folder)


@pytest.mark.parametrize("key", ["a\nb", "a\x1b[2Jb", "a" * 10**6, "\ud800"])
def test_keys_are_shown_on_one_line(folder, key):
    state = weights.read_folder(folder).state
    raw = key.encode("utf-8", "surrogatepass")
    body = OP.PROTO + b"\x02" + OP.EMPTY_DICT
    name = OP.BINUNICODE + len(raw).to_bytes(4, "little") + raw
    body += name + tensor(storage(), 0, (4,), (1,)) + OP.SETITEM + OP.STOP
    archive(folder / weights.TORCH_FILE, body)
    assert state
    with pytest.raises(ValueError, match="is no name of a tensor") as told:
        checkpoints.from_reference(folder)
    assert str(told.value).isprintable() and len(str(told.value)) < 600


@pytest.mark.parametrize(
    "file", [weights.TORCH_FILE, weights.SAFETENSORS_FILE, weights.CONFIG_FILE]
)
def test_pointers_of_git_lfs_are_told(folder, file):
    if file == weights.SAFETENSORS_FILE:
        (folder / weights.TORCH_FILE).unlink()
    (folder / file).write_bytes(POINTER)
    for read in (load_pretrained, inspect_checkpoint.report_reference):
        with pytest.raises(ValueError, match="Git LFS pointer.*git lfs pull"):
            read(folder)


def test_pointers_in_a_checkpoint_are_told(tmp_path):
    step = checkpoints.write(loaded(tiny()), tmp_path / "run")
    next(p for p in (step / "params" / "d").iterdir()).write_bytes(POINTER)
    for read in (checkpoints.read, models.load_checkpoint, checkpoint.open_whole):
        with pytest.raises(ValueError, match="is a Git LFS pointer: run 'git lfs pull'"):
            read(tmp_path / "run")


def test_files_that_cannot_be_opened(folder, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(weights, "is_pointer", refuse)
    with pytest.raises(ValueError, match=r"weights\.pth cannot be read \(Permission denied\)"):
        weights.read_folder(folder)
    monkeypatch.undo()
    (folder / weights.CONFIG_FILE).unlink()
    os.mkfifo(folder / weights.CONFIG_FILE)
    with pytest.raises(ValueError, match="pipe or device"):
        weights.read_folder(folder)


def test_mistyped_folders_are_named(folder, tmp_path):
    wrong = tmp_path / "refrence"
    for read in (weights.read_folder, checkpoint.find_checkpoint, weights.find):
        with pytest.raises(ValueError, match=f"did you mean {tmp_path / 'reference'}"):
            read(wrong)
    with pytest.raises(ValueError, match="there is no folder") as told:
        checkpoint.find_checkpoint(tmp_path / "elsewhere" / "a")
    assert "did you mean" not in str(told.value)


def test_what_is_no_checkpoint_is_named_with_the_command_that_helps(folder, tmp_path):
    command = rf"tools\.convert_weights import --source={folder}"
    for path in (folder, folder / weights.TORCH_FILE):
        with pytest.raises(NoCheckpoint, match=command):
            checkpoint.open_whole(path)
    for name in ("OlmoEarth-v1_2-Nano", "allenai/OlmoEarth-v1-Base", "olmoearth_v1_1_tiny"):
        with pytest.raises(NoCheckpoint, match=f"import --source={name} --target"):
            checkpoint.open_whole(name)
    checkpoints.write(checkpoints.from_reference(folder), tmp_path / "run")
    for path in (tmp_path / "run", tmp_path / "run" / "checkpoints" / "0"):
        with pytest.raises(ValueError, match="needs no import"):
            convert_weights.import_weights(str(path), str(tmp_path / "again"))
    (folder / weights.CONFIG_FILE).unlink()
    with pytest.raises(ValueError, match="there is no config file"):
        load_pretrained(folder)


def test_exports_are_the_same_bytes_and_clean_up(folder, tmp_path):
    checkpoints.write(checkpoints.from_reference(folder), tmp_path / "run")
    out = tmp_path / "out"
    convert_weights.export_weights(str(tmp_path / "run"), str(out))
    # What a killed export leaves behind, and what belongs to somebody else.
    for left in (".weights.pth.0123abcd.tmp", ".config.json.0123abcd.tmp"):
        (out / left).write_bytes(b"x")
    kept = [".weights.pth.tmp", ".weights.pth.0123abcx.tmp", "weights.pth.0123abcd.tmp", "other"]
    for name in kept:
        (out / name).write_bytes(b"x")
    convert_weights.export_weights(str(tmp_path / "run"), str(out))
    written = {weights.TORCH_FILE, weights.CONFIG_FILE, weights.NOTICE_FILE}
    assert {p.name for p in out.iterdir()} == {*written, *kept}
    first = {name: (out / name).read_bytes() for name in written}
    convert_weights.export_weights(str(tmp_path / "run"), str(out))
    convert_weights.export_weights(str(tmp_path / "run"), str(tmp_path / "other"))
    for place in (out, tmp_path / "other"):
        assert {name: (place / name).read_bytes() for name in written} == first


def test_an_export_killed_after_the_weights_can_be_repeated(folder, tmp_path, monkeypatch):
    checkpoints.write(checkpoints.from_reference(folder), tmp_path / "run")
    real = files.os.replace

    def killed(source, target):
        real(source, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        convert_weights.export_weights(str(tmp_path / "run"), str(tmp_path / "out"))
    monkeypatch.undo()
    assert (tmp_path / "out" / weights.TORCH_FILE).exists()
    convert_weights.export_weights(str(tmp_path / "run"), str(tmp_path / "out"))
    checkpoints.from_reference(tmp_path / "out")


@pytest.mark.parametrize(
    "wrapped", ["module.", "_orig_mod.", "model._orig_mod.", "_orig_mod.module.", "model.model."]
)
def test_names_that_wrappers_of_pytorch_put_in_front(folder, wrapped):
    before = checkpoints.from_reference(folder).digest
    state = torch_file.read(folder / weights.TORCH_FILE)
    torch_file.write({wrapped + k: v for k, v in state.items()}, folder / weights.TORCH_FILE)
    assert checkpoints.from_reference(folder).digest == before


def test_weights_under_other_names_are_pointed_out(folder):
    held = folder / weights.TORCH_FILE
    os.rename(held, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"if pytorch_model\.bin holds .* name it weights\.pth"):
        weights.read_folder(folder)
    with pytest.raises(ValueError, match=r"if pytorch_model\.bin holds .* name it weights\.pth"):
        load_pretrained(folder)
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"weights in several files \(2 such as model-00001"):
        weights.read_folder(folder)


def test_one_format_under_the_name_of_the_other(folder):
    torch, safe = folder / weights.TORCH_FILE, folder / weights.SAFETENSORS_FILE
    state = torch_file.read(torch)
    os.rename(torch, safe)
    with pytest.raises(ValueError, match=r"is a file of PyTorch: name it weights\.pth"):
        weights.read_folder(folder)
    safetensors.numpy.save_file(state, torch)
    with pytest.raises(ValueError, match=r"is a safetensors file: name it model\.safetensors"):
        weights.read_folder(folder)


@pytest.mark.parametrize("part", ["encoder_config", "decoder_config"])
@pytest.mark.parametrize(("member", "value"), [("num_heads", 0), ("num_heads", -2), ("depth", -1)])
def test_a_model_of_less_than_nothing_is_none(folder, part, member, value):
    path = folder / weights.CONFIG_FILE
    config = json.loads(path.read_text())
    config["model"][part][member] = value
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config of no model: its .*coder has .* blocks of"):
        checkpoints.from_reference(folder)


def test_a_config_may_begin_with_a_byte_order_mark(folder):
    before = weights.read_folder(folder).config
    path = folder / weights.CONFIG_FILE
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert weights.read_folder(folder).config == before
