"""The setting `engine` of before: refused where it asks for something else, read where saved."""

import json

import pytest

from olmoearth_jax import config_files, overrides
from olmoearth_jax.checkpoints import integrity
from olmoearth_jax.config import ConfigError, ExperimentConfig, load_json
from olmoearth_jax.configlib import gone, schema
from olmoearth_jax.configlib.official import official


def test_it_is_no_setting():
    assert gone.ENGINE not in schema.valid_paths(ExperimentConfig)
    assert gone.ENGINE not in official("nano").to_dict()


@pytest.mark.parametrize("text", ["engine=dense", "--config.engine=Dense", "engine=3", "engine"])
def test_another_engine_is_refused_in_one_sentence(text):
    with pytest.raises(ConfigError) as caught:
        overrides.apply(official("nano"), [text])
    (sentence,) = caught.value.problems
    assert "token stream is the only engine" in sentence and "\n" not in sentence


def test_it_is_told_beside_other_mistakes():
    with pytest.raises(ConfigError) as caught:
        overrides.apply(official("nano"), ["engine=dense", "trainer.nope=1"])
    assert len(caught.value.problems) == 2


def test_the_stream_may_still_be_asked_for():
    base = official("nano")
    assert overrides.apply(base, ["--config.engine=stream", "init_seed=3"]).init_seed == 3
    assert overrides.apply_values(base, {"engine": "stream"}) == base


@pytest.fixture
def said_anew():
    """The note is one of a process."""
    gone._say_once.cache_clear()
    yield
    gone._say_once.cache_clear()


@pytest.mark.parametrize(("engine", "notes"), [("dense", 1), ("stream", 0)])
def test_a_saved_config_is_read_and_the_dense_one_is_noted_once(
    tmp_path, caplog, said_anew, engine, notes
):
    values = official("nano").to_dict() | {"engine": engine}
    (tmp_path / "config.json").write_text(json.dumps(values))
    for _ in range(2):
        assert load_json(tmp_path) == official("nano")
    assert sum("token stream" in r.message for r in caplog.records) == notes
    now = official("nano").to_dict()
    assert integrity.config_differences(values, now) == []
    shown = integrity.config_differences(now, values, ignored=())
    assert shown == ['engine: "stream" -> "dense"'][:notes]


def test_a_saved_value_that_never_was_is_an_unknown_member():
    with pytest.raises(ConfigError, match="unknown config path 'engine'"):
        ExperimentConfig.from_dict({"engine": "other"})


def test_a_config_file_cannot_set_it(tmp_path):
    path = tmp_path / "mine.py"
    lines = ["from olmoearth_jax.configlib.official import official", "", "def get_config(arg):",
             "    cfg = official('nano')", "    cfg.engine = arg", "    return cfg"]  # fmt: skip
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(ConfigError, match="only engine"):
        config_files.load_file(f"{path}:dense")
    assert config_files.load_file(f"{path}:stream") == official("nano")
