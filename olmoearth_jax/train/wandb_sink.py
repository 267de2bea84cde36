"""Weights & Biases as one more place for the numbers; the package is an optional extra."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from olmoearth_jax.files import write_atomically
from olmoearth_jax.train.runfolder import RunFolder


class WandbSink:
    """Sends each record to a W&B run, and goes on with that run after a restart.

    The run's id is kept in wandb/wandb_runid.txt of the run folder. Raises ValueError if the
    package or the API key is missing.
    """

    def __init__(
        self,
        folder: RunFolder,
        *,
        project: str,
        name: str,
        entity: str | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        if "WANDB_API_KEY" not in os.environ and os.environ.get("WANDB_MODE") != "offline":
            raise ValueError(
                "trainer.callbacks.wandb.enabled needs the environment variable WANDB_API_KEY "
                "(or WANDB_MODE=offline)."
            )
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ValueError(
                "trainer.callbacks.wandb.enabled needs the package: pip install "
                "'olmoearth-jax[wandb]'."
            ) from error
        place = folder.root / "wandb"
        place.mkdir(parents=True, exist_ok=True)
        id_file = place / "wandb_runid.txt"
        known = id_file.read_text(encoding="utf-8").strip() if id_file.exists() else None
        self._run = wandb.init(
            project=project,
            entity=entity,
            name=name,
            dir=str(folder.root),
            config=dict(config or {}),
            id=known,
            resume="allow",
        )
        write_atomically(id_file, self._run.id)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Sends the numbers of a record; lists of names stay in metrics.jsonl."""
        numbers = {name: v for name, v in values.items() if not isinstance(v, (list, tuple))}
        self._run.log(numbers, step=step)

    def close(self) -> None:
        self._run.finish()
