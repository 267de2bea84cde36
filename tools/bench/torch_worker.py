"""The PyTorch side of `tools.bench.reference_step`: a process without JAX, fed line by line.

On a GPU the model runs under bfloat16 autocast with float32 token losses, as the reference's fast
script and its loss do.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np


def read_group(folder: Path, grid: int) -> tuple[dict[str, dict[str, np.ndarray]], np.ndarray]:
    """({'data' | 'mask_a' | 'mask_b': {modality: array}}, timestamps [B, T, 3])."""
    parts: dict[str, dict[str, np.ndarray]] = {"data": {}, "mask_a": {}, "mask_b": {}}
    with np.load(folder / f"group_{grid}.npz") as stored:
        for key in stored.files:
            if "/" in key:
                part, name = key.split("/")
                parts[part][name] = stored[key]
        return parts, stored["timestamps"]


class Torch:
    """The reference's micro-step, in the order of its contrastive training module."""

    def __init__(self, folder: Path, patch_size: int):
        import torch  # pyright: ignore[reportMissingImports]
        from olmoearth_pretrain import datatypes  # pyright: ignore[reportMissingImports]
        from olmoearth_pretrain.model_loader import (  # pyright: ignore[reportMissingImports]
            load_model_from_path,
        )
        from olmoearth_pretrain.train.loss import (  # pyright: ignore[reportMissingImports]
            LossConfig,
        )

        self.torch, self.datatypes, self.folder = torch, datatypes, folder
        self.patch_size = patch_size
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = load_model_from_path(str(folder / "weights")).to(self.device).train()
        base, contrastive = json.loads((folder / "losses.json").read_text())
        self.base, self.contrastive = LossConfig(base).build(), LossConfig(contrastive).build()

    def take(self, grid: int) -> None:
        """Makes the samples of a grid ready: masks at the resolution of pixels."""
        torch = self.torch
        parts, timestamps = read_group(self.folder, grid)
        self.views = []
        for key in ("mask_a", "mask_b"):
            fields: dict[str, Any] = {"timestamps": torch.from_numpy(timestamps).long()}
            for name, x in parts["data"].items():
                mask = parts[key][name].astype(np.int64)
                if x.ndim == 5:
                    side = x.shape[1] // mask.shape[1]
                    mask = mask.repeat(side, axis=1).repeat(side, axis=2)
                fields[name] = torch.from_numpy(x)
                fields[f"{name}_mask"] = torch.from_numpy(mask)
            fields = {name: x.to(self.device) for name, x in fields.items()}
            self.views.append(self.datatypes.MaskedOlmoEarthSample(**fields))

    def _view(self, sample: Any) -> tuple[Any, Any]:
        torch = self.torch
        on = self.device.type == "cuda"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=on):
            _, decoded, pooled, _, _ = self.model(sample, self.patch_size)
            with torch.no_grad():
                exits = dict.fromkeys(self.model.encoder.supported_modality_names, 0)
                target = self.model.target_encoder.forward(
                    sample.unmask(), patch_size=self.patch_size, token_exit_cfg=exits
                )["tokens_and_masks"]
        return self.base.compute(decoded, target), pooled

    def step(self) -> float:
        """Total loss of one micro-step, contrastive term included."""
        self.model.zero_grad()
        loss_a, pooled_a = self._view(self.views[0])
        loss_b, pooled_b = self._view(self.views[1])
        loss = (loss_a + loss_b) / 2 + self.contrastive.compute(pooled_a, pooled_b)
        loss.backward()
        if self.device.type == "cuda":
            self.torch.cuda.synchronize()
        return float(loss.detach())

    def device_peak_mb(self) -> float:
        """Most memory of the GPU in use at once; 0 on a CPU."""
        if self.device.type != "cuda":
            return 0.0
        return self.torch.cuda.max_memory_allocated() / 2**20


def serve(worker: Any) -> None:
    """Answers 'grid N' and 'step' lines with JSON lines until standard input ends."""
    for line in sys.stdin:
        word, *rest = line.split()
        begun, cpu = time.perf_counter(), time.process_time()
        loss = worker.take(int(rest[0])) if word == "grid" else worker.step()
        answer = {
            "seconds": time.perf_counter() - begun,
            "cpu": time.process_time() - cpu,
            "loss": loss,
            "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "device_peak_mb": worker.device_peak_mb(),
        }
        print(f"@{json.dumps(answer)}", flush=True)


if __name__ == "__main__":
    serve(Torch(Path(sys.argv[1]), int(sys.argv[2])))
