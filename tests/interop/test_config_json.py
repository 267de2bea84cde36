"""The published config file: reading with its compatibility rules, and writing."""

import json
from pathlib import Path

import pytest

from olmoearth_jax.interop import config_json
from olmoearth_jax.model.config import official_model, to_dict
from tests.interop.test_torch_keys import CONFIGS

RECORDED = Path(__file__).resolve().parents[1] / "goldens" / "model" / "official_configs.json"


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config_json.to_json(CONFIGS[name])))
    assert to_dict(config_json.read(tmp_path / "config.json")) == to_dict(CONFIGS[name])


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
