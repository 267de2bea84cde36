"""Samples, batches, pooling and embeddings."""

import numpy as np
import pytest

from olmoearth_jax import modalities
from olmoearth_jax.evals import embeddings
from olmoearth_jax.evals.embeddings import Extraction
from olmoearth_jax.evals.models import EncoderModel, RawBands
from olmoearth_jax.evals.samples import MASK, TIMESTAMPS, collate, make_sample
from olmoearth_jax.model.pooling import Pooling

from .builders import tiny_model

SPATIAL = Pooling(place="spatial")


def _sample(steps=2, side=8, seed=0, bands=12, name="sentinel2_l2a"):
    rng = np.random.default_rng(seed)
    stamps = np.stack([np.ones(steps, int), np.arange(steps), np.full(steps, 2020)], -1)
    return make_sample({name: rng.normal(size=(side, side, steps, bands))}, stamps)


def test_a_padded_sample_embeds_as_if_it_were_alone():
    model = tiny_model()
    short, long = _sample(2), _sample(3, seed=1)
    together = model.embed(collate([short, long]), 4, SPATIAL)
    alone = model.embed(collate([short]), 4, SPATIAL)
    assert np.allclose(together[0], alone[0], atol=1e-5)


def test_pooling_follows_from_spatial_tokens():
    model = tiny_model()
    batch = collate([_sample(), _sample(seed=1)])
    spatial = model.embed(batch, 4, SPATIAL)
    assert spatial.shape == (2, 2, 2, 32)
    assert np.allclose(model.embed(batch, 4, Pooling()), spatial.mean((1, 2)), atol=1e-5)
    assert np.allclose(model.embed(batch, 4, Pooling(place="centre")), spatial[:, 1, 1])
    concat = model.embed(batch, 4, Pooling(place="spatial_concat"))
    assert concat.shape == (2, 2, 2, 3, 32)
    assert np.allclose(concat.mean(3), spatial, atol=1e-5)


def test_extraction_fills_the_last_batch():
    class Split:
        items = [_sample(seed=i) for i in range(5)]

        def __len__(self):
            return 5

        def __getitem__(self, index):
            return self.items[index], np.asarray(index)

    model = tiny_model()
    how = Extraction(4, Pooling(), 2)
    x, y = embeddings.extract(model, Split(), ["sentinel2_l2a"], how)
    z, _ = embeddings.extract(
        model, Split(), ["sentinel2_l2a"], Extraction(4, Pooling(), 5, workers=0)
    )
    assert y.tolist() == [0, 1, 2, 3, 4] and np.allclose(x, z, atol=1e-5)
    with pytest.raises(embeddings.Stopped):
        embeddings.extract(model, Split(), ["sentinel2_l2a"], how, lambda: True)
    with pytest.raises(ValueError, match="does not take 'landsat'"):
        embeddings.extract(model, Split(), ["landsat"], how)


def test_a_diverged_model_is_refused():
    good = tiny_model()
    params = {**good.params, "norm": {k: v * np.nan for k, v in good.params["norm"].items()}}
    model = EncoderModel(good.config, {"encoder": params})

    class Split:
        def __len__(self):
            return 1

        def __getitem__(self, index):
            return _sample(), np.asarray(0)

    with pytest.raises(ValueError, match="NaN or infinite embeddings"):
        embeddings.extract(model, Split(), ["sentinel2_l2a"], Extraction(4, Pooling()))


def test_bad_batches_are_refused():
    with pytest.raises(ValueError, match="same modalities"):
        collate([_sample(), _sample(bands=2, name="sentinel1")])
    with pytest.raises(ValueError, match="several shapes"):
        collate([_sample(), _sample(side=16)])
    with pytest.raises(ValueError, match="no samples"):
        collate([])
    batch = collate([_sample(), _sample()])
    batch["sentinel2_l2a" + MASK][1] = 3
    with pytest.raises(ValueError, match=r"samples \[1\] of the batch have no online token"):
        tiny_model().embed(batch, 4, Pooling())
    with pytest.raises(ValueError, match="takes none of the modalities"):
        tiny_model().embed(collate([_sample(bands=11, name="landsat")]), 4, Pooling())


def test_modalities_that_are_absent_everywhere_do_not_count():
    model = tiny_model()
    both = collate([_sample() | _sample(bands=2, name="sentinel1")])
    both["sentinel1" + MASK][:] = 3
    only = {k: v for k, v in both.items() if "sentinel2" in k or k == TIMESTAMPS}
    got = model.embed(both, 4, SPATIAL)
    assert np.allclose(got, model.embed(only, 4, SPATIAL), atol=1e-5)


@pytest.mark.parametrize("patch_size", [4, 8])
@pytest.mark.parametrize("pixel", [(0, 0), (1, 1), (3, 2)])
def test_a_patch_with_a_missing_pixel_is_missing(patch_size, pixel):
    """Wherever that lies in it; nor does its fill value reach a neighbour."""
    sample, model = _sample(1, side=16), tiny_model()
    image, mask = sample["sentinel2_l2a"], sample["sentinel2_l2a_mask"]
    image[:patch_size, :patch_size], mask[:patch_size, :patch_size] = 0, 3
    want = model.embed(collate([sample]), patch_size, SPATIAL)
    mask[...] = 0
    image[pixel], mask[pixel] = modalities.MISSING, 3
    got = model.embed(collate([sample]), patch_size, SPATIAL)
    np.testing.assert_array_equal(got, want)
    assert not got[0, 0, 0].any() and got[0, 0, 1].any()


def test_raw_bands_do_not_count_what_is_missing():
    """Neither dates that fill up a batch, nor missing values, by band or by band set."""
    for channels in (12, 3):
        image = np.full((1, 8, 8, 3, 12), 0.5, np.float32)
        mask = np.zeros((1, 8, 8, 3, channels), np.int8)
        mask[:, :, :, 1], image[:, :, :, 1] = 3, 0
        band = modalities.get("sentinel2_l2a").band_sets[1][0]
        mask[:, :4, :, 2, 1 if channels == 3 else band] = 3
        image[:, :4, :, 2, band] = modalities.MISSING
        batch = {"sentinel2_l2a": image, "sentinel2_l2a_mask": mask}
        out = RawBands(["sentinel2_l2a"]).embed(batch, 4, SPATIAL)
        np.testing.assert_allclose(out, 0.5)
    mask[...] = 3
    assert not RawBands(["sentinel2_l2a"]).embed(batch, 4, SPATIAL).any()


def test_raw_bands_keep_every_pixel():
    batch = collate([_sample(steps=1)])
    out = RawBands(["sentinel2_l2a"]).embed(batch, 4, SPATIAL)
    assert out.shape == (1, 2, 2, 16 * 12)
    assert np.array_equal(out[0, 1, 0, :12], batch["sentinel2_l2a"][0, 4, 0, 0])
    with pytest.raises(ValueError, match="no band sets"):
        RawBands(["sentinel2_l2a"]).embed(batch, 4, Pooling(place="spatial_concat"))
