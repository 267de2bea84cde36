"""Reading and writing reference folders, and what is refused."""

import json
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from huggingface_hub import constants

from olmoearth_jax.interop import checkpoints, torch_file, torch_keys, weights
from olmoearth_jax.model import latent_mim
from olmoearth_jax.model.config import (
    PUBLISHED_VERSIONS,
    EncoderConfig,
    ModelConfig,
    PredictorConfig,
    official_model,
)

NAMES = ["sentinel2_l2a", "worldcover"]


def tiny(**encoder) -> ModelConfig:
    common = {"supported_modality_names": NAMES, "num_heads": 2, "depth": 1}
    return ModelConfig(
        encoder_config=EncoderConfig(**common, embedding_size=16, max_patch_size=4, **encoder),
        decoder_config=PredictorConfig(**common),
    )


def loaded(config: ModelConfig) -> checkpoints.Weights:
    params = latent_mim.initial_params(config, 3)
    state = torch_keys.to_state_dict(params, config)
    for key, value in state.items():
        if key.startswith("target_encoder.") and "month" not in key:
            state[key] = value + np.float32(0.5)
    return checkpoints.Weights(config, *torch_keys.from_state_dict(state, config), ("worldcover",))


@pytest.fixture
def folder(tmp_path) -> Path:
    """A reference folder."""
    out = tmp_path / "reference"
    checkpoints.to_reference(loaded(tiny()), out)
    return out


def test_round_trip_is_exact(folder, tmp_path):
    first = checkpoints.from_reference(folder)
    assert first.extras and first.decode_only == ("worldcover",)
    step = checkpoints.write(first, tmp_path / "ours")
    back = checkpoints.read(tmp_path / "ours")
    assert back.digest == first.digest and back.config == first.config
    checkpoints.to_reference(back, tmp_path / "again")
    before, after = weights.read_folder(folder), weights.read_folder(tmp_path / "again")
    assert before.state.keys() == after.state.keys()
    for key, value in before.state.items():
        np.testing.assert_array_equal(value, after.state[key])
    assert after.decode_only == ("worldcover",)
    for place in (tmp_path / "again", step.parent.parent):
        assert weights.LICENSE_URL in (place / weights.NOTICE_FILE).read_text()
    with pytest.raises(ValueError, match="already holds a checkpoint"):
        checkpoints.write(first, tmp_path / "ours")


def test_safetensors_are_read_too(folder):
    before = weights.read_folder(folder).state
    safetensors.numpy.save_file(before, folder / weights.SAFETENSORS_FILE)
    (folder / weights.TORCH_FILE).unlink()
    after = weights.read_folder(folder).state
    assert before.keys() == after.keys()
    for key, value in before.items():
        np.testing.assert_array_equal(value, after[key])
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("sys").modules, "safetensors", None)
        with pytest.raises(ValueError, match=r"olmoearth-jax\[convert\]"):
            weights.read_folder(folder)


def test_config_faults(folder):
    path = folder / weights.CONFIG_FILE
    good = json.loads(path.read_text())
    other = json.loads(path.read_text())
    other["model"]["encoder_config"]["_CLASS_"] = "a.b.EncodrConfig"
    path.write_text(json.dumps(other))
    with pytest.raises(ValueError, match="did you mean 'EncoderConfig'"):
        checkpoints.from_reference(folder)
    good["model"]["encoder_config"]["depth"] = 2
    path.write_text(json.dumps(good))
    with pytest.raises(ValueError, match=r"missing from the weights: encoder\.blocks\.1"):
        checkpoints.from_reference(folder)
    path.write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        checkpoints.from_reference(folder)
    path.unlink()
    with pytest.raises(ValueError, match="no config file"):
        checkpoints.from_reference(folder)


def test_weights_of_another_size(folder, tmp_path):
    other = ModelConfig(tiny().kind, tiny().encoder_config, tiny().decoder_config)
    other.encoder_config.max_patch_size = 2
    checkpoints.to_reference(loaded(other), tmp_path / "other")
    shutil.copy(tmp_path / "other" / weights.TORCH_FILE, folder)
    with pytest.raises(ValueError, match="of another shape: encoder"):
        checkpoints.from_reference(folder)


def test_damaged_safetensors(folder):
    path = folder / weights.SAFETENSORS_FILE
    safetensors.numpy.save_file(weights.read_folder(folder).state, path)
    (folder / weights.TORCH_FILE).unlink()
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged or cut off"):
        weights.read_folder(folder)
    path.unlink()
    with pytest.raises(ValueError, match="neither"):
        weights.read_folder(folder)


def test_non_finite_weights_are_refused(tmp_path):
    bad = loaded(tiny())
    bad.params["encoder"]["norm"]["scale"][0] = np.nan
    checkpoints.to_reference(bad, tmp_path / "bad")
    with pytest.raises(ValueError, match=r"not finite in 1 tensors: encoder\.norm\.weight"):
        weights.read_folder(tmp_path / "bad")


