"""Aliases, precedence, merging, and what follows from an override."""

import hypothesis.strategies as st
import pytest
from hypothesis import given

from olmoearth_jax import check, modalities, overrides
from olmoearth_jax.config import ConfigError
from olmoearth_jax.configlib.official import official
from olmoearth_jax.configlib.schema import get_path
from olmoearth_jax.overrides import format_value, parse_value

SAVER = "trainer.callbacks.checkpointer"


def apply(*texts, size="base", version="v1"):
    return overrides.apply(official(size, version), list(texts))


@pytest.mark.parametrize(
    "text",
    [
        "--train_module.optim_config.lr=0.001",
        "train_module.optim_config.lr=1e-3",
        "-train_module.optim-config.lr=0.001",
        "--config.train_module.optim_config.lr=0.001",
    ],
)
def test_spellings_of_a_path(text):
    assert apply(text).train_module.optim_config.lr == 0.001


def test_bare_path_is_true():
    assert apply("--config.trainer.no_evals").trainer.no_evals is True


def test_duration_of_two_parts_and_created_from_nothing():
    config = apply(
        "trainer.max_duration.value=10",
        "trainer.max_duration.unit=steps",
        "trainer.hard_stop={value: 5, unit: steps}",
    )
    assert (config.trainer.max_duration.value, config.trainer.max_duration.unit) == (10, "steps")
    assert config.trainer.hard_stop is not None
    assert (config.trainer.hard_stop.value, config.trainer.hard_stop.unit) == (5, "steps")


def test_lists_replace_and_mappings_merge():
    config = apply(
        "train_module.ema_decay=[0.996,1.0]",
        'train_module.token_exit_cfg={"SENTINEL2_L2A": 12}',
        "train_module.loss_config.loss_config={tau: 0.2}",
    )
    module = config.train_module
    assert module.ema_decay == [0.996, 1.0]
    assert module.token_exit_cfg["sentinel2_l2a"] == 12
    assert module.token_exit_cfg["landsat"] == 0
    assert module.loss_config is not None
    assert module.loss_config.loss_config == {
        "type": "modality_patch_discrimination_new",
        "tau": 0.2,
    }


def test_one_member_of_a_free_mapping():
    path = "train_module.loss_config.loss_config"
    config = apply(f"{path}.modality_weights.SENTINEL2_L2A=0.5", f"{path}.modality_weights.srtm=2")
    assert get_path(config, path)["modality_weights"] == {"sentinel2_l2a": 0.5, "srtm": 2}
    assert get_path(config, path)["tau"] == 0.1
    tasks = "trainer.callbacks.downstream_evaluator.tasks"
    assert get_path(apply(f"{tasks}={{}}"), tasks) == get_path(official("base"), tasks)


def test_exits_by_name():
    config = apply("train_module.token_exit_cfg=half", "model.encoder_config.depth=8")
    assert set(config.train_module.token_exit_cfg.values()) == {4}
    config = apply("train_module.token_exit_cfg=varied", "train_module.token_exit_cfg.cdl=3")
    exits = config.train_module.token_exit_cfg
    assert (exits["landsat"], exits["worldcover"], exits["cdl"]) == (12, 0, 3)


def test_profile_of_first_step_and_number():
    profile = apply("trainer.profile=(30,5)").trainer.profile
    assert (profile.enabled, profile.start_step, profile.num_steps) == (True, 30, 5)


def test_null_removes():
    config = apply("train_module.contrastive_config=null", "train_module.max_grad_norm=null")
    assert config.train_module.contrastive_config is None
    assert config.train_module.max_grad_norm is None


def test_text_that_looks_like_something_else():
    config = apply("common.run_name=123", "dataset.h5py_dir=/data/on: true, [x]/7")
    assert config.common.run_name == "123"
    assert config.dataset.h5py_dir == "/data/on: true, [x]/7"
    assert apply("common.run_name=on").common.run_name == "on"


def test_none_is_a_text_where_there_is_no_null():
    path = "model.encoder_config.position_encoding"
    assert get_path(apply(f"{path}=none"), path) == "none"
    assert get_path(apply(f"{path}='none'"), path) == "none"
    assert apply("dataset.h5py_dir=none").dataset.h5py_dir is None
    with pytest.raises(ConfigError, match="takes text; got null"):
        apply(f"{path}=null")


def test_a_number_of_thousands_of_digits():
    for text in ("1" * 5000, f"[{'-' + '9' * 5000}]"):
        with pytest.raises(ConfigError, match="'init_seed' takes an integer; got"):
            apply(f"init_seed={text}")


