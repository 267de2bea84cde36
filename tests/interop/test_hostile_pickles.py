"""Small pickles that would take all of the stack, the memory or the time if they were believed."""

import collections
import os
import pickle
import struct
import zipfile
import zlib

import h5py
import numpy as np
import pytest

from olmoearth_jax.evals.datasets import archives, geobench
from olmoearth_jax.interop import plain_pickle, torch_file
from olmoearth_jax.interop.plain_pickle import PickleRefused

from .test_hostile_weights import OP, archive, name, number, several, storage, tensor, text, weights

DEEP = 300_000


def doubled(times=60):
    """Bytes of a list of two times the same list of two times the same list, ..."""
    out = OP.EMPTY_LIST + OP.BINPUT + b"\0"
    for _ in range(times):
        out += OP.POP + OP.BINGET + b"\0" + OP.BINGET + b"\0" + OP.TUPLE2 + OP.BINPUT + b"\0"
    return out


def nested(kind):
    """Bytes of `kind` of `kind` of ... None."""
    if kind == "tuple":
        return OP.NONE + OP.TUPLE1 * DEEP
    maker = name("builtins", "slice") + OP.BINPUT + b"\1" + OP.POP
    return maker + OP.NONE + (OP.BINPUT + b"\0" + OP.POP + OP.BINGET + b"\1" + OP.BINGET + b"\0"
                              + OP.TUPLE1 + OP.REDUCE) * DEEP  # fmt: skip


def call(module, attribute, *arguments):
    return name(module, attribute) + several(*arguments) + OP.REDUCE


