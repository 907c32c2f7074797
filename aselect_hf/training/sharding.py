"""Training whose weights are divided among processes (FSDP2): what is optimized, averaged, saved, and gathered again.

accelerate shards in place: the objective stays, its parameters are replaced by shares (`DTensor`). Whole weights exist
only while a part of the network runs, so that code outside of the objective's `forward` must not compute with them.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from diffusers.training_utils import EMAModel
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from aselect_hf.modeling.noisy_pretrained import NoisyPreTrainedModel

SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether the weights of a run are divided among its processes."""
    return accelerator.distributed_type in SHARDED


def check_sharding(accelerator: Accelerator) -> None:
    """Check that sharding happens if it was asked for, and let it keep parameters in their own precision.

    Autocast alone then decides what is computed in lower precision, as without sharding; heads compute in float32.

    Raises:
        ValueError: FSDP was asked for on a CPU, or in its first version.
    """
    if accelerator.distributed_type == DistributedType.FSDP:
        plugin = accelerator.state.fsdp_plugin
        if plugin.fsdp_version != 2:
            raise ValueError(f"fsdp_version must be 2, got {plugin.fsdp_version}: set it in the config of accelerate")
        plugin.mixed_precision_policy = None
    elif os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        raise ValueError(
            f"FSDP was asked for, but accelerate does not shard on {accelerator.device.type}: "
            "use a GPU, or a config with distributed_type MULTI_GPU"
        )


def prepare_sharding(accelerator: Accelerator, objective: nn.Module) -> None:
    """Say which layers are gathered as one, compute under autocast, and let runs end without an exception.

    For FSDP2 accelerate leaves autocast out. An exception at the deepest feature would skip the hooks that divide a
    layer again and that prepare its gradient.
    """
    backbones: list[Any] = [module for module in objective.modules() if isinstance(module, NoisyPreTrainedModel)]
    present = {type(module).__name__ for module in objective.modules()}
    layers = {name for backbone in backbones for name in backbone._no_split_modules or ()}
    objective._no_split_modules = sorted(layers & present)  # type: ignore[assignment]
    for backbone in backbones:
        if hasattr(backbone, "early_exit"):
            backbone.early_exit = "block"
    if accelerator.distributed_type == DistributedType.FSDP:
        objective.forward = accelerator.autocast()(objective.forward)


def refuse_sharding(accelerator: Accelerator, option: str) -> None:
    """Raise a ValueError for an option that reads weights between the steps, if weights are sharded."""
    if is_sharded(accelerator):
        raise ValueError(
            f"{option} does not work with sharded weights (FSDP, DeepSpeed): leave it out, or use a config with "
            "distributed_type MULTI_GPU"
        )


def reshard(module: nn.Module) -> None:
    """Drop gathered weights, so that the next forward pass gathers the present ones."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def whole_weights(accelerator: Accelerator, objective: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of a prepared objective on the CPU of every process. Call it on all processes."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return accelerator.get_state_dict(objective)
    return {name: _whole(value).cpu() for name, value in objective.state_dict().items()}


class ShardedEMA(EMAModel):
    """An average of sharded weights, saved whole, so that any number of processes can load it."""

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        return state | {"shadow_params": [_whole(value).cpu() for value in state["shadow_params"]]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        whole = state_dict["shadow_params"]
        super().load_state_dict(state_dict | {"shadow_params": None})
        self.shadow_params = [_share(value, like) for value, like in zip(whole, self.shadow_params, strict=True)]


def _whole(value: torch.Tensor) -> torch.Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def _share(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This process's share of a whole tensor, divided as `like`."""
    if not isinstance(like, DTensor):
        return value.to(like.device)
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
