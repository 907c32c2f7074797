"""Speed of a feature: our DiT, a diffusers DiT with a hook, and a plain ViT of the same size (the limit).

Protocol. All contenders compute one feature of the same inputs with the same weights. Only the ViT has its own weights,
because only its speed counts. A warm-up compares the features. Then the contenders take turns in one process, one run
per round, and each round starts with a different contender, so that other load on the machine affects all alike. Times
are medians over rounds. Ratios are ratios of medians, with the least and greatest ratio within a round as their range.
There are as many rounds as fit in `max_seconds`, at most `rounds` and at least three. A batch size with no time for
three rounds is skipped, except 1.
Peak memory is the weights plus the memory that the warm-up added: resident memory on the CPU (Linux only),
`torch.cuda.max_memory_allocated` on a GPU. FLOPs are counted at batch size 1, two per multiply-add.
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
