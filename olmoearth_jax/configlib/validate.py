"""Every check of a config, so that one run of them lists all that has to be mended."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from olmoearth_jax import modalities
from olmoearth_jax.configlib import objectives
from olmoearth_jax.configlib.training import MODEL_KINDS, VIEWS
from olmoearth_jax.configlib.tree import ExperimentConfig
from olmoearth_jax.configlib.validate_model import model_problems
from olmoearth_jax.data.budget import check_grids
from olmoearth_jax.modalities import Tokenization, closest

TILE_PX = modalities.IMAGE_TILE_PX
"""Side of the tiles that bounds the drawn crops."""

_TRANSFORMS = {"flip_and_rotate": (), "mixup": ("alpha",)}


def problems(cfg: ExperimentConfig) -> list[str]:
    """One sentence per problem, in the order of the tree."""
    out: list[str] = []
    for part in (
        _common,
        model_problems,
        _dataset,
        _loader,
        _objective,
        _optimizer,
        _trainer,
        _run,
    ):
        out += part(cfg)
    return out


def _need(holds: bool, path: str, what: str, value: Any) -> Iterator[str]:
    if not holds:
        yield f"{path} must be {what}, got {value!r}"


def _positive(cfg: Any, path: str, *names: str) -> Iterator[str]:
    for name in names:
        value = getattr(cfg, name)
        yield from _need(value > 0, f"{path}.{name}", "greater than 0", value)


def _says(check: Callable[[], Any], path: str = "") -> Iterator[str]:
    """The message of the ValueError that `check` raises, if any."""
    try:
        check()
    except ValueError as e:
        yield f"{path}: {e}" if path else str(e)


def _common(cfg: ExperimentConfig) -> Iterator[str]:
    common = cfg.common
    name = common.run_name
    yield from _need(
        bool(name) and "/" not in name and name not in (".", ".."),
        "common.run_name",
        "a name without '/'",
        name,
    )
    yield from _names(common.training_modalities, "common.training_modalities")
    yield from _says(lambda: Tokenization.from_mapping(common.tokenization), "common.tokenization")


def _names(names: list[str], path: str) -> Iterator[str]:
    if not names:
        yield f"{path} is empty; name at least one modality"
    yield from _says(lambda: modalities.resolve(names), path)


def _dataset(cfg: ExperimentConfig) -> Iterator[str]:
    data = cfg.dataset
    yield from _names(data.training_modalities, "dataset.training_modalities")
    supported = cfg.model.encoder_config.supported_modality_names
    for name in data.training_modalities:
        if name not in supported:
            yield (
                f"dataset.training_modalities has {name!r}, which the model does not support; "
                f"set common.training_modalities, which reaches both "
                f"(the model supports: {', '.join(supported)})"
            )
    if data.dtype != "float32":
        yield "dataset.dtype must be float32: the fill value of missing data overflows float16"
    yield from _need(
        0 < data.dataset_percentage <= 1,
        "dataset.dataset_percentage",
        "greater than 0 and at most 1",
        data.dataset_percentage,
    )
    rate = data.samples_per_sec
    yield from _need(
        rate is None or rate > 0, "dataset.samples_per_sec", "greater than 0 or null", rate
    )


def _loader(cfg: ExperimentConfig) -> Iterator[str]:
    loader, group = cfg.data_loader, cfg.train_module.rank_microbatch_size
    yield from _positive(loader, "data_loader", "global_batch_size", "prefetch_factor", "repeats")
    yield from _need(
        loader.num_workers >= 0, "data_loader.num_workers", "0 or more", loader.num_workers
    )
    yield from _need(
        0 <= loader.max_bad_fraction <= 1,
        "data_loader.max_bad_fraction",
        "between 0 and 1",
        loader.max_bad_fraction,
    )
    if group > 0 and loader.global_batch_size > 0:
        yield from _batch(cfg, group)
    yield from _shapes(cfg)
    yield from _views(cfg)
    yield from _transform(loader.transform_config)


def _batch(cfg: ExperimentConfig, group: int) -> Iterator[str]:
    loader = cfg.data_loader
    if loader.global_batch_size % group:
        yield (
            f"data_loader.global_batch_size ({loader.global_batch_size}) must be divisible by "
            f"train_module.rank_microbatch_size ({group})"
        )
    block = loader.samples_per_shape
    if block is not None and (block < 1 or block % group):
        yield (
            f"data_loader.samples_per_shape ({block}) must be a multiple of "
            f"train_module.rank_microbatch_size ({group})"
        )


def _shapes(cfg: ExperimentConfig) -> Iterator[str]:
    loader, encoder = cfg.data_loader, cfg.model.encoder_config
    low, high = loader.min_patch_size, loader.max_patch_size
    for side, value in (("min_patch_size", low), ("max_patch_size", high)):
        wanted = getattr(encoder, side)
        if value != wanted:
            yield (
                f"data_loader.{side} ({value}) must equal model.encoder_config.{side} ({wanted})"
            )
    if not 1 <= low <= high:
        yield (
            "data_loader.min_patch_size and max_patch_size must satisfy 1 <= min <= max, "
            f"got {low} and {high}"
        )
        return
    # A grid must fit the budget as it is counted: by the registry's band sets, or the model's own.
    tokenization = encoder.tokenization if loader.match_model_tokenization else None
    yield from _says(
        lambda: check_grids(
            cfg.dataset.training_modalities,
            range(low, high + 1),
            loader.sampled_hw_p_list,
            loader.token_budget,
            TILE_PX,
            tokenization,
        ),
        "data_loader",
    )


def _views(cfg: ExperimentConfig) -> Iterator[str]:
    loader, kind = cfg.data_loader, cfg.train_module.kind
    views = loader.num_masked_views
    if views not in (1, 2):
        yield f"data_loader.num_masked_views must be 1 or 2, got {views}"
    elif views != VIEWS[kind]:
        yield (
            f"data_loader.num_masked_views must be {VIEWS[kind]} for train_module.kind "
            f"{kind!r}, got {views}"
        )
    if loader.masking_config is None:
        yield "data_loader.masking_config must be given"
    if loader.masking_config_b is not None and views == 1:
        yield "data_loader.masking_config_b is set, but there is only one view; set it to null"


def _transform(config: dict[str, Any] | None) -> Iterator[str]:
    if config is None:
        return
    path, kind = "data_loader.transform_config", config.get("type")
    if kind not in _TRANSFORMS:
        yield f"{path}: unknown type {kind!r}; {closest(str(kind), _TRANSFORMS)}"
        return
    for key in config:
        if key != "type" and key not in _TRANSFORMS[kind]:
            yield f"{path}: {kind!r} has no parameter {key!r}"
    if kind == "mixup" and not config.get("alpha", 0) > 0:
        yield f"{path}: 'mixup' needs an alpha greater than 0"


def _objective(cfg: ExperimentConfig) -> Iterator[str]:
    module, kind = cfg.train_module, cfg.train_module.kind
    if cfg.model.kind != MODEL_KINDS[kind]:
        yield (
            f"train_module.kind {kind!r} needs model.kind {MODEL_KINDS[kind]!r}, "
            f"got {cfg.model.kind!r}"
        )
    for path, values in objectives.options(cfg).items():
        found = objectives.problem(path, values)
        if found:
            yield found
    if kind == "mae":
        if module.mae_loss_config is None:
            yield "train_module.mae_loss_config must be given for train_module.kind 'mae'"
        if module.contrastive_config is not None:
            yield "train_module.contrastive_config needs two views; set it to null for kind 'mae'"
    elif module.loss_config is None:
        yield f"train_module.loss_config must be given for train_module.kind {kind!r}"
    if kind == "latent_mim" and module.contrastive_config is not None:
        yield "train_module.contrastive_config needs two views; set it to null or use two views"
    if module.mae_loss_config is not None and cfg.model.reconstructor_config is None:
        yield "train_module.mae_loss_config needs model.reconstructor_config"
    for name in ("loss_config_b", "token_exit_cfg_b"):
        if kind != "galileo" and getattr(module, name) is not None:
            yield f"train_module.{name} belongs to train_module.kind 'galileo'; set it to null"
    yield from _targets(cfg)


def _targets(cfg: ExperimentConfig) -> Iterator[str]:
    module, depth = cfg.train_module, cfg.model.encoder_config.depth
    exits = {"token_exit_cfg": module.token_exit_cfg}
    if module.token_exit_cfg_b is not None:
        exits["token_exit_cfg_b"] = module.token_exit_cfg_b
    deepest = 0
    for name, values in exits.items():
        missing = [m for m in cfg.dataset.training_modalities if m not in values]
        if missing:
            yield f"train_module.{name} has no entry for: {', '.join(missing)}"
        for modality, exit_depth in values.items():
            if not 0 <= exit_depth <= depth:
                yield (
                    f"train_module.{name}.{modality} must be between 0 and the encoder's depth "
                    f"{depth}, got {exit_depth}"
                )
            deepest = max(deepest, exit_depth)
    decay = module.ema_decay
    if len(decay) != 2 or not all(0 <= d <= 1 for d in decay):
        yield f"train_module.ema_decay must be two numbers between 0 and 1, got {decay}"
    if cfg.model.projection_only_target:
        if deepest > 0:
            yield "a projection-only target needs every train_module.token_exit_cfg entry to be 0"
        if decay != [1.0, 1.0]:
            yield "a projection-only target needs train_module.ema_decay=[1,1]"


def _optimizer(cfg: ExperimentConfig) -> Iterator[str]:
    from olmoearth_jax.train.optimizer import AdamWConfig

    module, optim, rate = (
        cfg.train_module,
        cfg.train_module.optim_config,
        cfg.train_module.scheduler,
    )
    path = "train_module.optim_config"
    yield from _positive(module, "train_module", "rank_microbatch_size")
    for name in ("lr", "weight_decay", "eps"):
        value = getattr(optim, name)
        holds = math.isfinite(value) and value >= 0
        yield from _need(holds, f"{path}.{name}", "0 or more", value)
    betas = len(optim.betas) == 2 and all(0 <= b < 1 for b in optim.betas)
    yield from _need(betas, f"{path}.betas", "two numbers in [0, 1)", optim.betas)
    yield from _says(
        lambda: AdamWConfig(group_overrides=optim.group_overrides), f"{path}.group_overrides"
    )
    yield from _need(optim.count_offset in (0, 1), f"{path}.count_offset", "0 or 1",
                     optim.count_offset)  # fmt: skip
    norm = module.max_grad_norm
    yield from _need(norm is None or norm > 0, "train_module.max_grad_norm",
                     "greater than 0 or null", norm)  # fmt: skip
    path = "train_module.scheduler"
    if (rate.warmup is None) == (rate.warmup_fraction is None):
        yield f"{path}: set exactly one of warmup and warmup_fraction, and the other to null"
    steps, share, horizon = rate.warmup, rate.warmup_fraction, rate.t_max
    yield from _need(steps is None or steps >= 0, f"{path}.warmup", "0 or more", steps)
    holds = share is None or 0 <= share <= 1
    yield from _need(holds, f"{path}.warmup_fraction", "between 0 and 1", share)
    yield from _need(0 <= rate.alpha_f <= 1, f"{path}.alpha_f", "between 0 and 1", rate.alpha_f)
    holds = horizon is None or horizon > 0
    yield from _need(holds, f"{path}.t_max", "greater than 0 or null", horizon)


def _trainer(cfg: ExperimentConfig) -> Iterator[str]:
    trainer = cfg.trainer
    yield from _positive(trainer.max_duration, "trainer.max_duration", "value")
    if trainer.hard_stop is not None:
        yield from _positive(trainer.hard_stop, "trainer.hard_stop", "value")
    yield from _positive(trainer, "trainer", "metrics_collect_interval", "cancel_check_interval")
    if trainer.profile.enabled:
        yield from _positive(trainer.profile, "trainer.profile", "start_step", "num_steps")
    saver, path = trainer.callbacks.checkpointer, "trainer.callbacks.checkpointer"
    yield from _positive(saver, path, "save_interval")
    short = saver.ephemeral_save_interval
    if short is not None:
        yield from _need(short > 0, f"{path}.ephemeral_save_interval", "greater than 0", short)
        if short >= saver.save_interval:
            yield (
                f"{path}.ephemeral_save_interval ({short}) must be less than save_interval "
                f"({saver.save_interval}); lower it, or set it to null for none"
            )
    if trainer.no_checkpoints and trainer.load_strategy == "always":
        yield "trainer.load_strategy 'always' and trainer.no_checkpoints exclude each other"
    yield from _evaluator(cfg)


def _evaluator(cfg: ExperimentConfig) -> Iterator[str]:
    from olmoearth_jax.evals.tasks import catalogue, check_task

    evaluator = cfg.trainer.callbacks.downstream_evaluator
    path = "trainer.callbacks.downstream_evaluator"
    for name in evaluator.tasks_to_run or ():
        if name not in evaluator.tasks:
            known = [*evaluator.tasks, *(t for t in catalogue() if t not in evaluator.tasks)]
            yield f"{path}.tasks_to_run: unknown task {name!r}; {closest(name, known)}"
    if not evaluator.enabled or cfg.trainer.no_evals:
        return
    for name, task in evaluator.tasks.items():
        yield from _positive(task.eval_interval, f"{path}.tasks.{name}.eval_interval", "value")
        if evaluator.tasks_to_run is None or name in evaluator.tasks_to_run:
            yield from _says(lambda name=name, task=task: check_task(name, task), f"{path}.tasks")


def _run(cfg: ExperimentConfig) -> Iterator[str]:
    mesh, ladder = cfg.mesh, cfg.ladder
    sizes = [mesh.data, mesh.fsdp]
    if any(s < 1 and s != -1 for s in sizes) or sizes == [-1, -1]:
        yield (
            "mesh.data and mesh.fsdp must be device counts of at least 1, or one of them -1, "
            f"got {mesh.data} and {mesh.fsdp}"
        )
    for i, rule in enumerate(cfg.fsdp_rules):
        yield from _rule(rule, f"fsdp_rules[{i}]")
    if not 1 <= ladder.max_rungs <= 12:
        yield f"ladder.max_rungs must be between 1 and 12, got {ladder.max_rungs}"
    shares = ladder.row_fractions
    if not shares or sorted(set(shares)) != shares or shares[0] <= 0 or shares[-1] != 1:
        yield f"ladder.row_fractions must ascend from above 0 to 1, got {shares}"


def _rule(rule: list[Any], path: str) -> Iterator[str]:
    import re

    if len(rule) != 2 or not isinstance(rule[0], str) or not isinstance(rule[1], list):
        yield f"{path} must be [pattern, [axis or null, ...]], got {rule!r}"
        return
    try:
        re.compile(rule[0])
    except re.error as e:
        yield f"{path}: {rule[0]!r} is not a regular expression: {e}"
    for axis in rule[1]:
        if axis not in (None, "data", "fsdp"):
            yield f"{path}: unknown mesh axis {axis!r}; {closest(str(axis), ('data', 'fsdp'))}"
