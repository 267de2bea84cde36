"""The reading copy of the model computes what the model computes."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from olmoearth_jax import losses, modalities
from olmoearth_jax.configlib.official import LATER_LOSS
from olmoearth_jax.model import latent_mim
from olmoearth_jax.model.config import official_model
from olmoearth_jax.model.uniform_batch import UniformBatch, forward_batch, target_batch
from tests.model.builders import random_params

PAGE = Path(__file__).resolve().parents[2] / "docs" / "model_on_one_page.py"
NAMES = ["sentinel2_l2a", "sentinel1", "worldcover", "openstreetmap_raster"]


def load_page():
    spec = importlib.util.spec_from_file_location("model_on_one_page", PAGE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def batch(names, patch, grid=(2, 3), steps=2, samples=3):
    """(images, two views of token masks, timestamps)."""
    rng = np.random.Generator(np.random.Philox(patch))
    images, views = {}, ({}, {})
    for name in names:
        m = modalities.get(name)
        side = [n * patch * m.image_factor for n in grid]
        t = steps if m.multitemporal else 1
        images[name] = rng.standard_normal((samples, *side, t, m.num_bands)).astype(np.float32)
        for view in views:
            view[name] = rng.integers(0, 4, (samples, *grid, t)).astype(np.int8)
    for view in views:  # maps are never seen
        view["worldcover"] = np.where(view["worldcover"] == 0, 2, view["worldcover"])
    stamps = [rng.integers(low, high, (samples, steps)) for low, high in ((1, 29), (0, 12))]
    stamps.append(rng.integers(2016, 2025, (samples, steps)))
    return images, views, np.stack(stamps, -1).astype(np.int32)


def real_loss(config, params, target, images, views, stamps, patch):
    """The same loss by the package."""
    model = latent_mim.merge(latent_mim.graph(config)[0], params)
    frozen = latent_mim.merge(latent_mim.target_graph(config)[0], target)
    token_loss = losses.build(LATER_LOSS)
    total, pooled = jnp.zeros(()), []
    for view in views:
        masks = {n: x[..., None] for n, x in view.items()}
        batch = UniformBatch(images, masks, stamps, patch)
        out = forward_batch(model, batch)
        goal = target_batch(frozen, batch, dict.fromkeys(images, 0))

        def flat(x):
            return {n: v.reshape(v.shape[0], -1, v.shape[-1]) for n, v in x.items()}

        flags = {n: x.reshape(len(x), -1) for n, x in view.items()}
        total += token_loss(flat(out.decoder), flat(goal), flags)[0] / 2
        pooled.append(out.project_aggregated)
    return total + losses.InfoNCE(0.1, 0.05)(*pooled)[0]


@pytest.mark.parametrize("patch", [2, 8])
def test_loss_and_gradient_are_the_real_ones(patch):
    page = load_page()
    config = official_model("nano", "v1_2", NAMES)
    params = random_params(config)
    target = latent_mim.target_params(random_params(config, seed=1))
    images, views, stamps = batch(NAMES, patch)
    figures = page.Model(
        finer=tuple((n, modalities.get(n).image_factor) for n in NAMES),
        in_time=tuple(n for n in NAMES if modalities.get(n).multitemporal),
    )
    maps = tuple(modalities.OFFICIAL_DECODE_ONLY)

    def own(params):
        return page.loss(figures, params, target, images, views, jnp.asarray(stamps), patch, maps)

    def real(params):
        return real_loss(config, params, target, images, views, stamps, patch)

    value, slope = jax.jit(jax.value_and_grad(own))(params)
    want, want_slope = jax.jit(jax.value_and_grad(real))(params)
    assert np.isfinite(value) and float(want) > 0.1
    np.testing.assert_allclose(value, want, rtol=2e-5)
    for (path, a), (_, b) in zip(
        latent_mim.flatten(slope), latent_mim.flatten(want_slope), strict=True
    ):
        scale = 1e-6 + float(np.abs(b).max())
        np.testing.assert_allclose(a, b, atol=2e-4 * scale, err_msg="/".join(path))


def test_it_fits_its_page():
    assert len(PAGE.read_text().splitlines()) <= 250
