"""The folder of a trained map: what it was made of, its weights, and how to apply them."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from olmoearth_jax.data.durable import write_first
from olmoearth_jax.data.work_list import differences
from olmoearth_jax.files import json_plain, remove_leftovers_in, replacing, write_atomically
from olmoearth_jax.maps.labels import MOST, Class, is_color
from olmoearth_jax.maps.samples import Target
from olmoearth_jax.maps.tokens import POOLINGS, Settings
from olmoearth_jax.train.runfolder import RunFolderInUse, RunLock

VERSION = 1
JOB, TASK, REPORT, LOCK = "job.json", "task.json", "report.json", "run.lock"


@dataclasses.dataclass(frozen=True)
class Task:
    """What `launch.predict` must know of a run.

    Attributes:
      mode: 'probe' or 'full'.
      model, digest: name or folder of the model, and SHA-256 of its parameters.
      settings: how windows become tokens.
      window, pixel: side of the training window in pixels, and of a pixel in map units.
      modalities: the bands of each that the images had.
      timesteps: the largest number in training.
      target: classes, or values.
      scale: (mean, spread) of values, else (0, 1).
      about: all else, for people.
    """

    mode: str
    model: str
    digest: str
    settings: Settings
    window: int
    pixel: float
    modalities: dict[str, list[str]]
    timesteps: int
    target: Target
    scale: tuple[float, float]
    about: dict[str, Any]

    @property
    def channels(self) -> int:
        """Values per pixel of what the head gives."""
        return 1 if self.target.classes is None else len(self.target.classes)

    def to_json(self) -> dict[str, Any]:
        """A plain object that `read_task` reads."""
        classes = self.target.classes
        kind = "values" if classes is None else "classes"
        held = None if classes is None else [dataclasses.asdict(c) for c in classes]
        return {
            "version": VERSION, "task": kind, "mode": self.mode,
            "model": self.model, "model_digest": self.digest,
            "embedding": dataclasses.asdict(self.settings),
            "window": self.window, "pixel": self.pixel, "modalities": self.modalities,
            "timesteps": self.timesteps, "classes": held, "unit": self.target.unit,
            "standardised_by": list(self.scale), **self.about,
        }  # fmt: skip


def read_task(folder: Path, finished: bool = True) -> Task:
    """The task of a run, which must be finished unless said otherwise.

    Raises:
      ValueError: there is none, it is not finished, it is of a newer version, or it holds what
        no run writes.
    """
    if not (folder / TASK).is_file() or (finished and not (folder / REPORT).is_file()):
        why = "is not finished: run launch.finetune again" if (folder / JOB).exists() else (
            "holds no run of launch.finetune")  # fmt: skip
        raise ValueError(f"{folder} {why}")
    try:
        held = json.loads((folder / TASK).read_text())
        _check_task(held)
        classes = held["classes"]
        target = Target(None if classes is None else [Class(**c) for c in classes], held["unit"])
        known = {
            "version", "task", "mode", "model", "model_digest", "embedding", "window", "pixel",
            "modalities", "timesteps", "classes", "unit", "standardised_by",
        }  # fmt: skip
        return Task(
            held["mode"], held["model"], held["model_digest"], Settings(**held["embedding"]),
            held["window"], held["pixel"], held["modalities"], held["timesteps"], target,
            (held["standardised_by"][0], held["standardised_by"][1]),
            {k: v for k, v in held.items() if k not in known},
        )  # fmt: skip
    except (
        OSError, KeyError, TypeError, ValueError, IndexError, AttributeError, RecursionError,
    ) as e:  # fmt: skip
        told = f"there is no {e}" if isinstance(e, KeyError) else e
        raise ValueError(f"{folder / TASK} cannot be read: {told}") from None


def _check_task(held: dict[str, Any]) -> None:
    """Raises ValueError for members that no run writes, KeyError for those that are missing."""
    if not isinstance(held, dict):
        raise ValueError("it is no object")
    if _is_whole(held["version"], VERSION + 1):
        raise ValueError(f"it is of version {held['version']}; this program reads {VERSION}")
    settings, classes, bands = held["embedding"], held["classes"], held["modalities"]
    patch, size = settings["patch_size"], settings["location_size"]
    rules = {
        "version": held["version"] == VERSION,
        "mode": held["mode"] in ("probe", "full"),
        "model": isinstance(held["model"], str),
        "embedding": _is_whole(patch, 1) and (size is None or _is_whole(size, 1))
        and settings["pooling"] in POOLINGS and settings["pooling_type"] in ("mean", "max"),
        "window": _is_whole(held["window"], 1)
        and _is_whole(patch, 1) and held["window"] % patch == 0,
        "overlap": _is_whole(held["overlap"], 0),
        "pixel": _is_number(held["pixel"]) and held["pixel"] > 0,
        "modalities": isinstance(bands, dict) and all(_are_texts(x) for x in bands.values()),
        "timesteps": _is_whole(held["timesteps"], 0),
        "classes": classes is None or _are_classes([Class(**c) for c in classes]),
        "task": held["task"] == ("values" if classes is None else "classes"),
        "unit": isinstance(held["unit"], str),
        "standardised_by": list(map(_is_number, held["standardised_by"])) == [True, True],
    }  # fmt: skip
    wrong = [name for name, right in rules.items() if not right]
    if wrong:
        shown = json.dumps(held[wrong[0]])
        raise ValueError(f"{wrong[0]} is not what a run writes: {shown[:80]}")


def _is_whole(x: Any, least: int) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and x >= least


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float) and abs(x) <= float(np.finfo(np.float32).max)


def _are_texts(x: Any) -> bool:
    return isinstance(x, list) and all(isinstance(text, str) for text in x)


def _are_classes(found: list[Class]) -> bool:
    """Whether these are classes that `classes_of` gives."""
    good = all(
        _is_whole(c.value, 0) and c.value <= MOST and is_color(c.color) and isinstance(c.name, str)
        for c in found
    )
    return good and len({c.value for c in found}) == len({c.name for c in found}) == len(found) > 0


def digest_of(record: Mapping[str, Any]) -> str:
    """SHA-256 of a plain object, whatever the order of its members."""
    text = json.dumps(record, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def check_free(folder: Path) -> None:
    """Raises ValueError if a folder to be made holds something, or is none."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file and no folder; give another --output")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds files of something else; give another --output")


