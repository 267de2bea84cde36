"""Names of v1.3's tensors and config members in three spellings."""

import json
from typing import Any

import numpy as np
import pytest

from olmoearth_jax.interop import checkpoints, config_json, spellings, torch_file, weights
from olmoearth_jax.interop.spellings import from_released, released_config, to_released
from olmoearth_jax.model.config import (
    AttentionPoolerConfig,
    LocationTokenDistillationHeadConfig,
    SupervisedMapConfig,
    SupervisionHeadConfig,
)
from tests.interop.test_weights import loaded, tiny

POOLER = {
    "pooler_dim": 8, "pooler_depth": 2, "per_depth_read_proj": True, "attn_dim": 8, "num_heads": 2,
    "student_dims": [6, 3], "student_output_norm": True,
}  # fmt: skip
OLD = ("register", "perceiver")


def small():
    config = tiny(position_encoding="rope", attention_pooler_config=AttentionPoolerConfig(**POOLER))
    assert config.decoder_config is not None
    decoder = config.decoder_config
    decoder.use_attention_pooler, decoder.pooler_dim = True, 8
    decoder.position_encoding = "rope"
    return config


def respelled(doc, spelling):
    """A released config document as an older one would have been written."""
    model = json.loads(json.dumps(doc))["model"]
    encoder, decoder = model["encoder_config"], model["decoder_config"]
    pooler = encoder.pop("attention_pooler_config")
    pooler.pop("_CLASS_")
    if spelling == "perceiver":
        names = {new: old for old, new in spellings.POOLER_MEMBERS.items()}
        encoder["perceiver_config"] = {names[k]: v for k, v in pooler.items()}
        decoder["use_perceiver"] = decoder.pop("use_attention_pooler")
    else:
        encoder |= {
            "use_register_bottleneck": True,
            "register_dim": None,  # half the encoder's width
            "register_latent_depth": pooler["pooler_depth"],
            "register_num_heads": pooler["num_heads"],
            "register_per_depth_read_proj": pooler["per_depth_read_proj"],
            "register_attn_dim": pooler["attn_dim"],
            "register_projection_dims": pooler["student_dims"],
            "register_projection_output_norm": pooler["student_output_norm"],
            "register_back_projection_hidden": 12,
            "register_grid_size": 0,
            "register_interleave": True,
        }
        decoder["use_register_bottleneck"] = decoder.pop("use_attention_pooler")
    decoder["register_dim"] = decoder.pop("pooler_dim")
    return {"model": model}


@pytest.mark.parametrize("spelling", OLD)
def test_old_names_load_as_the_same_model_and_are_written_anew(spelling, tmp_path):
    first = loaded(small())
    folder = tmp_path / "released"
    checkpoints.to_reference(first, folder)
    state = weights.read_folder(folder).state
    old = {from_released(k, spelling): v for k, v in state.items()}
    assert len(old) == len(state) and old.keys() != state.keys()
    doc = json.loads((folder / "config.json").read_text())
    other = tmp_path / "old"
    other.mkdir()
    torch_file.write(old, other / weights.TORCH_FILE)
    record = {"data_loader": doc["data_loader"]}
    (other / "config.json").write_text(json.dumps(respelled(doc, spelling) | record))
    second = checkpoints.from_reference(other)
    assert second.config == first.config and second.digest == first.digest
    checkpoints.to_reference(second, tmp_path / "again")
    again = weights.read_folder(tmp_path / "again").state
    assert again.keys() == state.keys()
    for key, value in state.items():
        np.testing.assert_array_equal(value, again[key])


@pytest.mark.parametrize("spelling", OLD)
def test_renaming_there_and_back_changes_nothing(spelling):
    keys = [
        "encoder.attention_pooler.learned_query",
        "encoder.attention_pooler.self_attn_blocks.1.attn.q.weight",
        "attention_pooler.student.0.bias",
        "location_token_distillation_head.back_projections.64.3.weight",
        "decoder.location_tokens_to_decoder_embed.bias",
        "encoder.blocks.0.norm1.weight",
        "encoder.register_tokens",
    ]
    for key in keys:
        old = from_released(key, spelling)
        assert to_released(old, spelling) == key
        assert to_released(key, spelling) == key
    assert spellings.spelling_of(["encoder.norm.weight", from_released(keys[0], spelling)]) == (
        spelling
    )


def test_mixtures_are_told_apart_by_the_first_key_and_not_renamed():
    state = {"encoder.perceiver.register": 1, "encoder.register_projection.bias": 2}
    assert list(spellings.released_state(state)) == [
        "encoder.attention_pooler.learned_query",
        "encoder.register_projection.bias",
    ]
    twice = {"perceiver.norm.bias": 1, "attention_pooler.norm.bias": 2}
    with pytest.raises(ValueError, match="twice, under an old and a new name"):
        spellings.released_state(twice)


def test_weights_without_a_pooler_keep_their_names():
    state = {"encoder.norm.bias": 1, "encoder.register_tokens": 2}
    assert spellings.released_state(state) == state


GONE = [
    ("encoder_config", "register_grid_size", 4),
    ("encoder_config", "register_projection_type", "mlp"),
    ("encoder_config", "register_interleave", False),
    ("encoder_config", "register_learned_read_weighting", None),
    ("model", "supervision_source", "tokens"),
]


