"""Which worker of how many a process is, and in which order it takes a list of work."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping


def place_of(
    shard: int | None = None, of: int | None = None, env: Mapping[str, str] | None = None
) -> tuple[int, int]:
    """(index, count) of this worker: the flags, else Slurm's array and tasks, else Kubernetes'.

    Args:
      shard, of: the flags --shard and --of; both or none.
      env: the environment.

    Raises:
      ValueError: one flag without the other, an index out of range, a count that is missing.
    """
    env = os.environ if env is None else env
    if (shard is None) != (of is None):
        raise ValueError("--shard and --of go together: --shard=I --of=N with 0 <= I < N")
    if shard is not None and of is not None:
        return _checked(shard, of, "--shard and --of")
    index, count = 0, 1
    if "SLURM_ARRAY_TASK_ID" in env:
        number = _integer(env, "SLURM_ARRAY_TASK_ID") - _integer(env, "SLURM_ARRAY_TASK_MIN")
        step = _integer(env, "SLURM_ARRAY_TASK_STEP")
        if step < 1:
            raise ValueError(f"the variable SLURM_ARRAY_TASK_STEP is no step: {step}")
        index = number // step
        count = _integer(env, "SLURM_ARRAY_TASK_COUNT")
    if "SLURM_PROCID" in env:
        tasks = _integer(env, "SLURM_NTASKS")
        index, count = index * tasks + _integer(env, "SLURM_PROCID"), count * tasks
    if "SLURM_ARRAY_TASK_ID" in env or "SLURM_PROCID" in env:
        return _checked(index, count, "the variables of Slurm")
    if "JOB_COMPLETION_INDEX" in env:
        if "OLMOEARTH_WORKERS" not in env:
            raise ValueError(
                "JOB_COMPLETION_INDEX is set, but Kubernetes does not say how many workers there "
                "are: set OLMOEARTH_WORKERS to the job's completions"
            )
        index, count = (_integer(env, n) for n in ("JOB_COMPLETION_INDEX", "OLMOEARTH_WORKERS"))
        return _checked(index, count, "JOB_COMPLETION_INDEX and OLMOEARTH_WORKERS")
    return 0, 1


def _integer(env: Mapping[str, str], name: str) -> int:
    try:
        return int(env[name])
    except KeyError:
        raise ValueError(f"the variable {name} is not set; give --shard and --of") from None
    except ValueError:
        raise ValueError(f"the variable {name} is no number: {env[name]!r}") from None


def _checked(index: int, count: int, source: str) -> tuple[int, int]:
    if count < 1 or not 0 <= index < count:
        raise ValueError(f"{source} say worker {index} of {count}; it must be one of 0..{count - 1}"
                         if count > 0 else f"{source} say {count} workers")  # fmt: skip
    return index, count


def order(total: int, index: int, count: int, steal: bool = True) -> Iterator[int]:
    """Places of the list in the order in which a worker takes them.

    First its own (every `count`-th), then those of the others, from its share of the list on.
    """
    yield from range(index, total, count)
    if not steal:
        return
    start = index * total // count
    for k in range(total):
        at = (start + k) % total
        if at % count != index:
            yield at
