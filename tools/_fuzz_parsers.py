"""The parsers that `tools.fuzz` tries, and how it spoils their files."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import io
import json
import pickle
import pickletools
import random
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from olmoearth_jax import check, overrides
from olmoearth_jax.config import load_json
from olmoearth_jax.configlib.official import official
from olmoearth_jax.data import chunk_index
from olmoearth_jax.data.convert.index_csv import COLUMNS, read_series
from olmoearth_jax.data.h5 import open_sample
from olmoearth_jax.data.h5_writer import Storage, write_sample
from olmoearth_jax.data.index import METADATA_FILE, chosen_numbers
from olmoearth_jax.data.verify import read_manifest
from olmoearth_jax.evals.datasets import archives
from olmoearth_jax.evals.datasets.pretrain import prepare_numbers
from olmoearth_jax.interop import config_json, torch_file, weights
from olmoearth_jax.model.config import official_model

_NAMES = ("sentinel2_l2a", "worldcover", "latlon")
_ODD = (
    None, True, -1, 0, 1, 2**31, 2**63, -(2**63), 10**30, 1e308, float("nan"), float("inf"), "",
    "x", "\0", "é\ud800", "9" * 400, [], [[]], [1, "a"], {}, {"a": {}}, [None] * 3,
)  # fmt: skip
_BYTES = (b"\0", b"\xff", b"\x7f", b"\x80", b"\0" * 8, b"\xff" * 8, struct.pack("<q", 2**40))


@dataclasses.dataclass(frozen=True)
class Parser:
    """Something that reads files.

    Attributes:
      plain: writes a good file into a folder.
      make: writes a spoilt one.
      read: reads a file wholly.
    """

    plain: Callable[[Path], Path]
    make: Callable[[random.Random, Path], Path]
    read: Callable[[Path], Any]


def rng(name: str, seed: int, number: int) -> random.Random:
    """The random numbers of a case, the same on every machine."""
    digest = hashlib.sha256(f"{name}/{seed}/{number}".encode()).digest()
    return random.Random(int.from_bytes(digest[:8], "little"))


def _spoil(random: random.Random, raw: bytes) -> bytes:
    """Changes, cuts, repeats or swaps parts of a file."""
    data = bytearray(raw)
    for _ in range(random.choice((1, 1, 1, 2, 4, 16))):
        at = random.randrange(len(data) + 1)
        length = random.choice((1, 1, 2, 8, 64))
        kind = random.randrange(6)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << random.randrange(8)
        elif kind == 1:
            part = random.choice(_BYTES)
            data[at : at + len(part)] = part
        elif kind == 2:
            del data[at : at + length]
        elif kind == 3:
            data[at:at] = data[max(0, at - length) : at]
        elif kind == 4 and random.random() < 0.3:
            del data[at:]
        else:
            data[at : at + length] = random.randbytes(length)
    return bytes(data)


def _spoil_tree(random: random.Random, tree: Any) -> Any:
    """Replaces, drops or doubles a member somewhere in a tree of plain data."""
    if isinstance(tree, dict) and tree and random.random() < 0.9:
        key = random.choice(sorted(tree))
        out = {k: v for k, v in tree.items() if k != key or random.random() < 0.9}
        if key in out:
            out[key] = _spoil_tree(random, tree[key])
        if random.random() < 0.1:
            out[random.choice(("x", "", "type", *tree))] = random.choice(_ODD)
        return out
    if isinstance(tree, list) and tree and random.random() < 0.8:
        at = random.randrange(len(tree))
        return [*tree[:at], _spoil_tree(random, tree[at]), *tree[at + random.randrange(2) :]]
    return random.choice(_ODD)


def _json(tree: Any) -> bytes:
    return json.dumps(tree).encode("utf-8", "surrogatepass")


def _written(path: Path, raw: bytes) -> Path:
    path.write_bytes(raw)
    return path


def _weights_file(folder: Path) -> Path:
    path = folder / "weights.pth"
    rows = np.arange(6, dtype=np.float32).reshape(2, 3)
    torch_file.write({"encoder.norm.weight": rows, "encoder.norm.bias": rows[0]}, path)
    return path


def _spoilt_weights(random: random.Random, folder: Path) -> Path:
    """Half the time inside a member, under a checksum that is right."""
    path = _weights_file(folder)
    if random.random() < 0.4:
        return _written(path, _spoil(random, path.read_bytes()))
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    target = random.choice([n for n in members for _ in range(8 if n.endswith("pkl") else 1)])
    members[target] = _spoil(random, members[target])
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", random.choice((0, 0, 0, zipfile.ZIP_DEFLATED))) as archive:
        for name, raw in members.items():
            if random.random() < 0.98:
                archive.writestr(name, raw)
    return _written(path, out.getvalue())


def _read_weights(path: Path) -> Any:
    _published_config(path.parent)
    return weights.read_folder(path.parent).state


def _safetensors_file(folder: Path) -> Path:
    header = {
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "F16", "shape": [4], "data_offsets": [24, 32]},
    }
    return _written(folder / "model.safetensors", _safetensors(_json(header)))


def _safetensors(header: bytes, length: int | None = None) -> bytes:
    size = len(header) if length is None else length
    return struct.pack("<Q", size % 2**64) + header + bytes(32)


def _spoilt_safetensors(random: random.Random, folder: Path) -> Path:
    path = _safetensors_file(folder)
    raw = path.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    if random.random() < 0.5:
        return _written(path, _spoil(random, raw))
    header = json.loads(raw[8 : 8 + size])
    for name in header:
        if random.random() < 0.3:
            header[name]["dtype"] = random.choice(("F64", "BF16", "F8_E4M3", "C64", "I4", "U8"))
    return _written(path, _safetensors(_json(_spoil_tree(random, header))))


def _sample_file(folder: Path, indexed: bool = False) -> Path:
    steps = 3
    storage = Storage("zstd", 3, chunk_px=8) if indexed else Storage("zstd", 3)
    stamps = np.array([[15, m, 2020] for m in range(steps)])
    ramp = np.arange(16 * 16, dtype=np.uint16).reshape(16, 16, 1, 1)
    arrays = {
        "sentinel2_l2a": np.tile(ramp, (1, 1, steps, 12)),
        "worldcover": np.full((16, 16, 1, 1), 10, np.float32),
    }
    masks = {"sentinel2_l2a": np.ones(steps, bool)}
    path = folder / "sample_0.h5"
    write_sample(path, arrays, stamps, masks, np.array([1.0, 2.0]), storage)
    return path


def _spoilt_sample(random: random.Random, folder: Path) -> Path:
    path = _sample_file(folder)
    return _written(path, _spoil(random, path.read_bytes()))


def _spoilt_index(random: random.Random, folder: Path) -> Path:
    """Mostly an index with lies in it whose checksum is right."""
    path = _sample_file(folder, indexed=True)
    raw = path.read_bytes()
    start = len(chunk_index.MAGIC) + 8
    length = int.from_bytes(raw[start - 8 : start - 4], "little")
    text, table = raw[start : start + length].split(b"\0", 1)
    if random.random() < 0.7:
        text = _json(_spoil_tree(random, json.loads(text)))
    if random.random() < 0.5:
        table = _spoil(random, table)
    body = text + b"\0" * (random.random() < 0.98) + table
    head = np.array([len(body), zlib.crc32(body)], "<u4").tobytes()
    rest = raw[start + len(body) :] if len(body) < 4000 else raw[start + length :]
    out = chunk_index.MAGIC + head + body + rest
    return _written(path, out if random.random() < 0.9 else _spoil(random, out))


def _read_sample(path: Path) -> Any:
    with open_sample(path, _NAMES) as sample:
        return [sample.read(name).shape for name in sample.header.shapes]


def _published_config(folder: Path) -> Path:
    doc = config_json.to_json(official_model("nano", "v1_2"))
    return _written(folder / "config.json", _json(doc))


def _spoilt_published(random: random.Random, folder: Path) -> Path:
    path = _published_config(folder)
    return _spoilt_json(random, path)


def _spoilt_json(random: random.Random, path: Path) -> Path:
    raw = path.read_bytes()
    if random.random() < 0.2:
        return _written(path, _spoil(random, raw))
    if random.random() < 0.02:
        return _written(path, b"[" * 100_000)
    tree = json.loads(raw)
    for _ in range(random.choice((1, 1, 3))):
        tree = _spoil_tree(random, tree)
    return _written(path, _json(tree))


def _run_config(folder: Path) -> Path:
    return _written(folder / "run.json", official("nano", "v1_2").to_json().encode())


def _spoilt_config(random: random.Random, folder: Path) -> Path:
    return _spoilt_json(random, _run_config(folder))


def _read_config(path: Path) -> Any:
    return check.problems(load_json(path))


_PIECES = (
    "common.training_modalities", "train_module.optim_config.lr", "trainer.max_duration", "model",
    "data_loader.masking_config.strategy_config", ".type", ".weight", "=", "[", "]", "{", "}", ":",
    ",", "null", "1e999", "-0", "0x1", "'", '"', "\\", "\n", "\0", "é", "sentinel2_l2a", " ",
    "9" * 50, "[[[[" * 500, "true", ".", "..", "a.b" * 40,
)  # fmt: skip


def _override_file(folder: Path) -> Path:
    return _written(folder / "overrides", b"train_module.optim_config.lr=1e-4")


def _spoilt_override(random: random.Random, folder: Path) -> Path:
    text = "".join(random.choice(_PIECES) for _ in range(random.randrange(1, 9)))
    if "=" not in text:
        text = f"{random.choice(_PIECES)}={text}"
    return _written(folder / "overrides", text.encode())


def _read_override(path: Path) -> Any:
    overrides.apply(official("nano"), [path.read_bytes().decode()])


_PLAIN = {
    "arrays": [np.arange(6).reshape(2, 3).astype(kind) for kind in ("f4", "i8", "u1", "?")],
    "order": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "scalars": (np.float32(1.5), np.int64(-2), 3, 2.5, None, True, b"bytes", "text"),
    "date": datetime.datetime(2020, 1, 31, tzinfo=datetime.timezone(datetime.timedelta(hours=1))),
    "sets": [{1, "a"}, frozenset({2})],
    "shared": [[1]] * 2,
}
_OPERATIONS = {op.code.encode("latin1") for op in pickletools.opcodes if op.arg is None}


def _pickle_file(folder: Path) -> Path:
    return _written(folder / "task_specs.pkl", pickle.dumps(_PLAIN, 4))


def _spoilt_pickle(random: random.Random, folder: Path) -> Path:
    """Half the time within a torch archive; mostly whole operations that are out of place."""
    torch = random.random() < 0.5
    raw = pickle.dumps(_PLAIN, random.choice((0, 1, 2, 3, 4, 5)))
    path = folder / "task_specs.pkl"
    if torch:
        path = folder / "data.pt"
        torch_file.write({"a": np.ones((2, 3), np.float32), "b": np.ones(4, np.float32)}, path)
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        raw = members["archive/data.pkl"]
    places = [at for _, _, at in pickletools.genops(raw)]
    parts = [raw[a:b] for a, b in zip(places, [*places[1:], len(raw)], strict=True)]
    for _ in range(random.choice((1, 1, 2, 4, 16))):
        at, other = random.randrange(len(parts)), random.randrange(len(parts))
        kind = random.randrange(5)
        if kind == 0:
            parts[at], parts[other] = parts[other], parts[at]
        elif kind == 1:
            parts[at] = parts[other]
        elif kind == 2:
            parts[at] = b""
        elif kind == 3:
            parts[at] += random.choice(sorted(_OPERATIONS)) * random.choice((1, 1, 1, 1000))
        else:
            parts[at] += parts[other] * random.choice((1, 2, 50))
    spoilt = b"".join(parts)
    spoilt = _spoil(random, spoilt) if random.random() < 0.2 else spoilt
    if not torch:
        return _written(path, spoilt)
    with zipfile.ZipFile(path, "w") as archive:
        for name, held in {**members, "archive/data.pkl": spoilt}.items():
            archive.writestr(name, held)
    return path


def _read_pickle(path: Path) -> Any:
    if path.suffix == ".pt":
        return archives.load_torch(path)
    return archives.loads(path.read_bytes(), str(path))


_SERIES = "10_sentinel1_monthly.csv"
_MANIFEST = "checksums.csv"
_CELLS = (
    "", " ", "-1", "0", "1", "1.0", "2.000", "1e400", "nan", "9" * 400, "9" * 5000, str(2**63),
    "-" + "9" * 19, "0x10", "1_000", "١", "é", "\0", "\ud800", '"', '""', "'", ",", ";", "\t", "\n",
    "\r", "sep=;", "#", "EPSG:32633", "EPSG:3857", "EPSG:99999", "EPSG:326", "EPSG:4326", "../x",
    "+proj=utm +zone=33", "2020-13-01", "0000-00-00", "9999-12-31", "now", "sample_index",
    "x" * 200_000,
)  # fmt: skip


def _tables() -> dict[str, list[list[str]]]:
    """A good table of each kind, by file name."""
    day, end = "2020-01-01T00:00:00+00:00", "2020-01-31T00:00:00+00:00"
    tiles = [["EPSG:32633", "100", "-2000", day, str(i), day, end] for i in range(3)]
    return {
        METADATA_FILE: [["sample_index", *_NAMES[:2]], *[[str(i), "1", "1"] for i in range(4)]],
        _SERIES: [list(COLUMNS), *tiles],
        _MANIFEST: [["sample_index", "blake2b"], *[[str(i), "0" * 64] for i in range(3)]],
    }


def _table_file(folder: Path) -> Path:
    rows = _tables()[METADATA_FILE]
    return _written(folder / METADATA_FILE, "\n".join(map(",".join, rows)).encode())


def _spoilt_table(random: random.Random, folder: Path) -> Path:
    name, rows = random.choice(list(_tables().items()))
    for _ in range(random.choice((1, 1, 2, 4))):
        at = random.randrange(len(rows))
        kind = random.randrange(6)
        if kind < 3 and rows[at]:
            rows[at][random.randrange(len(rows[at]))] = random.choice(_CELLS)
        elif kind == 3:
            rows[at].insert(random.randrange(len(rows[at]) + 1), random.choice(_CELLS))
        elif kind == 4:
            rows[at] = rows[at][: random.randrange(len(rows[at]) + 1)]
        else:
            rows.insert(at, list(random.choice(rows)))
    mark, end = random.choice(",,,;\t|"), random.choice(("\n", "\n", "\r\n", "\r", "\n\n"))
    text = random.choice(("", "", "\ufeff", "sep=;\n")) + end.join(map(mark.join, rows))
    raw = text.encode(random.choice(("utf-8",) * 6 + ("utf-16",)), "surrogatepass")
    return _written(folder / name, _spoil(random, raw) if raw and random.random() < 0.3 else raw)


def _read_table(path: Path) -> Any:
    if path.name == METADATA_FILE:
        found = chosen_numbers(path.parent, ["sentinel2_l2a"])
        return found, prepare_numbers(path.parent, "worldcover")
    if path.name == _SERIES:
        return read_series(path.parent, "sentinel1")
    return read_manifest(path)


PARSERS = {
    "weights": Parser(_weights_file, _spoilt_weights, _read_weights),
    "safetensors": Parser(_safetensors_file, _spoilt_safetensors, _read_weights),
    "sample": Parser(_sample_file, _spoilt_sample, _read_sample),
    "index": Parser(lambda f: _sample_file(f, True), _spoilt_index, _read_sample),
    "published_config": Parser(_published_config, _spoilt_published, config_json.read),
    "config": Parser(_run_config, _spoilt_config, _read_config),
    "overrides": Parser(_override_file, _spoilt_override, _read_override),
    "pickle": Parser(_pickle_file, _spoilt_pickle, _read_pickle),
    "csv": Parser(_table_file, _spoilt_table, _read_table),
}
