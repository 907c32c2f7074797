"""What a model gives is finite, or one error names the part that stopped being so and the precision it ran in."""

from __future__ import annotations

import torch


def is_checked() -> bool:
    """Whether values can be looked at: not while they are compiled, exported or traced."""
    return not (torch.compiler.is_compiling() or torch.jit.is_tracing())


def computed_in(tensor: torch.Tensor) -> torch.dtype:
    """The precision of a module's products: that of autocast where it is on, or else of its weights, `tensor`."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype


def overflow_error(what: str, dtype: torch.dtype, hint: str = "") -> ValueError:
    """The error for NaN or infinite values in `what`, computed in `dtype`.

    Args:
        hint: another way out of float16.
    """
    way_out = "check the weights, and that the pixel values lie in [-1, 1]"
    if dtype == torch.float16:
        way_out = f"its largest number is 65504; use bfloat16 or float32 (--dtype bfloat16){hint}"
    return ValueError(f"{what} holds NaN or infinite values in {dtype}: {way_out}")


__all__ = ["computed_in", "is_checked", "overflow_error"]
