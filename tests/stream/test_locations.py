"""Grids of the pooler on the stream: predictions, maps and student equal those of the dense one."""

import numpy as np
import pytest

from olmoearth_jax.config import TrainModuleConfig
from olmoearth_jax.configlib.official import official
from olmoearth_jax.masks import MISSING_TOKEN
from olmoearth_jax.modalities import MISSING
from olmoearth_jax.stream.ladder import fitting_rungs
from olmoearth_jax.train import build, estimate, probe
from olmoearth_jax.train.build_objective import build_objective
from tests.engines.compare import check
from tests.stream.grids import MAPS, grid_groups, grid_model, grid_objective

pytestmark = pytest.mark.usefixtures("quick_compile")


def test_all_terms_on_mixed_grids_with_gaps_and_holes():
    config = grid_model()
    groups, strategy = grid_groups([(3, 2), (2, 4)], 1)
    check(config, groups, [strategy], grid_objective(config))


@pytest.mark.slow
def test_few_cells_of_many_are_compared_and_a_map_is_absent():
    config = grid_model(1, num_register_tokens=2)
    groups, strategy = grid_groups([(4, 2), (1, 3), (2, 1)], 2, holes=((), (0, 3)), missing=0.7)
    for group in groups[:2]:
        group["data"][MAPS[0]][:] = MISSING
        group["mask_a"][MAPS[0]][:] = MISSING_TOKEN
    check(config, groups, [strategy], grid_objective(config, most=13))


@pytest.mark.slow
def test_drawn_sizes_of_a_location():
    config = grid_model(1)
    groups, strategy = grid_groups([(2, 4), (3, 2)], 3)
    groups[0]["group"] = np.int64(1)
    module = TrainModuleConfig(random_query_stride=True, max_location_queries=20)
    check(config, groups, [strategy], grid_objective(config), module)


def test_programs_of_the_newest_recipe_are_few_and_hold_all_shapes():
    config = official("nano", "v1_3")
    config.data_loader.global_batch_size = config.train_module.rank_microbatch_size = 4
    timesteps = estimate.most_timesteps(config)
    spec = build.stream_of(config, timesteps, 1, build_objective(config))
    assert spec.loc_bound == 1024 and len(spec.maps) == 6
    ladder = build.size_ladder(config, spec, timesteps, [])
    assert 2 < len(ladder) <= 11 and ladder[-1] == spec.top_rung()
    shapes = build.likely_shapes(config, timesteps, 1)
    assert isinstance(shapes, list)
    assert len(shapes) == len(set(shapes)) and {s.grid for s in shapes} == set(timesteps)
    whole = [probe.complete(spec.modalities)]
    drawn = probe.simulate_needs(
        spec, whole, build.masking_strategies(config), shapes, 7, len(shapes)
    )
    top = 1 << len(ladder) - 1
    usual = [fitting_rungs(ladder, need) != top for need in drawn]
    assert np.mean(usual) > 0.9
