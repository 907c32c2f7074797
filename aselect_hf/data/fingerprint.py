"""Names for cached work: a hash of everything that it depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch


def fingerprint(tensors: Mapping[str, torch.Tensor], choices: Mapping[str, Any]) -> str:
    """32 hexadecimal digits that change with any name, type, shape or value of `tensors` and with any of `choices`.

    Args:
        choices: what JSON can hold.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor_bytes(tensor))
    digest.update(json.dumps(choices, sort_keys=True).encode())
    return digest.hexdigest()[:32]


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """A tensor's values as they lie in memory; no copy where it is contiguous and on the CPU."""
    return tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data
