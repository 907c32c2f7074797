"""The stages of `benchmarks/on_gpu.py`, one file for each question."""
