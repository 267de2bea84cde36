"""Values of a config that no run could take: absurd numbers, wrong shapes, nesting."""

import copy
import json
import math
import time
from typing import Any

import jax
import pytest

from olmoearth_jax import check, modalities, overrides
from olmoearth_jax.config import ConfigError, ExperimentConfig, load_json
from olmoearth_jax.configlib import limits
from olmoearth_jax.configlib.official import official
from olmoearth_jax.train.optimizer import GroupOverride

MODEL = "model.encoder_config"
LOSS = "train_module.loss_config.loss_config"
ABSURD = [
    ("init_seed", -1),
    ("init_seed", 2**70),
    ("init_seed", 10**400),
    ("data_loader.seed", -5),
    ("dataset.seed", 2**63),
    ("data_loader.global_batch_size", 2**62),
    ("data_loader.num_workers", 10**9),
    ("data_loader.num_workers", 10**400),
    ("data_loader.token_budget", 10**21),
    ("data_loader.max_patch_size", 10**9),
    ("data_loader.sampled_hw_p_list", [1, 10**9]),
    ("train_module.rank_microbatch_size", 10**9),
    (f"{MODEL}.depth", 10**6),
    (f"{MODEL}.max_sequence_length", 10**12),
    (f"{MODEL}.embedding_size", 10**9),
    (f"{MODEL}.mlp_ratio", 1e300),
    (f"{MODEL}.rope_base", 0.0),
    (f"{MODEL}.patch_embed_hidden_sizes", [64, 10**9]),
    ("trainer.max_duration", {"value": 10**308, "unit": "steps"}),
    ("train_module.optim_config.lr", 1e308),
    ("trainer.host_timeout_s", 1e300),
    ("mesh.fsdp", 10**9),
]
UNLIMITED = [
    f"{MODEL}.mlp_ratio",
    f"{MODEL}.rope_base",
    f"{MODEL}.rope_mixed_base",
    f"{MODEL}.layer_scale_init",
    "model.decoder_config.mlp_ratio",
    f"{LOSS}.tau",
    "dataset.cache_size_gb",
    "dataset.samples_per_sec",
    "dataset.dataset_percentage",
    "train_module.optim_config.lr",
    "train_module.optim_config.weight_decay",
    "train_module.scheduler.warmup_min_lr",
    "train_module.max_grad_norm",
    "trainer.host_timeout_s",
    "data_loader.max_bad_fraction",
]


@pytest.mark.parametrize(("path", "value"), ABSURD, ids=str)
def test_absurd_number_is_refused_at_once(path, value):
    begun = time.perf_counter()
    found = check.problems(overrides.apply_values(official("nano", "v1"), {path: value}))
    assert time.perf_counter() - begun < 2
    assert any(p.startswith(path) and "got " in p and len(p) < 300 for p in found), found


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("path", UNLIMITED)
def test_number_that_is_not_finite_is_refused(path, value):
    found = check.problems(overrides.apply_values(official("nano"), {path: value}))
    assert [p for p in found if p.startswith(f"{path} must be ") and f"got {value}" in p], found


def test_alpha_of_mixup_is_finite():
    options = {"type": "mixup", "alpha": math.nan}
    config = overrides.apply_values(official("nano"), {"data_loader.transform_config": options})
    (found,) = check.problems(config)
    assert found == "data_loader.transform_config.alpha must be a finite number, got nan"


@pytest.mark.parametrize("size", ["nano", "large"])
def test_limits_are_generous(size):
    assert limits.problems(official(size, "v1_2")) == {}
    large = {
        "init_seed": 2**63 - 1,
        "data_loader.global_batch_size": 65536,
        "data_loader.num_workers": 512,
        "trainer.max_duration": {"value": 10**9, "unit": "steps"},
        f"{MODEL}.depth": 200,
        f"{MODEL}.max_sequence_length": 1000,
        "dataset.cache_size_gb": 1e6,
    }
    assert limits.problems(overrides.apply_values(official(size), large)) == {}
    jax.random.key(2**63 - 1)


