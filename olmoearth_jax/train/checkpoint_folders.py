"""Finds the checkpoints of a run, by the names of their folders alone."""

from __future__ import annotations

from pathlib import Path


def complete_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in a `checkpoints` folder, ascending."""
    if not folder.is_dir():
        return []
    steps = [path for path in folder.iterdir() if _is_number(path.name) and path.is_dir()]
    return sorted(int(path.name) for path in steps if (path / "meta").is_dir())


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdigit()


_REFERENCE_FILES = ("weights.pth", "model.safetensors")


def find_checkpoint(path: str | Path) -> Path:
    """The step folder meant by a run folder, a `checkpoints` folder or a step folder itself.

    Raises ValueError if there is no complete checkpoint.
    """
    path = Path(path).expanduser().absolute()
    if (path / "meta").is_dir():
        return path
    for folder in (path / "checkpoints", path):
        if steps := complete_steps(folder):
            return folder / str(steps[-1])
    if any((path / name).exists() for name in _REFERENCE_FILES):
        raise ValueError(
            f"{path} holds weights in the reference's layout and no checkpoint: make one of them "
            f"with python -m tools.convert_weights import --source={path} --target=DIR, and give "
            "DIR."
        )
    raise ValueError(
        f"No complete checkpoint in {path}. Give a run folder, its checkpoints folder, or one "
        "checkpoints/<step> folder."
    )
