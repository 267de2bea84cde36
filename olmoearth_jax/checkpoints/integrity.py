"""Checks around checkpoints: checksums, digests, and what may differ between save and restore."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import math
import os
import shutil
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from olmoearth_jax.configlib import gone
from olmoearth_jax.configlib.values import too_deep
from olmoearth_jax.files import is_pointer, write_atomically
from olmoearth_jax.mesh import path_text

CHECKSUMS_FILE = "checksums.json"
_MOST_PACKED = 64
_MOST_BYTES_EACH = 8
_ROOM = 64 << 20
"""Values that are all equal are packed well, noise is not: a model's arrays are mostly noise."""
_SHOWN = 20  # lines of a long list that an error message shows

_RESUME_IGNORES = (
    "common.run_name",
    "common.save_folder",
    "common.recipe",
    "common.plugins",
    "dataset.h5py_dir",
    "dataset.more_h5py_dirs*",
    "dataset.filter_idx_file",
    "dataset.cache_dir",
    "dataset.cache_size_gb",
    "dataset.samples_per_sec",
    "data_loader.num_workers",
    "data_loader.prefetch_factor",
    "data_loader.max_bad_fraction",
    "trainer.*",
    "mesh.*",
    "fsdp_rules",
    "ladder.*",
    "compile.*",
    "attention",
    "remat",
    gone.ENGINE,
)
"""Config paths (glob patterns) that may change between a checkpoint and the run that resumes it:
they move files, spread the same sums otherwise, or say how long and how often, not what is learnt.
The dataset is compared by its content (which samples of what), not by its folders."""

_SAMPLES = "trainer.callbacks.validation.samples"
_UNSAID = {"dataset.validation_fraction": 0.0, gone.ENGINE: gone.STREAM}
"""Members that configs of older or newer runs lack, and what these runs do."""


