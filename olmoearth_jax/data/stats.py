"""Mean and spread of a stream of values (spec/data.md section 2, statistics tool)."""

from __future__ import annotations

import dataclasses
import math

import numpy as np


@dataclasses.dataclass
class StreamingStats:
    """Running count, mean and sum of squared deviations of one band.

    The squared deviations of a batch are taken against the mean before and after it, which is
    the rule the published statistics were made with.
    """

    count: int = 0
    mean: float = 0.0
    m2: float = 0.0

    def update(self, values: np.ndarray) -> None:
        """Adds a batch of values of any shape; an empty one changes nothing."""
        x = np.asarray(values, np.float64).reshape(-1)
        if not x.size:
            return
        self.count += x.size
        before = self.mean
        self.mean += (float(x.mean()) - before) * x.size / self.count
        self.m2 += float(np.sum((x - before) * (x - self.mean)))

    def merge(self, other: StreamingStats) -> None:
        """Adds what `other` has seen. Merging in the same order always gives the same bits."""
        if not other.count:
            return
        total, apart = self.count + other.count, other.mean - self.mean
        self.mean += apart * (other.count / total)
        self.m2 += other.m2 + apart * apart * (self.count * other.count / total)
        self.count = total

    @property
    def std(self) -> float:
        """Population standard deviation; 0 before the first value."""
        return math.sqrt(self.m2 / self.count) if self.count else 0.0