PAIRS = OP.EMPTY_LIST + nested("tuple") + number(1) + OP.TUPLE2 + OP.APPEND
HOSTILE = {
    "a deep key of an ordered dict": call("collections", "OrderedDict", PAIRS),
    "a deep key": OP.EMPTY_DICT + nested("tuple") + number(1) + OP.SETITEM,
    "deep slices": nested("slice"),
    "a data type of lists": call("numpy", "dtype", doubled()),
    "a date of lists": call("datetime", "date", doubled(), number(1), number(1)),
    "a set of lists": call("builtins", "set", OP.EMPTY_LIST + doubled() + OP.APPEND),
    "keys of one hash": OP.EMPTY_DICT + number(2**61 - 1) + number(1) + OP.SETITEM,
    "pairs of numbers as keys, which can be of one hash": OP.EMPTY_DICT + number(1) + number(2)
    + OP.TUPLE2 + number(1) + OP.SETITEM,
    "an array within a list that never gets its state": OP.EMPTY_LIST
    + call("numpy.core.multiarray", "_reconstruct", OP.NONE, OP.NONE, OP.NONE) + OP.APPEND,
    "a mark in a list": OP.EMPTY_LIST + OP.MARK + OP.APPEND,
    "a mark that is kept": OP.MARK + OP.BINPUT + b"\0" + OP.BINGET + b"\0",
    "a mark alone": OP.MARK,
    "a state that replaces how states are taken": call("affine", "A") + OP.EMPTY_DICT
    + text("with_state") + name("builtins", "set") + OP.SETITEM + OP.BUILD + name("os", "abort")
    + OP.BUILD,
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_evaluation_data_end_in_a_sentence(what):
    with pytest.raises(ValueError, match="task_specs.pkl"):
        archives.loads(OP.PROTO + b"\x02" + HOSTILE[what] + OP.STOP, "task_specs.pkl")


def repeated(given, times, how):
    """Bytes of a list of what `how` makes of `given`, which is in the file once, again and again.

    `how` finds `given` in the memo at 0.
    """
    out = given + OP.BINPUT + b"\0" + OP.POP
    return out + OP.EMPTY_LIST + OP.MARK + how * times + OP.APPENDS


ITEMS = OP.EMPTY_LIST + OP.MARK + b"".join(map(number, range(20_000))) + OP.APPENDS
PAIRED = OP.EMPTY_LIST + OP.MARK + b"".join(
    text(str(i)) + number(i) + OP.TUPLE2 for i in range(20_000)
) + OP.APPENDS  # fmt: skip
MEMBERS = OP.EMPTY_DICT + OP.MARK + b"".join(
    text(str(i)) + number(i) for i in range(20_000)
) + OP.SETITEMS  # fmt: skip
RAW = OP.BINBYTES + struct.pack("<I", 1 << 20) + bytes(1 << 20)
GET, GIVEN = OP.BINGET + b"\0", OP.BINGET + b"\0" + OP.TUPLE1 + OP.REDUCE
DTYPE = call("numpy", "dtype", text("u1"))
ARRAY = call("numpy.core.multiarray", "_reconstruct", OP.NONE)
COPIES = {
    "texts": repeated(text("a" * (1 << 20)), 3000, name("_codecs", "encode") + GIVEN),
    "arrays": repeated(
        OP.MARK + number(1) + several(number(1 << 20)) + DTYPE + OP.NEWFALSE + RAW + OP.TUPLE,
        3000, ARRAY + GET + OP.BUILD,
    ),
    "sets": repeated(ITEMS, 3000, name("builtins", "set") + GIVEN),
    "ordered dicts": repeated(PAIRED, 3000, name("collections", "OrderedDict") + GIVEN),
    "members of objects": repeated(MEMBERS, 3000, call("affine", "A") + GET + OP.BUILD),
}  # fmt: skip


@pytest.mark.parametrize("what", COPIES)
def test_nothing_is_copied_again_and_again(what):
    with pytest.raises(PickleRefused, match="far more of its parts"):
        archives.loads(OP.PROTO + b"\x02" + COPIES[what] + OP.STOP, "task_specs.pkl")


def test_parts_that_are_shared_may_be_used_several_times():
    shared = {str(i): i for i in range(1000)}
    value = [collections.OrderedDict(shared) for _ in range(500)]
    arrays = [np.arange(1000.0)] * 50
    back = archives.loads(pickle.dumps([value, arrays], 4), "x")
    assert back[0] == value and len(back[1]) == 50


PID = several(*[doubled() for _ in range(5)]) + OP.BINPERSID
WEIGHTS = {
    "an id of lists": PID,
    "a storage of lists": tensor(doubled(), 0, (2,), (1,)),
    "a text as an id": text("x") + OP.BINPERSID,
}


@pytest.mark.parametrize("what", WEIGHTS)
def test_weights_end_in_a_sentence(tmp_path, what):
    with pytest.raises(ValueError, match="storage|make sense|unpack"):
        torch_file.read(archive(tmp_path / "w.pth", weights(WEIGHTS[what])))


def test_parts_are_bounded(monkeypatch):
    monkeypatch.setattr(plain_pickle, "_MOST_STEPS", 1000)
    assert len(archives.loads(pickle.dumps(list(range(900))), "x")) == 900
    with pytest.raises(PickleRefused, match="far more parts"):
        archives.loads(pickle.dumps(list(range(1100))), "x")


def test_storages_that_overlap_are_bounded(tmp_path):
    """Each member's data hold the next member with its header, so all have the same bytes."""
    entries, content = [], bytes(1 << 16)
    for i in range(40):
        entry = zipfile.ZipInfo(f"archive/data/{i}")
        entry.CRC, entry.file_size = zlib.crc32(content), len(content)
        entry.compress_size = len(content)
        entries.append((entry, len(content)))
        content = entry.FileHeader() + content
    rows = b"".join(
        text(f"t{i}") + tensor(storage(size, "ByteStorage", str(i)), 0, (1,), (1,)) + OP.SETITEM
        for i, (_, size) in enumerate(entries)
    )
    path = tmp_path / "w.pth"
    with zipfile.ZipFile(path, "w") as out:
        assert out.fp is not None
        out.fp.write(content)
        for entry, size in entries:
            entry.header_offset = len(content) - size - len(entry.FileHeader())
            out.filelist.append(entry)
            out.NameToInfo[entry.filename] = entry
        out.start_dir = out.fp.tell()
        out.writestr("archive/data.pkl", OP.PROTO + b"\x02" + OP.EMPTY_DICT + rows + OP.STOP)
    with zipfile.ZipFile(path) as packed:
        try:
            assert len(packed.read("archive/data/39")) > len(packed.read("archive/data/0"))
        except zipfile.BadZipFile:  # newer Pythons see it themselves
            return
    with pytest.raises(PickleRefused, match="storages together are larger"):
        torch_file.read(path)


def test_a_member_that_claims_more_than_the_file(tmp_path):
    path = archive(tmp_path / "w.pth", weights(tensor(storage(), 0, (4,), (1,))))
    raw = path.read_bytes()
    for at in (raw.rfind(b"archive/data/0") - 46 + 20, raw.rfind(b"archive/data/0") - 46 + 24):
        raw = raw[:at] + struct.pack("<I", 2**31 - 1) + raw[at + 4 :]
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="longer than it can be"):
        torch_file.read(path)


