"""Rules side by side on the same images."""

from aselect_hf.compare.conclusion import conclude
from aselect_hf.compare.run import check_strategies, compare_strategies, options_by_rule
from aselect_hf.compare.table import Comparison, ComparisonRow

__all__ = ["Comparison", "ComparisonRow", "check_strategies", "compare_strategies", "conclude", "options_by_rule"]
