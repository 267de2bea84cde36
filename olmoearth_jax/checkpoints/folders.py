"""Finds the checkpoints of a run, by the names of their folders alone."""

from __future__ import annotations

import re
from pathlib import Path

from olmoearth_jax.files import no_folder


def complete_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in a `checkpoints` folder, ascending."""
    if not folder.is_dir():
        return []
    steps = [path for path in folder.iterdir() if _is_number(path.name) and path.is_dir()]
    return sorted(int(path.name) for path in steps if (path / "meta").is_dir())


def damaged_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints that were set aside as damaged, descending."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    found = [m for name in names if (m := _SET_ASIDE.fullmatch(name))]
    return sorted({int(m[1]) for m in found}, reverse=True)


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdigit()


class NoCheckpoint(ValueError):
    """There is no complete checkpoint at a place."""


_SET_ASIDE = re.compile(r"damaged-([0-9]+)(?:-[0-9]+)?")
_PUBLISHED = re.compile(r"(allenai/)?olmoearth[-_. ]?v\d", re.IGNORECASE)
_REFERENCE_FILES = ("weights.pth", "model.safetensors")


def find_checkpoint(path: str | Path) -> Path:
    """The step folder meant by a run folder, a `checkpoints` folder or a step folder itself.

    Raises NoCheckpoint, which names what is there instead.
    """
    name, path = str(path), Path(path).expanduser().absolute()
    if path.name in _REFERENCE_FILES and path.is_file():
        path = path.parent
    if (path / "meta").is_dir():
        return path
    for folder in (path / "checkpoints", path):
        if steps := complete_steps(folder):
            return folder / str(steps[-1])
    if any((path / name).exists() for name in _REFERENCE_FILES):
        raise NoCheckpoint(
            f"{path} holds weights in the reference's layout and no checkpoint: make one of them "
            f"with python -m tools.convert_weights import --source={path} --target=DIR, and give "
            "DIR."
        )
    if not path.exists():
        why = no_folder(path)
        if _PUBLISHED.match(name):
            why = (
                f"{name} is no folder here; to start from a published model, make a checkpoint of "
                f"it with python -m tools.convert_weights import --source={name} --target=DIR, "
                "and give DIR"
            )
        raise NoCheckpoint(f"No complete checkpoint: {why}")
    raise NoCheckpoint(
        f"No complete checkpoint in {path}. Give a run folder, its checkpoints folder, or one "
        "checkpoints/<step> folder."
    )