@pytest.mark.parametrize("where, name, value", GONE)
def test_features_that_are_gone_are_refused(where, name, value):
    doc = respelled(config_json.to_json(small()), "register")["model"]
    assert released_config(doc)
    (doc if where == "model" else doc[where])[name] = value
    with pytest.raises(ValueError, match=name):
        released_config(doc)


def test_heads_lose_members_without_effect():
    one = {"task_type": "regression", "time_conditioned": False, "time_harmonics": 4}
    doc: dict[str, Any] = {"supervision_head_config": {"modality_configs": {"srtm": one}}}
    doc["supervision_head_config"]["register_supervision"] = True
    assert released_config(doc)["supervision_head_config"] == {
        "modality_configs": {"srtm": {"task_type": "regression"}}
    }
    for value in (True, None):
        one["time_conditioned"] = value
        with pytest.raises(ValueError, match=r"modality_configs\.srtm\.time_conditioned"):
            released_config(doc)


def test_without_a_bottleneck_its_members_are_dropped():
    doc = {
        "encoder_config": {
            "use_register_bottleneck": False, "register_dim": 5, "register_grid_size": 3, "depth": 2
        },
        "decoder_config": {"use_register_bottleneck": False, "register_dim": 5},
    }  # fmt: skip
    got = released_config(doc)
    assert got["encoder_config"] == {"depth": 2}
    assert got["decoder_config"] == {"use_attention_pooler": False}


def test_the_distillation_head_is_found_in_every_spelling():
    doc = config_json.to_json(small())
    flat = released_config(respelled(doc, "register")["model"])
    assert flat["location_token_distillation_head_config"] == {"back_projection_hidden": 12}
    older = {
        "encoder_config": {"perceiver_config": {"projection_dims": [4], "register_dim": 8}},
        "register_distillation_head_config": {"back_projection_hidden": None},
    }
    got = released_config(older)
    assert got["location_token_distillation_head_config"] == {"back_projection_hidden": None}
    assert got["encoder_config"]["attention_pooler_config"] == {
        "student_dims": [4], "pooler_dim": 8
    }  # fmt: skip
    both = {"encoder_config": {"perceiver_config": {"x": 1}, "attention_pooler_config": {"y": 2}}}
    with pytest.raises(ValueError, match="pooler twice"):
        released_config(both)


def test_released_documents_stay_as_they_are():
    for config in (small(), tiny()):
        model = config_json.to_json(config)["model"]
        assert released_config(model) == model


def with_heads():
    config = small()
    maps = {
        "worldcover": SupervisedMapConfig("classification", 2, 0.1, [0.1, 0.2]),
    }
    config.supervision_head_config = SupervisionHeadConfig(maps, spatial_unfold=2)
    config.location_token_distillation_head_config = LocationTokenDistillationHeadConfig(5)
    return config


@pytest.mark.parametrize("spelling", [*OLD, "attention_pooler"])
def test_heads_travel_with_the_weights(spelling, tmp_path):
    first = loaded(with_heads())
    checkpoints.to_reference(first, tmp_path / "out")
    state = weights.read_folder(tmp_path / "out").state
    assert "supervision_head.heads.worldcover.weight" in state
    assert "supervision_head._class_values_worldcover" in state
    assert "location_token_distillation_head.back_projections.3.3.bias" in state
    old = {from_released(k, spelling): v for k, v in state.items()}
    torch_file.write(old, tmp_path / "out" / weights.TORCH_FILE)
    second = checkpoints.from_reference(tmp_path / "out")
    assert second.config == first.config and second.digest == first.digest


def test_heads_that_do_not_fit_their_config_are_left_out(tmp_path):
    first = loaded(with_heads())
    checkpoints.to_reference(first, tmp_path / "out")
    state = dict(weights.read_folder(tmp_path / "out").state)
    name = "location_token_distillation_head."
    state = {k.replace("back_projections", "projections"): v for k, v in state.items()}
    torch_file.write(state, tmp_path / "out" / weights.TORCH_FILE)
    second = checkpoints.from_reference(tmp_path / "out")
    assert second.config.location_token_distillation_head_config is None
    assert second.config.supervision_head_config == first.config.supervision_head_config
    assert not any(k.startswith(name) for k in weights.read_folder(tmp_path / "out").state)


def test_a_head_whose_config_describes_none_is_left_out(tmp_path):
    first = loaded(with_heads())
    checkpoints.to_reference(first, tmp_path / "out")
    path = tmp_path / "out" / weights.CONFIG_FILE
    doc = json.loads(path.read_text())
    doc["model"]["supervision_head_config"] = {"weight": 0.1}
    path.write_text(json.dumps(doc))
    second = checkpoints.from_reference(tmp_path / "out")
    kept = "location_token_distillation_head_config"
    assert second.config.supervision_head_config is None
    assert getattr(second.config, kept) == getattr(first.config, kept) is not None
    state = weights.read_folder(tmp_path / "out").state
    assert not any(k.startswith("supervision_head.") for k in state)


def test_head_configs_that_can_not_be_are_refused():
    doc = config_json.to_json(with_heads())
    one = doc["model"]["supervision_head_config"]["modality_configs"]["worldcover"]
    one["a_member_of_tomorrow"] = 1
    assert config_json.from_json(doc) == with_heads()
    one["norm_pix_loss"] = True
    with pytest.raises(ValueError, match=r"worldcover\.norm_pix_loss"):
        config_json.from_json(doc)
    doc["model"]["supervision_head_config"] = [1]
    with pytest.raises(ValueError, match="supervision_head_config must be an object"):
        config_json.from_json(doc)
