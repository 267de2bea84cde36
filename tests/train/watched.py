"""Runs launch.train, and fails where an array that spans processes is worked on eagerly."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import jax
from jax._src import core, pjit  # eager operations have no public hook

ALLOWED = ("jax.experimental.multihost_utils",)
"""JAX's own gathering of arrays: one program, before training."""


def spans(value: Any) -> bool:
    return isinstance(value, jax.Array) and not value.is_fully_addressable


@contextmanager
def no_eager_operations(forbidden: Callable[[Any], bool] = spans):
    """Raises AssertionError where an operation outside of a program of ours gets such an array.

    Eager operations are programs too, of JAX's own functions: that is how they are told.
    """
    run, fast_path = pjit._run_python_pjit, pjit._get_fastpath_data

    def watch(p: Any, values: Any, function: Any, *rest: Any) -> Any:
        module = getattr(function, "__module__", None) or ""
        theirs = module.partition(".")[0] == "jax" and module not in ALLOWED
        if theirs and core.trace_state_clean() and any(map(forbidden, values)):
            name = getattr(function, "__name__", "operation")
            raise AssertionError(f"eager {name} of an array that spans processes")
        return run(p, values, function, *rest)

    jax.clear_caches()
    pjit._run_python_pjit = watch
    pjit._get_fastpath_data = lambda *args: None  # else a repeated operation goes another way
    try:
        yield
    finally:
        pjit._run_python_pjit, pjit._get_fastpath_data = run, fast_path


if __name__ == "__main__":
    sys.argv[0] = "launch.train"
    with no_eager_operations():
        runpy.run_module("launch.train", run_name="__main__")
