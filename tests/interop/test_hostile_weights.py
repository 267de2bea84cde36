"""Weight files and pickles that try more than to hold tensors, and those that are merely odd."""

import collections
import pickle
import struct
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from olmoearth_jax.evals.datasets import archives
from olmoearth_jax.interop import torch_file
from olmoearth_jax.interop.plain_pickle import PickleDamaged, PickleRefused, PlainReader
from tools import fuzz

OP = pickle


def text(value):
    raw = value.encode()
    return OP.BINUNICODE + struct.pack("<I", len(raw)) + raw


def number(value):
    return OP.LONG1 + b"\x10" + value.to_bytes(16, "little", signed=True)


def several(*parts):
    return OP.MARK + b"".join(parts) + OP.TUPLE


def name(module, attribute):
    return OP.GLOBAL + f"{module}\n{attribute}\n".encode()


def storage(count=4, kind="FloatStorage", key="0"):
    parts = text("storage"), name("torch", kind), text(key), text("cpu"), number(count)
    return several(*parts) + OP.BINPERSID


def tensor(held, offset, size, stride):
    form = several(*map(number, size)), several(*map(number, stride))
    arguments = several(held, number(offset), *form, OP.NEWFALSE, OP.NONE)
    return name("torch._utils", "_rebuild_tensor_v2") + arguments + OP.REDUCE


def weights(value):
    return OP.PROTO + b"\x02" + OP.EMPTY_DICT + text("w") + value + OP.SETITEM + OP.STOP


