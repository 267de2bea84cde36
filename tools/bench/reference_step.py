"""Times one training micro-step against the PyTorch reference, on the same groups and weights.

    python -m tools.bench.reference_step --config=configs/nano.py --batch=8 --grids=2,5

Each side is a process of its own, so that peak memory can be told apart; they take micro-steps in
turn. A micro-step is what both do with a group of samples: both views forward, the target, the
losses, and the backward pass. Drop path and band dropout are off, so that the losses can be
compared too. Prints one JSON line; ratios are ours over theirs. On a GPU both processes share it,
which needs XLA_PYTHON_CLIENT_PREALLOCATE=false.

Needs PyTorch and the reference with its losses, for which these are enough:

    pip install torch
    pip install --no-deps olmoearth-pretrain==0.1.2 ai2-olmo-core==2.6.0 bettermap dill \\
        class-registry dataclass-extensions
    pip install einops cached-path universal-pathlib omegaconf rich pyyaml pandas safetensors \\
        matplotlib "setuptools<80"
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from olmoearth_jax import commands
from olmoearth_jax.config_files import load_file
from olmoearth_jax.interop import checkpoints
from olmoearth_jax.model import latent_mim
from olmoearth_jax.train import estimate

from .micro_step import config_path, prepare_step, random_group, stream_program
from .torch_worker import read_group, serve

flags.declare_key_flag("config")
_BATCH = flags.DEFINE_integer("batch", 8, "Samples of the group.", lower_bound=1)
_GRIDS = flags.DEFINE_list("grids", ["2", "5"], "Grid sides to time.")
_PATCH = flags.DEFINE_integer("patch_size", 4, "Patch size in pixels.")
_STEPS = flags.DEFINE_integer("steps", 5, "Timed micro-steps per side and grid.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of pixels, masks and weights.")
_FOLDER = flags.DEFINE_string("worker_folder", None, "Internal: answer as a worker from there.")


def _config() -> Any:
    """The config of the run with everything random in the forward pass switched off."""
    config = load_file(config_path())
    config.data_loader.global_batch_size = config.train_module.rank_microbatch_size = _BATCH.value
    config.model.encoder_config.drop_path = 0.0
    config.model.encoder_config.band_dropout_rate = 0.0
    return config


def write_inputs(folder: Path) -> None:
    """Weights in the reference's layout, settings of the losses, and one group per grid."""
    config = _config()
    params = latent_mim.initial_params(config.model, _SEED.value)
    loaded = checkpoints.Weights(config.model, params, None, {}, ())
    checkpoints.to_reference(loaded, folder / "weights")
    module = config.train_module
    losses = [module.loss_config.loss_config, module.contrastive_config.loss_config]
    (folder / "losses.json").write_text(json.dumps(losses))
    timesteps = estimate.grid_timesteps(config)
    for text in _GRIDS.value:
        grid = int(text)
        group = random_group(config, grid, timesteps[grid], _PATCH.value, _BATCH.value, _SEED.value)
        arrays = {"timestamps": group["timestamps"]}
        for name, x in group["data"].items():
            arrays[f"data/{name}"] = x
            arrays[f"mask_a/{name}"] = group["mask_a"][name]
            arrays[f"mask_b/{name}"] = group["mask_b"][name]
        np.savez(folder / f"group_{grid}.npz", **arrays)


class Ours:
    """The stream engine's micro-step."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.program = stream_program(_config(), 12)
        self.state = self.program.state_from(checkpoints.from_reference(folder / "weights").params)

    def take(self, grid: int) -> None:
        """Makes the micro-step of a grid ready."""
        parts, timestamps = read_group(self.folder, grid)
        size = len(timestamps)
        group = {
            "position": np.arange(size), "index": np.arange(size), "ok": np.ones(size, bool),
            "grid": np.int32(grid), "patch_size": np.int32(_PATCH.value),
            "timestamps": timestamps, **parts,
        }  # fmt: skip
        self.run, _, _ = prepare_step(self.program, self.state, group)

    def step(self) -> float:
        """Total loss of one micro-step, contrastive term included."""
        return float(self.run()["loss"])

    def device_peak_mb(self) -> float:
        """Most memory of the device in use at once; 0 where it isn't counted (on a CPU)."""
        stats = jax.local_devices()[0].memory_stats() or {}
        return stats.get("peak_bytes_in_use", 0) / 2**20


class _Worker:
    """A side in a process of its own."""

    def __init__(self, side: str, folder: Path):
        if side == "torch":
            given = [f"{__package__}.torch_worker", str(folder), str(_PATCH.value)]
        else:
            same = [f"--{f}={flags.FLAGS[f].value}" for f in ("batch", "patch_size")]
            config = f"--config={config_path()}"
            given = [f"{__package__}.reference_step", f"--worker_folder={folder}", config, *same]
        self.side = side
        self.process = subprocess.Popen(
            [sys.executable, "-m", *given], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, line: str) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        for answer in self.process.stdout:
            if answer.startswith("@"):
                return json.loads(answer[1:])
        raise RuntimeError(f"the process of {self.side} ended early; see its message above")


def measure() -> dict[str, Any]:
    """The figures of all grids."""
    results = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder)
        for text in _GRIDS.value:
            # New processes for every grid: peaks never fall.
            workers = {side: _Worker(side, folder) for side in ("ours", "torch")}
            row: dict[str, Any] = {"grid": int(text)}
            runs: dict[str, list[dict[str, Any]]] = {side: [] for side in workers}
            for worker in workers.values():
                worker.ask(f"grid {text}")
                worker.ask("step")
            for _ in range(_STEPS.value):
                for side, worker in workers.items():
                    runs[side].append(worker.ask("step"))
            for side, worker in workers.items():
                assert worker.process.stdin is not None
                worker.process.stdin.close()
                worker.process.wait()
                for what in ("seconds", "cpu"):
                    row[f"{side}_{what}"] = statistics.median(r[what] for r in runs[side])
                row[f"{side}_peak_mb"] = runs[side][-1]["peak_mb"]
                row[f"{side}_device_peak_mb"] = runs[side][-1]["device_peak_mb"]
                row[f"{side}_loss"] = runs[side][-1]["loss"]
            for what in ("seconds", "cpu"):
                pairs = zip(runs["ours"], runs["torch"], strict=True)
                row[f"ratio_{what}"] = statistics.median(a[what] / b[what] for a, b in pairs)
            row["ratio_peak"] = row["ours_peak_mb"] / row["torch_peak_mb"]
            results.append(row)
    return {
        "benchmark": "reference_step",
        "config": config_path(),
        "batch": _BATCH.value,
        "patch_size": _PATCH.value,
        "device": jax.devices()[0].device_kind,
        "results": results,
    }


def main(_argv: list[str]) -> None:
    if _FOLDER.value:
        serve(Ours(Path(_FOLDER.value)))
    else:
        print(json.dumps(measure()))


if __name__ == "__main__":
    commands.run(main)