class _Code:
    def __reduce__(self):
        return (print, ("run",))


@pytest.mark.parametrize("fault", ["truncated", "pickle", "code", "empty", "not a tensor"])
def test_bad_weight_files(folder, fault, capsys):
    path = folder / weights.TORCH_FILE
    match = "was refused|damaged"
    if fault == "truncated":
        path.write_bytes(path.read_bytes()[:2000])
    elif fault == "pickle":
        path.write_bytes(b"not a file of weights")
    else:
        value = {"code": {"a": _Code()}, "empty": {}, "not a tensor": {"a": 1}}[fault]
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(value))
        match = {"code": "was refused", "empty": "not a state dict"}.get(fault, "a are no tensors")
    with pytest.raises(ValueError, match=match):
        weights.read_folder(folder)
    assert "run" not in capsys.readouterr().out


def test_the_prefix_of_the_direct_builder_is_dropped(folder):
    before = weights.read_folder(folder).state
    prefixed = {f"model.{k}": v for k, v in before.items()}
    prefixed["model.supervision_head.weight"] = np.zeros(2, np.float32)
    torch_file.write(prefixed, folder / weights.TORCH_FILE)
    assert before.keys() == weights.read_folder(folder).state.keys()


@pytest.mark.parametrize(
    "name", ["OlmoEarth-v1_2-Base", "olmoearth-v1.2-base", "allenai/OlmoEarth-v1_2-Base"]
)
def test_names_are_completed(name):
    assert weights.repository(name) == "allenai/OlmoEarth-v1_2-Base"


def test_other_names(tmp_path):
    assert weights.repository("me/my-model") == "me/my-model"
    for name in ("OlmoEarth-v1_2-Bse", "./missing", "/nowhere/at/all", "allenai/OlmoEarth-v1-Bas"):
        with pytest.raises(ValueError, match="no published model"):
            weights.repository(name)
    assert weights.find(tmp_path) == tmp_path
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        weights.find(tmp_path / "file")


def test_offline_without_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="not in the local cache"):
        weights.find("OlmoEarth-v1-Nano")


def test_training_starts_from_converted_weights(folder, tmp_path):
    import jax
    from jax.sharding import SingleDeviceSharding

    from olmoearth_jax.checkpoints import checkpoint

    first = checkpoints.from_reference(folder)
    step = checkpoints.write(first, tmp_path / "ours")
    here = SingleDeviceSharding(jax.devices()[0])
    start = {
        "params": jax.tree.map(np.zeros_like, first.params),
        "target": jax.tree.map(np.zeros_like, first.target),
        "opt_state": {"count": np.int32(0)},
        "step": np.int32(0),
    }
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=here), start
    )
    state = checkpoint.restore_as_start(step, abstract, lambda: start)
    assert checkpoints.Weights(first.config, state["params"], None, {}, None).digest == first.digest
    assert state["opt_state"] == start["opt_state"] and int(state["step"]) == 0
    wrong = {**abstract, "params": {"a": abstract["step"]}}
    with pytest.raises(ValueError, match="another params tree"):
        checkpoint.restore_as_start(step, wrong, lambda: start)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "version"), [(s, v) for v, sizes in PUBLISHED_VERSIONS.items() for s in sizes]
)
def test_layouts_of_all_presets_are_exact(size, version):
    config = official_model(size, version)
    entries = torch_keys.model_entries(config)
    entries += torch_keys.target_entries(config, not config.projection_only_target)
    assert len({e.key for e in entries}) == len(entries)
    seen = set()
    for entry in entries:
        kind = (entry.layout, entry.torch_shape)
        if kind not in seen:
            seen.add(kind)
            x = np.arange(np.prod(entry.torch_shape), dtype=np.float32).reshape(entry.torch_shape)
            np.testing.assert_array_equal(entry.to_torch(entry.to_ours(x)), x)


def test_a_folder_that_is_not_there_is_told_before_the_hub(tmp_path, monkeypatch):
    def nothing(repo, revision):
        raise ValueError(f"the hub has no repository {repo!r}")

    monkeypatch.setattr(weights, "_download", nothing)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "local_output").mkdir()
    said = r"no folder local_output/zz\. And as a name of the hub: the hub has no repository"
    with pytest.raises(ValueError, match=said):
        weights.find("local_output/zz")
    with pytest.raises(ValueError, match="^the hub has no repository 'somebody/zz'"):
        weights.find("somebody/zz")
    (tmp_path / "local_output" / "my_run").mkdir()
    with pytest.raises(ValueError, match=r"did you mean local_output/my_run\? And as a name"):
        weights.find("local_output/my_ran")
