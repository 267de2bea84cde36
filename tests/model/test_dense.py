"""Properties of whole models on uniform batches."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from olmoearth_jax.masks import VISIBLE
from olmoearth_jax.model import latent_mim
from olmoearth_jax.model.blocks import Running
from olmoearth_jax.model.uniform_batch import (
    UniformBatch,
    encode_batch,
    forward_batch,
    target_batch,
    token_masks_from_pixels,
)
from tests.model.builders import NAMES, random_batch, random_params, small_config

MODES = ("absolute", "rope_3d_mixed")


@functools.partial(jax.jit, static_argnums=0)
def _forward(graph, params, drop, data, masks, stamps):
    model = latent_mim.merge(graph, params)
    factor = None if drop is None else lambda layer, branch: drop
    batch = UniformBatch(data, masks, stamps, 2)
    out = forward_batch(model, batch, encoder=Running(factor))
    return out.encoder, out.decoder, out.project_aggregated


def _run(config, params, batch, drop=None):
    return _forward(latent_mim.graph(config)[0], params, drop, *batch)


def _close(a, b, atol=2e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol), a, b)


@pytest.mark.parametrize("mode", MODES)
def test_samples_are_independent_and_hidden_tokens_have_no_influence(mode):
    config = small_config(mode)
    params = random_params(config)
    data, masks, stamps = random_batch(config)
    out = _run(config, params, (data, masks, stamps))

    order = np.array([2, 0, 1])
    shuffled = jax.tree.map(lambda x: x[order], (data, masks, stamps))
    _close(_run(config, params, shuffled), jax.tree.map(lambda x: x[order], out))

    # A token's own pixels are the whole of what it reads at the base patch size only, so change
    # modalities that are hidden altogether.
    hidden = {**masks, "worldcover": np.full_like(masks["worldcover"], 3)}
    base = _run(config, params, (data, hidden, stamps))
    noisy = {**data, "worldcover": data["worldcover"] + 5.0}
    _close(_run(config, params, (noisy, hidden, stamps)), base, atol=0.0)

    encoded, decoded, _ = out
    for name in NAMES:
        assert not np.asarray(encoded[name])[masks[name] != VISIBLE].any()
        # Positions that take no part all give the same constant.
        idle = np.asarray(decoded[name])[np.isin(masks[name], (1, 3))]
        if len(idle):
            np.testing.assert_array_equal(idle, np.broadcast_to(idle[0], idle.shape))


def test_queries_do_not_see_each_other():
    config = small_config("rope")
    params = random_params(config)
    data, masks, stamps = random_batch(config)
    decoded = _run(config, params, (data, masks, stamps))[1]["sentinel2_l2a"]
    fewer = {k: np.where((m == 2) & (k != "sentinel2_l2a"), 3, m) for k, m in masks.items()}
    again = _run(config, params, (data, fewer, stamps))[1]["sentinel2_l2a"]
    np.testing.assert_allclose(again, decoded, atol=2e-5)


def test_absent_modality_equals_missing_one():
    config = small_config()
    params = random_params(config)
    data, masks, stamps = random_batch(config)
    masks["worldcover"][:] = 3
    full = _run(config, params, (data, masks, stamps))
    without = [{k: v for k, v in x.items() if k != "worldcover"} for x in (data, masks)]
    part = _run(config, params, (*without, stamps))
    _close(part[0], {k: v for k, v in full[0].items() if k != "worldcover"})
    _close(part[2], full[2])


def test_registers_take_part_but_are_not_returned():
    config = small_config("rope_3d_mixed", num_register_tokens=3)
    params = random_params(config)
    batch = random_batch(config)
    out = _run(config, params, batch)
    changed = jax.tree.map(lambda x: x, params)
    changed["encoder"] = {
        **params["encoder"],
        "register_tokens": params["encoder"]["register_tokens"][:, ::-1],
    }
    other = _run(config, changed, batch)
    assert out[0]["sentinel1"].shape == batch[1]["sentinel1"].shape + (32,)
    assert float(jnp.abs(out[2] - other[2]).max()) > 1e-3


@pytest.mark.slow
def test_rematerialisation_changes_nothing():
    config = small_config("rope_3d_mixed")
    params = random_params(config)
    batch = random_batch(config)
    graph = latent_mim.graph(config)[0]

    def grads(remat):
        @jax.jit
        @jax.grad
        def call(params):
            model, running = latent_mim.merge(graph, params), Running(remat=remat)
            out = forward_batch(model, UniformBatch(*batch, 2), 0, running, running)
            return sum(jnp.sum(x**2) for x in out.decoder.values())

        return call(params)

    def close(a, b):
        np.testing.assert_allclose(a, b, atol=1e-4 * (1e-6 + float(np.abs(b).max())))

    plain = grads("none")
    for policy in ("full", "dots"):
        jax.tree.map(close, grads(policy), plain)


def test_drop_path_scales_branches():
    config = small_config()
    params = random_params(config)
    batch = random_batch(config)
    kept = _run(config, params, batch, np.ones((3, 1, 1), np.float32))
    _close(kept, _run(config, params, batch))
    some = np.array([1.0, 0.0, 1.0], np.float32)[:, None, None]
    part = _run(config, params, batch, some)
    _close(part[2][::2], kept[2][::2])
    # With every branch off, a visible token depends on itself alone.
    data = {**batch[0], "sentinel1": batch[0]["sentinel1"] + 1.0}
    other = _run(config, params, (data, *batch[1:]), some)
    _close(other[0]["sentinel2_l2a"][1], part[0]["sentinel2_l2a"][1], atol=0.0)
    assert float(jnp.abs(other[0]["sentinel2_l2a"][0] - part[0]["sentinel2_l2a"][0]).max()) > 1e-3


def test_targets():
    config = small_config(output_embedding_size=16)
    params = random_params(config)
    data, masks, stamps = random_batch(config)
    graph, shapes = latent_mim.target_graph(config)
    target = latent_mim.target_params(params)
    assert jax.tree.structure(target) == jax.tree.structure(shapes)
    module = latent_mim.merge(graph, target)
    zero = dict.fromkeys(NAMES, 0)
    batch = UniformBatch(data, masks, stamps, 2)
    projected = target_batch(module, batch, zero)
    full_graph, _ = latent_mim.target_graph(config, full=True)
    full = latent_mim.merge(full_graph, latent_mim.target_params(params, full=True))
    _close(projected, target_batch(full, batch, zero), atol=1e-6)
    assert projected["sentinel1"].shape[-1] == 16
    with pytest.raises(ValueError, match="projection-only target"):
        target_batch(module, batch, {**zero, "sentinel1": 1})
    with pytest.raises(ValueError, match=r"outside 0\.\.2"):
        target_batch(full, batch, {**zero, "sentinel1": 3})
    with pytest.raises(ValueError, match="missing: \\['latlon'\\]"):
        partial = {k: 1 for k in NAMES if k != "latlon"}
        target_batch(full, batch, partial)
    with pytest.raises(ValueError, match="fast_pass"):
        encode_batch(full, batch, exits=zero, fast_pass=True)


def test_bfloat16_compute_stays_close_and_returns_float32():
    config = small_config("rope_3d_mixed")
    params = random_params(config)
    batch = random_batch(config)
    exact = _run(config, params, batch)
    graph = latent_mim.graph(config, jnp.bfloat16)[0]
    sample = UniformBatch(*batch, 2)
    out = jax.jit(lambda p: forward_batch(latent_mim.merge(graph, p), sample).encoder)(params)
    for name, x in out.items():
        assert x.dtype == jnp.float32
        np.testing.assert_allclose(x, exact[0][name], atol=0.15)


def test_token_masks_from_pixels_take_the_corner():
    config = small_config()
    slots = latent_mim.slot_table(config.encoder_config)
    mask = np.arange(4 * 6).reshape(1, 4, 6, 1, 1) % 4
    out = token_masks_from_pixels(slots, {"worldcover": mask, "latlon": mask[:, 0, 0, 0]}, 2)
    np.testing.assert_array_equal(out["worldcover"], mask[:, ::2, ::2])
    assert out["latlon"].shape == (1, 1)


def test_sample_without_known_modality_is_refused():
    config = small_config()
    model = latent_mim.build(config)
    with pytest.raises(ValueError, match="none of the model's modalities"):
        encode_batch(
            model.encoder, UniformBatch({"landsat": np.zeros(1)}, {}, np.zeros((1, 1, 3)), 2)
        )


@pytest.mark.parametrize(
    "change, message",
    [
        ({"decoder_embedding_size": 32, "encoder_embedding_size": 8}, "width 8"),
        ({"supported_modality_names": NAMES[::-1]}, "same modalities"),
        ({"position_encoding": "rope2"}, "unknown position_encoding 'rope2'"),
        ({"max_sequence_length": 6}, "max_sequence_length"),
    ],
)
def test_disagreeing_parts_are_refused(change, message):
    config = small_config()
    decoder = dataclasses.replace(config.decoder_config, **change)
    with pytest.raises(ValueError, match=message):
        latent_mim.graph(dataclasses.replace(config, decoder_config=decoder))
