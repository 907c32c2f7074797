"""What a model gives is finite, or one error names the part that stopped being so and the precision it ran in."""

from __future__ import annotations

from collections.abc import Iterable

import torch


def is_checked() -> bool:
    """Whether values can be looked at: not while they are compiled, exported or traced."""
    return not (torch.compiler.is_compiling() or torch.jit.is_tracing())


def all_finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether no value is NaN or infinite: one look, however many tensors."""
    return bool(torch.stack([tensor.isfinite().all() for tensor in tensors]).all())


def check_finite(tensors: Iterable[torch.Tensor], what: str, weight: torch.Tensor, hint: str = "") -> None:
    """Raise `overflow_error` for the values that `what`, a part with this weight, has given."""
    if is_checked() and not all_finite(tensors):
        raise overflow_error(what, weight, hint)


def overflow_error(what: str, weight: torch.Tensor, hint: str = "") -> ValueError:
    """The error for NaN or infinite values.

    Args:
        what: the part that gives them.
        weight: one of its weights: where autocast is off, its precision is that of the computation.
        hint: another way out of float16.
    """
    device = weight.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    way_out = "check its weights, and that the inputs have the range that the model was trained on"
    if dtype == torch.float16:
        way_out = f"they are beyond its largest number, 65504: use bfloat16 (--dtype bfloat16) or float32{hint}"
    return ValueError(f"{what} in {dtype}: {way_out}")


__all__ = ["all_finite", "check_finite", "is_checked", "overflow_error"]
