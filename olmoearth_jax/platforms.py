"""Whether JAX finds the devices that it was told to use, and the system gives what runs need, in
words."""

from __future__ import annotations

import traceback

import jax

try:
    import resource
except ImportError:  # not everywhere
    resource = None

_ACCELERATORS = {"cuda": "cuda12 or cuda13", "gpu": "cuda12 or cuda13"}


_FEWEST_FILES = 64
"""Open files without which the libraries below crash while they write a checkpoint."""


class HostMissing(RuntimeError):
    """A process kept the others waiting for too long; the message names it."""


def check_open_files() -> None:
    """Lifts a low limit of open files as far as the system lets it.

    Raises:
      ValueError: it is still too low for a run.
    """
    if resource is None:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = 16 * _FEWEST_FILES
    if soft == resource.RLIM_INFINITY or soft >= enough:
        return
    wanted = enough if hard == resource.RLIM_INFINITY else min(enough, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    if wanted < _FEWEST_FILES:
        raise ValueError(
            f"this process may open {wanted} files at a time, and a run needs {_FEWEST_FILES}: "
            f"raise the limit (ulimit -n {enough})"
        )


def given() -> str:
    """JAX_PLATFORMS as JAX took it, '' without one."""
    return str(getattr(jax.config, "jax_platforms", None) or "")


def check() -> None:
    """Starts JAX's devices, which later calls then find.

    Raises:
      ValueError: the platform that JAX_PLATFORMS names is not here.
    """
    try:
        jax.local_devices()
    except (RuntimeError, AssertionError) as error:
        told = problem(error)
        if told is None:
            raise
        raise ValueError(told) from error


def problem(error: BaseException) -> str | None:
    """The sentence for an error that means JAX found no devices; None for other errors."""
    frames = traceback.extract_tb(error.__traceback__)
    last = frames[-1].filename.replace("\\", "/") if frames else ""
    if not isinstance(error, RuntimeError | AssertionError) or not last.endswith("xla_bridge.py"):
        return None
    reason = str(error).partition(" (set JAX_PLATFORMS")[0].strip(" .")
    if not given():
        return f"JAX finds no devices: {reason or 'no platform could be started'}"
    names = [name.strip() for name in given().lower().split(",")]
    extra = next((_ACCELERATORS[n] for n in names if n in _ACCELERATORS), None)
    install = f"install olmoearth-jax with the extra {extra} on a machine with a GPU, " * bool(
        extra
    )
    why = f" ({reason})" if reason else ""
    return (
        f"JAX_PLATFORMS={given()} names a platform that is not here{why}; {install}unset it, "
        "or set JAX_PLATFORMS=cpu"
    )
