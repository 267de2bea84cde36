"""What an engine is: the part of a step that turns groups of samples into a loss."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax

from olmoearth_jax.losses import Objective

Group = dict[str, Any]
"""Samples that share patch size and grid; see `olmoearth_jax.data.pipeline`."""


@dataclasses.dataclass
class Prepared:
    """One micro-step, planned on the host; its inputs move to the devices when asked for.

    Attributes:
      key: of the program that runs it.
      pack: makes the inputs.
      host: counts that need no device.
      bad_ids: samples that are holes.
    """

    key: Any
    pack: Callable[[], tuple]
    host: dict[str, float]
    bad_ids: list[str]

    @functools.cached_property
    def inputs(self) -> tuple:
        """Device inputs, packed on first use and kept until `release`."""
        return self.pack()

    def release(self) -> None:
        """Forgets the inputs; a program that was given them keeps them while it needs them."""
        self.__dict__.pop("inputs", None)


class Engine(Protocol):
    """How groups become losses; see `olmoearth_jax.stream.engine` and `train.dense_engine`."""

    @property
    def objective(self) -> Objective:
        """The terms that are minimised."""
        ...

    def prepare(self, groups: Sequence[Group]) -> list[Prepared]:
        """Splits a step's groups into micro-steps."""
        ...

    def loss(
        self, params, target, inputs: tuple, key: jax.Array, program_key: Any
    ) -> tuple[jax.Array, Any]:
        """(loss, aux) of one micro-step; traced once per program key."""
        ...
