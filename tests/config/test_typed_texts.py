"""A text of the command line is typed by the annotation of the setting that it is given to."""

import dataclasses
from typing import Any, Literal

import pytest

from olmoearth_jax import check, overrides
from olmoearth_jax.configlib import objectives, schema
from olmoearth_jax.configlib.official import official
from olmoearth_jax.configlib.schema import ConfigError
from olmoearth_jax.configlib.values import parse
from olmoearth_jax.modalities import ModalityName


@dataclasses.dataclass
class Settings:
    name: str = ""
    path: str | None = None
    count: int = 0
    share: float = 0.0
    on: bool = False
    mode: Literal["none", "on"] = "on"
    anything: Any = None
    names: list[ModalityName] = dataclasses.field(default_factory=list)
    by_name: dict[ModalityName, int] = dataclasses.field(default_factory=dict)
    free: dict[str, Any] = dataclasses.field(default_factory=dict)


@pytest.mark.parametrize(
    ("path", "text", "value"),
    [
        ("name", "5", "5"),
        ("name", "true", "true"),
        ("name", '"null"', "null"),
        ("path", "null", None),
        ("path", '"null"', "null"),
        ("path", "1e3", "1e3"),
        ("count", "1_000", 1000),
        ("count", "2.0", 2),
        ("share", "2e-4", 2e-4),
        ("on", "yes", True),
        ("on", "0", False),
        ("mode", "none", "none"),
        ("mode", "ON", "on"),
        ("anything", "none", None),
        ("anything", "'5'", "5"),
        ("anything", "[1, '1', x, {a: off}]", [1, "1", "x", {"a": False}]),
        ("names", "[SENTINEL1, landsat]", ["sentinel1", "landsat"]),
        ("by_name", "{SENTINEL1: 2}", {"sentinel1": 2}),
        ("by_name.LANDSAT", "3", {"landsat": 3}),
        ("free.a.b", "on", {"a": {"b": True}}),
        ("free", "{a: '1', b: 1}", {"a": "1", "b": 1}),
    ],
)
def test_the_annotation_decides(path, text, value):
    settings = Settings()
    schema.set_path(settings, path, parse(text), written=True)
    found = getattr(settings, path.partition(".")[0])
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("path", "text"),
    [("name", "null"), ("count", "'5'"), ("count", "1.5"), ("on", '"true"'), ("mode", "off"),
     ("names", "sentinel1"), ("names", "[nonsense]"), ("by_name.nonsense", "1")],
)  # fmt: skip
def test_what_does_not_fit_is_refused_and_changes_nothing(path, text):
    settings = Settings()
    with pytest.raises(ConfigError):
        schema.set_path(settings, path, parse(text), written=True)
    assert settings == Settings()


def test_plain_values_are_taken_as_they_are():
    settings = Settings()
    schema.set_path(settings, "path", "null")
    schema.set_path(settings, "anything", "5")
    assert (settings.path, settings.anything) == ("null", "5")


def test_parameters_of_maskings_and_losses_name_modalities_by_their_class():
    masking = "data_loader.masking_config.strategy_config"
    cfg = overrides.apply(
        official("nano"),
        [f"{masking}.only_decode_modalities=[WORLDCOVER]", f"{masking}.type=random_with_decode"],
    )
    values = objectives.options(cfg)[masking]
    assert set(objectives.naming(masking, values)) == {"only_decode_modalities"}
    assert values["only_decode_modalities"] == ["worldcover"]
    loss = "train_module.loss_config.loss_config"
    names = cfg.common.training_modalities
    weights = overrides.format_value({name.upper(): 2.0 for name in names})
    cfg = overrides.apply(cfg, [f"{loss}.modality_weights={weights}"])
    assert objectives.options(cfg)[loss]["modality_weights"] == dict.fromkeys(names, 2.0)
    assert check.problems(cfg) == []


def test_a_parameter_that_lists_no_modalities_is_told_with_its_path():
    path = "data_loader.masking_config.strategy_config.only_decode_modalities"
    for text in ("5", "[nonsense]", "worldcover"):
        with pytest.raises(ConfigError, match=f"config path '{path}'"):
            overrides.apply(official("nano"), [f"{path}={text}"])
