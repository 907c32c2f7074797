"""Training scripts for `accelerate launch`; each also runs as `python -m aselect_hf.training.<name>`."""
