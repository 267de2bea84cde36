"""The folder of a trained map: what it was made of, its weights, and how to apply them."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from olmoearth_jax.data.durable import write_first
from olmoearth_jax.data.work_list import differences
from olmoearth_jax.files import json_plain, replacing, write_atomically
from olmoearth_jax.maps.labels import Class
from olmoearth_jax.maps.samples import Target
from olmoearth_jax.maps.tokens import Settings
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
      ValueError: there is none, it is not finished, or it is of a newer version.
    """
    if not (folder / TASK).is_file() or (finished and not (folder / REPORT).is_file()):
        why = "is not finished: run launch.finetune again" if (folder / JOB).exists() else (
            "holds no run of launch.finetune")  # fmt: skip
        raise ValueError(f"{folder} {why}")
    try:
        held = json.loads((folder / TASK).read_text())
        if held["version"] > VERSION:
            raise ValueError(f"it is of version {held['version']}; this program reads {VERSION}")
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
    except (OSError, KeyError, TypeError, ValueError) as e:
        raise ValueError(f"{folder / TASK} cannot be read: {e}") from None


def digest_of(record: Mapping[str, Any]) -> str:
    """SHA-256 of a plain object, whatever the order of its members."""
    text = json.dumps(record, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


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
        if folder.exists() and any(folder.iterdir()):
            raise ValueError(f"{folder} holds files of something else; give another --output")
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
    """Within it no other process trains in a folder.

    Raises:
      ValueError: one does.
    """
    lock = folder / LOCK
    try:
        with RunLock(lock):
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


def load_arrays(path: Path) -> dict[str, Any]:
    """What `save_arrays` wrote.

    Raises:
      ValueError: it cannot be read.
    """
    out: dict[str, Any] = {}
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as held:
            for key in held.files:
                *above, name = key.split("/")
                at = out
                for part in above:
                    at = at.setdefault(part, {})
                at[name] = held[key]
    except (OSError, ValueError, EOFError) as e:
        raise ValueError(f"{path} cannot be read: {e}") from None
    return out
