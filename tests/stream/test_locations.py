"""Grids of the pooler on the stream: predictions, maps and student equal those of the dense one."""

import dataclasses

import pytest

from tests.engines.compare import check
from tests.stream.grids import grid_groups, grid_model, grid_objective


def test_decoder_alone_on_mixed_grids():
    config = grid_model()
    objective = grid_objective(config)
    objective = dataclasses.replace(objective, supervision=None, distillation=None)
    groups, strategy = grid_groups([(3, 2), (2, 4)])
    check(config, groups, [strategy], objective)


def test_all_terms_on_mixed_grids_with_gaps_and_holes():
    config = grid_model()
    groups, strategy = grid_groups([(3, 2), (2, 4), (4, 1)], 1)
    check(config, groups, [strategy], grid_objective(config))


@pytest.mark.parametrize("depth", [1])
def test_few_cells_of_many_are_compared(depth):
    config = grid_model(depth)
    groups, strategy = grid_groups([(4, 2), (2, 3)], 2)
    check(config, groups, [strategy], grid_objective(config, most=13))
