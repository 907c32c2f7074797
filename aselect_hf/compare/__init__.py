"""Ways to choose a timestep, side by side on the same images."""

from aselect_hf.compare.run import check_strategies, compare_strategies
from aselect_hf.compare.table import Comparison, ComparisonRow

__all__ = ["Comparison", "ComparisonRow", "check_strategies", "compare_strategies"]
