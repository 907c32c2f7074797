"""Reports: one HTML file that tells a selection, an audit or a comparison, and needs nothing else."""

from aselect_hf.report.write import write_report

__all__ = ["write_report"]
