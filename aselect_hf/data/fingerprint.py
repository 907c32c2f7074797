"""Names for cached results: a hash of everything that they depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch


def fingerprint(tensors: Mapping[str, torch.Tensor], choices: Mapping[str, Any]) -> str:
    """32 hexadecimal digits that change with any name, dtype, shape or value of `tensors` and with any of `choices`.

    Args:
        choices: values that JSON can represent.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor_bytes(tensor))
    digest.update(json.dumps(choices, sort_keys=True).encode())
    return digest.hexdigest()[:32]


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor, without a copy if it is contiguous and on the CPU."""
    return tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data
