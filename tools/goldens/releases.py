"""Checks of the recorded release folders: read, run, and write back bit for bit."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import logging as absl_logging

from olmoearth_jax.interop import checkpoints, weights

from .common import Case, Checks, Result, load_npz

Check = Callable[[Checks, checkpoints.Weights, dict[str, Any]], None]


def release_case(folder: Path, check: Check, rtol: float, atol: float) -> Case:
    """The case of one release folder; `check` holds the outputs to the recorded ones."""
    return Case(folder.name, functools.partial(_run, folder, check, rtol, atol))


def _run(folder: Path, check: Check, rtol: float, atol: float) -> Result:
    absl_logging.set_verbosity(absl_logging.ERROR)  # checkpoints are written and read: much said
    checks = Checks(rtol, atol)
    loaded = checkpoints.from_reference(folder)
    check(checks, loaded, load_npz(folder / "expected.npz"))
    source = weights.read_folder(folder).state
    with tempfile.TemporaryDirectory() as scratch:
        checkpoints.write(loaded, Path(scratch) / "ours")
        back = checkpoints.read(Path(scratch) / "ours")
        checks.equal("digest", back.digest, loaded.digest)
        checkpoints.to_reference(back, Path(scratch) / "out")
        written = weights.read_folder(Path(scratch) / "out")
    checks.equal("config", written.config, loaded.config)
    stale = "composite_encodings.pos_embed"
    wanted = {k: v for k, v in source.items() if not k.endswith(stale)}
    checks.equal("keys", sorted(written.state), sorted(wanted))
    for key in wanted.keys() & written.state.keys():
        checks.array(f"export {key}", written.state[key], wanted[key], 0.0, 0.0)
    return checks.result()
