"""What `test_sharding` launches: a training script whose backbone is sharded over CPU processes (FSDP2 over gloo).

    accelerate launch --config_file aselect_hf/training/configs/fsdp2.yaml -m tests.training.sharded classify <flags>

accelerate 1.15 shards on accelerators only: on the CPU it makes FSDP flags DDP. Everything below that choice works on
the CPU, so this module makes the choice before accelerate does.
"""

from __future__ import annotations

import importlib
import sys

from accelerate import PartialState
from accelerate.utils import DistributedType


def allow_sharding() -> None:
    """Let accelerate find a kind of run that it turns into FSDP."""
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def main(script: str) -> None:
    allow_sharding()
    importlib.import_module(f"aselect_hf.training.{script}").main()


if __name__ == "__main__":
    main(sys.argv.pop(1))
