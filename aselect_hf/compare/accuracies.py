"""Test accuracies of one probe per seed, as the rows of a comparison have them."""

from __future__ import annotations

import numpy as np


class ProbeAccuracies:
    """Methods of a row with `test_accuracies` in [0, 1], one per seed."""

    test_accuracies: list[float]

    @property
    def test_accuracy_mean(self) -> float:
        return float(np.mean(self.test_accuracies))

    @property
    def test_accuracy_deviation(self) -> float:
        """Sample standard deviation over seeds; 0 for a single seed."""
        return float(np.std(self.test_accuracies, ddof=1)) if len(self.test_accuracies) > 1 else 0.0

    @property
    def test_accuracy(self) -> str:
        """Mean and deviation for a table."""
        return f"{100 * self.test_accuracy_mean:.2f} ± {100 * self.test_accuracy_deviation:.2f} %"
