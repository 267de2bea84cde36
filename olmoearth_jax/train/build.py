"""From a validated config to everything a run needs: program, data stream, what is told of it."""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Sequence

import jax
from jax.sharding import Mesh

from olmoearth_jax import masking
from olmoearth_jax.checkpoints.checkpoint import RunInfo
from olmoearth_jax.config import ExperimentConfig
from olmoearth_jax.data import index as dataset_index
from olmoearth_jax.data.pipeline import TrainStream
from olmoearth_jax.data.sampler import shape_sampler
from olmoearth_jax.losses import Objective
from olmoearth_jax.mesh import make_mesh
from olmoearth_jax.modalities import IMAGE_TILE_PX, normalization_of
from olmoearth_jax.stream.ladder import build_ladder, expected_use
from olmoearth_jax.stream.stream_shape import MicroStepSize, Rung, StreamSpec
from olmoearth_jax.stream.token_counts import Need
from olmoearth_jax.train import assemble, probe
from olmoearth_jax.train.build_objective import build_objective
from olmoearth_jax.train.flops import training_flops
from olmoearth_jax.train.loop import Extras, max_steps
from olmoearth_jax.train.pictures import Pictures
from olmoearth_jax.train.query_stride import query_stride
from olmoearth_jax.train.step import TrainProgram

_log = logging.getLogger(__name__)

_MICRO_STEPS_PER_GRID = 24
"""Simulated micro-steps per grid side when the ladder is sized."""


@dataclasses.dataclass(frozen=True)
class Training:
    """What `launch.train` runs."""

    program: TrainProgram
    stream: TrainStream
    info: RunInfo
    extras: Extras


def masking_strategies(config: ExperimentConfig) -> list[masking.Strategy]:
    """Masking per view, as many as there are views."""
    loader = config.data_loader
    assert loader.masking_config is not None
    first = masking.build(loader.masking_config.strategy_config)
    if loader.num_masked_views == 1:
        return [first]
    second = loader.masking_config_b
    return [first, first if second is None else masking.build(second.strategy_config)]


def build_index(
    config: ExperimentConfig, part: dataset_index.Split = "train"
) -> dataset_index.DatasetIndex:
    """The samples of `config.dataset` that are trained on, or those kept out for validation."""
    data = config.dataset
    if not data.h5py_dir:
        raise ValueError(
            "no dataset is given: set --config.dataset.h5py_dir to the folder that holds "
            "sample_0.h5, sample_1.h5, ... (or use :smoke for the packaged sample)"
        )
    folders = {data.h5py_dir: data.dataset_percentage, **data.more_h5py_dirs}
    parts = [
        dataset_index.prepare(
            folder,
            data.training_modalities,
            filter_idx_file=data.filter_idx_file if folder == data.h5py_dir else None,
            dataset_percentage=share,
            seed=data.seed,
            validation_fraction=data.validation_fraction,
            part=part,
        )
        for folder, share in folders.items()
    ]
    return parts[0] if len(parts) == 1 else dataset_index.concat(parts)


def build_stream(config: ExperimentConfig, index: dataset_index.DatasetIndex) -> TrainStream:
    """The batches of a run."""
    hosts = jax.process_index(), jax.process_count()
    sampler = shape_sampler(config, index.tile_px)
    return TrainStream(index, config, masking_strategies(config), *hosts, sampler=sampler)


def stream_of(
    config: ExperimentConfig,
    timesteps: dict[int, int],
    devices: int,
    objective: Objective | str,
) -> StreamSpec:
    """The static stream of a config on so many devices.

    Args:
      config: the config.
      timesteps: grid side -> timesteps.
      devices: devices of a micro-step.
      objective: the losses, or just the scope of the token loss.
    """
    k, samples = assemble.micro_step_shape(
        config.data_loader.global_batch_size, config.train_module.rank_microbatch_size, devices
    )
    views = config.data_loader.num_masked_views
    if isinstance(objective, str):
        needs = assemble.StreamNeeds(views, (objective,))
    else:
        needs = dataclasses.replace(assemble.StreamNeeds.of(objective), views=views)
    size = MicroStepSize(samples, devices, k)
    stride = query_stride(config)
    most = 0 if stride is None else stride.most
    return assemble.stream_spec(
        config.model, masking_strategies(config), timesteps, size, needs, most
    )


