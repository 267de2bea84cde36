"""What the tools share that any number of workers can run at a time."""

from __future__ import annotations

from collections.abc import Callable

from absl import flags

from olmoearth_jax.data.blocks import OthersAtWork, Place
from olmoearth_jax.data.work_list import STOPPED, Stopped, stopping
from olmoearth_jax.data.worker_place import place_of


def define_flags() -> None:
    """Adds the flags that say which worker a process is."""
    flags.DEFINE_integer("shard", None, "Number of this worker, from 0.")
    flags.DEFINE_integer("of", None, "How many workers there are.")
    flags.DEFINE_bool("wait", False, "Wait for blocks of files that other workers hold.")


def place(given: flags.FlagValues) -> Place:
    """The place of this worker by its flags, else by Slurm or Kubernetes.

    Raises:
      ValueError: see `place_of`.
    """
    return Place(*place_of(given.shard, given.of), given.wait)


def share(main: Callable[[], int | None]) -> int | None:
    """Runs a worker; the exit code. SIGTERM ends it with its claims given back."""
    try:
        with stopping():
            return main()
    except Stopped:
        print("stopped; the same command goes on", flush=True)
        return STOPPED
    except OthersAtWork as e:
        print(e, flush=True)
        return 0
