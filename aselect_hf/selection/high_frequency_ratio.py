"""High-Frequency Ratio (HFR): the share of high spatial frequencies in a feature (A-SelecT, arXiv 2603.25758).

The paper defines HFR as that share; its code has a cutoff of 0.15 and a switch between 1-D and 2-D. The exact form
below (spectrum, bins, averaging) is ours.
"""

from __future__ import annotations

import torch

SPECTRA = ("power", "amplitude")


def high_frequency_ratio(
    tokens: torch.Tensor,
    grid_size: tuple[int, int],
    *,
    cutoff: float = 0.15,
    dims: int = 2,
    spectrum: str = "power",
    remove_mean: bool = False,
) -> torch.Tensor:
    """Share of the spectrum above `cutoff`, per channel, averaged over channels.

    Args:
        tokens: `(batch, height * width, channels)`, row-major; computed in float32.
        grid_size: `(height, width)` of the patch grid.
        cutoff: in cycles per token; bins with a strictly higher frequency are high. Nyquist is 0.5 per axis.
        dims: `2` for the spectrum over the patch grid (radial frequency), `1` for the token sequence.
        spectrum: `"power"` (squared magnitude) or `"amplitude"` (magnitude).
        remove_mean: leave the zero-frequency bin out of the total.

    Returns:
        `(batch,)` ratios in [0, 1]. They do not depend on the scale of a channel; a channel without energy counts as 0.

    Raises:
        ValueError: shapes do not match, an option is unknown, or `cutoff` leaves no bin on one of its sides.
    """
    if tokens.ndim != 3 or tokens.shape[1] != grid_size[0] * grid_size[1]:
        raise ValueError(
            f"tokens must be (batch, {grid_size[0]} * {grid_size[1]}, channels) for grid_size={tuple(grid_size)}, "
            f"got {tuple(tokens.shape)}"
        )
    if spectrum not in SPECTRA:
        raise ValueError(f"spectrum must be one of {', '.join(SPECTRA)}; got {spectrum!r}")
    frequencies = bin_frequencies(grid_size, dims).to(tokens.device)
    high = frequencies > cutoff + 1e-9  # a bin at the cutoff is low despite rounding
    low = ~high[1:] if remove_mean else ~high
    if not cutoff >= 0 or not high.any() or not low.any():
        lowest = frequencies[1:].min().item() if remove_mean and len(frequencies) > 1 else 0
        raise ValueError(
            f"cutoff={cutoff} leaves no bins on one side: with dims={dims} and grid_size={tuple(grid_size)} it must be "
            f"at least {lowest:.3g} and below {frequencies.max().item():.3f} cycles per token"
        )
    signal = tokens.float().transpose(1, 2)
    tiny = torch.finfo(signal.dtype).tiny
    signal = signal / signal.abs().amax(-1, keepdim=True).clamp(min=tiny)
    if remove_mean:  # the remainder of a constant channel is rounding, not energy
        signal = signal - signal.mean(-1, keepdim=True)
        signal = signal * (signal.abs().amax(-1, keepdim=True) > 1e-6)
    if dims == 2:
        signal = signal.unflatten(-1, grid_size)
    energy = torch.fft.fftn(signal, dim=tuple(range(-dims, 0))).abs().flatten(2)
    if spectrum == "power":
        energy = energy.square()
    if remove_mean:
        energy = energy[..., 1:]
        high = high[1:]
    ratio = energy[..., high].sum(-1) / energy.sum(-1).clamp(min=tiny)
    return ratio.clamp(0, 1).mean(-1)


def bin_frequencies(grid_size: tuple[int, int], dims: int = 2) -> torch.Tensor:
    """Frequency of every bin of the transform, in cycles per token, flattened; the first is the mean (0)."""
    if dims == 1:
        return torch.fft.fftfreq(grid_size[0] * grid_size[1], dtype=torch.float64).abs()
    if dims == 2:
        vertical, horizontal = (torch.fft.fftfreq(size, dtype=torch.float64) for size in grid_size)
        return torch.hypot(vertical[:, None], horizontal[None, :]).flatten()
    raise ValueError(f"dims must be 1 (token sequence) or 2 (patch grid), got {dims!r}")


def standardize_channels(tokens: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """Shift and scale every channel of `(batch, tokens, channels)` to mean 0 and deviation 1 over batch and tokens.

    This removes what all images share in a channel, such as the constant part of a massive activation (DiTF).
    """
    deviation, mean = torch.std_mean(tokens.float(), dim=(0, 1), correction=0)
    return (tokens.float() - mean) / (deviation + eps)
