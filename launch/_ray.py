"""Workers of a list of work as actors of Ray, on one machine or a cluster.

Only this module imports Ray, and only where it is asked for. What lies on disk is the state, as
always: actors and this driver may be killed, and the same command goes on.
"""

from __future__ import annotations

import collections
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from olmoearth_jax.data.work_list import Outcome, WorkList

from ._app import is_users

_STORE_BYTES = 80 * 2**20  # nothing but ids and counts passes through it
_PAUSE_S = 5.0


class Worker:
    """An actor: opens the job once, then works on the units that it is given.

    Args:
      opener: "module:function" that makes (list of work, what works on a unit) from `arguments` and
        a taker of lines that tell of the job.
      arguments: of the command line.
      attempts: times that a unit is tried.
    """

    def __init__(self, opener: str, arguments: Sequence[str], attempts: int):
        module, name = opener.split(":")
        self.attempts, self.error = attempts, ""
        self.told: list[str] = []
        self.work: WorkList | None = None
        opened = getattr(importlib.import_module(module), name)
        try:
            self.work, self.do = opened(
                list(arguments), lambda *lines: self.told.extend(map(str, lines))
            )
        except (ValueError, OSError) as e:
            if not is_users(e):
                raise
            self.error = str(e)

    def plan(self) -> tuple[list[str], list[str], str]:
        """(units, lines that tell of the job, a mistake of the user)."""
        return list(self.work.units if self.work else ()), list(self.told), self.error

    def take(self, unit: str, orphaned: bool) -> tuple[str, str]:
        """Works on a unit; (what became of it, the last error).

        `orphaned`: its last worker is dead, so its claim means nothing.
        """
        if self.work is None:
            return "failed", self.error
        if orphaned:
            self.work.forget(unit)
        state = self.work.take(unit, self.do, self.attempts)
        return state, str((self.work.failure(unit) or {}).get("error", ""))


class _Pool:
    """Actors, and the unit that each has."""

    def __init__(self, ray: Any, make: Callable[[], Any]):
        self.ray, self.make = ray, make
        self.busy: dict[Any, tuple[Any, str]] = {}

    def give(self, actor: Any, unit: str, orphaned: bool) -> None:
        self.busy[actor.take.remote(unit, orphaned)] = (actor, unit)

    def next(self) -> tuple[Any, str, tuple[str, str] | None]:
        """(actor, unit, its result) of whoever is first; a new actor and None for a dead one."""
        (ready,), _ = self.ray.wait(list(self.busy), num_returns=1)
        actor, unit = self.busy.pop(ready)
        try:
            return actor, unit, self.ray.get(ready)
        except self.ray.exceptions.RayActorError:
            return self.make(), unit, None


def _library() -> Any:
    try:
        return importlib.import_module("ray")
    except ImportError:
        raise ValueError(
            "--engine=ray needs Ray: pip install 'olmoearth-jax[ray]', or start workers without it "
            "(--shard=I --of=N)"
        ) from None


def run(
    opener: str,
    arguments: Sequence[str],
    actors: int,
    gpus_per_actor: float | None,
    address: str | None,
    attempts: int,
    say: Callable[[str], None],
) -> Outcome:
    """Works on a job by actors until nothing is left to do.

    Args:
      opener, arguments, attempts: see `Worker`.
      actors: how many.
      gpus_per_actor: 0 for actors on CPUs; None is 1 where Ray finds a GPU.
      address: of a cluster that is there, or None for one of this machine and this call.
      say: takes progress lines.

    Raises:
      ValueError: Ray is not installed, it has fewer GPUs or cores than so many actors need, or the
        job could not be opened.
    """
    ray = _library()
    _connect(ray, address, actors)
    try:
        gpus_per_actor = _room(ray.cluster_resources(), actors, gpus_per_actor)
        made = ray.remote(Worker).options(
            num_cpus=1, num_gpus=gpus_per_actor, max_restarts=0, max_concurrency=1
        )
        pool = _Pool(ray, lambda: made.remote(opener, list(arguments), attempts))
        return _drive(pool, actors, attempts, say)
    finally:
        ray.shutdown()


def _connect(ray: Any, address: str | None, actors: int) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address:
        ray.init(address=address, log_to_driver=True)
        return
    # What is imported here must be importable there, a source tree that is not installed too.
    path = os.pathsep.join([str(Path(__file__).resolve().parents[1]), *filter(None, sys.path)])
    ray.init(
        num_cpus=actors, include_dashboard=False, object_store_memory=_STORE_BYTES,
        runtime_env={"env_vars": {"PYTHONPATH": path}},
    )  # fmt: skip


def _drive(pool: _Pool, actors: int, attempts: int, say: Callable[[str], None]) -> Outcome:
    """Gives units to actors one by one; those of dead actors go back."""
    ray, found, losses = pool.ray, Outcome(), collections.Counter()
    first = pool.make()
    # The others start when the job is open, and extended if that was asked for.
    units, told, error = ray.get(first.plan.remote())
    if error:
        raise ValueError(error)
    idle = [first, *(pool.make() for _ in range(actors - 1))]
    for line in told:
        say(line)
    waiting = collections.deque((unit, False) for unit in units)
    others: list[str] = []
    while waiting or pool.busy:
        while idle and waiting:
            pool.give(idle.pop(), *waiting.popleft())
        actor, unit, result = pool.next()
        idle.append(actor)
        if result is None:
            losses[unit] += 1
            say(f"{unit}: its actor died; a new one starts")
            if losses[unit] < attempts:
                waiting.append((unit, True))
            else:
                found.failed[unit] = f"{losses[unit]} actors died on it"
        elif result[0] == "tried":
            waiting.append((unit, False))
        elif result[0] == "failed":
            found.failed[unit] = result[1]
        elif result[0] == "busy":
            others.append(unit)
        elif result[0] == "made":
            found.made += 1
            say(f"{unit}: done, {len(waiting) + len(pool.busy)} of {len(units)} left")
    found.busy = others
    return found


def _room(held: dict[str, float], actors: int, gpus: float | None) -> float:
    """GPUs of each actor; without room for all Ray would wait for ever."""
    if gpus is None:
        gpus = 1.0 if held.get("GPU", 0) else 0.0
    for name, each in (("GPU", gpus), ("CPU", 1.0)):
        if actors * each > held.get(name, 0):
            raise ValueError(
                f"{actors} actors need {actors * each:g} {name}s, and Ray finds "
                f"{held.get(name, 0):g}: give fewer --actors"
                + (" or less --gpus_per_actor" if name == "GPU" else "")
            )
    return gpus