def claim(folder: Path, record: Mapping[str, Any], free: Mapping[str, Any] | None = None) -> None:
    """Makes a folder the one of a job, or checks that it is.

    Args:
      record: members that determine the results.
      free: members that do not, for people.

    Raises:
      ValueError: the folder holds another job, or files of something else.
    """
    path = folder / JOB
    if not path.exists():
        check_free(folder)
        about = {"settings": record, "digest": digest_of(record), **(free or {})}
        write_first(path, json.dumps(about, indent=1) + "\n")  # or another was first: compare
    try:
        held = json.loads(path.read_text())["settings"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{path} cannot be read: {e}") from None
    wanted = json.loads(json.dumps(record))
    if odd := differences(held, wanted):
        shown = "; ".join(f"{name} {there} there, {now} now" for name, there, now in odd)
        raise ValueError(f"{folder} holds another job ({shown}): give another --output")


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Within it no other process trains in a folder; what killed ones have left unfinished goes.

    Raises:
      ValueError: one does.
    """
    lock = folder / LOCK
    try:
        with RunLock(lock):
            remove_leftovers_in(folder)
            yield
    except RunFolderInUse:
        raise ValueError(
            f"{folder} is in use by another launch.finetune: wait for it, or give another "
            f"--output; if it is surely dead, delete {lock}"
        ) from None


def write_json(path: Path, record: Any) -> None:
    """A JSON file, whole or not at all; NaN becomes null."""
    write_atomically(path, json.dumps(json_plain(record), indent=1) + "\n")


def flat_name(path: Any) -> str:
    """The name under which `save_arrays` stores a leaf."""
    return "/".join(str(k.key) for k in path)


def save_arrays(path: Path, tree: Any) -> None:
    """A nested dict of arrays, whole or not at all."""
    found = jax.tree_util.tree_leaves_with_path(tree)
    arrays = {flat_name(keys): np.asarray(x) for keys, x in found}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    """What `save_arrays` wrote, by flat name.

    Raises:
      ValueError: it cannot be read.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as held:
            return {key: held[key] for key in held.files}
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile, zlib.error) as e:
        raise ValueError(f"{path} cannot be read: {e}") from None


def in_form(path: Path, held: Mapping[str, np.ndarray], form: Any) -> Any:
    """The weights of a file as a nested dict.

    Args:
      held: what `load_arrays` gives.
      form: a nested dict of arrays of their shapes.

    Raises:
      ValueError: they are not of this form, or not finite.
    """

    def stored(keys: Any, x: Any) -> np.ndarray:
        value = held.get(flat_name(keys))
        if value is None or value.shape != x.shape or value.dtype.kind != "f":
            raise ValueError(f"{path} lacks {flat_name(keys)} in the form of the model")
        if not np.isfinite(value).all():
            raise ValueError(f"{flat_name(keys)} in {path} holds NaN or infinite values")
        return value

    return jax.tree_util.tree_map_with_path(stored, form)
