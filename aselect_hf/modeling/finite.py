"""Check that values are finite; the error names the part of the model that gave them, and its precision."""

from __future__ import annotations

from collections.abc import Iterable

import torch


def is_checked() -> bool:
    """Whether values can be read: not while a model is compiled, exported or traced."""
    return not (torch.compiler.is_compiling() or torch.jit.is_tracing())


def all_finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether no value is NaN or infinite, with a single synchronization."""
    return bool(torch.stack([tensor.isfinite().all() for tensor in tensors]).all())


def check_finite(tensors: Iterable[torch.Tensor], what: str, weight: torch.Tensor, hint: str = "") -> None:
    """Raise `overflow_error` unless all values are finite."""
    if is_checked() and not all_finite(tensors):
        raise overflow_error(what, weight, hint)


def overflow_error(what: str, weight: torch.Tensor, hint: str = "") -> ValueError:
    """The error for NaN or infinite values.

    Args:
        what: the part that gives them.
        weight: one of its weights, which has the precision of the computation if autocast is off.
        hint: an alternative to float16, to append.
    """
    device = weight.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    way_out = "check its weights, and that inputs are in the range that the model was trained on"
    if dtype == torch.float16:
        way_out = f"they are beyond its largest number, 65504: use bfloat16 (--dtype bfloat16) or float32{hint}"
    return ValueError(f"{what} in {dtype}: {way_out}")


__all__ = ["all_finite", "check_finite", "is_checked", "overflow_error"]
