"""Resize, encodings, rotary encodings, patch embedding, pooling: properties of single parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from olmoearth_jax.modalities import SINGLE_BAND_SET_OVERRIDES, Tokenization
from olmoearth_jax.model import latent_mim, layers, pooling, rope
from olmoearth_jax.model.encodings import CompositeEncodings, month_table
from olmoearth_jax.model.patch_embed import (
    PatchEmbed,
    band_keep_mask,
    resize,
    resize_matrix,
    to_patches,
)
from olmoearth_jax.model.rope import RopeConfig
from olmoearth_jax.model.tokens import SlotTable, Tokens, days_since_2000


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40))
def test_resize_rows_sum_to_one_and_mirror(a, b):
    matrix = resize_matrix(a, b)
    np.testing.assert_allclose(matrix.sum(1), 1.0, atol=1e-12)
    np.testing.assert_allclose(matrix, matrix[::-1, ::-1], atol=1e-12)


def test_resize_identity_and_library():
    np.testing.assert_array_equal(resize_matrix(7, 7), np.eye(7))
    image = np.random.default_rng(0).standard_normal((2, 6, 9, 3)).astype(np.float32)
    ours = resize(jnp.asarray(image), 3, 8)
    theirs = jax.image.resize(image, (2, 16, 24, 3), "cubic", antialias=True)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_patches_are_in_place_and_indivisible_sides_fail():
    image = np.arange(2 * 8 * 4 * 3 * 2, dtype=np.float32).reshape(2, 8, 4, 3, 2)
    patches = to_patches(jnp.asarray(image), 4, 4)
    assert patches.shape == (2, 2, 1, 3, 4, 4, 2)
    np.testing.assert_array_equal(patches[1, 1, 0, 2], image[1, 4:, :, 2])
    with pytest.raises(ValueError, match="not divisible by patch size 3"):
        to_patches(jnp.asarray(image), 3, 4)


def test_linear_projection_equals_convolution():
    embed = PatchEmbed(4, 3, 5)
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((5, 3, 4, 4)).astype(np.float32)
    embed.proj.kernel[...] = jnp.asarray(weight.transpose(2, 3, 1, 0).reshape(48, 5))
    patches = rng.standard_normal((2, 4, 4, 3)).astype(np.float32)
    expected = np.einsum("nyxc,dcyx->nd", patches, weight)
    np.testing.assert_allclose(embed.project(jnp.asarray(patches)), expected, atol=1e-5)


def _tokens(**fields) -> Tokens:
    shape = np.shape(next(iter(fields.values())))
    blank = Tokens.blank(shape)
    return Tokens(**{k: fields.get(k, getattr(blank, k)) for k in blank.__dataclass_fields__})


def test_slot_table():
    table = SlotTable.build(["SENTINEL1", "sentinel2_l2a", "latlon"], Tokenization())
    assert table.names == ("sentinel2_l2a", "sentinel1", "latlon")
    assert list(table.of("sentinel1")) == [3]
    assert [s.patch_side for s in table.slots] == [8, 8, 8, 8, 1]
    assert [len(s.channels) for s in table.slots] == [4, 6, 2, 2, 2]
    assert hash(table) == hash(SlotTable.build(table.names, Tokenization()))
    single = SlotTable.build(
        table.names,
        Tokenization.from_mapping({"sentinel2_l2a": SINGLE_BAND_SET_OVERRIDES["sentinel2_l2a"]}),
    )
    assert len(single) == 3
    with pytest.raises(ValueError, match="'landsat' is not supported by this model"):
        table.of("landsat")


def test_blank_tokens_get_no_encodings():
    table = SlotTable.build(["sentinel2_l2a", "worldcover"], Tokenization())
    module = CompositeEncodings(table, 32, "absolute")
    for name in table.names:
        module.channel[name][...] = jnp.ones_like(module.channel[name][...])
    assert not np.asarray(module(Tokens.blank((2, 3)))).any()
    encoded = np.asarray(module(_tokens(slot=np.array([0, 3], np.int32))))
    assert encoded[:, :8].all()
    # Static maps get neither timestep nor month part.
    assert encoded[0, 8:24].any() and not encoded[1, 8:24].any()


def test_channel_gradient_has_no_scatter():
    table = SlotTable.build(["sentinel2_l2a"], Tokenization())
    module = CompositeEncodings(table, 32, "absolute")
    tokens = _tokens(slot=np.array([0, 1, 2, -1], np.int32))

    graph, params = latent_mim.split(module)

    def loss(params):
        return jnp.sum(latent_mim.merge(graph, params)(tokens) ** 2)

    text = str(jax.make_jaxpr(jax.grad(loss))(params))
    assert "scatter" not in text


def test_month_table_is_periodic_unit_circle():
    table = month_table(8)
    np.testing.assert_allclose(table[:, 0] ** 2 + table[:, -1] ** 2, 1.0, atol=1e-6)
    with pytest.raises(ValueError, match="divisible by 16"):
        CompositeEncodings(SlotTable.build(["latlon"], Tokenization()), 24, "absolute")


def test_days_agree_on_host_and_device():
    stamps = np.array([[1, 0, 2000], [15, 6, 2024]], np.int32)
    host = days_since_2000(stamps)
    np.testing.assert_array_equal(host, [0.0, 24 * 365.25 + 181 + 14])
    np.testing.assert_array_equal(jax.jit(days_since_2000)(stamps), host)


@pytest.mark.parametrize("mode", rope.ROPE_MODES)
def test_scores_depend_on_relative_position_only(mode):
    config = RopeConfig(mode)
    rng = np.random.default_rng(0)
    freqs = rope.mixed_frequencies(rng, config.num_axes, 2, 16, 10.0) if config.mixed else None
    q, k = (jnp.asarray(rng.standard_normal((5, 2, 16)), jnp.float32) for _ in range(2))
    place = rng.integers(0, 6, (2, 5, config.num_axes)).astype(np.float32)

    def scores(shift):
        turned = [
            rope.rotate(x, rope.angles(config, jnp.asarray(p + shift), 16, freqs))
            for x, p in zip((q, k), place, strict=True)
        ]
        return jnp.einsum("qhd,khd->hqk", *turned)

    np.testing.assert_allclose(scores(0.0), scores(3.0), atol=2e-5)
    assert float(jnp.abs(scores(0.0) - jnp.einsum("qhd,khd->hqk", q, k)).max()) > 0.1


def test_rope_rejects_heads_it_cannot_divide():
    with pytest.raises(ValueError, match="multiple of 4"):
        RopeConfig("rope").check(6)
    with pytest.raises(ValueError, match="rope_3d: a head of 8"):
        RopeConfig("rope_3d").check(8)


@settings(max_examples=20, deadline=None)
@given(st.floats(0.0, 1.0), st.integers(1, 6), st.booleans(), st.integers(0, 99))
def test_band_dropout_always_keeps_a_band(rate, bands, random_rate, seed):
    rng = np.random.default_rng(seed)
    keep = band_keep_mask(
        rate,
        random_rate,
        jnp.asarray(rng.random()),
        jnp.asarray(rng.random((4, bands))),
        jnp.asarray(rng.random(4)),
    )
    assert keep.shape == (4, bands)
    assert set(np.unique(keep)) <= {0.0, 1.0}
    assert (np.asarray(keep).sum(1) >= 1).all()


def test_pooling_ignores_hidden_tokens():
    rng = np.random.default_rng(0)
    tokens = {"sentinel1": rng.standard_normal((2, 3, 2, 2, 1, 4)).astype(np.float32)}
    masks = {"sentinel1": rng.integers(0, 2, (2, 3, 2, 2, 1))}
    masks["sentinel1"][:, 0] = 0
    noisy = {"sentinel1": tokens["sentinel1"] + 9.0 * (masks["sentinel1"] > 0)[..., None]}
    for how in ("mean", "max"):
        for pool in (pooling.pool_instance, pooling.pool_spatial):
            np.testing.assert_array_equal(pool(tokens, masks, how), pool(noisy, masks, how))
    masks["sentinel1"][0] = 1
    with pytest.raises(ValueError, match="no visible token"):
        pooling.pool_instance(tokens, masks)
    with pytest.raises(ValueError, match="visible everywhere"):
        pooling.pool_spatial_concat(tokens, masks)
    assert pooling.centre_token(jnp.zeros((2, 3, 2, 5))).shape == (2, 5)


def test_slots_of_another_table_are_found_by_band_set():
    names = ["sentinel2_l2a", "landsat"]
    whole = SlotTable.build([*names, "latlon", "sentinel1"], Tokenization())
    part = SlotTable.build(names, Tokenization(), base_patch_size=4)
    found = whole.numbers(part.slots)
    assert [whole.slots[n].modality for n in found] == [s.modality for s in part.slots]
    assert [whole.slots[n].channels for n in found] == [s.channels for s in part.slots]
    single = SlotTable.build(names, Tokenization.from_mapping(SINGLE_BAND_SET_OVERRIDES))
    for a, b in ((single, part), (part, single)):
        with pytest.raises(ValueError, match="different band sets for 'sentinel2_l2a'"):
            a.numbers(b.slots)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_gradient_of_a_norm_on_a_cpu_is_that_of_its_formula(dtype):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((3, 50, 24)) * 3 + 1, dtype)
    scale, bias, g = (jnp.asarray(rng.standard_normal(n), jnp.float32) for n in (24, 24, x.shape))
    want = jax.vjp(layers._normed, x, scale, bias)
    got = jax.vjp(layers._normed_on_cpu, x, scale, bias)
    np.testing.assert_array_equal(got[0], want[0])
    for mine, theirs in zip(got[1](g), want[1](g), strict=True):
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
        tolerance = 1e-5 if mine.dtype == jnp.float32 else 0.02
        np.testing.assert_allclose(
            np.float32(mine), np.float32(theirs), rtol=tolerance, atol=tolerance
        )