def test_pipes_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "w.pt")
    for read in (torch_file.read, archives.load_torch):
        with pytest.raises(ValueError, match="no file"):
            read(tmp_path / "w.pt")
        with pytest.raises(ValueError, match="."):
            read(tmp_path)


def test_truth_values_are_zero_or_one(tmp_path):
    path = tmp_path / "w.pth"
    body = weights(tensor(storage(4, "BoolStorage"), 0, (4,), (1,)))
    found = torch_file.read(archive(path, body, b"\0\1\2\xff"))["w"]
    raw = pickle.dumps(np.array([False, True, True, True]), 3)
    assert raw.count(b"\0\1\1\1") == 1
    for values in (found, archives.loads(raw.replace(b"\0\1\1\1", b"\0\1\2\xff"), "x")):
        assert values.dtype == bool and values.view(np.uint8).tolist() == [0, 1, 1, 1]


@pytest.mark.parametrize(
    ("kind", "told"),
    [("ComplexFloatStorage", "a kind that is not read"), ("QInt8Storage", "a kind that is not")],
)
def test_other_kinds_of_numbers_are_named(tmp_path, kind, told):
    path = archive(tmp_path / "w.pth", weights(tensor(storage(2, kind), 0, (2,), (1,))))
    with pytest.raises(torch_file.NumbersRefused, match=told):
        torch_file.read(path)


def sample(folder, record, label=None):
    path = folder / "a.hdf5"
    with h5py.File(path, "w") as f:
        f["02 - Blue_2020"] = np.ones((4, 4))
        if label is not None:
            f["label"] = label
        f.attrs["pickle"] = repr(record if isinstance(record, bytes) else pickle.dumps(record, 2))
    return path


ORDER = {"bands_order": ["02 - Blue_2020"]}


@pytest.mark.parametrize("label", [3, 2.0, np.int64(3), np.arange(3), [0, 1, 1], np.array(3)])
def test_labels_of_geobench(tmp_path, label):
    path = sample(tmp_path, ORDER | {"label": label})
    image, found = geobench.read_sample(path, ["02 - Blue"], False)
    np.testing.assert_array_equal(found, np.asarray(label).astype(np.int64))
    assert image.shape == (4, 4, 1) and found.dtype == np.int64


LAUGHS = OP.PROTO + b"\x02" + OP.EMPTY_DICT + text("label") + doubled() + OP.SETITEM + OP.STOP


@pytest.mark.parametrize(
    "record",
    [
        LAUGHS, 5, [1], {}, ORDER, ORDER | {"label": "x"}, ORDER | {"label": [[1]]},
        {"bands_order": 3, "label": 1}, {"bands_order": [["x"]], "label": 1},
        {"bands_order": [], "label": 1},
    ],
)  # fmt: skip
def test_odd_records_of_geobench_end_in_a_sentence(tmp_path, record):
    if record == LAUGHS:
        body = OP.EMPTY_LIST + text("02 - Blue_2020") + OP.APPEND
        record = LAUGHS[:-1] + text("bands_order") + body + OP.SETITEM + OP.STOP
    with pytest.raises(ValueError, match=r"a\.hdf5"):
        geobench.read_sample(sample(tmp_path, record), ["02 - Blue"], False)


def test_geobench_reads_nothing_outside_the_file(tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(4 * 4 * 8))
    path = sample(tmp_path, ORDER | {"label": 1})
    with h5py.File(path, "a") as f:
        del f["02 - Blue_2020"]
        f.create_dataset("02 - Blue_2020", (4, 4), "f8", external=[(str(secret), 0, 128)])
    with pytest.raises(ValueError, match="outside the file"):
        geobench.read_sample(path, ["02 - Blue"], False)


def test_ordered_dicts_of_old_pickles():
    made = collections.OrderedDict([("a", 1), ("b", [2])])
    for protocol in range(2, 5):
        assert archives.loads(pickle.dumps(made, protocol), "x") == {"a": 1, "b": [2]}
    pairs = OP.EMPTY_LIST + several(text("a"), number(1)) + OP.APPEND
    old = OP.PROTO + b"\x02" + call("collections", "OrderedDict", pairs) + OP.STOP
    assert archives.loads(old, "x") == {"a": 1}
