"""How fast a DiT gives a feature: ours, a hooked diffusers DiT, and a plain ViT of the same size (the limit).

Protocol. All contenders compute one feature of the same inputs with the same weights (the ViT has weights of its own:
only its speed counts). After a warm-up they take turns in one process, one run each a round, each round starting with
another of them, so that whatever else the machine does hits all alike. Times are medians over rounds, ratios are ratios
of medians, and their spread is the least and greatest ratio within a round. Features are compared in the warm-up.
Rounds are as many as fit in `max_seconds`, at most `rounds` and at least three; a batch size with no time for three is
skipped, 1 excepted.
Peak memory is the weights and what the warm-up took beyond what was there before it: resident memory on the CPU (Linux
only), `torch.cuda.max_memory_allocated` on a GPU. FLOPs are counted at batch size 1, two per multiply-add.
"""

from aselect_hf.speed.contenders import CUT, DIFFUSERS, FIXED, OURS, VIT
from aselect_hf.speed.measure import BATCH_SIZES, MAX_ROUNDS, MAX_SECONDS, benchmark_model, describe_protocol
from aselect_hf.speed.table import Benchmark

__all__ = [
    "BATCH_SIZES",
    "CUT",
    "DIFFUSERS",
    "FIXED",
    "MAX_ROUNDS",
    "MAX_SECONDS",
    "OURS",
    "VIT",
    "Benchmark",
    "benchmark_model",
    "describe_protocol",
]
