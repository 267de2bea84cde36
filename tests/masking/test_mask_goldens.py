"""The statistics check itself: it passes our strategies and catches wrong ones."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from olmoearth_jax import masking
from olmoearth_jax.masking.modality_cross import ModalityCrossRandom
from tools.goldens import mask_stats

FOLDER = Path(__file__).resolve().parents[1] / "goldens" / "train"
CASES = list(mask_stats.cases(FOLDER))


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_recorded_statistics(case):
    result = case.run()
    assert result.status == "passed", result.reason


@dataclass(frozen=True)
class DropsDecoders(ModalityCrossRandom):
    """Takes decoder tokens from band sets outside X even if they aren't encoded."""

    def _apply(self, masks, chosen):
        super()._apply(masks, [(e | (set(self._sets(masks)) - x), x) for e, x in chosen])

    @staticmethod
    def _sets(masks):
        return [(m, k) for m in masks for k in range(masks[m].shape[-1])]


def test_a_wrong_strategy_is_caught(monkeypatch):
    monkeypatch.setitem(masking.STRATEGIES, "modality_cross_random", DropsDecoders)
    case = next(c for c in CASES if "cross_random_v1" in c.name)
    assert case.run().status == "failed"


def test_slightly_wrong_ratios_are_caught(monkeypatch):
    def build(config):
        return masking.STRATEGIES[config["type"]](0.47, 0.5)

    monkeypatch.setattr(masking, "build", build)
    case = next(c for c in CASES if c.name == "masks/random")
    assert case.run().status == "failed"


def test_chi_square_deviate():
    rng = np.random.default_rng(0)
    draws = [rng.integers(0, 6, 2000) for _ in range(2)]
    histograms = [dict(enumerate(np.bincount(d, minlength=6).tolist())) for d in draws]
    assert abs(mask_stats.chi_square_z(*histograms)) < 4
    assert mask_stats.chi_square_z(histograms[0], {0: 400, 1: 1600}) > 20
