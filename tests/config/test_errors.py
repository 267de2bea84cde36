"""What a wrong override or config says: path, value, what is expected, and the nearest name."""

import pytest

from olmoearth_jax import check, overrides
from olmoearth_jax.config import ConfigError, ExperimentConfig
from olmoearth_jax.configlib.official import official
from olmoearth_jax.model import latent_mim

OVERRIDES = [
    ("trainer.nope=1", ["unknown config path 'trainer.nope'", "did you mean"]),
    (
        "train_module.optim_confg.lr=1",
        [
            "unknown config path 'train_module.optim_confg.lr'",
            "did you mean 'train_module.optim_config.lr'?",
        ],
    ),
    ("positional", ["unknown config path 'positional'", "the top has: common, model"]),
    ("lr=1", ["unknown config path 'lr'", "'train_module.optim_config.lr'"]),
    ("train_module.optim_config.lr.x=1", ["unknown config path 'train_module.optim_config.lr.x'"]),
    ("launch.num_gpus=8", ["unknown config path 'launch.num_gpus'", "--gpus_per_host"]),
    ("launch.clusters=[a,b]", ["unknown config path 'launch.clusters'", "launch.submit"]),
    ("train_module.optim_config.lr=abc", ["takes a number", '"abc"']),
    ("data_loader.num_workers=abc", ["takes an integer", '"abc"']),
    ("data_loader.num_workers=1.5", ["takes an integer", "1.5"]),
    ("data_loader.num_workers=true", ["takes an integer", "true"]),
    ("train_module.optim_config.lr=null", ["takes a number; got null"]),
    ("trainer.callbacks.wandb.enabled=maybe", ["takes true or false", '"maybe"']),
    ("trainer.max_duration.unit=hours", ['no value "hours"', "steps, epochs"]),
    ("trainer.max_duration.unit=step", ["did you mean 'steps'?"]),
    ("common.training_modalities=sentinel1", ["takes a list", '"sentinel1"']),
    (
        "common.training_modalities=[sentinel2_l2b]",
        ["unknown modality 'sentinel2_l2b'", "did you mean 'sentinel2_l2a'?"],
    ),
    ("common.training_modalities=[landsat,LANDSAT]", ["'landsat' is listed more than once"]),
    ("trainer.hard_stop=5", ["takes a mapping", "got 5"]),
    ("train_module.token_exit_cfg=ful", ["unknown token exit preset 'ful'", "mean 'full'?"]),
    ("train_module.token_exit_cfg=null", ["takes a mapping"]),
    ("train_module.token_exit_cfg.sentinel3=1", ["unknown modality 'sentinel3'"]),
    (
        "trainer.callbacks.downstream_evaluator.tasks.madoz.probe_lr=1",
        ["tasks.madoz'", "did you mean 'mados'?"],
    ),
]


@pytest.mark.parametrize(("text", "parts"), OVERRIDES, ids=[t for t, _ in OVERRIDES])
def test_wrong_override(text, parts):
    with pytest.raises(ConfigError) as caught:
        overrides.apply(official("base"), [text])
    for part in parts:
        assert part in str(caught.value)


def test_an_aliased_path_is_named_as_it_was_written():
    with pytest.raises(ConfigError, match="'train_module.scheduler.warmup_steps' takes an integer"):
        overrides.apply(official("base"), ["train_module.scheduler.warmup_steps=soon"])


def test_all_wrong_overrides_and_problems_are_listed():
    with pytest.raises(ConfigError) as caught:
        overrides.apply(official("base"), ["a=1", "trainer.b", "data_loader.global_batch_size=33"])
    text = "\n".join(caught.value.problems)
    assert all(part in text for part in ("'a'", "'trainer.b'", "must be divisible"))


STRATEGY = "data_loader.masking_config.strategy_config"
LOSS = "train_module.loss_config.loss_config"
ONLY_DECODE = f"{STRATEGY}.only_decode_modalities"
SAVER = "trainer.callbacks.checkpointer"