@pytest.mark.parametrize("text", ["null", "[]", "[1]", "3", "1e5", '"x"', "true", "{", "", "NaN"])
def test_json_that_is_no_mapping(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"a config is a mapping|is not valid JSON"):
        load_json(tmp_path)


@pytest.mark.parametrize("part", ["common", "model", "dataset", "trainer", "mesh"])
@pytest.mark.parametrize("value", [None, "x", 5, [1], True])
def test_part_of_a_json_that_is_no_mapping(part, value):
    with pytest.raises(ConfigError, match=f"config path '{part}' takes a mapping"):
        ExperimentConfig.from_json(json.dumps({part: value}))


def test_json_of_other_bytes_and_endless_numbers(tmp_path):
    (tmp_path / "config.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_json(tmp_path)
    with pytest.raises(ConfigError, match="is not valid JSON"):
        ExperimentConfig.from_json('{"init_seed": ' + "1" * 5000 + "}")


@pytest.mark.parametrize("depth", [70, 300, 900, 100_000])
@pytest.mark.parametrize("begin", ["[", '{"a":'])
def test_values_too_deep_in_each_other(begin, depth, tmp_path):
    end = "]" if begin == "[" else "}"
    deep = begin * depth + "1" + end * depth
    for call in (
        lambda: ExperimentConfig.from_json(deep),
        lambda: ExperimentConfig.from_json('{"common": ' + deep + "}"),
        lambda: overrides.apply(official("nano"), [f"data_loader.transform_config={deep}"]),
        lambda: overrides.apply(official("nano"), [f"{LOSS}.x={begin * depth}"]),
        lambda: overrides.apply(official("nano"), [f"{LOSS}{'.b' * depth}=1"]),
    ):
        with pytest.raises(ConfigError):
            call()
    path = tmp_path / "modalities.json"
    path.write_text(deep)
    with pytest.raises(ValueError, match=r"cannot be read|must hold an object|record of modality"):
        modalities.register_file(path)


@pytest.mark.parametrize("value", [["a"], {"a": 1}, 5, True, 1.5])
@pytest.mark.parametrize(
    "path",
    [
        "data_loader.masking_config.strategy_config",
        "data_loader.transform_config",
        LOSS,
        "train_module.contrastive_config.loss_config",
    ],
)
def test_type_that_is_no_name(path, value):
    config = official("nano")
    config.data_loader.transform_config = {"type": "mixup", "alpha": 1.0}
    changed = overrides.apply_values(config, {f"{path}.type": value})
    assert any(p.startswith(path) and "must be a name, got" in p for p in check.problems(changed))


GROUPS: list[tuple[Any, str]] = [
    ({"params": 5}, "params must be a list"),
    ({"params": "encoder/*"}, "params must be a list"),
    ({"params": []}, "params must be a list"),
    ({"params": [5]}, "patterns in text"),
    ({"opts": {"lr": 1}}, "params must be a list"),
    ({"params": ["*"], "opts": 5}, "opts must be a mapping"),
    ({"params": ["*"], "opts": ["lr"]}, "opts must be a mapping"),
    ({"params": ["*"], "opts": {"lr": "x"}}, "opts.lr must be a number"),
    ({"params": ["*"], "opts": {"lr": None}}, "opts.lr must be a number"),
    ({"params": ["*"], "opts": {"lr": math.nan}}, "opts.lr must be a number"),
    ({"params": ["*"], "opts": {"eps": -1}}, "opts.eps must be a number"),
    ({"params": ["*"], "opts": {"eps": 0}}, "opts.eps must be at least 1e-30"),
    ({"params": ["*"], "opts": {"betas": 5}}, "opts.betas must be two numbers"),
    ({"params": ["*"], "opts": {"betas": [0.9, "x"]}}, "opts.betas must be two numbers"),
    ({"params": ["*"], "opts": {"betas": [0.9, 1.0]}}, "opts.betas must be two numbers"),
    ({"params": ["*"], "optz": {}}, "has no member 'optz'"),
    (5, "must be a list of"),
    ("encoder", "must be a list of"),
]


@pytest.mark.parametrize(("group", "part"), GROUPS, ids=str)
def test_group_of_another_form(group, part):
    with pytest.raises(ValueError, match="^(?!.*object is not).*") as caught:
        GroupOverride.from_config(group)
    assert part in str(caught.value)
    if isinstance(group, dict):
        config = official("nano")
        config.train_module.optim_config.group_overrides = [group]
        assert any("group_overrides" in p for p in check.problems(config))


RECORD: dict[str, Any] = {
    "bands": ["a", "b"],
    "band_sets": [{"bands": ["a", "b"], "resolution_factor": 16}],
    "tile_resolution_factor": 16,
    "image_tile_size_factor": 1,
    "multitemporal": True,
    "source_dtype": "uint16",
    "normalization": {
        "computed": {"mean": [1, 2], "std": [1, 2]},
        "predefined": {"min": [0, 0], "max": [1, 1]},
    },
}
WRONG: list[tuple[str, Any]] = [
    ("normalization.computed.std", [0, 1]),
    ("normalization.computed.std", [-1, 1]),
    ("normalization.computed.std", [math.nan, 1]),
    ("normalization.computed.std", [1]),
    ("normalization.computed.std", 5),
    ("normalization.computed.mean", [math.inf, 1]),
    ("normalization.computed.mean", ["1", 2]),
    ("normalization.computed", {"mean": [1, 2]}),
    ("normalization.predefined.min", [1, 0]),
    ("normalization.predefined.min", [2, 0]),
    ("normalization", [1]),
    ("tile_resolution_factor", -16),
    ("tile_resolution_factor", math.inf),
    ("tile_resolution_factor", 1.5),
    ("tile_resolution_factor", "16"),
    ("tile_resolution_factor", 10**9),
    ("image_tile_size_factor", 0),
    ("image_tile_size_factor", 10**9),
    ("image_tile_size_factor", math.nan),
    ("band_sets", []),
    ("band_sets", "ab"),
    ("band_sets", [["a"]]),
    ("band_sets", [{"bands": ["a"], "resolution_factor": 0}]),
    ("band_sets", [{"bands": ["a"], "resolution_factor": -16}]),
    ("band_sets", [{"bands": ["c"], "resolution_factor": 16}]),
    ("band_sets", [{"bands": [], "resolution_factor": 16}]),
    ("bands", ["a", "a"]),
    ("bands", "ab"),
    ("bands", None),
    ("multitemporal", "false"),
    ("skip_normalization", 1),
    ("source_dtype", "O"),
    ("source_dtype", "U7"),
    ("source_dtype", "anything"),
    ("source_dtype", ["uint8"]),
]


def changed(path: str, value: Any) -> dict[str, Any]:
    record = copy.deepcopy(RECORD)
    node, *rest = record, *path.split(".")
    for key in rest[:-1]:
        node = node[key]
    node[rest[-1]] = value
    return record


@pytest.mark.parametrize(("path", "value"), WRONG, ids=str)
def test_record_of_a_modality_that_no_run_could_use(path, value):
    records = {"odd_sensor": changed(path, value)}
    with pytest.raises(ConfigError) as caught:
        overrides.apply_values(official("nano"), {"common.extra_modalities": records})
    text = caught.value.problems[0]
    leaf = path.split(".")[1] if path.count(".") else path
    assert "common.extra_modalities" in text and "record of modality 'odd_sensor': " in text
    assert leaf in text or "band" in text
    assert "odd_sensor" not in modalities.all_names()


@pytest.mark.parametrize("key", [k for k in RECORD if k not in ("source_dtype", "normalization")])
def test_record_without_a_member_and_of_an_odd_name(key):
    record = {k: v for k, v in RECORD.items() if k != key}
    with pytest.raises(ValueError, match=f"it has no {key}"):
        modalities.register("odd_sensor", record)
    for name in ("", "../x", "a/b", "a\n", "1a", "a" * 200):
        with pytest.raises(ValueError, match="its name must begin with a letter"):
            modalities.register(name, RECORD)
