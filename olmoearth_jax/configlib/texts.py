"""Texts of a config that become names of files, folders and jobs."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from typing import TYPE_CHECKING

from olmoearth_jax import plugins

if TYPE_CHECKING:
    from olmoearth_jax.config import ExperimentConfig

_MAX_NAME = 200
"""Bytes of a run's name; file systems take 255, of which suffixes need some."""

_MAX_PATH = 4000
"""Bytes of a path; Linux takes 4095."""

_UNPRINTABLE = {
    "Cc": "a line break or another control character",
    "Zl": "a line break",
    "Zp": "a line break",
    "Cs": "half of a character (a lone surrogate)",
}


def unprintable(text: str) -> str | None:
    """What keeps a text from standing on one line of a file, in words; None if nothing does."""
    for character in text:
        found = _UNPRINTABLE.get(unicodedata.category(character))
        if found is not None:
            return found
    return None


def shown(text: str) -> str:
    """A text as error messages quote it: escaped, and its middle left out where it is long."""
    return ascii(text if len(text) <= 120 else f"{text[:60]}...{text[-20:]}")


def _text_problem(text: str, longest: int = _MAX_NAME) -> str | None:
    """Why a text is no name of a file, folder or job ("must ..."); None if it is one."""
    found = unprintable(text)
    if found is not None:
        return f"must be plain text on one line, but has {found}"
    if not text.strip():
        return "must not be empty or only spaces"
    if text.startswith("-"):
        return "must not begin with '-', which programs take for an option"
    if text != text.strip():
        return "must not begin or end with a space"
    if len(text.encode()) > longest:
        return f"must have at most {longest} bytes, but has {len(text.encode())}"
    return None


def name_problem(text: str) -> str | None:
    """Why a text cannot be the name of a folder within another ("must ..."); None if it can."""
    found = _text_problem(text)
    if found is None and ("/" in text or text in (".", "..")):
        return "must be a name without '/'"
    return found


def problems(cfg: ExperimentConfig) -> Iterator[str]:
    """What is wrong with the run's name, its plugins and its paths, one sentence each."""
    yield from plugins.problems(cfg.common.plugins)
    name = cfg.common.run_name
    found = name_problem(name)
    if found is not None:
        yield f"common.run_name {found}, got {shown(name)}"
    paths = {
        "common.save_folder": cfg.common.save_folder,
        "dataset.h5py_dir": cfg.dataset.h5py_dir,
        "dataset.cache_dir": cfg.dataset.cache_dir,
        "dataset.filter_idx_file": cfg.dataset.filter_idx_file,
        "trainer.load_path": cfg.trainer.load_path,
        "compile.cache_dir": cfg.compile.cache_dir,
        "trainer.callbacks.downstream_evaluator.tasks_json": (
            cfg.trainer.callbacks.downstream_evaluator.tasks_json
        ),
    }
    for path, value in paths.items():
        found = _text_problem(value, _MAX_PATH) if value else None  # '' is none, as null is
        if found is not None:
            yield f"{path} {found}, got {shown(value or '')}"
    for folder in cfg.dataset.more_h5py_dirs:
        found = _text_problem(folder, _MAX_PATH)
        if found is not None:
            yield f"dataset.more_h5py_dirs {found}, got {shown(folder)}"
