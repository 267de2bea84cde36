"""The kernels that a profile spent its time in.

    python -m tools.bench.kernels --profile_dir=local_output/my_run/profile

Reads the newest trace under the folder that `--config.trainer.profile` or jax.profiler wrote, adds
up the time of equal kernels on all devices, and prints one JSON line.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
from absl import flags

from olmoearth_jax import commands

_FOLDER = flags.DEFINE_string("profile_dir", None, "Folder of a profile.")
_TOP = flags.DEFINE_integer("top", 10, "Kernels to name.", lower_bound=1)


def top_kernels(folder: str, count: int) -> list[dict[str, Any]]:
    """The kernels with the most time: name, milliseconds, calls, share of all kernels' time.

    Raises:
      ValueError: the folder holds no trace, or one without any kernel.
    """
    found = sorted(Path(folder).rglob("*.xplane.pb"), key=lambda p: p.stat().st_mtime)
    if not found:
        raise ValueError(f"{folder} holds no profile (*.xplane.pb)")
    spent: dict[str, list[float]] = {}
    for plane in jax.profiler.ProfileData.from_file(str(found[-1])).planes:
        for line in plane.lines:
            # On a GPU every stream is a line of kernels; on a CPU XLA's own threads are.
            device = plane.name.startswith("/device:") and line.name.startswith("Stream")
            if not device and "XLAEigen" not in line.name and "XLATfrt" not in line.name:
                continue
            for event in line.events:
                if event.name.startswith(("ThreadpoolListener", "ThunkExecutor", "end:")):
                    continue
                entry = spent.setdefault(event.name, [0.0, 0.0])
                entry[0] += event.duration_ns / 1e6
                entry[1] += 1
    if not spent:
        raise ValueError(f"{found[-1]} holds no kernels")
    whole = sum(ms for ms, _ in spent.values())
    ranked = sorted(spent.items(), key=lambda item: -item[1][0])[:count]
    return [
        {"kernel": name[:120], "ms": round(ms, 3), "calls": int(n), "share": round(ms / whole, 4)}
        for name, (ms, n) in ranked
    ]


def main(_argv: list[str]) -> None:
    print(json.dumps({"benchmark": "kernels", "top": top_kernels(_FOLDER.value or "", _TOP.value)}))


if __name__ == "__main__":
    flags.mark_flag_as_required("profile_dir")
    commands.run(main)
