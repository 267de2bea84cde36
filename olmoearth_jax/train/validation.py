"""Loss on samples that are kept out of training, always with the same crops and masks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from olmoearth_jax.config import ExperimentConfig
from olmoearth_jax.data.pipeline import TrainStream
from olmoearth_jax.model.config import ModelConfig
from olmoearth_jax.stream.engine import Engine, StreamEngine
from olmoearth_jax.train import assemble, build
from olmoearth_jax.train.loop import max_steps
from olmoearth_jax.train.loop_parts import Evaluation
from olmoearth_jax.train.progress import VAL_LOSS
from olmoearth_jax.train.step import State, TrainProgram

SEED = 99
"""Of the draws, which no training step has made."""
_KEPT_BYTES = 1 << 30
"""Samples up to this size are read once; more are read again each time."""


def quiet(config: ExperimentConfig) -> ExperimentConfig:
    """The config with nothing random in the model, and draws and batches of validation.

    A batch is one micro-step, so that few samples are enough.
    """
    config = config.copy()
    config.data_loader.seed, config.data_loader.repeats = SEED, 1
    config.data_loader.num_workers = 0  # it is read beside the readers of training
    config.data_loader.transform_config = None
    config.dataset.apply_cutmix = False
    without_noise(config.model)
    return config


def without_noise(model: ModelConfig) -> None:
    """Sets all rates of a model to 0 at which parts of it are left out at random."""
    model.encoder_config.band_dropout_rate = 0.0
    pixels = model.reconstructor_config
    decoders = (model.decoder_config, None if pixels is None else pixels.decoder_config)
    for part in (model.encoder_config, *decoders):
        if part is not None:
            part.drop_path = 0.0


class Validation:
    """The loss of the parameters on fixed draws of the samples for validation.

    Programs run forward only, and have the capacities of the training's.

    Args:
      config: of the run.
      program: the training, of which stream, ladder and devices are taken.
      steps_per_epoch: of the training, which say where its end is.

    Raises:
      ValueError: too few samples are kept out of training.
    """

    def __init__(self, config: ExperimentConfig, program: TrainProgram, steps_per_epoch: int):
        self.settings = config.trainer.callbacks.validation
        self.last_step = max_steps(config.trainer.max_duration, steps_per_epoch)
        calm = quiet(config)
        group, devices = config.train_module.rank_microbatch_size, program.mesh.size
        k, _ = assemble.micro_step_shape(config.data_loader.global_batch_size, group, devices)
        calm.data_loader.global_batch_size = k * group
        self.stream = _stream(config, calm)
        self.engine: Engine = _engine(calm, program)
        wanted = self.settings.samples // (k * group)
        self.batches = max(1, min(wanted, self.stream.steps_per_epoch))
        self.mesh = program.mesh
        self._programs: dict[Any, Any] = {}
        self._groups: list[Any] | None = None
        self._too_large = False

    @property
    def samples(self) -> int:
        """How many samples are looked at."""
        return self.batches * self.stream.global_batch_size

    def due(self, step: int) -> bool:
        """Is it time after this step?"""
        return step > 0 and (step % self.settings.interval == 0 or step == self.last_step)

    def __call__(
        self, state: State, step: int, stop: Callable[[], bool] = lambda: False
    ) -> dict[str, float] | None:
        """Mean losses over the micro-steps by name; None if `stop()` became true."""
        found: dict[str, list[Any]] = {}
        # Several processes compute together: none may leave before the others.
        alone = jax.process_count() == 1
        for groups in self._read():
            if alone and stop():
                return None
            for name, value in self.losses(state["params"], state["target"], groups):
                found.setdefault(name, []).append(value)
        return {name: float(np.mean(jax.device_get(values))) for name, values in found.items()}

    def warm_up(self, state: State) -> int:
        """Runs each program once, so that the compilation cache has it; how many there are."""
        for groups in self._read():
            for micro_step in self.engine.prepare(groups):
                if micro_step.key not in self._programs:
                    program = self._program(micro_step.key)
                    done = program(state["params"], state["target"], micro_step.inputs)
                    jax.block_until_ready(done)
        return len(self._programs)

    def losses(self, params: Any, target: Any, groups: Sequence[Any]):
        """(name, value) of the losses of each micro-step of some groups."""
        for micro_step in self.engine.prepare(groups):
            total, parts = self._program(micro_step.key)(params, target, micro_step.inputs)
            yield VAL_LOSS, total
            for name, value in parts.items():
                yield "val/" + ("InfoNCE" if name == "contrastive" else name), value

    def _program(self, key: Any) -> Any:
        if key not in self._programs:
            everywhere = NamedSharding(self.mesh, PartitionSpec())

            def forward(params: Any, target: Any, inputs: Any):
                rng = jax.random.key(0)  # nothing is drawn
                total, parts = self.engine.loss(params, target, inputs, rng, key)
                return total, jax.tree.map(lambda x: jnp.mean(x.astype(jnp.float32)), parts)

            self._programs[key] = jax.jit(forward, out_shardings=everywhere)
        return self._programs[key]

    def _read(self) -> Any:
        """The groups of each batch, from memory if they fit."""
        if self._groups is not None:
            return self._groups
        if self._too_large:
            return self.stream.batches(0, self.batches)
        read, size = [], 0
        for groups in self.stream.batches(0, self.batches):
            size += sum(x.nbytes for x in jax.tree.leaves(groups) if hasattr(x, "nbytes"))
            if size > _KEPT_BYTES:
                self._too_large = True  # else as much would be read for nothing every time
                return self.stream.batches(0, self.batches)
            read.append(groups)
        self._groups = read
        return read


def _stream(config: ExperimentConfig, calm: ExperimentConfig) -> TrainStream:
    index = build.build_index(config, "validation")
    need = calm.data_loader.global_batch_size
    if len(index) < need:
        raise ValueError(
            f"{len(index)} samples are kept out of training, fewer than the {need} of one "
            "micro-step: raise dataset.validation_fraction, or lower "
            "train_module.rank_microbatch_size"
        )
    return build.build_stream(calm, index)


def _engine(calm: ExperimentConfig, program: TrainProgram) -> StreamEngine:
    engine: Any = program.engine
    return assemble.stream_engine(calm, engine.spec, engine.ladder, engine.objective, program.mesh)


@dataclasses.dataclass
class Together:
    """Several evaluations as one: those that are due, one after another."""

    parts: tuple[Evaluation, ...]

    def due(self, step: int) -> bool:
        return any(part.due(step) for part in self.parts)

    @property
    def cancel(self) -> bool:
        """Whether one of them ends the training."""
        return any(getattr(part, "cancel", False) for part in self.parts)

    def __call__(
        self, state: State, step: int, stop: Callable[[], bool]
    ) -> Mapping[str, float] | None:
        values: dict[str, float] = {}
        for part in self.parts:
            if not part.due(step):
                continue
            found = part(state, step, stop)
            if found is None:
                return None
            values |= found
        return values
