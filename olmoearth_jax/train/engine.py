"""What an engine is: the part of a step that turns groups of samples into a loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import jax

from olmoearth_jax.train.objectives import Objective

Group = dict[str, Any]
"""Samples that share patch size and grid; see `olmoearth_jax.data.pipeline`."""


@dataclasses.dataclass
class Prepared:
    """One micro-step ready to run: a program's key, its device inputs, and host counts."""

    key: Any
    inputs: tuple
    host: dict[str, float]
    bad_ids: list[str]


class Engine(Protocol):
    """How groups become losses; see `olmoearth_jax.stream.engine` and `train.dense_engine`."""

    @property
    def objective(self) -> Objective:
        """The terms that are minimised."""
        ...

    def prepare(self, groups: Sequence[Group]) -> list[Prepared]:
        """Splits a step's groups into micro-steps and moves them to the devices."""
        ...

    def loss(
        self, params, target, inputs: tuple, key: jax.Array, program_key: Any
    ) -> tuple[jax.Array, Any]:
        """(loss, aux) of one micro-step; traced once per program key."""
        ...
