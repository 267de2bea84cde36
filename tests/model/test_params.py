"""Parameter trees: names, shapes, counts, initial values, splitting and merging."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from olmoearth_jax.model import config as model_config
from olmoearth_jax.model import latent_mim
from olmoearth_jax.model.reference_counts import param_table, reference_counts, trainable
from olmoearth_jax.model.versions import PUBLISHED, VERSIONS, version_of
from tests.model.builders import small_config

GOLDEN = Path(__file__).resolve().parents[1] / "golden_text"

PRESETS = [(s, n, False) for n, v in VERSIONS.items() if not v.pooler for s in v.sizes]
PRESETS.append(("base", "v1_2", True))


def table_text(size: str, version: str, faster: bool) -> str:
    """Rows 'path shape' of the trained and the target tree, then the reference's counts."""
    config = model_config.official_model(size, version, faster=faster)
    rows = [("online", *row) for row in param_table(latent_mim.graph(config)[1])]
    rows += [("target", *row) for row in param_table(latent_mim.target_graph(config)[1])]
    lines = [f"{part} {path} {'x'.join(map(str, shape))}" for part, path, shape, _ in rows]
    counts = reference_counts(config)
    lines += [f"count {name} {value}" for name, value in counts.items()]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("size, version, faster", PRESETS)
def test_parameter_tree_is_as_recorded(size, version, faster):
    name = f"params_{version}_{size}{'_faster' if faster else ''}.txt"
    assert table_text(size, version, faster) == (GOLDEN / name).read_text()


def test_split_and_merge_are_inverse_and_seeded():
    config = small_config("rope_3d_mixed", num_register_tokens=2, qk_norm=True)
    model = latent_mim.build(config, seed=3)
    graph, params = latent_mim.split(model)
    assert hash(graph) == hash(latent_mim.graph(config)[0])
    again = latent_mim.split(latent_mim.merge(graph, params))[1]
    jax.tree.map(np.testing.assert_array_equal, again, params)
    jax.tree.map(np.testing.assert_array_equal, latent_mim.initial_params(config, 3), params)
    other = latent_mim.initial_params(config, 4)
    kernel = ("blocks", "0", "mlp", "fc1", "kernel")
    flat, flat_other = (dict(latent_mim.flatten(p["encoder"])) for p in (params, other))
    assert np.abs(flat[kernel] - flat_other[kernel]).max() > 0
    assert all(x.dtype == jnp.float32 for x in flat.values())


def test_initial_values_follow_their_distributions():
    config = model_config.official_model("nano", "v1_2")
    flat = dict(latent_mim.flatten(latent_mim.initial_params(config)))
    embed = ("encoder", "patch_embeddings", "per_modality", "sentinel2_l2a", "0")
    for path, bound in {
        (*embed, "proj", "kernel"): (12 * 64) ** -0.5,
        (*embed, "proj", "bias"): (12 * 64) ** -0.5,
        (*embed, "pixel_proj", "0", "kernel"): 12**-0.5,
        ("encoder", "blocks", "1", "mlp", "fc1", "kernel"): (6 / (128 + 512)) ** 0.5,
        ("decoder", "output_proj", "kernel"): (6 / 256) ** 0.5,
    }.items():
        largest = np.abs(flat[path]).max()
        assert 0.8 * bound < largest <= bound, path
    assert not flat["decoder", "mask_token"].any()
    assert not flat["encoder", "encodings", "channel", "sentinel1"].any()
    assert (flat["encoder", "blocks", "0", "norm1", "scale"] == 1).all()
    assert not flat["encoder", "blocks", "0", "attention", "query", "bias"].any()


def test_galileo_decoders_start_equal_and_mae_may_lack_a_decoder():
    config = small_config(kind="galileo")
    params = latent_mim.initial_params(config)
    jax.tree.map(np.testing.assert_array_equal, params["decoder_a"], params["decoder_b"])
    bare = dataclasses.replace(config, kind="mae", decoder_config=None)
    assert set(latent_mim.graph(bare)[1]) == {"encoder"}
    with pytest.raises(ValueError, match="needs a decoder_config"):
        latent_mim.graph(dataclasses.replace(bare, kind="latent_mim"))
    with pytest.raises(ValueError, match="unknown model kind 'galilei'"):
        latent_mim.graph(dataclasses.replace(config, kind="galilei"))


def test_frozen_parts():
    config = small_config(frozen_patch_embeddings=True, learnable_channel_embeddings=False)
    is_trainable = trainable(config)
    paths = [path for path, _ in latent_mim.flatten(latent_mim.graph(config)[1])]
    frozen = {path[:2] for path in paths if not is_trainable(path)}
    assert frozen == {("encoder", "patch_embeddings"), ("encoder", "encodings")}


def test_a_model_tells_its_version():
    for name, version in VERSIONS.items():
        assert set(version.published) <= set(version.sizes)
        for size in version.sizes:
            assert version_of(model_config.official_model(size, name)) == name
    assert len(set(PUBLISHED)) == 12 and PUBLISHED[0] == "OlmoEarth-v1-Nano"