def leaf_paths(tree: Any) -> dict[str, Any]:
    """Leaves of a pytree by path, e.g. 'encoder/blocks/0/attn/q/kernel', in sorted order."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return dict(sorted((path_text(path), leaf) for path, leaf in leaves))


def describe(tree: Any) -> dict[str, list[Any]]:
    """`{path: [shape, dtype]}` of arrays or ShapeDtypeStructs, ready for JSON."""
    return {
        path: [list(np.shape(leaf)), str(np.dtype(leaf.dtype))]
        for path, leaf in leaf_paths(tree).items()
    }


def tree_differences(
    saved: Mapping[str, Sequence[Any]], wanted: Mapping[str, Sequence[Any]]
) -> list[str]:
    """Lines that tell how two `describe` listings differ; empty if they are equal."""
    missing = [f"missing in the checkpoint: {p}" for p in wanted if p not in saved]
    extra = [f"unknown to this model: {p}" for p in saved if p not in wanted]
    other = [
        f"differs: {p} is {_leaf(saved[p])} in the checkpoint, {_leaf(wanted[p])} in this model"
        for p in wanted
        if p in saved and list(saved[p]) != list(wanted[p])
    ]
    return _shorten(other) + _shorten(missing) + _shorten(extra)


def config_differences(
    saved: Mapping[str, Any], current: Mapping[str, Any], ignored: Sequence[str] = _RESUME_IGNORES
) -> list[str]:
    """Lines 'path: saved value -> current value' for fields that matter; see `_RESUME_IGNORES`."""
    before, after = _flatten(saved), _flatten(current)
    lines = []
    for path in sorted({*before, *after}):
        unsaid = _UNSAID.get(path, "(not set)")
        old, new = before.get(path, unsaid), after.get(path, unsaid)
        if old != new and not any(fnmatch.fnmatchcase(path, pattern) for pattern in ignored):
            lines.append(f"{path}: {json.dumps(old)} -> {json.dumps(new)}")
    return lines


def loss_differences(meta: Mapping[str, Any], info: Any) -> list[str]:
    """Lines that tell what makes a validation loss of now another than at a checkpoint.

    Args:
      meta: the checkpoint's record.
      info: the RunInfo of the run that goes on from it.
    """
    before, now = ({_SAMPLES: _flatten(c).get(_SAMPLES)} for c in (meta["config"], info.config))
    old, new = meta.get("content", meta.get("dataset_content")), info.dataset_content
    return [
        *config_differences(meta["config"], info.config),
        *config_differences(before, now, ignored=()),
        *(["the dataset holds other samples"] if old is not None and old != new else []),
    ]


def parameter_digest(params: Any) -> str:
    """SHA-256 (hex) over the sorted leaves of a tree: path, dtype, shape, bytes (little endian)."""
    digest = hashlib.sha256()
    for path, leaf in leaf_paths(params).items():
        array = np.asarray(leaf)
        header = f"{path}|{array.dtype.name}|{','.join(map(str, array.shape))}|"
        digest.update(header.encode())
        little = array.astype(array.dtype.newbyteorder("<"), copy=False)
        digest.update(np.ascontiguousarray(little).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def tree_bytes(tree: Any) -> int:
    """Bytes of all leaves of a tree of arrays or ShapeDtypeStructs (global, not per device)."""
    return sum(
        int(np.prod(leaf.shape, dtype=np.int64)) * np.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )


def check_free_space(folder: Path, state_bytes: int, permanent: int) -> str | None:
    """Checks that checkpoints fit on the disk, before any work is done.

    `permanent` is how many checkpoints the run will keep. Returns a warning if these may not fit.
    Raises ValueError if not even two fit: the newest, and the one being written.
    """
    free = shutil.disk_usage(folder).free
    if free < 2 * state_bytes:
        raise ValueError(
            f"Not enough disk space for checkpoints in {folder}: one needs about "
            f"{_size(state_bytes)}, two must fit at a time, {_size(free)} are free. Free some "
            "space or choose another folder with --config.common.save_folder."
        )
    if free < (permanent + 2) * state_bytes:
        return (
            f"{folder} has {_size(free)} free; the {permanent} checkpoints that this run keeps "
            f"need about {_size((permanent + 2) * state_bytes)}. Raise "
            "--config.trainer.callbacks.checkpointer.save_interval or free some space."
        )
    return None


def write_checksums(folder: Path) -> None:
    """Writes checksums.json: size and CRC-32 of every file of a checkpoint's items."""
    files = sorted(path for path in folder.glob("*/**/*") if path.is_file())
    sums = {str(path.relative_to(folder)): _checksum(path) for path in files}
    write_atomically(folder / CHECKSUMS_FILE, json.dumps(sums))


def damage(folder: Path) -> str | None:
    """What is wrong with the files of a checkpoint in one sentence, or None.

    A checkpoint without checksums.json is taken as whole: reading it will show.
    """
    for path in folder.glob("**/*"):
        if path.exists() and not path.is_file() and not path.is_dir():
            return f"{str(path.relative_to(folder))[:200]} is a pipe or device and no file"
    try:
        sums = json.loads((folder / CHECKSUMS_FILE).read_text(encoding="utf-8"))
        entries = {str(path): (int(size), int(crc)) for path, (size, crc) in sums.items()}
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError, OSError):
        return f"{CHECKSUMS_FILE} cannot be read"
    for path, expected in entries.items():
        # The list comes with the files, so it may name no other ones.
        if os.path.isabs(path) or ".." in Path(path).parts:
            return f"{CHECKSUMS_FILE} names a file outside of the checkpoint"
        try:
            if not (folder / path).is_file():
                return f"{path[:200]} is missing or no file"
            if _checksum(folder / path) != expected:
                if is_pointer(folder / path):
                    return f"{path[:200]} is a Git LFS pointer: run 'git lfs pull' in its folder"
                return f"{path[:200]} has changed since it was written"
        except OSError as error:
            return f"{path[:200]} cannot be read ({error.strerror})"
    return None


