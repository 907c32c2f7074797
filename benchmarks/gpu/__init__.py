"""The stages of `benchmarks/on_gpu.py`, one file per question."""
