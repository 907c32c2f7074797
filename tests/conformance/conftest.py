"""`modules/` needs transformers' test sources beside it, which `run.py` arranges: plain pytest must not collect it."""

collect_ignore_glob = ["modules*"]
