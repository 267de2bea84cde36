"""The stream engine equals the dense one for every kind of training and model option."""

import dataclasses

import numpy as np
import pytest

from olmoearth_jax import losses, masking
from olmoearth_jax.losses import NoTokenLoss, Objective
from olmoearth_jax.masking import MaskContext
from olmoearth_jax.modalities import Tokenization
from olmoearth_jax.model.config import ReconstructorConfig
from tests.engines.compare import NAMES, SINGLE, check, model_of
from tests.stream.builders import make_group
from tests.stream.grids import grid_model

PATCH = {"type": "patch_discrimination_new"}
MODALITY = {"type": "modality_patch_discrimination_new"}
EXITS = (("sentinel2_l2a", 2), ("landsat", 1), ("worldcover", 0))

pytestmark = pytest.mark.usefixtures("quick_compile")


def _groups(shapes, seed=0, tokenization=None, holes=(1,), strategy=None):
    rng = np.random.default_rng(seed)
    out = []
    for number, (grid, patch_size) in enumerate(shapes):
        group, used = make_group(
            rng, 4, grid, patch_size, first=4 * number, names=NAMES,
            tokenization=tokenization or Tokenization(), holes=holes, strategy=strategy,
        )  # fmt: skip
        out.append(group)
    return out, used


def test_one_view_deep_targets_registers_and_koleo():
    config = model_of(num_register_tokens=2, qk_norm=True, output_embedding_size=24)
    groups, strategy = _groups([(2, 2)])
    objective = Objective(
        losses.build(PATCH),
        kind="latent_mim",
        regularizer=losses.build({"type": "KoLeo"}),
        exits=EXITS,
        moving=True,
    )
    check(config, groups, [strategy], objective)


@pytest.mark.slow
def test_v1_2_model_with_band_dropout_and_a_strategy_per_view():
    tokens = Tokenization.from_mapping(SINGLE)
    config = model_of(
        tokenization_overrides=SINGLE, position_encoding="rope_3d_mixed",
        patch_embed_hidden_sizes=[6], band_dropout_rate=0.4, random_band_dropout=True,
    )  # fmt: skip
    config.encoder_config.drop_path = 0.2
    config.encoder_config.band_dropout_modalities = ["sentinel2_l2a", "landsat"]
    first = masking.build(
        {"type": "random_time_with_decode", "only_decode_modalities": ["worldcover"]}
    )
    groups, _ = _groups([(2, 2), (3, 4)], 1, tokens, (), first)
    second = masking.build({"type": "random", "encode_ratio": 0.4, "decode_ratio": 0.5})
    for group in groups:
        gone = masking.missing_tokens(group["data"], int(group["patch_size"]), tokens)
        group["mask_b"] = second(gone, MaskContext.whole_group(7, 4))
    loss = {
        "type": "modality_patch_discrimination_masked_negatives_vec",
        "mask_negatives_for_modalities": ["worldcover"],
        "modality_weights": {"landsat": 0.5},
    }
    koleo = losses.build({"type": "KoLeo"})
    objective = Objective(losses.build(loss), losses.InfoNCE(0.1, 0.05), regularizer=koleo)
    check(config, groups, [first, second], objective)


@pytest.mark.slow
def test_galileo_with_deep_targets_of_one_view():
    groups, strategy = _groups([(2, 2), (1, 4)], 2)
    objective = Objective(
        losses.build(PATCH),
        losses.InfoNCE(0.1, 0.05),
        kind="galileo",
        token_loss_b=losses.build(MODALITY),
        exits_b=EXITS,
        view_metrics=("a_PatchDisc", "b_ModalityPatchDisc"),
    )
    check(model_of("galileo", num_register_tokens=1), groups, [strategy], objective)


@pytest.mark.slow
def test_pixels_of_mixed_patch_sizes():
    groups, strategy = _groups([(2, 3), (2, 4)], 3)
    pixels = {"type": "mae", "loss_function": "SmoothL1Loss", "beta": 0.1}
    objective = Objective(NoTokenLoss(), kind="mae", mae=losses.build(pixels))
    config = model_of("mae", pixels=True)
    config.decoder_config = None
    check(config, groups, [strategy], objective)


@pytest.mark.slow
def test_pixels_and_tokens_of_the_online_encoder_with_koleo_on_patches():
    groups, strategy = _groups([(2, 2)], 4)
    objective = Objective(
        losses.build({"type": "all_discrimination"}),
        kind="mae",
        mae=losses.build({"type": "mae"}),
        regularizer=losses.build({"type": "KoLeo", "mode": "patch"}),
        exits=EXITS,
    )
    config = model_of("mae", pixels=True, num_register_tokens=1)
    check(config, groups, [strategy], objective)


SOME = {"type": "random", "encode_ratio": 0.3, "decode_ratio": 0.3}
"""Leaves tokens that only the target sees."""
ONE_WAY = {
    **SOME, "type": "random_time_with_decode", "only_decode_modalities": ["worldcover"],
}  # fmt: skip


def _all_pixels(config, groups, strategy, token_loss, **terms):
    """Asserts that the pixels of all tokens, in every part that a token can have, agree."""
    parts = [mask.ravel() for mask in groups[0]["mask_a"].values()]
    assert {*range(4)} == set(np.concatenate(parts).tolist())
    mae = losses.build({"type": "mae", "only_decode": False, "loss_function": "L1Loss"})
    check(config, groups, [strategy], Objective(token_loss, mae=mae, **terms))


def test_pixels_of_all_tokens_of_mixed_patch_sizes():
    config = model_of("mae", pixels=True, num_register_tokens=2)
    config.decoder_config = None
    groups, strategy = _groups([(2, 3), (2, 4)], 5, strategy=masking.build(SOME))
    _all_pixels(config, groups, strategy, NoTokenLoss(), kind="mae")


@pytest.mark.slow
def test_pixels_of_all_tokens_beside_deep_targets_of_two_views():
    config = model_of(pixels=True, output_embedding_size=24)
    groups, strategy = _groups([(3, 2), (1, 4)], 6, strategy=masking.build(SOME))
    contrast = losses.InfoNCE(0.1, 0.1)
    _all_pixels(config, groups, strategy, losses.build(PATCH), contrastive=contrast, exits=EXITS)


@pytest.mark.slow
def test_pixels_of_all_tokens_where_some_modalities_are_never_encoded():
    config = model_of("mae", pixels=True, band_dropout_rate=0.4, random_band_dropout=True)
    config.encoder_config.drop_path = 0.2
    groups, strategy = _groups([(2, 2)], 7, strategy=masking.build(ONE_WAY))
    _all_pixels(config, groups, strategy, losses.build(PATCH), kind="mae")


@pytest.mark.slow
def test_pixels_of_all_tokens_behind_a_location_grid():
    config = grid_model(1)
    assert config.decoder_config is not None
    encoder = config.encoder_config
    config.reconstructor_config = ReconstructorConfig(
        dataclasses.replace(config.decoder_config), encoder.supported_modality_names,
        encoder.max_patch_size, encoder.tokenization_overrides,
    )  # fmt: skip
    rng, strategy = np.random.default_rng(8), masking.build(ONE_WAY)
    groups = [
        make_group(
            rng, 4, grid, 2, first=4 * number, names=encoder.supported_modality_names,
            tokenization=encoder.tokenization, strategy=strategy, holes=(2,),
        )[0]
        for number, grid in enumerate((2, 3))
    ]  # fmt: skip
    _all_pixels(config, groups, strategy, losses.build(PATCH), kind="latent_mim")
