"""PyTorch's weight files without PyTorch."""

import os
import pickle
import zipfile

import numpy as np
import pytest

from olmoearth_jax.interop import torch_file
from olmoearth_jax.interop.plain_pickle import PickleRefused

TENSORS = {
    "matrix": np.arange(12, dtype=np.float32).reshape(3, 4),
    "scalar": np.float32(3).reshape(()),
    "empty": np.zeros((0, 5), np.float32),
    "turned": np.arange(6, dtype=np.float32).reshape(2, 3).T,
}


def test_what_is_written_is_read_again(tmp_path):
    torch_file.write(TENSORS, tmp_path / "w.pth")
    back = torch_file.read(tmp_path / "w.pth")
    assert list(back) == list(TENSORS)
    for key, x in TENSORS.items():
        assert back[key].shape == x.shape and back[key].dtype == np.float32
        np.testing.assert_array_equal(back[key], x)


def test_tensors_in_tuples_of_every_length(tmp_path):
    """PyTorch keeps parameters as a tuple of a tensor and two flags."""
    torch_file.write({"w": np.arange(6, dtype=np.float32).reshape(2, 3)}, tmp_path / "w.pth")
    with zipfile.ZipFile(tmp_path / "w.pth") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    plain = members["archive/data.pkl"]
    head, key = b"\x80\x02}(", b"X\x01\x00\x00\x00w"
    tensor = plain.removeprefix(head + key).removesuffix(b"u.")
    assert head + key + tensor + b"u." == plain
    parameter = b"ctorch._utils\n_rebuild_parameter\n%b\x89ccollections\nOrderedDict\n)R\x87R"
    for value, length in (
        (b"%b\x85", 1), (b"%b\x89\x86", 2), (b"%b\x89\x89\x87", 3), (b"(%b\x89\x89\x89t", 4),
        (parameter, 0),
    ):  # fmt: skip
        members["archive/data.pkl"] = head + key + value.replace(b"%b", tensor) + b"u."
        with zipfile.ZipFile(tmp_path / "w.pth", "w") as archive:
            for name, raw in members.items():
                archive.writestr(name, raw)
        found = torch_file.read(tmp_path / "w.pth")["w"]
        assert length == (len(found) if isinstance(found, tuple) else 0)
        array = found[0] if length else found
        np.testing.assert_array_equal(array, np.arange(6, dtype=np.float32).reshape(2, 3))


class Malice:
    def __reduce__(self):
        return os.system, ("echo malice",)


@pytest.mark.parametrize("value", [Malice(), np.zeros(3), {"a": Malice()}])
def test_only_tensors_are_read(tmp_path, value, capfd):
    with zipfile.ZipFile(tmp_path / "w.pth", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(value))
    with pytest.raises(PickleRefused, match="it asks for"):
        torch_file.read(tmp_path / "w.pth")
    assert "malice" not in capfd.readouterr().out


def test_damaged_files(tmp_path):
    path = tmp_path / "w.pth"
    torch_file.write(TENSORS, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="no ZIP archive"):
        torch_file.read(path)
    with zipfile.ZipFile(path, "w") as target:
        target.writestr("archive/other", b"")
    with pytest.raises(PickleRefused, match="no data.pkl"):
        torch_file.read(path)


def test_a_tensor_that_reaches_beyond_its_storage(tmp_path):
    path = tmp_path / "w.pth"
    torch_file.write(TENSORS, path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members["archive/data/0"] = members["archive/data/0"][:-4]
    with zipfile.ZipFile(path, "w") as archive:
        for name, raw in members.items():
            archive.writestr(name, raw)
    with pytest.raises(ValueError, match="too short"):
        torch_file.read(path)


@pytest.mark.torch
def test_pytorch_reads_and_writes_the_same(tmp_path):
    torch = pytest.importorskip("torch", reason="make test-torch installs PyTorch")
    torch_file.write(TENSORS, tmp_path / "ours.pth")
    state = torch.load(tmp_path / "ours.pth", weights_only=True)
    for key, x in TENSORS.items():
        np.testing.assert_array_equal(state[key].numpy(), x)
    kinds = {str(d): torch.tensor([0.0, 1.0, 2.0]).to(d) for d in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
        torch.int16, torch.int8, torch.uint8, torch.bool,
    )}  # fmt: skip
    kinds["view"] = torch.arange(12.0).reshape(3, 4)[1:, ::2].T
    kinds["parameter"] = torch.nn.Parameter(torch.ones(2))
    torch.save(kinds, tmp_path / "theirs.pth")
    for key, x in torch_file.read(tmp_path / "theirs.pth").items():
        np.testing.assert_array_equal(
            np.asarray(x, np.float64), kinds[key].detach().double().numpy()
        )