PROBLEMS = [
    ({"data_loader.num_masked_views": 3}, "num_masked_views must be 1 or 2, got 3"),
    ({"data_loader.num_masked_views": 1}, "must be 2 for train_module.kind"),
    ({"data_loader.masking_config": None}, "masking_config must be given"),
    ({"model.decoder_config.encoder_embedding_size": 384}, "encoder_embedding_size (384)"),
    ({"model.encoder_config.position_encoding": "zzz"}, "position_encoding must be one of ("),
    ({"model.encoder_config.num_heads": 7}, "divisible by num_heads (7)"),
    ({"model.encoder_config.depth": -1}, "depth must be at least 0"),
    ({"model.encoder_config.drop_path": 1.0}, "drop_path must be in [0, 1)"),
    ({"model.encoder_config.max_patch_size": 4}, "data_loader.max_patch_size (8) must be at most"),
    ({"model.encoder_config.min_patch_size": 2}, "data_loader.min_patch_size (1) must be at least"),
    ({"model.kind": "latent"}, "model.kind: unknown kind 'latent'; did you mean 'latent_mim'?"),
    ({"model.kind": "galileo"}, "needs model.kind 'latent_mim'"),
    ({"data_loader.global_batch_size": 500}, "must be divisible by"),
    ({"data_loader.samples_per_shape": 40}, "must be a multiple of"),
    ({"data_loader.token_budget": 100}, "token budget 100 is too small"),
    ({"data_loader.sampled_hw_p_list": []}, "grid sizes"),
    ({"data_loader.transform_config": {"type": "flip_rotate"}}, "did you mean 'flip_and_rotate'?"),
    ({"data_loader.transform_config": {"type": "mixup"}}, "augmentation 'mixup' needs 'alpha'"),
    ({"dataset.dtype": "float16"}, "dataset.dtype must be float32"),
    ({"dataset.dataset_percentage": 0}, "greater than 0 and at most 1"),
    ({"dataset.training_modalities": ["latlon"]}, "which the model does not support"),
    ({f"{STRATEGY}.type": "randm"}, "did you mean 'random'?"),
    ({f"{STRATEGY}.encode_ratio": 1.5}, "encode"),
    ({f"{STRATEGY}.encod_ratio": 0.5}, "did you mean 'encode_ratio'?"),
    ({f"{STRATEGY}.encode_ratio": 0.7, f"{STRATEGY}.decode_ratio": 0.7}, "add up to more than 1"),
    ({f"{STRATEGY}.encode_ratio": 0}, "or the encoder sees nothing"),
    ({f"{STRATEGY}.decode_ratio": 0, ONLY_DECODE: []}, "or nothing is predicted"),
    ({f"{STRATEGY}.only_decode_modalities": ["naip_10"]}, "'naip_10', which is not trained"),
    ({"common.training_modalities": ["latlon"]}, "no modality with an image (latlon)"),
    ({"common.training_modalities": ["era5_10"]}, "add one of "),
    ({"common.training_modalities": ["srtm", "cdl"]}, "no modality is left to encode"),
    ({"train_module.regularizer_config": {"loss_config": {"type": "mae"}}}, "must be the loss 'K"),
    ({"train_module.token_exit_cfg": {"landsat": -1}}, "between 0 and the encoder's depth 12"),
    ({"mesh": {"data": 24, "fsdp": 1}}, "does not divide over 24 devices"),
    ({"mesh": {"data": 24, "fsdp": 1}}, "no train_module.rank_microbatch_size does"),
    (
        {
            "mesh": {"data": 32, "fsdp": 1},
            "data_loader.global_batch_size": 480,
            "train_module.rank_microbatch_size": 6,
        },
        "set train_module.rank_microbatch_size to one of 1, 3, 5, 15, 16, ",
    ),
    ({f"{LOSS}.type": "modality_patch_disc"}, "did you mean 'modality_patch_discrimination'?"),
    ({f"{LOSS}.type": "mae"}, "a loss between tokens (patch_discrimination, "),
    ({f"{LOSS}.type": "cross_entropy"}, "must be a loss between tokens (patch_discrimination, "),
    ({f"{LOSS}.modality_weights": {"srtm": 1}}, "no entry for cdl, landsat"),
    ({f"{LOSS}.modality_weights": {"srtm": "abc"}}, "modality_weights.srtm must be a number of"),
    ({f"{LOSS}.modality_weights": {"srtm": -1}}, "modality_weights.srtm must be a number of"),
    ({f"{LOSS}.tua": 1.0}, "did you mean 'tau'?"),
    ({"train_module.loss_config": None}, "loss_config must be given"),
    ({"train_module.kind": "mae"}, "mae_loss_config must be given"),
    ({"train_module.ema_decay": [0.9]}, "ema_decay must be two numbers"),
    ({"train_module.token_exit_cfg": {"landsat": 13}}, "between 0 and the encoder's depth 12"),
    ({"train_module.token_exit_cfg_b": {}}, "belongs to train_module.kind 'galileo'"),
    ({"train_module.optim_config.betas": [0.9, 1.0]}, "betas must be two numbers in [0, 1)"),
    ({"train_module.optim_config.lr": float("nan")}, "lr must be 0 or more"),
    ({"train_module.optim_config.eps": 0}, "eps must be greater than 0"),
    ({"train_module.optim_config.eps": 1e-50}, "eps must be at least 1e-30"),
    ({"train_module.regularizer_config": {"loss_config": {"type": "KoLeo", "eps": 0}}}, "eps must"),
    ({f"{STRATEGY}.max_encoded_bandsets": -1}, "max_encoded_bandsets must be a whole number"),
    ({"trainer.load_weights_only": True}, "trainer.load_weights_only needs the checkpoint"),
    ({"dataset.more_h5py_dirs": {"/d/9": 1.5}}, "more_h5py_dirs./d/9 must be in (0, 1], got 1.5"),
    (
        {"dataset.h5py_dir": "/d/9", "dataset.more_h5py_dirs": {"/d/9/": 0.5}},
        "more_h5py_dirs has /d/9/, which is dataset.h5py_dir itself",
    ),
    ({"dataset.cache_size_gb": 9.0}, "set dataset.cache_dir too"),
    ({"train_module.scheduler.warmup": None}, "exactly one of warmup and warmup_fraction"),
    ({"train_module.max_grad_norm": 0}, "greater than 0 or null"),
    ({"trainer.max_duration.value": 0}, "max_duration.value must be greater than 0"),
    ({f"{SAVER}.save_interval": 100}, "ephemeral_save_interval (250) must be less than"),
    (
        {"trainer.callbacks.downstream_evaluator.tasks_to_run": ["madoz"]},
        "unknown task 'madoz'; did you mean 'mados'?",
    ),
    ({"common.run_name": "a/b"}, "common.run_name must be a name without '/'"),
    ({"common.tokenization": {"landsat": [["B99"]]}}, "unknown band 'B99'"),
    ({"mesh.data": 0}, "mesh.data and mesh.fsdp"),
    ({"mesh.fsdp": -1}, "mesh.data and mesh.fsdp"),
    ({"fsdp_rules": [["(", ["fsdp"]]]}, "not a regular expression"),
    ({"fsdp_rules": [["(a+)+$", ["fsdp"]]]}, "could take for ever"),
    ({"fsdp_rules": [["(a|a)*$", ["fsdp"]]]}, "could take for ever"),
    ({"fsdp_rules": [[".*.*.*.*.*x", ["fsdp"]]]}, "could take for ever"),
    ({"fsdp_rules": [["(?:[^)]{1,9}){9}", ["fsdp"]]]}, "could take for ever"),
    ({"fsdp_rules": [["a?" * 30 + "a" * 30, ["fsdp"]]]}, "could take for ever"),
    ({"fsdp_rules": [["a" * 201, ["fsdp"]]]}, "could take for ever"),
    ({f"{LOSS}.tau": 1e-40}, "tau must be at least 1e-12"),
    ({"train_module.contrastive_config.loss_config.tau": 1e-40}, "tau must be at least 1e-12"),
    ({"fsdp_rules": [["kernel", ["fdsp"]]]}, "did you mean 'fsdp'?"),
    ({"ladder.max_rungs": 13}, "max_rungs must be between 1 and 12"),
    ({"ladder.row_classes": 0}, "row_classes must be between 1 and 8"),
]