def archive(path, body, data=bytes(16), how=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", how) as out:
        out.writestr("archive/data.pkl", body)
        out.writestr("archive/data/0", data)
    return path


EMPTY = tensor(storage(), 0, (2**40, 0), (0, 0))
STATE = several(number(1), several(number(2**40), number(0)), name("torch", "FloatStorage"))
HOSTILE = {
    "an empty tensor as a storage": tensor(EMPTY, 0, (64,), (1,)),
    "the state of a storage": tensor(storage() + STATE + OP.BUILD, 0, (64,), (1,)),
    "the state of a tensor": EMPTY + STATE + OP.BUILD,
    "the state of a maker": name("torch._utils", "_rebuild_tensor_v2") + STATE + OP.BUILD,
    "a dtype that is called": name("torch", "FloatStorage") + OP.EMPTY_TUPLE + OP.REDUCE,
    "one value again and again": tensor(storage(), 0, (2**29,), (0,)),
    "beyond the storage": tensor(storage(), 2, (4,), (1,)),
    "before the storage": tensor(storage(), -1, (2,), (1,)),
    "backwards": tensor(storage(), 3, (4,), (-1,)),
    "a huge size": tensor(storage(), 0, (2**70,), (1,)),
    "a storage longer than the file says": tensor(storage(2), 0, (2,), (1,)),
    "a storage shorter than the file says": tensor(storage(2**40), 0, (2,), (1,)),
    "a storage of another name": tensor(storage(key="../../../etc/passwd"), 0, (2,), (1,)),
    "an unknown kind": tensor(storage(4, "Float8_e4m3fnStorage"), 0, (4,), (1,)),
    "sizes that are a text": name("torch._utils", "_rebuild_tensor_v2")
    + several(storage(), number(0), text("ab"), several(number(1), number(1))) + OP.REDUCE,
    "no arguments": name("torch._utils", "_rebuild_tensor_v2") + OP.EMPTY_TUPLE + OP.REDUCE,
    "an append to a tensor": EMPTY + number(1) + OP.APPEND,
    "an item of a tensor": EMPTY + text("a") + number(1) + OP.SETITEM,
    "a call of an ordered dict": name("collections", "OrderedDict") + several(number(1))
    + OP.REDUCE,
    "an operation of old pickles": OP.MARK + OP.INST + b"os\nsystem\n",
    "a name with dots": name("torch", "serialization.os.system"),
    "a memo of two billion": OP.NONE + OP.LONG_BINPUT + struct.pack("<I", 2**31 - 1) + OP.POP,
    "a claim of a terabyte": OP.BINBYTES8 + struct.pack("<Q", 2**40) + b"x",
    "nothing": b"",
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_refused_in_a_sentence_by_both_readers(tmp_path, what):
    path = archive(tmp_path / "w.pth", weights(HOSTILE[what]))
    for read in (torch_file.read, archives.load_torch):
        with pytest.raises(ValueError, match="."):
            read(path)


def test_compressed_and_encrypted_members_are_refused(tmp_path):
    body = weights(tensor(storage(), 0, (4,), (1,)))
    path = archive(tmp_path / "w.pth", body, how=zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="compressed"):
        torch_file.read(path)
    raw = bytearray(archive(path, body).read_bytes())
    for signature, at in ((b"PK\x01\x02", 8), (b"PK\x03\x04", 6)):
        found = -1
        while (found := raw.find(signature, found + 1)) >= 0:
            raw[found + at] |= 1
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="encrypted"):
        torch_file.read(path)


def test_many_tensors_of_one_storage_are_bounded(tmp_path):
    rows = b"".join(text(f"t{i}") + tensor(storage(1 << 18), i, (1 << 17,), (1,)) + OP.SETITEM
                    for i in range(200))  # fmt: skip
    body = OP.PROTO + b"\x02" + OP.EMPTY_DICT + rows + OP.STOP
    path = archive(tmp_path / "w.pth", body, bytes(4 << 18))
    with pytest.raises(ValueError, match="far larger than the file"):
        torch_file.read(path)


def test_shared_tensors_are_read(tmp_path):
    pair = text("a") + tensor(storage(), 0, (2, 2), (1, 2)) + OP.SETITEM
    pair += text("b") + tensor(storage(), 0, (2, 2), (1, 2)) + OP.SETITEM
    data = np.arange(4, dtype="<f4").tobytes()
    path = archive(tmp_path / "w.pth", OP.PROTO + b"\x02" + OP.EMPTY_DICT + pair + OP.STOP, data)
    found = torch_file.read(path)
    np.testing.assert_array_equal(found["a"], [[0, 2], [1, 3]])
    np.testing.assert_array_equal(found["b"], found["a"])


def test_two_exports_have_the_same_bytes(tmp_path):
    tensors = {"a": np.arange(6, dtype=np.float32).reshape(2, 3)}
    for file in ("one.pth", "two.pth"):
        torch_file.write(tensors, tmp_path / file)
    assert (tmp_path / "one.pth").read_bytes() == (tmp_path / "two.pth").read_bytes()


class Made:
    """Pickles as the call of `what` on `arguments`, then a state."""

    def __init__(self, what, arguments, state=None):
        self.reduced = (what, arguments) if state is None else (what, arguments, state)

    def __reduce__(self):
        return self.reduced


RECONSTRUCT = np.empty(0).__reduce__()[0]
SCALAR = np.float64(0).__reduce__()[0]
HIDDEN = Made(
    np.dtype, ("V8", False, True),
    (3, "|", None, ("a",), {"a": (np.dtype("O"), 0)}, 8, 1, 0),
)  # fmt: skip
FORGED = Made(
    np.dtype, ("f8", False, True), (3, "|", None, ("a",), {"a": (np.dtype("O"), 0)}, 8, 1, 0)
)


@pytest.mark.parametrize(
    "value",
    [
        Made(SCALAR, (HIDDEN, b"A" * 8)),
        Made(SCALAR, (FORGED, b"A" * 8)),
        Made(RECONSTRUCT, (np.ndarray, (0,), b"b"), (1, (2,), HIDDEN, False, b"A" * 16)),
        Made(RECONSTRUCT, (np.ndarray, (0,), b"b"), (1, (2,), FORGED, False, b"A" * 16)),
        Made(RECONSTRUCT, (np.ndarray, (0,), b"b"), (1, (9,), np.dtype("f8"), False, b"A" * 16)),
        Made(RECONSTRUCT, (np.ndarray, (10**12,), b"b")),
        Made(np.ndarray, ((1000,), "f8")),
        np.array([1, "x"], object),
        Made(np.dtype, ("i4," * 1000,)),
        {(1, (2, 3)): 1},
    ],
)
def test_data_types_and_arrays_cannot_be_made_up(value):
    with pytest.raises(ValueError, match="data.pkl"):
        archives.loads(pickle.dumps(value, 2), "data.pkl")


@pytest.mark.parametrize("protocol", range(5))
def test_plain_data_come_back(protocol):
    value = {
        "n": [1, -(2**70), 1.5, None, True], "t": ("a", "é", b"\x00\xff"), "s": {1, 2},
        "f": np.float32(2.5), "i": np.arange(6).reshape(2, 3), "c": np.ones((2, 2), "f4", "F"),
        "b": np.array([True, False]), "e": [], "d": collections.OrderedDict(a=1),
    }  # fmt: skip
    back = archives.loads(pickle.dumps(value, protocol), "data.pkl")
    for key in "nts":
        assert back[key] == value[key]
    for key in "ficb":
        np.testing.assert_array_equal(back[key], value[key])
        assert back[key].dtype == value[key].dtype
    assert back["e"] == [] and (protocol < 2 or back["d"] == {"a": 1})


def test_what_is_shared_is_shared():
    inner = [1]
    back = archives.loads(pickle.dumps([inner, inner]), "x")
    assert back[0] is back[1]
    array = np.arange(3)
    back = archives.loads(pickle.dumps([array, array]), "x")
    np.testing.assert_array_equal(back[0], array)
    assert back[0] is back[1]


@given(st.binary(max_size=200))
def test_any_bytes_end_in_a_value_or_a_sentence(data):
    def find(module, attribute):
        raise PickleRefused(f"{module}.{attribute}")

    try:
        PlainReader(find).load(data)
    except (PickleRefused, PickleDamaged) as told:
        assert str(told)


@pytest.mark.parametrize("parser", ["weights", "safetensors", "pickle"])
def test_spoilt_files_end_in_a_sentence(tmp_path, parser):
    for case in range(300):
        assert fuzz.try_case(parser, 1, case, tmp_path) is None, case