def check_declared(folder: Path, leaves: Sequence[Any]) -> None:
    """Holds what an item's files say of their arrays to the bytes that they have.

    Args:
      folder: the item's.
      leaves: Orbax's records of its arrays.

    Raises:
      ValueError: arrays or chunks far larger than the files can hold.
    """
    held = sum(path.stat().st_size for path in folder.glob("**/*") if path.is_file())
    declared = 0
    for leaf in leaves:
        shape = tuple(getattr(leaf, "shape", None) or ())
        chunk = tuple(getattr(getattr(leaf, "storage", None), "chunk_shape", None) or ())
        if any(c > max(n, 1) for c, n in zip(chunk, shape, strict=False)):
            raise ValueError("an array has chunks larger than itself")
        declared += math.prod(map(int, shape)) * _MOST_BYTES_EACH
    if declared > _MOST_PACKED * held + _ROOM:
        raise ValueError(f"it declares {declared} bytes of arrays, but its files have {held}")


def meta_fault(meta: Any) -> str | None:
    """What is wrong with a checkpoint's meta record in a few words, or None."""
    if not isinstance(meta, dict):
        return "it is no record"
    numbers = ("step", "epoch", "steps_into_epoch", "steps_per_epoch", "seed")
    saved_on: Any = meta.get("saved_on")
    wrong = [name for name in numbers if type(meta.get(name)) is not int]
    wrong += [name for name in ("config", "items", "normalization", "saved_on")
              if not isinstance(meta.get(name), dict)]  # fmt: skip
    wrong += [name for name in ("dataset_fingerprint",) if not isinstance(meta.get(name), str)]
    for name in ("content", "dataset_content"):  # either, or none of the two
        if not isinstance(meta.get(name, ""), str):
            return f"its {name} is no text"
    if wrong:
        return f"it has no {' or '.join(wrong)}"
    if not all(type(saved_on.get(name)) is int for name in ("devices", "processes")):
        return "it does not say on what it was saved"
    if not 0 <= meta["step"] < 1 << 31:  # as the state holds it
        return "its step makes no sense"
    if too_deep(meta["config"]) or not isinstance(meta["config"].get("trainer", {}), dict):
        return "its config makes no sense"
    best = meta.get("best")
    if best is not None and not _is_best(best):
        return "its note of the best step makes no sense"
    others = meta.get("other_best", [])
    if not isinstance(others, list) or not all(type(step) is int for step in others):
        return "its note of earlier best steps makes no sense"
    for name, leaves in meta["items"].items():
        if not isinstance(leaves, dict) or not all(map(_is_leaf, leaves.values())):
            return f"its list of the arrays of {name[:40]!r} makes no sense"
    return None


def _is_best(entry: Any) -> bool:
    if not isinstance(entry, dict) or type(entry.get("step")) is not int:
        return False
    return type(entry.get("val/loss")) in (int, float)


def _is_leaf(entry: Any) -> bool:
    if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[0], list):
        return False
    return isinstance(entry[1], str) and all(type(n) is int and n >= 0 for n in entry[0])


def _checksum(path: Path) -> tuple[int, int]:
    size, crc = 0, 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return size, crc


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping) and value:
        flat: dict[str, Any] = {}
        for key, entry in value.items():
            flat |= _flatten(entry, f"{prefix}.{key}" if prefix else str(key))
        return flat
    # Through JSON, so that a tuple equals the list it becomes in the file.
    return {prefix: json.loads(json.dumps(value))}


def _leaf(entry: Sequence[Any]) -> str:
    return f"{entry[1]}{list(entry[0])}"


def _shorten(lines: list[str]) -> list[str]:
    if len(lines) <= _SHOWN:
        return lines
    return [*lines[:_SHOWN], f"... and {len(lines) - _SHOWN} more ({lines[0].split(':')[0]})"]


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**27 else f"{count / 2**20:.2f} MiB"
