"""How fast a host prepares samples: all between a sample that is read and arrays on the devices.

    python -m tools.bench.host --config=configs/base.py:version=v1_2

Samples are complete, synthetic, of twelve timesteps, and in memory; shapes, crops and masks are
drawn as in training. Counted are the crop and its normalisation, masks, the choice of a rung, the
index arrays of the token stream, patches, and the start of the transfers; left out are reading and
the passing of arrays between processes. The arms:

    one           one process
    two           two processes at once
    devices       one process for eight devices of a CPU, one packing thread for each
    pack          as `one`, of groups that are made already: what the process of a GPU does while
                  others crop and mask
    pack_devices  likewise, as `devices`
    numpy         one process that resizes patches itself, as training on a CPU does

But for the last one, images are sent to where programs resize them, as on a GPU. Without a GPU
these programs are started but compute nothing. Prints one JSON line per arm: samples per
core-second (CPU time of all threads) and per second, CPU milliseconds per sample by phase,
`lock_ms`, those for which some thread holds Python's lock, and `lock_share`, their share of all
(`lock_share.py` says how that is found; null where the machine is too busy to tell). With any
number of cores, one process does no more than 1000 / lock_ms samples per second. `digest` is equal
for two versions that pack alike.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from typing import Any, NamedTuple

from absl import flags

from olmoearth_jax import commands
from olmoearth_jax.modalities import IMAGE_TILE_PX, closest

from .micro_step import config_path

flags.declare_key_flag("config")


class Arm(NamedTuple):
    """Who does the work, and which."""

    processes: int = 1
    devices: int = 1
    """Devices of a process, all of a CPU; 1 for what there is."""
    numpy: bool = False
    """Whether NumPy resizes patches."""
    made: bool = False
    """Whether groups are made before."""


ARMS = {
    "one": Arm(),
    "two": Arm(processes=2),
    "devices": Arm(devices=8),
    "pack": Arm(made=True),
    "pack_devices": Arm(devices=8, made=True),
    "numpy": Arm(numpy=True),
}

TARGET = 250.0
"""Samples per core-second that are wanted."""

_DEVICES_FLAG = "--xla_force_host_platform_device_count"

_ARMS = flags.DEFINE_list("host_arms", list(ARMS), "Arms to measure.")
_GROUPS = flags.DEFINE_integer("host_groups", 24, "Groups of a pass.", lower_bound=1)
_REPEATS = flags.DEFINE_integer("host_repeats", 3, "Timed passes.", lower_bound=1)
_TILE = flags.DEFINE_integer("host_tile_px", IMAGE_TILE_PX, "Side of the samples.", lower_bound=1)
_CALIBRATION = flags.DEFINE_float(
    "host_calibration_s", 1.0, "Seconds for each load that the lock's share is measured against.",
    lower_bound=0.1,
)  # fmt: skip


class _Child:
    """A process of `host_work`."""

    def __init__(self, settings: dict[str, Any], devices: int):
        env = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        if devices > 1:
            flag = f"{_DEVICES_FLAG}={devices}"
            env |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{env.get('XLA_FLAGS', '')} {flag}"}
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.host_work"], env=env, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=self._errors, text=True,
        )  # fmt: skip
        self.say(json.dumps(settings))

    def say(self, line: str) -> None:
        """Writes a line to it."""
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """Its next line.

        Raises:
          ValueError: it has ended, with its last words.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._errors.seek(0)
            raise ValueError(f"a process of the benchmark failed: {self._errors.read()[-1000:]}")
        return json.loads(line)

    def close(self) -> None:
        """Ends it."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()


def measure(arm: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Figures of an arm, summed over its processes."""
    how, children = ARMS[arm], []
    try:
        for _ in range(how.processes):
            own = {**settings, "numpy": how.numpy, "made": how.made}
            children.append(_Child(own, how.devices))
        for child in children:
            child.answer()
        for child in children:
            child.say("go")
        return joined([child.answer() for child in children])
    finally:
        for child in children:
            child.close()


def joined(found: list[dict[str, Any]]) -> dict[str, Any]:
    """What the processes of an arm did together."""
    samples = sum(f["samples"] for f in found)
    cpu = sum(f["cpu_s"] for f in found)
    speed = samples / cpu
    spent = [sum(times) for times in zip(*(f["passes_cpu_s"] for f in found), strict=True)]
    held = [f["lock_share"] for f in found if f["lock_share"] is not None]
    lock = sum(held) / len(held) if len(held) == len(found) else None
    return {
        "device": found[0]["device"],
        "processes": len(found),
        "samples_per_core_s": speed,
        "reaches_target": speed >= TARGET,
        "slowest_and_fastest_pass": [samples / max(spent), samples / min(spent)],
        "samples_per_s": sum(f["samples"] / f["wall_s"] for f in found),
        "cpu_ms_per_sample": 1e3 * cpu / samples,
        "phases_cpu_ms": {
            phase: sum(f["phases_cpu_ms"][phase] * f["samples"] for f in found) / samples
            for phase in found[0]["phases_cpu_ms"]
        },
        "lock_ms": None if lock is None else 1e3 * lock * cpu / samples,
        "lock_share": lock,
        "digest": found[0]["digest"],
    }


def main() -> None:
    for arm in _ARMS.value:
        if arm not in ARMS:
            raise ValueError(f"unknown arm {arm!r}; {closest(arm, ARMS)}")
    path = config_path("configs/base.py:version=v1_2")
    settings = {
        "config": path,
        "tile_px": _TILE.value,
        "groups": _GROUPS.value,
        "repeats": _REPEATS.value,
        "calibration_s": _CALIBRATION.value,
    }
    for arm in _ARMS.value:
        head = {"benchmark": "host", "config": path, "arm": arm, "target": TARGET}
        load = {"load_average": round(os.getloadavg()[0], 2)}
        print(json.dumps(head | load | measure(arm, settings)), flush=True)


if __name__ == "__main__":
    commands.run_alone(main)
