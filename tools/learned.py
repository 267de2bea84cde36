"""Whether pretraining has taught features anything: trained against untrained, and raw bands.

    python -m tools.learned local_output/learn_1 local_output/learn_2 local_output/learn_3

Evaluates the encoders of the runs, the same encoders before their first step (of the same seeds),
and the raw bands of the same patches, on the packaged land-use task by kNN and linear probe. Prints
means over the seeds with 95 % intervals (Student's t), the difference that training made, and
whether that interval leaves out 0. `make learn` trains the runs and calls this.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from absl import app, flags
from absl import logging as absl_logging

from olmoearth_jax import commands
from olmoearth_jax.checkpoints import checkpoint
from olmoearth_jax.config import ExperimentConfig
from olmoearth_jax.configlib import tasks
from olmoearth_jax.evals import models
from olmoearth_jax.evals.embeddings import EmbeddingModel, EncoderModel
from olmoearth_jax.evals.runner import Hooks, run_task
from olmoearth_jax.model import latent_mim

TASKS = ("brandenburg_knn", "brandenburg_probe")
SPLITS = ("valid", "test")

FLAGS = flags.FlagValues()
"""This program's own flags; other programs have flags of the same names."""

_PATCH = flags.DEFINE_integer(
    "patch_size", 2, "Side of a patch in pixels.", lower_bound=1, flag_values=FLAGS
)

Scores = dict[tuple[str, str], float]
"""(task, split) -> primary metric."""

_T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""Two-sided 95 % quantiles of Student's t, by the number of values."""


def scores(model: EmbeddingModel, patch_size: int) -> Scores:
    """What a model reaches on the packaged tasks."""
    found = tasks.change_all(tasks.select(tasks.catalogue(), list(TASKS)), patch_size=patch_size)
    out: Scores = {}
    options = tasks.RunOptions(run_on_test=True)
    hooks = Hooks(lambda: False, cache={})  # both judge the same embeddings, made once
    for name, task in found.items():
        result = run_task(name, task, model, options, hooks)
        for split in SPLITS:
            part = getattr(result, split)
            out[name, split] = math.nan if part is None else float(part.primary)
    return out


def interval(values: Sequence[float]) -> tuple[float, float]:
    """(mean, half of the 95 % interval); the half is NaN for one value."""
    x = np.asarray(values, float)
    if len(x) < 2:
        return float(x.mean()), math.nan
    wide = _T[min(len(x), max(_T))]  # that of ten is a little too wide for more
    return float(x.mean()), float(wide * x.std(ddof=1) / math.sqrt(len(x)))


def table(
    trained: Sequence[Scores], fresh: Sequence[Scores], raw: Scores
) -> tuple[list[str], list[str]]:
    """(Markdown rows, one sentence per task and split)."""
    lines = [
        "| task, split | trained | untrained | difference | raw bands |",
        "|---|--:|--:|--:|--:|",
    ]
    said = []
    for task in TASKS:
        for split in SPLITS:
            key = (task, split)
            ours, theirs = [s[key] for s in trained], [s[key] for s in fresh]
            gain, half = interval([a - b for a, b in zip(ours, theirs, strict=True)])
            cells = [_text(*interval(ours)), _text(*interval(theirs)), _text(gain, half, "+"),
                     f"{raw[key]:.3f}"]  # fmt: skip
            lines.append(f"| {task}, {split} | " + " | ".join(cells) + " |")
            if math.isnan(half):
                verdict = "one seed says nothing of chance"
            elif gain - half > 0:
                verdict = "better than untrained beyond the interval"
            else:
                verdict = "not better than untrained beyond the interval"
            above = "above" if np.mean(ours) > raw[key] else "below"
            said.append(f"{task}, {split}: {verdict}; {above} raw bands")
    return lines, said


def _text(mean: float, half: float, sign: str = "") -> str:
    text = f"{mean:{sign}.3f}"
    return text if math.isnan(half) else f"{text} ± {half:.3f}"


def untrained(config: Mapping) -> EmbeddingModel:
    """The encoder that a run began with."""
    cfg = ExperimentConfig.from_dict(config)
    params = latent_mim.initial_params(cfg.model, cfg.init_seed)
    return EncoderModel(cfg.model, {"encoder": params["encoder"]}, None)


def main(argv: list[str]) -> None:
    """Prints the table."""
    if len(argv) < 2:
        raise app.UsageError("name at least one run folder")
    absl_logging.set_verbosity(absl_logging.ERROR)
    patch, trained, fresh = _PATCH.value, [], []
    try:
        for folder in argv[1:]:
            loaded = models.load_checkpoint(Path(folder))
            trained.append(scores(loaded.model, patch))
            meta = checkpoint.read_meta(checkpoint.find_checkpoint(folder))
            fresh.append(scores(untrained(meta["config"]), patch))
            print(f"{folder}, step {loaded.step}: evaluated", flush=True)
        raw = scores(models.baseline("raw_bands").model, patch)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    lines, said = table(trained, fresh, raw)
    print("\n".join(["", *lines, "", *said]))


if __name__ == "__main__":
    commands.run(main, FLAGS)
