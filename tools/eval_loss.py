"""Pretraining loss of checkpoints on fixed draws, which says whether a run has learnt.

    python -m tools.eval_loss --checkpoint=local_output/my_run [--h5py_dir=OTHER_FOLDER]

The loss of a training step depends on the patch size and grid that it drew, so its curve may rise
while the model improves. Here every checkpoint, and the fresh model before its first step, gets the
same samples, crops and masks, which no training step has drawn. Prints a table and one JSON line.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from olmoearth_jax import check, commands
from olmoearth_jax.checkpoints import checkpoint, integrity
from olmoearth_jax.config import ExperimentConfig
from olmoearth_jax.files import json_plain
from olmoearth_jax.mesh import make_mesh
from olmoearth_jax.train import build, devices, validation

_Losses = dict[str, float]


def _fixed_draws(config: ExperimentConfig, h5py_dir: str | None, seed: int) -> ExperimentConfig:
    """The config with other data, its own draws, and nothing random in the model."""
    config = ExperimentConfig.from_dict(config.to_dict())
    if h5py_dir is not None:
        config.dataset.h5py_dir, config.dataset.more_h5py_dirs = h5py_dir, {}
        config.dataset.validation_fraction = 0.0  # all of it: none is known to be trained on
    config.data_loader.seed = seed
    validation.without_noise(config.model)
    check.checked(config)
    return config


class _LossEvaluator:
    """The losses of any parameters on the same batches.

    Args:
      config: of the checkpoints, see `_fixed_draws`.
      batches: how many global batches.
    """

    def __init__(self, config: ExperimentConfig, batches: int):
        self.config = config
        index = build.build_index(config)
        stream = build.build_stream(config, index)
        self.program = build.build_program(config, stream, index, make_mesh(), batches, say=_quiet)
        self._compiled: dict[Any, Any] = {}
        self._groups = list(stream.batches(0, batches))

    def fresh(self) -> tuple[Any, Any]:
        """(parameters, target) before the first step."""
        return self.program.initial()

    def __call__(self, params: Any, target: Any) -> _Losses:
        """Mean of each loss over the micro-steps, by name."""
        found: dict[str, list[float]] = {}
        for name, value in self._each(params, target):
            found.setdefault(name, []).append(value)
        return {name: float(np.mean(values)) for name, values in sorted(found.items())}

    def _each(self, params: Any, target: Any) -> Iterator[tuple[str, float]]:
        engine, key = self.program.engine, jax.random.key(0)
        for groups in self._groups:
            for micro_step in engine.prepare(groups):
                total, parts = self._program(micro_step.key)(params, target, micro_step.inputs, key)
                yield engine.objective.metric_name, float(total)
                for name, value in jax.device_get(parts).items():
                    yield name, float(np.mean(value))

    def _program(self, key: Any) -> Any:
        if key not in self._compiled:
            engine = self.program.engine
            self._compiled[key] = jax.jit(
                lambda params, target, inputs, rng: engine.loss(params, target, inputs, rng, key)
            )
        return self._compiled[key]


def table(results: dict[str, _Losses]) -> list[str]:
    """Markdown: a row per loss, a column per checkpoint."""
    names = sorted({name for losses in results.values() for name in losses})
    lines = ["| loss | " + " | ".join(results) + " |", "|---|" + "--:|" * len(results)]
    for name in names:
        cells = [f"{x[name]:.4f}" if name in x else "-" for x in results.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def _step_folders(paths: list[str], every: bool) -> list[Path]:
    """The checkpoints meant. Raises ValueError if there is none."""
    if not every:
        return [checkpoint.find_checkpoint(p) for p in paths]
    if len(paths) > 1:
        raise ValueError("--all_steps takes one run as --checkpoint")
    newest = checkpoint.find_checkpoint(paths[0])
    return [newest.parent / str(step) for step in checkpoint.complete_steps(newest.parent)]


def evaluate(folders: list[Path], h5py_dir: str | None, batches: int, seed: int):
    """{'fresh' or '<run> <step>': losses} of checkpoints of one architecture.

    Raises:
      ValueError: a damaged checkpoint, or one of another model than the first.
    """
    metas = [checkpoint.open_whole(folder)[1] for folder in folders]
    for folder, meta in zip(folders, metas, strict=True):
        if lines := integrity.tree_differences(
            meta["items"]["params"], metas[0]["items"]["params"]
        ):
            raise ValueError(f"{folder} holds another model than {folders[0]}: {lines[0]}")
    config = ExperimentConfig.from_dict(metas[0]["config"])
    evaluator = _LossEvaluator(_fixed_draws(config, h5py_dir, seed), batches)
    results, names = {"fresh": evaluator(*evaluator.fresh())}, _names(folders)
    for folder, meta in zip(folders, metas, strict=True):
        items = [checkpoint.load_item(folder, i) if i in meta["items"] else {}
                 for i in ("params", "target")]  # fmt: skip
        results[names[folder]] = evaluator(*items)
    return results


def _names(folders: list[Path]) -> dict[Path, str]:
    """'<run> <step>', or the whole path where runs of one name have the step."""
    short = {folder: f"{folder.parents[1].name} {folder.name}" for folder in folders}
    count = Counter(short.values())
    return {folder: n if count[n] == 1 else str(folder) for folder, n in short.items()}


def _quiet(line: str) -> None:
    del line


def main() -> None:
    given = flags.FLAGS
    devices.use_compilation_cache()
    folders = _step_folders(given.checkpoint, given.all_steps)
    results = evaluate(folders, given.h5py_dir, given.batches, given.seed)
    print("\n".join(table(results)))
    print(
        json.dumps(
            json_plain({"batches": given.batches, "seed": given.seed, "losses": results}),
            allow_nan=False,
        )
    )


def define_flags() -> None:
    """Defined when this is run, so that its functions can be imported beside those of others."""
    flags.DEFINE_list(
        "checkpoint", None, "Run, checkpoints or step folders, by commas.", required=True
    )
    flags.DEFINE_bool("all_steps", False, "Evaluate every checkpoint of the run.")
    flags.DEFINE_string("h5py_dir", None, "Samples; default: those of the run.")
    flags.DEFINE_integer("batches", 16, "Global batches to evaluate.", lower_bound=1)
    flags.DEFINE_integer("seed", 99, "Of the fixed draws.")


if __name__ == "__main__":
    define_flags()
    commands.run_alone(main, quiet=True)