def test_last_of_several_wins():
    texts = [f"data_loader.num_workers={n}" for n in (3, 4, 5)]
    assert apply(*texts).data_loader.num_workers == 5


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_explicit_path_beats_its_alias(order):
    texts = ["train_module.scheduler.warmup=7", "train_module.scheduler.warmup_steps=9"]
    assert apply(*(texts[i] for i in order)).train_module.scheduler.warmup == 7


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_explicit_path_beats_common(order):
    texts = [
        "common.training_modalities=[sentinel2_l2a,sentinel1]",
        "dataset.training_modalities=[sentinel1]",
    ]
    config = apply(*(texts[i] for i in order))
    assert config.dataset.training_modalities == ["sentinel1"]
    assert config.model.encoder_config.supported_modality_names == ["sentinel2_l2a", "sentinel1"]


@pytest.mark.parametrize("unit", ["epochs", "steps"])
def test_duration_aliases(unit):
    duration = apply(f"trainer.max_duration.{unit}=40").trainer.max_duration
    assert (duration.value, duration.unit) == (40, unit)


def test_warmup_alias_and_fraction_replace_each_other():
    share = apply("train_module.scheduler.warmup_fraction=0.1")
    assert share.train_module.scheduler.warmup is None
    assert check.problems(share) == []
    back = overrides.apply(share, ["train_module.scheduler.warmup_steps=10"])
    assert back.train_module.scheduler.warmup == 10
    assert back.train_module.scheduler.warmup_fraction is None
    both = apply("train_module.scheduler.warmup_fraction=0.1", "train_module.scheduler.warmup=5")
    assert any("exactly one" in p for p in check.problems(both))


def test_save_interval_alias_switches_too_rare_ephemeral_saves_off():
    config = apply("trainer.save_interval=100")
    assert get_path(config, f"{SAVER}.save_interval") == 100
    assert get_path(config, f"{SAVER}.ephemeral_save_interval") is None
    assert check.problems(config) == []
    kept = apply("trainer.save_interval=1000")
    assert get_path(kept, f"{SAVER}.ephemeral_save_interval") == 250


@pytest.mark.parametrize("version", ["v1", "v1_2"])
def test_common_modalities_reach_everything(version):
    names = ["sentinel2_l2a", "srtm", "latlon"]
    config = apply(f"common.training_modalities=[{','.join(names)}]", version=version)
    model, loader, module = config.model, config.data_loader, config.train_module
    assert model.decoder_config is not None
    assert model.encoder_config.supported_modality_names == names
    assert model.decoder_config.supported_modality_names == names
    assert config.dataset.training_modalities == names
    assert loader.masking_config is not None
    assert loader.masking_config.strategy_config["only_decode_modalities"] == ["srtm"]
    assert module.token_exit_cfg == dict.fromkeys(names, 0)
    if version == "v1_2":
        assert list(model.encoder_config.tokenization_overrides) == ["sentinel2_l2a"]
        assert model.encoder_config.band_dropout_modalities == ["sentinel2_l2a"]
        assert module.loss_config is not None
        assert module.loss_config.loss_config["mask_negatives_for_modalities"] == ["srtm"]
    assert check.problems(config) == []


def test_common_modalities_reach_the_heads_of_maps():
    config = apply("common.training_modalities=[sentinel2_l2a,srtm,cdl]", version="v1_3")
    heads = config.model.supervision_head_config
    assert heads is not None and set(heads.modality_configs) == {"srtm", "cdl"}
    assert check.problems(config) == []
    alone = apply("common.training_modalities=[sentinel2_l2a]", version="v1_3")
    assert alone.model.supervision_head_config is None and check.problems(alone) == []


def test_common_as_a_mapping_is_its_members():
    whole = apply("common={training-modalities: [sentinel2_l2a, LANDSAT], run_name: x}")
    assert whole == apply("common.training_modalities=[sentinel2_l2a,landsat]", "common.run_name=x")
    assert whole.dataset.training_modalities == ["sentinel2_l2a", "landsat"]
    with pytest.raises(ConfigError, match="unknown config path 'common.run_nam'"):
        apply("common={run_nam: x}")


def test_common_tokenization_reaches_encoder_and_decoder():
    bands = list(modalities.get("landsat").bands)
    config = apply("common.tokenization=" + format_value({"LANDSAT": [bands]}))
    assert config.model.encoder_config.tokenization_overrides == {"landsat": [bands]}
    assert config.model.decoder_config is not None
    assert config.model.decoder_config.tokenization_overrides == {"landsat": [bands]}
    assert check.problems(config) == []


