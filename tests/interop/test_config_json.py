"""The published config file: reading with its compatibility rules, and writing."""

import json
from pathlib import Path

import pytest

from olmoearth_jax.interop import checkpoints, config_json
from olmoearth_jax.model.config import official_model
from tests.interop.test_torch_keys import CONFIGS
from tests.interop.test_weights import loaded, tiny

RECORDED = Path(__file__).resolve().parents[1] / "goldens" / "model" / "official_configs.json"


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config_json.to_json(CONFIGS[name])))
    assert config_json.read(tmp_path / "config.json") == CONFIGS[name]


def _document():
    return {"model": json.loads(RECORDED.read_text())["v1-nano"], "optimizer": {"ignored": 1}}


def test_legacy_names_and_rules():
    doc = _document()
    encoder = doc["model"]["encoder_config"]
    for part in (doc["model"], encoder, doc["model"]["decoder_config"]):
        part["_CLASS_"] = "helios.nn.flexihelios." + part["_CLASS_"].rsplit(".", 1)[-1]
    assert encoder.pop("use_linear_patch_embed") is False
    encoder["a_member_of_tomorrow"] = 3
    assert config_json.from_json(doc) == official_model("nano")
    encoder["spatial_pos_encoding"] = "rope"
    assert config_json.from_json(doc).encoder_config.position_encoding == "rope"
    encoder["tokenization_config"] = {"overrides": {"landsat": {"band_groups": [["B8", "B1"]]}}}
    config = config_json.from_json(doc)
    assert config.encoder_config.tokenization.num_band_sets("landsat") == 1


def test_missing_members_take_defaults():
    doc = {
        "encoder_config": {"supported_modality_names": ["sentinel1"]},
        "decoder_config": {"supported_modality_names": ["sentinel1"]},
    }
    config = config_json.from_json(doc)
    assert config.kind == "latent_mim"
    assert config.encoder_config.embedding_size == 16
    assert not config.encoder_config.use_linear_patch_embed
    assert not config.projection_only_target


@pytest.mark.parametrize(
    "doc, message",
    [
        ({"model": {}}, "no encoder_config"),
        ({"encoder_config": 3}, "encoder_config must be an object"),
        ({"encoder_config": {}}, "no supported_modality_names"),
        ({"_CLASS_": "x.LatentMimConfig", "encoder_config": {}}, "did you mean 'LatentMIMConfig'"),
    ],
)
def test_unusable_documents_are_refused(doc, message):
    with pytest.raises(ValueError, match=message):
        config_json.from_json(doc)


def test_file_errors_name_the_file(tmp_path):
    with pytest.raises(ValueError, match="no config file"):
        config_json.read(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is not valid JSON"):
        config_json.read(tmp_path / "config.json")


def test_band_dropout_names_only_what_the_model_supports():
    config = official_model("nano", "v1_2", ["sentinel2_l2a", "worldcover"])
    assert config.encoder_config.band_dropout_modalities == ["sentinel2_l2a"]


SIZES = [
    ("num_heads", 0), ("num_heads", 3), ("mlp_ratio", -1), ("num_register_tokens", -2),
    ("embedding_size", 0), ("depth", 10**6), ("depth", "2"), ("embedding_size", 1e999),
    ("supported_modality_names", "sentinel2_l2a"), ("supported_modality_names", [["x"]]),
    ("supported_modality_names", ["sentinel9"]), ("tokenization_config", [1]),
    ("tokenization_config", {"overrides": {"sentinel2_l2a": {}}}),
    ("tokenization_config", {"overrides": {"sentinel2_l2a": {"band_groups": [["X"]]}}}),
    ("tokenization_config", {"overrides": {"sentinel2_l2a": {"band_groups": 5}}}),
    ("attention_pooler_config", 5), ("_CLASS_", ["a"]), ("_CLASS_", {"a": 1}),
]  # fmt: skip


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    checkpoints.to_reference(loaded(tiny()), folder)
    return folder


@pytest.mark.parametrize(("member", "value"), SIZES)
@pytest.mark.parametrize("part", ["encoder_config", "decoder_config"])
def test_configs_of_no_model_end_in_a_sentence(exported, part, member, value):
    path = exported / "config.json"
    good = path.read_text()
    doc = json.loads(good)
    doc["model"][part][member] = value
    path.write_text(json.dumps(doc))
    try:
        if (part, member) not in (
            ("decoder_config", "attention_pooler_config"),
            ("decoder_config", "embedding_size"),
            ("decoder_config", "num_register_tokens"),
        ):  # those are no members of it, and ignored as readers of the reference do
            with pytest.raises(ValueError, match=r"config\.json|do not fit the config"):
                checkpoints.from_reference(exported)
        else:
            checkpoints.from_reference(exported)
    finally:
        path.write_text(good)


@pytest.mark.parametrize("text", ["null", "5", '"x"', "[]", "{}", "[" * 100_000, '{"model": 3}',
                                  '{"a":' * 5000 + "1" + "}" * 5000, "\ud800", ""])  # fmt: skip
def test_documents_that_are_none(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match=r"config\.json"):
        config_json.read(path)