@pytest.mark.parametrize(
    ("changes", "part"), PROBLEMS, ids=[f"{next(iter(c))}-{i}" for i, (c, _) in enumerate(PROBLEMS)]
)
def test_problem_is_found(changes, part):
    problems = check.problems(overrides.apply_values(official("base"), changes))
    assert any(part in p for p in problems), problems


def test_budget_can_be_counted_with_the_models_own_tokens():
    # A 9x9 grid has 6 maps and 3 + 1 + 2 band sets of sensors, or 3 as v1.2 sees them.
    changes = {"data_loader.sampled_hw_p_list": [9], "data_loader.token_budget": 9 * 81}
    config = overrides.apply_values(official("base", "v1_2"), changes)
    assert any("token budget 729 is too small" in p for p in check.problems(config))
    config.data_loader.match_model_tokenization = True
    assert check.problems(config) == []


def test_faster_target_needs_exit_zero_and_no_ema():
    changes = {"train_module.token_exit_cfg.landsat": 1, "train_module.ema_decay": [0.9, 1.0]}
    config = overrides.apply_values(official("base", "v1_2", faster=True), changes)
    assert len([p for p in check.problems(config) if "projection-only" in p]) == 2


def test_every_problem_is_listed_at_once():
    changes = {f: c for changes, _ in PROBLEMS[:1] for f, c in changes.items()}
    changes |= {"data_loader.global_batch_size": 500, "mesh.data": 0, f"{LOSS}.tua": 1.0}
    config = overrides.apply_values(official("base"), changes)
    assert len(check.problems(config)) == 4
    with pytest.raises(ConfigError) as caught:
        check.checked(config)
    assert len(caught.value.problems) == 4