def test_common_run_name_moves_the_folder_unless_it_is_given():
    assert apply("common.run_name=x").run_folder.as_posix() == "local_output/x"
    moved = apply("common.run_name=x", "common.save_folder=/d")
    assert moved.run_folder.as_posix() == "/d"


def test_a_folder_below_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    for folder, meant in (("~/runs/x", "/home/me/runs/x"), ("~nobody-of-this-name/x",) * 2):
        config = official("nano")
        config.common.save_folder = folder  # as a config file sets it
        assert config.run_folder.as_posix() == meant


def test_common_inside_a_value_is_only_a_value():
    config = apply("dataset.h5py_dir=/data/common.training_modalities=[x]")
    assert config.dataset.h5py_dir == "/data/common.training_modalities=[x]"
    assert len(config.common.training_modalities) == 9


def test_masking_of_the_train_module_is_the_loaders():
    config = apply("train_module.masking_config.strategy_config.encode_ratio=0.25")
    assert config.data_loader.masking_config is not None
    assert config.data_loader.masking_config.strategy_config["encode_ratio"] == 0.25


def test_new_type_drops_the_parameters_of_the_old_one():
    config = apply(
        "data_loader.masking_config.strategy_config.type=random",
        "train_module.loss_config.loss_config.type=patch_discrimination_new",
        version="v1_2",
    )
    assert config.data_loader.masking_config is not None
    assert set(config.data_loader.masking_config.strategy_config) == {
        "type",
        "encode_ratio",
        "decode_ratio",
    }
    assert config.train_module.loss_config is not None
    assert set(config.train_module.loss_config.loss_config) == {"type", "tau"}
    assert check.problems(config) == []


def test_parameter_given_with_a_new_type_is_kept_and_reported():
    path = "data_loader.masking_config.strategy_config"
    config = apply(f"{path}.type=random", f"{path}.random_ratio=0.5")
    assert any("random_ratio" in p for p in check.problems(config))


def test_encoder_width_reaches_the_decoder_unless_it_is_set():
    config = apply("model.encoder_config.embedding_size=384")
    assert config.model.decoder_config is not None
    assert config.model.decoder_config.encoder_embedding_size == 384
    assert check.problems(config) == []
    fixed = apply(
        "model.encoder_config.embedding_size=384",
        "model.decoder_config.encoder_embedding_size=768",
    )
    assert any("encoder_embedding_size (768)" in p for p in check.problems(fixed))


def test_task_names_with_hyphen_or_underscore():
    base = "trainer.callbacks.downstream_evaluator.tasks"
    config = apply(f"{base}.m-eurosat.patch_size=8", f"{base}.mados.probe_lr=0.05")
    tasks = config.trainer.callbacks.downstream_evaluator.tasks
    assert (tasks["m-eurosat"].patch_size, tasks["mados"].probe_lr) == (8, 0.05)


def test_the_given_config_is_left_alone():
    config = official("nano")
    before = config.to_json()
    overrides.apply(config, ["common.training_modalities=[landsat]", "trainer.no_evals"])
    assert config.to_json() == before


def test_take_splits_a_command_line():
    rest, ours = overrides.take(["prog", "--config=x.py", "--config.a.b=1", "-config.c", "--v=2"])
    assert rest == ["prog", "--config=x.py", "--v=2"]
    assert ours == ["--config.a.b=1", "-config.c"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1_000", 1000),
        ("-5", -5),
        ("5.", 5.0),
        ("yes", True),
        ("OFF", False),
        ("~", None),
        ("", ""),
        ("'it''s'", "it's"),
        ('"1"', "1"),
        ("[a, 'b', [1, true], {k: null}]", ["a", "b", [1, True], {"k": None}]),
        ("{u: gs://a/b, 'v w': [x,]}", {"u": "gs://a/b", "v w": ["x"]}),
        ("(10, 3)", [10, 3]),
        ("gs://bucket/a b", "gs://bucket/a b"),
    ],
)
def test_values(text, value):
    assert parse_value(text) == value


@pytest.mark.parametrize("text", ["[a", "{a: 1", "{a}", "[a]]", '"x', "[,]"])
def test_unfinished_values_name_path_and_value(text):
    with pytest.raises(ConfigError, match="'train_module.ema_decay'.*not a valid value"):
        apply(f"train_module.ema_decay={text}")


_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


@given(_values)
def test_values_survive_writing_and_reading(value):
    # An infinite float is written as JSON does it, which the grammar knows without the minus sign.
    assert parse_value(format_value(value).replace("Infinity", "inf")) == (
        value if not isinstance(value, str) else value
    )