def likely_shapes(
    config: ExperimentConfig, timesteps: dict[int, int], count: int, tile_px: int = IMAGE_TILE_PX
) -> dict[int, int] | list[probe.Shape]:
    """Shapes of groups for `probe.simulate`: about `count`, each as often as it is likely.

    Every shape that can be drawn is there at least once. Where timesteps and locations are not
    drawn, just `timesteps`.
    """
    sampler, stride = shape_sampler(config, tile_px), query_stride(config)
    if sampler is None and stride is None:
        return timesteps
    if sampler is not None:
        drawn = sampler.probabilities()
    else:
        loader = config.data_loader
        patches = range(loader.min_patch_size, loader.max_patch_size + 1)
        fitting = [(p, g, t) for g, t in timesteps.items() for p in patches if p * g <= tile_px]
        drawn = dict.fromkeys(fitting, 1.0 / max(len(fitting), 1))
    likely: dict[probe.Shape, float] = {}
    for (patch, grid, steps), p in drawn.items():
        sizes = [patch] if stride is None else stride.sizes(patch, grid)
        for size in sizes:
            shape = probe.Shape(grid, steps, patch // size)
            likely[shape] = likely.get(shape, 0.0) + p / len(sizes)
    return [s for s in sorted(likely) for _ in range(max(1, round(count * likely[s])))]


def _likely_needs(
    config: ExperimentConfig,
    spec: StreamSpec,
    timesteps: dict[int, int],
    presence: list[probe.Presence],
    tile_px: int = IMAGE_TILE_PX,
) -> list[Need]:
    """What simulated micro-steps of a data set with these presence patterns need."""
    count = _MICRO_STEPS_PER_GRID * len(timesteps)
    shapes = likely_shapes(config, timesteps, count, tile_px)
    presence = presence or [probe.complete(spec.modalities)]
    return probe.simulate_needs(
        spec,
        presence,
        masking_strategies(config),
        shapes,
        config.data_loader.seed,
        count if shapes is timesteps else len(shapes),
        pool=_MICRO_STEPS_PER_GRID,
    )


def size_ladder(
    config: ExperimentConfig,
    spec: StreamSpec,
    timesteps: dict[int, int],
    presence: list[probe.Presence],
    tile_px: int = IMAGE_TILE_PX,
) -> tuple[Rung, ...]:
    """Rungs for a data set with these presence patterns; one slot is kept for the update."""
    return _ladder_for(config, spec, _likely_needs(config, spec, timesteps, presence, tile_px))


def _ladder_for(
    config: ExperimentConfig, spec: StreamSpec, needs: Sequence[Need]
) -> tuple[Rung, ...]:
    """Rungs for what micro-steps are likely to need; one slot is kept for the update.

    With two programs in all that is one rung for everything likely, and behind it the hard bound,
    which is compiled only if a micro-step needs it after all.
    """
    programs = config.ladder.max_rungs
    rungs = max(2, programs - 1) if programs > 1 else 1
    return build_ladder(spec, needs, rungs, config.ladder.row_classes)


def build_program(
    config: ExperimentConfig,
    stream: TrainStream,
    index: dataset_index.DatasetIndex,
    mesh: Mesh,
    last_step: int,
    say: Callable[[str], None] = _log.info,
) -> TrainProgram:
    """Engine, ladder and optimiser of a run.

    The ladder also holds what is kept out of training, for its validation.
    """
    objective = build_objective(config)
    spec = stream_of(config, stream.timesteps, mesh.size, objective)
    begun = time.perf_counter()
    presence = probe.read_presence(index)
    if config.dataset.validation_fraction:
        presence += probe.read_presence(build_index(config, "validation"))
    needs = _likely_needs(config, spec, stream.timesteps, presence, index.tile_px)
    ladder = _ladder_for(config, spec, needs)
    say(f"sized {len(ladder)} step programs in {time.perf_counter() - begun:.1f} s")
    engine = assemble.stream_engine(config, spec, ladder, objective, mesh)
    engine.expected = expected_use(ladder, needs)
    engine.flops = functools.partial(training_flops, config, spec)
    return TrainProgram(
        config,
        engine,
        mesh,
        assemble.trainable_leaves(config.model, objective.pools, objective),
        last_step,
        on_compile=lambda name, seconds: say(f"compiled a step program in {seconds:.1f} s"),
    )


def _dataset_summary(
    config: ExperimentConfig, index: dataset_index.DatasetIndex, stream: TrainStream
) -> str:
    """Markdown: where the data is, how much there is of it, and how it is cut."""
    rows = {
        "folder": config.dataset.h5py_dir,
        "samples": f"{len(index):,}",
        "modalities": ", ".join(index.modalities),
        "fingerprint": index.fingerprint,
        "tile": f"{index.tile_px} pixels",
        "steps per epoch": f"{stream.steps_per_epoch:,}",
        "samples per step": f"{stream.global_batch_size} in groups of {stream.group_size}",
        "patch sizes": f"{min(stream.patch_sizes)} to {max(stream.patch_sizes)}",
        "timesteps per grid side": ", ".join(f"{g}: {t}" for g, t in stream.timesteps.items()),
    }
    return "\n".join(["| dataset | |", "|---|---|", *(f"| {k} | {v} |" for k, v in rows.items())])


def build_training(config: ExperimentConfig, say: Callable[[str], None] = print) -> Training:
    """Builds a run.

    Args:
      config: validated config.
      say: takes progress lines.

    Raises:
      ValueError: missing data, sizes that don't divide, parts that don't fit together.
    """
    index = build_index(config)
    probe.check_images(index)
    stream = build_stream(config, index)
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp)
    last = max_steps(config.trainer.max_duration, stream.steps_per_epoch)
    program = build_program(config, stream, index, mesh, last, say)
    info = RunInfo(
        config=config.to_dict(),
        normalization=normalization_of(index.modalities),
        dataset_fingerprint=index.fingerprint,
        dataset_content=index.content,
        seed=config.init_seed,
        steps_per_epoch=max(stream.steps_per_epoch, 1),
    )
    draws = config.trainer.callbacks.tensorboard.enabled
    extras = Extras(
        pictures=Pictures(stream, config.model) if draws else None,
        texts={"dataset": _dataset_summary(config, index, stream)},
    )
    return Training(program, stream, info, extras)