def test_json_with_unknown_or_wrong_members():
    with pytest.raises(ConfigError, match="unknown config path 'trainer.save_intervall'"):
        ExperimentConfig.from_dict({"trainer": {"save_intervall": 5}})
    with pytest.raises(ConfigError, match="'init_seed' takes an integer"):
        ExperimentConfig.from_json('{"init_seed": "x"}')
    with pytest.raises(ConfigError, match="not valid JSON"):
        ExperimentConfig.from_json("{")


@pytest.mark.parametrize("encoding", ["absolute", "rope"])
@pytest.mark.parametrize("width", [40, 72, 80, 96, 100])
def test_width_that_is_accepted_can_be_built(encoding, width):
    config = overrides.apply_values(
        official("nano"),
        {
            "model.encoder_config.embedding_size": width,
            "model.encoder_config.num_heads": 1,
            "model.encoder_config.position_encoding": encoding,
        },
    )
    found = [p for p in check.problems(config) if "embedding_size" in p]
    assert bool(found) == (width % (16 if encoding == "absolute" else 8) != 0), found
    if not found:
        latent_mim.graph(config.model)


@pytest.mark.parametrize(
    "pattern",
    ["kernel", r"(query|key|value)/kernel$", r"blocks/\d+/.*/kernel", r"^encoder/.+\.\*[*+?]$",
     r"(?:mlp|attn)?/(?P<which>fc[12])/bias", r"a\)*", "[)]*"],
)  # fmt: skip
def test_patterns_of_parameters_are_taken(pattern):
    config = official("nano")
    config.fsdp_rules = [[pattern, ["fsdp"]]]
    assert check.problems(config) == []
