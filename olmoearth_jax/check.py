"""Every check of a config, so that one run of them lists all that has to be mended.

Stands above all that it checks. What takes long to import is imported where it is needed, since
every command looks at its config first.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from olmoearth_jax import modalities
from olmoearth_jax.config import (
    MODEL_KINDS,
    VIEWS,
    ConfigError,
    DataLoaderConfig,
    ExperimentConfig,
)
from olmoearth_jax.configlib import limits, objectives, own_tasks, texts
from olmoearth_jax.configlib.schema import get_path
from olmoearth_jax.data import transforms
from olmoearth_jax.data.budget import check_grids
from olmoearth_jax.data.sampler import SAMPLER_OPTIONS, shape_sampler
from olmoearth_jax.modalities import Tokenization, closest
from olmoearth_jax.model.config import POSITION_ENCODINGS, EncoderConfig, PredictorConfig

_TILE_PX = modalities.IMAGE_TILE_PX  # side of the tiles, which bounds the drawn crops

_NUMBERS: dict[str, Callable[[Any], bool]] = {
    "greater than 0": lambda v: v > 0,
    "greater than 0 or null": lambda v: v is None or v > 0,
    "0 or more": lambda v: v is None or (v >= 0 and math.isfinite(v)),
    "between 0 and 1": lambda v: v is None or 0 <= v <= 1,
    "greater than 0 and at most 1": lambda v: 0 < v <= 1,
    "at least 0 and below 1": lambda v: 0 <= v < 1,
    "0 or 1": lambda v: v in (0, 1),
    "two numbers in [0, 1)": lambda v: len(v) == 2 and all(0 <= b < 1 for b in v),
    "two numbers between 0 and 1": lambda v: len(v) == 2 and all(0 <= b <= 1 for b in v),
    "between 1 and 8": lambda v: 1 <= v <= 8,
    "between 1 and 12": lambda v: 1 <= v <= 12,
    "float32: float16 cannot hold the fill value of missing data": lambda v: v == "float32",
}

_RULES = {
    "dataset.dtype": "float32: float16 cannot hold the fill value of missing data",
    "dataset.dataset_percentage": "greater than 0 and at most 1",
    "dataset.validation_fraction": "at least 0 and below 1",
    "dataset.samples_per_sec": "greater than 0 or null",
    "data_loader.global_batch_size": "greater than 0",
    "data_loader.prefetch_factor": "greater than 0",
    "data_loader.repeats": "greater than 0",
    "data_loader.num_workers": "0 or more",
    "data_loader.max_bad_fraction": "between 0 and 1",
    "data_loader.min_tokens_per_instance": "0 or more",
    "data_loader.time_priority_prob": "between 0 and 1",
    "train_module.rank_microbatch_size": "greater than 0",
    "train_module.max_location_queries": "greater than 0",
    "train_module.max_grad_norm": "greater than 0 or null",
    "train_module.ema_decay": "two numbers between 0 and 1",
    "train_module.optim_config.lr": "0 or more",
    "train_module.optim_config.weight_decay": "0 or more",
    "train_module.optim_config.eps": "greater than 0",
    "train_module.optim_config.betas": "two numbers in [0, 1)",
    "train_module.optim_config.count_offset": "0 or 1",
    "train_module.scheduler.warmup": "0 or more",
    "train_module.scheduler.warmup_fraction": "between 0 and 1",
    "train_module.scheduler.alpha_f": "between 0 and 1",
    "train_module.scheduler.t_max": "greater than 0 or null",
    "trainer.max_duration.value": "greater than 0",
    "trainer.metrics_collect_interval": "greater than 0",
    "trainer.cancel_check_interval": "greater than 0",
    "trainer.host_timeout_s": "greater than 0",
    "trainer.callbacks.tensorboard.image_interval": "greater than 0 or null",
    "trainer.callbacks.validation.interval": "greater than 0",
    "trainer.callbacks.validation.samples": "greater than 0",
    "trainer.profile.start_step": "greater than 0",
    "trainer.profile.num_steps": "greater than 0",
    "trainer.callbacks.checkpointer.save_interval": "greater than 0",
    "trainer.callbacks.checkpointer.ephemeral_save_interval": "greater than 0 or null",
    "ladder.max_rungs": "between 1 and 12",
    "ladder.row_classes": "between 1 and 8",
}
"""What the value of a path must be, in the words of the error text."""


def problems(cfg: ExperimentConfig) -> list[str]:
    """One sentence per problem; the parts are put together only where each is good in itself."""
    absurd = limits.problems(cfg)
    out = []
    for path, rule in _RULES.items():
        value = get_path(cfg, path)
        if path in absurd and isinstance(value, int):
            continue  # perhaps too large to be compared
        if not _NUMBERS[rule](value):
            absurd.pop(path, None)
            out.append(f"{path} must be {rule}, got {value!r}")
    out += absurd.values()
    out += texts.problems(cfg)
    if absurd:
        return out  # nothing is put together, not even for a try, with such numbers
    parts = (_modalities, _model, _data, _loader, _views, _options, _objective, _targets, _run)
    for part in parts:
        out += part(cfg)
    if not out:
        from olmoearth_jax.model import latent_mim
        from olmoearth_jax.train.build_objective import build_objective

        for whole in (lambda: latent_mim.check(cfg.model), lambda: build_objective(cfg)):
            out += _says(whole)
    if not out:
        from olmoearth_jax.stream.locations import check_grid

        out += _says(lambda: check_grid(cfg.model))
    return out


def checked(cfg: ExperimentConfig) -> ExperimentConfig:
    """The config itself, if it can be run.

    Raises:
      ConfigError: it has problems; all are listed.
    """
    found = problems(cfg)
    if found:
        raise ConfigError(found)
    return cfg


def _says(check: Callable[[], Any], path: str = "") -> Iterator[str]:
    """The message of the ValueError that `check` raises, if any."""
    try:
        check()
    except ValueError as e:
        yield f"{path}: {e}" if path else str(e)


def _modalities(cfg: ExperimentConfig) -> Iterator[str]:
    model = cfg.model
    lists = {
        "common.training_modalities": cfg.common.training_modalities,
        "dataset.training_modalities": cfg.dataset.training_modalities,
        "model.encoder_config.supported_modality_names": (
            model.encoder_config.supported_modality_names
        ),
    }
    images = [n for n in modalities.names() if modalities.get(n).spatial]
    for path, names in lists.items():
        if not names:
            yield f"{path} is empty; name at least one modality"
        elif not set(names) & set(images):
            yield (
                f"{path} has no modality with an image ({', '.join(names)}), so every sample would "
                f"be left out; add one of {', '.join(images)}"
            )
        yield from _says(lambda names=names: modalities.resolve(names), path)
    tokens = {"common.tokenization": cfg.common.tokenization}
    tokens["model.encoder_config.tokenization_overrides"] = (
        model.encoder_config.tokenization_overrides
    )
    for path, bands in tokens.items():
        yield from _says(lambda bands=bands: Tokenization.from_mapping(bands), path)
    if {"ndvi", "sentinel2_l2a"} & set(cfg.dataset.training_modalities) == {"ndvi"}:
        yield (
            "dataset.training_modalities has 'ndvi', which is computed from 'sentinel2_l2a'; add it"
        )
    supported = model.encoder_config.supported_modality_names
    for name in cfg.dataset.training_modalities:
        if name not in supported:
            yield (
                f"dataset.training_modalities has {name!r}, which the model does not support; "
                f"set common.training_modalities, which reaches both "
                f"(the model supports: {', '.join(supported)})"
            )


def _model(cfg: ExperimentConfig) -> Iterator[str]:
    model, encoder, kinds = cfg.model, cfg.model.encoder_config, set(MODEL_KINDS.values())
    if model.kind not in kinds:
        yield f"model.kind: unknown kind {model.kind!r}; {closest(model.kind, sorted(kinds))}"
        return
    yield from _stack(encoder, "embedding_size", "model.encoder_config")
    yield from _encoder(encoder, "model.encoder_config")
    decoder, path, pixels = model.decoder_config, "model.decoder_config", model.reconstructor_config
    if pixels is not None and decoder is None:
        decoder, path = pixels.decoder_config, "model.reconstructor_config.decoder_config"
    if model.kind == "mae" and pixels is None:
        yield "model.reconstructor_config must be given for model.kind 'mae'"
    elif decoder is None:
        yield f"model.decoder_config must be given for model.kind {model.kind!r}"
    if decoder is None:
        return
    yield from _stack(decoder, "decoder_embedding_size", path)
    width = encoder.output_embedding_size or encoder.embedding_size
    if decoder.encoder_embedding_size != width:
        yield (
            f"{path}.encoder_embedding_size ({decoder.encoder_embedding_size}) must equal the "
            f"width of the encoder's tokens ({width})"
        )
    for name in ("supported_modality_names", "tokenization_overrides", "max_sequence_length"):
        if getattr(encoder, name) != getattr(decoder, name):
            yield f"model.encoder_config.{name} and {path}.{name} must be equal"


def _encoder(encoder: EncoderConfig, path: str) -> Iterator[str]:
    for name, low in (("num_register_tokens", 0), ("num_projection_layers", 1)):
        if getattr(encoder, name) < low:
            yield f"{path}.{name} must be at least {low}, got {getattr(encoder, name)}"
    if not 0 <= encoder.band_dropout_rate < 1:
        yield f"{path}.band_dropout_rate must be in [0, 1), got {encoder.band_dropout_rate}"
    for name in encoder.band_dropout_modalities or ():
        if name not in encoder.supported_modality_names:
            yield f"{path}.band_dropout_modalities has {name!r}, which the model does not support"
    if not encoder.use_linear_patch_embed and encoder.patch_embed_hidden_sizes:
        yield (
            f"{path}.patch_embed_hidden_sizes needs use_linear_patch_embed=true; "
            "set one or the other"
        )


def _stack(part: EncoderConfig | PredictorConfig, field: str, path: str) -> Iterator[str]:
    """What encoder and decoder have in common; `field` is the name of their width."""
    from olmoearth_jax.model.encodings import quarter_width
    from olmoearth_jax.model.rope import RopeConfig

    for name, low in (("depth", 0), ("num_heads", 1), ("max_sequence_length", 1)):
        if getattr(part, name) < low:
            yield f"{path}.{name} must be at least {low}, got {getattr(part, name)}"
    if not 0 <= part.drop_path < 1:
        yield f"{path}.drop_path must be in [0, 1), got {part.drop_path}"
    if part.mlp_ratio <= 0:
        yield f"{path}.mlp_ratio must be greater than 0, got {part.mlp_ratio}"
    width, heads, encoding = getattr(part, field), part.num_heads, part.position_encoding
    if width < 1 or (heads > 0 and width % heads):
        yield f"{path}.{field} ({width}) must be positive and divisible by num_heads ({heads})"
    elif encoding not in POSITION_ENCODINGS:
        known = ", ".join(POSITION_ENCODINGS)
        yield f"{path}.position_encoding must be one of ({known}), got {encoding!r}"
    elif encoding in ("rope", "rope_mixed") and heads > 0 and (width // heads) % 4:
        yield (
            f"{path}: position_encoding {encoding!r} needs a head width divisible by 4, "
            f"got {width // heads}"
        )
    elif encoding == "absolute" and width % 16:
        yield f"{path}.{field} must be divisible by 16 for absolute encodings, got {width}"
    elif quarter_width(width) % 2:
        yield f"{path}.{field} must be divisible by 8 ({encoding} encodings), got {width}"
    elif (rotary := RopeConfig.of(part)) is not None and heads > 0:
        yield from _says(lambda: rotary.check(width // heads), path)


def _data(cfg: ExperimentConfig) -> Iterator[str]:
    data = cfg.dataset
    for folder, share in data.more_h5py_dirs.items():
        if not 0 < share <= 1:
            yield f"dataset.more_h5py_dirs.{folder} must be in (0, 1], got {share!r}"
        if folder.rstrip("/") == (data.h5py_dir or "").rstrip("/"):
            yield f"dataset.more_h5py_dirs has {folder}, which is dataset.h5py_dir itself"
    if data.cache_size_gb is not None and not data.cache_dir:
        yield "dataset.cache_size_gb is the size of a cache: set dataset.cache_dir too"


def _loader(cfg: ExperimentConfig) -> Iterator[str]:
    loader, encoder, group = (
        cfg.data_loader,
        cfg.model.encoder_config,
        cfg.train_module.rank_microbatch_size,
    )
    batch, block = loader.global_batch_size, loader.samples_per_shape
    group_path = f"train_module.rank_microbatch_size ({group})"
    if group > 0 and batch % group:
        yield f"data_loader.global_batch_size ({batch}) must be divisible by {group_path}"
    if group > 0 and block is not None and (block < 1 or block % group):
        yield f"data_loader.samples_per_shape ({block}) must be a multiple of {group_path}"
    low, high = loader.min_patch_size, loader.max_patch_size
    least, most = encoder.min_patch_size, encoder.max_patch_size
    if low < least:
        yield (
            f"data_loader.min_patch_size ({low}) must be at least "
            f"model.encoder_config.min_patch_size ({least})"
        )
    if high > most:
        yield (
            f"data_loader.max_patch_size ({high}) must be at most "
            f"model.encoder_config.max_patch_size ({most})"
        )
    if not 1 <= low <= high:
        yield f"data_loader: 1 <= min_patch_size <= max_patch_size must hold, got {low} and {high}"
    elif loader.sample_timesteps:
        yield from _says(lambda: shape_sampler(cfg, _TILE_PX), "data_loader")
    else:  # a grid must fit the budget as it is counted: by the registry's band sets, or our own
        counted = encoder.tokenization if loader.match_model_tokenization else None
        sizes, names = range(low, high + 1), cfg.dataset.training_modalities
        grids, budget = loader.sampled_hw_p_list, loader.token_budget
        yield from _says(
            lambda: check_grids(names, sizes, grids, budget, _TILE_PX, counted), "data_loader"
        )
    yield from _says(
        lambda: transforms.build(loader.transform_config), "data_loader.transform_config"
    )
    yield from _drawn_timesteps(cfg)


def _drawn_timesteps(cfg: ExperimentConfig) -> Iterator[str]:
    loader, usual = cfg.data_loader, DataLoaderConfig()
    if loader.sample_timesteps:
        for name in loader.token_budget_excluded_modalities:
            if name not in cfg.dataset.training_modalities:
                yield f"data_loader.token_budget_excluded_modalities: {name!r} is not trained"
        return
    for name in SAMPLER_OPTIONS:
        if getattr(loader, name) != getattr(usual, name):
            yield f"data_loader.{name} needs data_loader.sample_timesteps=true (v1.3)"


def _views(cfg: ExperimentConfig) -> Iterator[str]:
    loader, kind, views = cfg.data_loader, cfg.train_module.kind, cfg.data_loader.num_masked_views
    if views not in (1, 2):
        yield f"data_loader.num_masked_views must be 1 or 2, got {views}"
    elif views != VIEWS[kind]:
        yield (
            f"data_loader.num_masked_views must be {VIEWS[kind]} for train_module.kind "
            f"{kind!r}, got {views}"
        )
    if VIEWS[kind] == 2 and cfg.model.encoder_config.attention_pooler_config is not None:
        yield (
            f"train_module.kind {kind!r} has two masked views, but v1.3 trains on one: configs "
            "saved before its recipe was known borrowed that of v1.2, and their runs cannot go on; "
            "start from configs/base.py:version=v1_3, with their checkpoint as trainer.load_path "
            "and trainer.load_partial=true"
        )
    if loader.masking_config is None:
        yield "data_loader.masking_config must be given"
    if loader.masking_config_b is not None and views == 1:
        yield "data_loader.masking_config_b is set, but there is only one view; set it to null"


def _options(cfg: ExperimentConfig) -> Iterator[str]:
    """Maskings and losses: their types, their parameters, and the modalities that they name."""
    trained = cfg.model.encoder_config.supported_modality_names
    for path, values in objectives.options(cfg).items():
        try:
            built = objectives.build(path, values)
        except ValueError as e:
            yield f"{path}: {e}"
            continue
        for key in objectives.naming(path, values):
            listed = () if isinstance(values[key], Mapping) else values[key] or ()
            for name in set(listed) - set(trained):
                known = ", ".join(trained)
                yield f"{path}.{key} has {name!r}, which is not trained; trained: {known}"
        factors = getattr(built, "modality_weights", None)
        if factors and (lacking := set(cfg.dataset.training_modalities) - {n for n, _ in factors}):
            yield (
                f"{path}.modality_weights has no entry for {', '.join(sorted(lacking))}; give each "
                "trained modality a factor"
            )
        if path.startswith("data_loader."):
            yield from _visible(built, cfg, path)


def _visible(strategy: Any, cfg: ExperimentConfig, path: str) -> Iterator[str]:
    """Whether a strategy leaves the encoder anything to see."""
    hidden: set[str] = set()
    for key in ("only_decode_modalities", "decoded_modalities", "fully_mask_modalities"):
        hidden.update(getattr(strategy, key, ()))
    if hidden.issuperset(cfg.dataset.training_modalities):
        yield (
            f"{path}: no modality is left to encode, since all that are trained "
            f"({', '.join(cfg.dataset.training_modalities)}) are only decoded"
        )
    if getattr(strategy, "encode_ratio", 1) == 0:
        yield f"{path}.encode_ratio must be greater than 0, or the encoder sees nothing"
    if getattr(strategy, "decode_ratio", 1) == 0 and not hidden:
        yield (
            f"{path}.decode_ratio must be greater than 0, or nothing is predicted; 0 goes with "
            "only_decode_modalities"
        )


def _objective(cfg: ExperimentConfig) -> Iterator[str]:
    from olmoearth_jax.train.optimizer import overrides

    module, kind, rate = cfg.train_module, cfg.train_module.kind, cfg.train_module.scheduler
    if cfg.model.kind != MODEL_KINDS[kind]:
        yield (
            f"train_module.kind {kind!r} needs model.kind {MODEL_KINDS[kind]!r}, "
            f"got {cfg.model.kind!r}"
        )
    needed = "mae_loss_config" if kind == "mae" else "loss_config"
    if getattr(module, needed) is None:
        yield f"train_module.{needed} must be given for train_module.kind {kind!r}"
    if VIEWS[kind] == 1 and module.contrastive_config is not None:
        yield f"train_module.contrastive_config needs two views; set it to null for kind {kind!r}"
    if module.random_query_stride and cfg.model.encoder_config.attention_pooler_config is None:
        yield "train_module.random_query_stride needs a model with an attention pooler (v1.3)"
    heads = cfg.model.supervision_head_config
    for name in heads.modality_configs if heads is not None else ():
        if name not in cfg.dataset.training_modalities:
            yield (
                f"model.supervision_head_config.modality_configs has {name!r}, which is not "
                "trained; add it to common.training_modalities"
            )
    if module.mae_loss_config is not None and cfg.model.reconstructor_config is None:
        yield "train_module.mae_loss_config needs model.reconstructor_config"
    for name in ("loss_config_b", "token_exit_cfg_b"):
        if kind != "galileo" and getattr(module, name) is not None:
            yield f"train_module.{name} belongs to train_module.kind 'galileo'; set it to null"
    yield from _says(
        lambda: overrides(module.optim_config), "train_module.optim_config.group_overrides"
    )
    if (rate.warmup is None) == (rate.warmup_fraction is None):
        yield (
            "train_module.scheduler: set exactly one of warmup and warmup_fraction, and the other "
            "to null"
        )


def _targets(cfg: ExperimentConfig) -> Iterator[str]:
    module, depth = cfg.train_module, cfg.model.encoder_config.depth
    exits = {"token_exit_cfg": module.token_exit_cfg}
    if module.token_exit_cfg_b is not None:
        exits["token_exit_cfg_b"] = module.token_exit_cfg_b
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
    if cfg.model.projection_only_target:
        if any(any(values.values()) for values in exits.values()):
            yield "a projection-only target needs every train_module.token_exit_cfg entry to be 0"
        if module.ema_decay != [1.0, 1.0]:
            yield "a projection-only target needs train_module.ema_decay=[1,1]"


def _run(cfg: ExperimentConfig) -> Iterator[str]:
    from olmoearth_jax.train.assemble import micro_step_shape

    trainer, saver = cfg.trainer, cfg.trainer.callbacks.checkpointer
    if trainer.hard_stop is not None and trainer.hard_stop.value < 1:
        yield f"trainer.hard_stop.value must be greater than 0, got {trainer.hard_stop.value}"
    short = saver.ephemeral_save_interval
    if short is not None and short >= saver.save_interval:
        yield (
            f"trainer.callbacks.checkpointer.ephemeral_save_interval ({short}) must be less than "
            f"save_interval ({saver.save_interval}); lower it, or set it to null for none"
        )
    for name in ("load_partial", "load_weights_only"):
        if getattr(trainer, name) and not trainer.load_path:
            yield f"trainer.{name} needs the checkpoint to start from: set trainer.load_path"
    if trainer.no_checkpoints and trainer.load_strategy == "always":
        yield "trainer.load_strategy 'always' and trainer.no_checkpoints exclude each other"
    sizes = [cfg.mesh.data, cfg.mesh.fsdp]
    batch, group = cfg.data_loader.global_batch_size, cfg.train_module.rank_microbatch_size
    if any(s < 1 and s != -1 for s in sizes) or sizes == [-1, -1]:
        yield (
            "mesh.data and mesh.fsdp must be device counts of at least 1, or one of them -1, "
            f"got {cfg.mesh.data} and {cfg.mesh.fsdp}"
        )
    elif -1 not in sizes and group > 0 and batch > 0 and batch % group == 0:
        devices = sizes[0] * sizes[1]
        yield from _says(lambda: micro_step_shape(batch, group, devices), "mesh")
    for i, rule in enumerate(cfg.fsdp_rules):
        yield from _rule(rule, f"fsdp_rules[{i}]")
    evaluator = trainer.callbacks.downstream_evaluator
    yield from own_tasks.problems(evaluator, evaluator.enabled and not trainer.no_evals)


_MOST_REPEATS, _LONGEST_RULE = 4, 200


def _rule(rule: list[Any], path: str) -> Iterator[str]:
    if len(rule) != 2 or not isinstance(rule[0], str) or not isinstance(rule[1], list):
        yield f"{path} must be [pattern, [axis or null, ...]], got {rule!r}"
        return
    try:
        re.compile(rule[0])
    except re.error as e:
        yield f"{path}: {rule[0]!r} is not a regular expression: {e}"
    else:
        # Repeats within or after each other can take for ever to say that a path does not match.
        plain = re.sub(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?", "_", rule[0])
        repeats = len(re.findall(r"[*+?{]\??", plain))
        if len(rule[0]) > _LONGEST_RULE or repeats > _MOST_REPEATS or re.search(r"\)[*+{]", plain):
            yield (
                f"{path}: {rule[0][:60]!r} could take for ever to match; at most {_MOST_REPEATS} "
                f"of * + ? {{ are taken, none of them after a group, and {_LONGEST_RULE} characters"
            )
    for axis in rule[1]:
        if axis not in (None, "data", "fsdp"):
            yield f"{path}: unknown mesh axis {axis!r}; {closest(str(axis), ('data', 'fsdp'))}"
