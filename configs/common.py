"""What all config files share: the argument after the colon, the smoke settings, ablations.

Argument, comma-separated: `version=v1|v1_1|v1_2|v1_3`, `faster` (targets from a projection),
`smoke` (a tiny run for a CPU). Files under ablations/ also take `size=`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from olmoearth_jax import overrides
from olmoearth_jax.config import ConfigError, ExperimentConfig
from olmoearth_jax.configlib.official import official, trained_model
from olmoearth_jax.modalities import closest
from olmoearth_jax.model.config import (
    PUBLISHED_VERSIONS,
    ModelConfig,
    ReconstructorConfig,
)

SMOKE_STEPS = 20


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The parsed text after the colon."""

    version: str
    size: str
    faster: bool = False
    smoke: bool = False


def pairs() -> str:
    """The valid sizes and versions, for error texts."""
    return ", ".join(f"{s}:version={v}" for v, sizes in PUBLISHED_VERSIONS.items() for s in sizes)


def parse_arguments(
    text: str, size: str, version: str = "v1", size_allowed: bool = False
) -> Arguments:
    """Reads the text after the colon of `--config=<file>:<text>`.

    Args:
      text: comma-separated `key=value` and flags; may be empty.
      size: size of the config file.
      version: default version.
      size_allowed: whether `size=` may be given.

    Raises:
      ConfigError: unknown or repeated keys, bad values, or a pair that was never defined.
    """
    values = {"version": version, "size": size}
    keys = ["version", "size"] if size_allowed else ["version"]
    flags: set[str] = set()
    seen: set[str] = set()
    for part in filter(None, (p.strip() for p in text.split(","))):
        key, equals, value = (p.strip() for p in part.partition("="))
        if key in seen:
            raise ConfigError(f"config argument {key!r} is given twice")
        seen.add(key)
        if key in keys and value:
            values[key] = value
        elif key in ("faster", "smoke") and not equals:
            flags.add(key)
        elif key in keys:
            raise ConfigError(f"config argument {key!r} needs a value, as in {key}={values[key]}")
        elif key in ("faster", "smoke"):
            raise ConfigError(
                f"config argument {key!r} takes no value; leave it out or write {key}"
            )
        else:
            known = [f"{k}=..." for k in keys] + ["faster", "smoke"]
            raise ConfigError(f"unknown config argument {key!r}; {closest(key, known)}")
    _check_pair(values["size"], values["version"])
    return Arguments(values["version"], values["size"], "faster" in flags, "smoke" in flags)


def _check_pair(size: str, version: str) -> None:
    if version not in PUBLISHED_VERSIONS:
        raise ConfigError(f"unknown version {version!r}; {closest(version, PUBLISHED_VERSIONS)}")
    if size not in PUBLISHED_VERSIONS[version]:
        raise ConfigError(
            f"size {size!r} was never defined for version {version!r}; valid: {pairs()}"
        )


def build(arguments: Arguments) -> ExperimentConfig:
    """The typed config of parsed arguments."""
    cfg = official(arguments.size, arguments.version, arguments.faster)
    return smoke(cfg, arguments) if arguments.smoke else cfg


def smoke(cfg: ExperimentConfig, arguments: Arguments) -> ExperimentConfig:
    """The same recipe, small enough for a CPU: nano model, 20 steps, the packaged sample."""
    from olmoearth_jax.data.sample import sample_dataset_dir

    cfg.common.recipe += " smoke"
    cfg.common.run_name += "_smoke"
    cfg.model = trained_model("nano", arguments.version, arguments.faster)
    cfg.dataset.h5py_dir = str(sample_dataset_dir())
    loader = cfg.data_loader
    loader.global_batch_size = 8
    loader.num_workers = 0
    loader.sampled_hw_p_list = [4]  # one number of tokens, which one program fits
    loader.samples_per_shape = 4
    loader.token_budget = 300
    if loader.sample_timesteps:
        loader.min_tokens_per_instance = 20
    cfg.ladder.max_rungs = 2
    cfg.ladder.row_classes = 1
    cfg.train_module.rank_microbatch_size = 4
    cfg.train_module.scheduler.warmup = 5
    trainer = cfg.trainer
    trainer.max_duration.value, trainer.max_duration.unit = SMOKE_STEPS, "steps"
    trainer.metrics_collect_interval = 1
    trainer.cancel_check_interval = 1
    trainer.no_evals = True
    trainer.callbacks.downstream_evaluator.enabled = False
    trainer.callbacks.downstream_evaluator.tasks = {}
    trainer.callbacks.checkpointer.save_interval = SMOKE_STEPS
    trainer.callbacks.checkpointer.ephemeral_save_interval = SMOKE_STEPS // 2
    return cfg


def mae_model(model: ModelConfig) -> dict[str, Any]:
    """The settings that turn a model into an encoder with its decoder in a pixel reconstructor."""
    assert model.decoder_config is not None
    reconstructor = ReconstructorConfig(
        decoder_config=model.decoder_config,
        supported_modality_names=list(model.encoder_config.supported_modality_names),
        max_patch_size=model.encoder_config.max_patch_size,
        tokenization_overrides=model.encoder_config.tokenization_overrides,
    )
    return {
        "kind": "mae",
        "decoder_config": None,
        "reconstructor_config": dataclasses.asdict(reconstructor),
    }


def config(text: str, size: str, version: str = "v1") -> ConfigDict:
    """The complete config of a size file, as the mapping that config loaders expect."""
    return _mapping(build(parse_arguments(text, size, version)))


def _mapping(cfg: ExperimentConfig) -> ConfigDict:
    return ConfigDict(cfg.to_dict(), sort_keys=False)


Changes = Mapping[str, Any] | Callable[[ExperimentConfig], Mapping[str, Any]]
"""Config path -> value, or a function of the config they are applied to."""


def ablation(text: str, name: str, changes: Changes, version: str = "v1") -> ConfigDict:
    """The base config (or `size=`) with the changes of an ablation.

    Args:
      text: the text after the colon.
      name: of the ablation; goes into run name and recipe.
      changes: what the ablation changes.
      version: default version, the one that the ablation was made for.
    """
    arguments = parse_arguments(text, "base", version, size_allowed=True)
    cfg = build(arguments)
    cfg = overrides.apply_values(cfg, changes(cfg) if callable(changes) else changes)
    cfg.common.run_name += f"_{name}"
    cfg.common.recipe += f" {name}"
    return _mapping(cfg)


def grid(rates: Sequence[float], gpus_per_host: int | None = None) -> Iterator[dict[str, Any]]:
    """The sweep of the v1 recipe: every learning rate with every weight decay.

    Args:
      rates: learning rates.
      gpus_per_host: GPUs of each job; None leaves them to `launch.submit`.
    """
    launch = {} if gpus_per_host is None else {"launch.gpus_per_host": gpus_per_host}
    for rate, decay in itertools.product(rates, (0.2, 0.02, 0.002)):
        optimizer = {"lr": rate, "weight_decay": decay}
        yield {f"train_module.optim_config.{k}": v for k, v in optimizer.items()} | launch
