"""HFR against what is known analytically: white noise, sinusoids, constants; its invariances; bad options."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import aselect_hf
from aselect_hf import high_frequency_ratio
from aselect_hf.selection.high_frequency_ratio import standardize_channels


def frequency(index: int, size: int) -> float:
    """Cycles per token of bin `index` of a transform of length `size`."""
    return min(index, size - index) / size


def frequencies(grid_size: tuple[int, int], dims: int) -> list[float]:
    height, width = grid_size
    if dims == 1:
        return [frequency(index, height * width) for index in range(height * width)]
    return [math.hypot(frequency(i, height), frequency(j, width)) for i in range(height) for j in range(width)]


def wave(grid_size: tuple[int, int], cycles: tuple[int, int], phase: float = 0.3) -> torch.Tensor:
    """`(1, height * width, 1)` tokens of a cosine with whole cycles along the height and the width."""
    height, width = grid_size
    rows, columns = torch.arange(height)[:, None], torch.arange(width)[None]
    angle = 2 * math.pi * (cycles[0] * rows / height + cycles[1] * columns / width) + phase
    return angle.cos().reshape(1, -1, 1)


def test_exported() -> None:
    assert aselect_hf.high_frequency_ratio is high_frequency_ratio


@pytest.mark.parametrize("remove_mean", [False, True])
@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("cutoff", [0.0, 0.15, 0.3])
@pytest.mark.parametrize("grid_size", [(16, 16), (6, 11)])
def test_white_noise_has_the_share_of_bins(
    normal: Any, grid_size: tuple[int, int], cutoff: float, dims: int, remove_mean: bool
) -> None:
    if remove_mean and cutoff == 0:
        pytest.skip("no low bin is left: refused, tested below")
    ratio = high_frequency_ratio(
        normal(4, math.prod(grid_size), 4000), grid_size, cutoff=cutoff, dims=dims, remove_mean=remove_mean
    )
    bins = frequencies(grid_size, dims)
    share = sum(f > cutoff for f in bins) / (len(bins) - remove_mean)
    assert ratio.shape == (4,)
    torch.testing.assert_close(ratio, torch.full((4,), share), atol=0.005, rtol=0)


def test_white_noise_amplitudes_on_a_large_grid(normal: Any) -> None:
    ratio = high_frequency_ratio(normal(1, 64 * 64, 20), (64, 64), spectrum="amplitude")
    share = sum(f > 0.15 for f in frequencies((64, 64), 2)) / 64**2
    assert ratio.item() == pytest.approx(share, abs=0.005)


@pytest.mark.parametrize("spectrum", ["power", "amplitude"])
@pytest.mark.parametrize("remove_mean", [False, True])
@pytest.mark.parametrize("grid_size", [(16, 16), (12, 20)])
@pytest.mark.parametrize(
    ("cycles", "expected"), [((1, 0), 0), ((0, 1), 0), ((1, 1), 0), ((5, 0), 1), ((0, 7), 1), ((4, 5), 1)]
)
def test_pure_waves_are_low_or_high(
    grid_size: tuple[int, int], cycles: tuple[int, int], expected: int, spectrum: str, remove_mean: bool
) -> None:
    ratio = high_frequency_ratio(wave(grid_size, cycles), grid_size, spectrum=spectrum, remove_mean=remove_mean)
    assert ratio.item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("cycles", "expected"), [(2, 0), (9, 0), (20, 1), (31, 1)])
def test_one_dimensional_waves_follow_the_token_sequence(cycles: int, expected: int) -> None:
    tokens = wave((1, 64), (0, cycles))
    assert high_frequency_ratio(tokens, (8, 8), dims=1).item() == pytest.approx(expected, abs=1e-4)


def test_one_and_two_dimensions_differ_where_they_should() -> None:
    """A wave down the columns is fast on the grid, and slow along the row-major sequence."""
    tokens = wave((8, 8), (2, 0))
    assert high_frequency_ratio(tokens, (8, 8), dims=2).item() == pytest.approx(1, abs=1e-4)
    assert high_frequency_ratio(tokens, (8, 8), dims=1).item() < 0.2


def test_tokens_are_row_major_on_a_non_square_grid() -> None:
    """2 cycles over 16 columns are low (0.125), over 4 rows high (0.5): the axes must not be swapped."""
    assert high_frequency_ratio(wave((4, 16), (0, 2)), (4, 16)).item() == pytest.approx(0, abs=1e-5)
    assert high_frequency_ratio(wave((4, 16), (2, 0), phase=0), (4, 16)).item() == pytest.approx(1, abs=1e-5)


def test_power_of_a_mixture() -> None:
    """A low wave of amplitude 1, a high one of amplitude 3 and a mean: shares of power and of amplitude by hand."""
    low, high = wave((16, 16), (1, 0)), 3 * wave((16, 16), (5, 0))
    tokens = low + high + 2
    # A cosine of amplitude a has two bins of a / 2; the mean has one bin.
    for spectrum, remove_mean, expected in [
        ("power", False, 4.5 / (0.5 + 4.5 + 4)),
        ("power", True, 4.5 / 5),
        ("amplitude", False, 3 / (1 + 3 + 2)),
        ("amplitude", True, 3 / 4),
    ]:
        ratio = high_frequency_ratio(tokens, (16, 16), spectrum=spectrum, remove_mean=remove_mean)
        assert ratio.item() == pytest.approx(expected, abs=1e-4)


@given(data=st.data())
def test_bounded_and_invariant_to_scale(data: st.DataObject) -> None:
    grid_size = (data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9)))
    dims = data.draw(st.sampled_from([1, 2]))
    highest = max(frequencies(grid_size, dims))
    lowest = min((f for f in frequencies(grid_size, dims) if f), default=0)
    options: dict[str, Any] = {
        "dims": dims,
        "spectrum": data.draw(st.sampled_from(["power", "amplitude"])),
        "remove_mean": data.draw(st.booleans()),
        "cutoff": data.draw(st.floats(0, 0.7)),
    }
    assume(options["cutoff"] < highest - 1e-6)
    assume(not options["remove_mean"] or options["cutoff"] > lowest + 1e-6)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    tokens = torch.randn(2, math.prod(grid_size), 3, generator=generator) + data.draw(st.floats(-3, 3))
    ratio = high_frequency_ratio(tokens, grid_size, **options)
    assert ratio.shape == (2,)
    assert bool(((ratio >= 0) & (ratio <= 1)).all())
    scale = torch.tensor([10.0 ** data.draw(st.integers(-30, 30)) for _ in range(3)])
    torch.testing.assert_close(high_frequency_ratio(tokens * scale, grid_size, **options), ratio, rtol=1e-3, atol=1e-4)


@given(size=st.integers(2, 64), data=st.data())
def test_a_bin_exactly_at_the_cutoff_is_low(size: int, data: st.DataObject) -> None:
    """ "Strictly larger" must not depend on how a fraction rounds."""
    cut = data.draw(st.integers(0, (size - 1) // 2))
    assume(any(Fraction(min(k, size - k), size) > Fraction(cut, size) for k in range(size)))
    tokens = wave((1, size), (0, cut))
    assert high_frequency_ratio(tokens, (1, size), cutoff=cut / size).item() == pytest.approx(0, abs=1e-4)
    assert high_frequency_ratio(tokens, (1, size), cutoff=cut / size, dims=1).item() == pytest.approx(0, abs=1e-4)


def test_channels_are_averaged_and_an_empty_one_counts_as_zero() -> None:
    high, low = wave((16, 16), (5, 0)), wave((16, 16), (1, 0))
    tokens = torch.cat([high, low, torch.zeros_like(high), 1e20 * high], dim=2)
    assert high_frequency_ratio(tokens, (16, 16)).item() == pytest.approx(0.5, abs=1e-4)
    assert high_frequency_ratio(torch.zeros(2, 9, 3), (3, 3)).tolist() == [0, 0]


@pytest.mark.parametrize("grid_size", [(8, 8), (7, 7), (5, 9)])
@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("remove_mean", [False, True])
def test_a_constant_channel_has_no_high_frequencies(grid_size: tuple[int, int], dims: int, remove_mean: bool) -> None:
    """With the mean removed nothing is left but rounding, which is no energy."""
    tokens = torch.full((1, math.prod(grid_size), 3), 1.1) * torch.tensor([1.0, -30.0, 1e6])
    ratio = high_frequency_ratio(tokens, grid_size, dims=dims, remove_mean=remove_mean)
    assert ratio.item() == pytest.approx(0, abs=1e-6)


def test_images_do_not_mix(normal: Any) -> None:
    tokens = normal(5, 36, 7)
    alone = torch.cat([high_frequency_ratio(image[None], (6, 6)) for image in tokens])
    torch.testing.assert_close(high_frequency_ratio(tokens, (6, 6)), alone)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_type_is_computed_in_float32(normal: Any, dtype: torch.dtype) -> None:
    tokens = normal(2, 64, 8).to(dtype)
    assert high_frequency_ratio(tokens, (8, 8)).dtype == torch.float32
    torch.testing.assert_close(high_frequency_ratio(tokens, (8, 8)), high_frequency_ratio(tokens.float(), (8, 8)))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"cutoff": 0.5, "dims": 1}, "cutoff"),
        ({"cutoff": 0.71}, "cutoff"),
        ({"cutoff": -0.1}, "cutoff"),
        ({"cutoff": math.nan}, "cutoff"),
        ({"cutoff": 0.1, "remove_mean": True}, "cutoff"),  # the lowest of 8 x 8 bins beside the mean is 0.125
        ({"cutoff": 0.0, "remove_mean": True, "dims": 1}, "cutoff"),
        ({"dims": 3}, "dims"),
        ({"spectrum": "phase"}, "spectrum"),
    ],
    ids=repr,
)
def test_bad_options_are_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        high_frequency_ratio(torch.randn(1, 64, 3), (8, 8), **options)


def test_a_grid_of_one_token_has_no_high_bin() -> None:
    with pytest.raises(ValueError, match="cutoff"):
        high_frequency_ratio(torch.randn(1, 1, 3), (1, 1))


@pytest.mark.parametrize("shape", [(64, 3), (1, 63, 3), (1, 3, 8, 8), (1, 3, 64)], ids=str)
def test_shapes_must_match_the_grid(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"tokens must be"):
        high_frequency_ratio(torch.randn(shape), (8, 8))


def test_standardize_channels(normal: Any) -> None:
    tokens = normal(4, 36, 3) * torch.tensor([1.0, 50.0, 1e-2]) + torch.tensor([0.0, -7.0, 3.0])
    standard = standardize_channels(tokens)
    assert standard.shape == tokens.shape
    torch.testing.assert_close(standard.mean((0, 1)), torch.zeros(3), atol=1e-3, rtol=0)
    torch.testing.assert_close(standard.std((0, 1), correction=0), torch.ones(3), atol=1e-3, rtol=0)


def test_standardize_removes_a_massive_activation(normal: Any) -> None:
    """What a huge constant hides in the spectrum is seen again; a constant channel stays finite and flat."""
    tokens = normal(4, 64, 2) + torch.tensor([1e3, 0.0])
    hidden = high_frequency_ratio(tokens, (8, 8))
    seen = high_frequency_ratio(standardize_channels(tokens), (8, 8))
    share = sum(f > 0.15 for f in frequencies((8, 8), 2)) / 64
    assert bool((hidden < 0.6).all())
    torch.testing.assert_close(seen, torch.full((4,), share), atol=0.1, rtol=0)
    flat = standardize_channels(torch.full((2, 64, 1), 4.0))
    assert torch.equal(flat, torch.zeros_like(flat))
