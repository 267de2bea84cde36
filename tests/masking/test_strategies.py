"""Properties that every masking strategy has, whatever is missing."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from olmoearth_jax import masking, modalities
from olmoearth_jax.modalities import OFFICIAL_DECODE_ONLY as MAPS
from olmoearth_jax.modalities import SINGLE_BAND_SET_OVERRIDES, Tokenization

DEFAULT, SINGLE = Tokenization(), Tokenization.from_mapping(SINGLE_BAND_SET_OVERRIDES)
NAMES = ("sentinel2_l2a", "sentinel1", "worldcover", "srtm", "landsat", "era5_10", "latlon")
ONLY = {"only_decode_modalities": list(MAPS)}
CROSS = [
    {"type": f"modality_cross_{kind}", **ONLY, "allow_encoding_decoding_same_bandset": both}
    for kind in ("random", "space", "time", "space_time")
    for both in (True, False)
]
CONFIGS = [
    {"type": "random"},
    {"type": "random", "encode_ratio": 0.1, "decode_ratio": 0.75},
    {"type": "space", "encode_ratio": 0.25},
    {"type": "time", "encode_ratio": 0.25},
    {"type": "space_time"},
    {"type": "random_space"},
    {"type": "random_increasing"},
    {"type": "random_range"},
    {"type": "random_range", "max_encode_ratio": 0.4, "min_decode_ratio": 0.3,
     "max_decode_ratio": 0.6},
    *CROSS,
    {"type": "modality_cross_random", "min_encoded_bandsets": None},
    {"type": "selectable_modality", "decodable_modalities": ["worldcover", "srtm"],
     "fully_mask_modalities": ["sentinel1"], "max_to_mask": 3},
    {"type": "selectable_random_range_modality", "decodable_modalities": ["worldcover"],
     "fully_mask_modalities": ["sentinel1", "srtm"], "max_to_mask": 2},
    {"type": "random_fixed_modality", "decoded_modalities": ["worldcover", "srtm"],
     "randomize_missing_modalities": ["sentinel1", "landsat", "srtm"]},
    {"type": "random_with_decode", **ONLY},
    {"type": "random_time_with_decode", **ONLY},
    {"type": "random_time_with_decode", **ONLY, "random_ratio": 0.0, "encode_ratio": 0.3},
]  # fmt: skip
HIDING = ("selectable_modality", "selectable_random_range_modality", "random_fixed_modality")


def token_shape(name: str, batch: int, grid: int, steps: int, tokenization: Tokenization):
    sets = tokenization.num_band_sets(name)
    return {
        "space_time": (batch, grid, grid, steps, sets),
        "space_only": (batch, grid, grid, 1, sets),
        "time_only": (batch, steps, sets),
        "static": (batch, sets),
    }[modalities.get(name).kind]


def some_missing(seed, names, batch, grid, steps, tokenization, gaps):
    """Missing flags: whole modalities, timesteps and single tokens at random."""
    rng = np.random.default_rng(seed)
    out = {}
    for name in names:
        shape = token_shape(name, batch, grid, steps, tokenization)
        flags = rng.random(shape) < rng.choice([0.0, gaps])
        flags[rng.random(batch) < gaps / 2] = True
        if modalities.get(name).multitemporal:
            flags[..., rng.random(steps) < gaps, :] = True
        out[name] = flags
    return out


cases = st.tuples(
    st.integers(0, 10**6),
    st.lists(st.sampled_from(NAMES), min_size=1, unique=True),
    st.integers(1, 4),
    st.sampled_from([1, 2, 5]),
    st.sampled_from([1, 2, 3, 4]),
    st.sampled_from([DEFAULT, SINGLE]),
    st.sampled_from([0.0, 0.3, 0.8, 0.97]),
)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c["type"])
@settings(max_examples=20, deadline=None)
@given(case=cases)
def test_masks_are_valid_and_bounded(config, case):
    seed, names, batch, grid, steps, tokenization, gaps = case
    missing = some_missing(seed, names, batch, grid, steps, tokenization, gaps)
    before = {m: f.copy() for m, f in missing.items()}
    strategy = masking.build(config)
    masks = strategy(missing, masking.MaskContext.whole_group(seed, batch))
    counts = {m: (int(np.prod(f.shape[1:-1])), f.shape[-1]) for m, f in missing.items()}
    bounds = [strategy.bounds(counts, t) for t in (steps, None)]
    assert set(masks) == set(missing)
    encoded = np.zeros(batch, int)
    for m, mask in masks.items():
        assert mask.shape == missing[m].shape and mask.dtype == np.int8
        assert np.isin(mask, (0, 1, 2, 3)).all()
        if config["type"] in HIDING:
            assert (mask[missing[m]] == 3).all()
        else:
            np.testing.assert_array_equal(mask == 3, missing[m])
        np.testing.assert_array_equal(missing[m], before[m])
        flat = mask.reshape(batch, -1)
        encoded += (flat == 0).sum(axis=1)
        for b in bounds:
            assert ((flat == 0).sum(axis=1) <= b.encode_by_modality[m]).all()
            assert ((flat == 2).sum(axis=1) <= b.decode[m]).all()
    for b in bounds:
        assert (encoded <= b.encode).all()


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c["type"])
def test_masks_do_not_depend_on_neighbours_or_process(config):
    missing = some_missing(3, NAMES, 6, 2, 4, DEFAULT, 0.3)
    strategy = pickle.loads(pickle.dumps(masking.build(config)))

    def run(rows, order):
        ctx = masking.MaskContext.whole_group(7, 6, step=5)
        part = masking.MaskContext(
            [ctx.rngs[i] for i in rows], ctx.group_rng, 6, np.array(rows), ctx.step
        )
        return strategy({m: missing[m][rows] for m in order}, part)

    whole = run(list(range(6)), NAMES)
    if strategy.needs_whole_group:
        with pytest.raises(ValueError, match="whole groups"):
            run([4, 1], NAMES)
        return
    part = run([4, 1], NAMES[::-1])
    for m in NAMES:
        np.testing.assert_array_equal(part[m], whole[m][[4, 1]])


def test_exact_counts_of_odd_token_numbers():
    missing = {"worldcover": np.zeros((4, 3, 3, 1, 1), bool)}
    mask = masking.build({"type": "random"})(missing, masking.MaskContext.whole_group(0, 4))
    for one in mask["worldcover"]:
        assert [int((one == c).sum()) for c in range(4)] == [4, 1, 4, 0]


def test_static_tokens_share_a_pool_over_the_group():
    missing = {"latlon": np.zeros((8, 1), bool)}
    mask = masking.build({"type": "random"})(missing, masking.MaskContext.whole_group(0, 8))
    assert sorted(mask["latlon"].ravel().tolist()) == [0] * 4 + [2] * 4


def test_time_gives_one_role_per_timestep():
    missing = some_missing(0, NAMES, 4, 2, 4, DEFAULT, 0.0)
    for seed in range(10):
        masks = masking.build({"type": "time"})(missing, masking.MaskContext.whole_group(seed, 4))
        times = [masks[m].reshape(4, -1, 4, masks[m].shape[-1]) for m in NAMES if
                 modalities.get(m).multitemporal]  # fmt: skip
        roles = np.concatenate([t.transpose(0, 2, 1, 3).reshape(4, 4, -1) for t in times], axis=-1)
        assert (roles == roles[..., :1]).all()
        assert (np.sort(roles[..., 0], axis=1) == [0, 0, 2, 2]).all()


def cross(missing, seed, **options):
    batch = len(next(iter(missing.values())))
    config = {"type": "modality_cross_random", "allow_encoding_decoding_same_bandset": True}
    strategy = masking.build({**config, **ONLY, **options})
    return strategy(missing, masking.MaskContext.whole_group(seed, batch))


def band_sets_with(masks, code, names):
    return np.concatenate(
        [(masks[m] == code).any(axis=tuple(range(1, masks[m].ndim - 1))) for m in names], axis=-1
    )


def test_cross_random_invariants():
    names = NAMES[:5]
    missing = some_missing(0, names, 8, 3, 4, DEFAULT, 0.0)
    encodable = [m for m in names if m not in MAPS]
    tokens = {m: int(np.prod(missing[m].shape[1:])) for m in names}
    sizes = set()
    for seed in range(40):
        masks = cross(missing, seed)
        encoded = band_sets_with(masks, 0, encodable)
        sizes |= set(encoded.sum(axis=1).tolist())
        for m in MAPS:
            if m in masks:
                assert (masks[m] != 0).all()
                assert ((masks[m] == 2).reshape(8, -1).sum(axis=1) == tokens[m] // 2).all()
        # All decoder tokens of band sets that aren't encoded stay, so the sum over a modality
        # with no encoded band set is its full share.
        for m in encodable:
            idle = ~band_sets_with(masks, 0, [m]).any(axis=1)
            kept = (masks[m] == 2).reshape(8, -1).sum(axis=1)[idle]
            assert (kept == tokens[m] // 2).all()
    assert sizes == {2, 3, 4, 5, 6}


def test_cross_with_two_present_band_sets_takes_them_in_order():
    missing = some_missing(0, ("worldcover", "sentinel1"), 16, 4, 2, DEFAULT, 0.0)
    masks = cross(missing, 0)
    assert (masks["sentinel1"] == 0).any() and not (masks["sentinel1"] == 2).any()
    assert (masks["worldcover"] == 2).any() and not (masks["worldcover"] == 0).any()
    maps = some_missing(0, ("worldcover", "srtm"), 16, 4, 2, DEFAULT, 0.0)
    masks = cross(maps, 0)
    assert (masks["worldcover"] == 0).any() and not (masks["srtm"] == 0).any()


def test_cross_disjoint_never_gives_a_band_set_both_roles():
    missing = some_missing(0, NAMES[:5], 8, 3, 4, DEFAULT, 0.0)
    for seed in range(10):
        masks = cross(missing, seed, allow_encoding_decoding_same_bandset=False)
        for m in masks:
            assert not (band_sets_with(masks, 0, [m]) & band_sets_with(masks, 2, [m])).any()


def test_refill_of_a_single_token_encodes_it():
    missing = {m: np.ones(token_shape(m, 4, 2, 3, SINGLE), bool) for m in NAMES[:3]}
    for m in ("sentinel2_l2a", "sentinel1"):
        missing[m][:, 1, 0, 2] = False
    strategy = masking.build({"type": "random_time_with_decode", **ONLY})
    masks = strategy(missing, masking.MaskContext.whole_group(0, 4))
    for m in ("sentinel2_l2a", "sentinel1"):
        assert (masks[m][:, 1, 0, 2] == 0).all()


def test_random_time_with_decode_modes():
    names = ("sentinel2_l2a", "sentinel1", "landsat", "worldcover")
    missing = some_missing(0, names, 400, 3, 4, SINGLE, 0.0)
    strategy = masking.build({"type": "random_time_with_decode", **ONLY, "random_ratio": 0.25})
    masks = strategy(missing, masking.MaskContext.whole_group(1, 400))
    assert (masks["worldcover"] == 2).all()
    encoded, decoded = (band_sets_with(masks, c, names[:3]) for c in (0, 2))
    assert (encoded.sum(1) == 2).all() and (decoded.sum(1) == 1).all()
    times = [
        np.any([(masks[m] == c).any(axis=(1, 2, 4)) for m in names[:3]], axis=0) for c in (0, 2)
    ]
    by_time = ~(times[0] & times[1]).any(axis=1)
    assert abs(by_time.mean() - 0.75) < 5 * np.sqrt(0.75 * 0.25 / 400)
    assert (times[0][by_time].sum(1) == 2).all() and (times[1][by_time].sum(1) == 2).all()


def test_random_increasing_follows_the_step():
    strategy = masking.build({"type": "random_increasing", "steps": 10})
    assert strategy.ratios_at(0) == pytest.approx((0.46, 0.54))
    assert strategy.ratios_at(9) == (0.1, 0.9)
    assert strategy.ratios_at(500) == (0.1, 0.9)


def test_official_bounds():
    def counts(grid, steps, tokenization):
        shapes = {
            m: token_shape(m, 1, grid, steps, tokenization) for m in modalities.OFFICIAL_MODALITIES
        }
        return {m: (int(np.prod(s[1:-1])), s[-1]) for m, s in shapes.items()}

    v1 = masking.build(CROSS[0])
    assert v1.bounds(counts(6, 9, DEFAULT), 9).encode == 972
    v12 = masking.build({"type": "random_time_with_decode", **ONLY})
    assert v12.bounds(counts(6, 9, SINGLE), 9).encode == 361
    tall = v12.bounds(counts(12, 1, SINGLE), 1)
    assert sum(tall.decode[m] for m in MAPS) == 864 and tall.decode["sentinel1"] == 72


@pytest.mark.parametrize("parent", [masking.Strategy, *masking.STRATEGIES.values()])
def test_masks_of_its_own_need_bounds_of_its_own(parent):
    with pytest.raises(TypeError, match="bounds"):
        type("Other", (parent,), {"__call__": lambda self, missing, ctx: missing})


def test_a_strategy_without_masks_or_bounds_cannot_be_made():
    other = type("Other", (masking.Strategy,), {})
    with pytest.raises(TypeError, match="bounds"):
        other()
