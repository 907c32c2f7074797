"""High-Frequency Ratio (A-SelecT): the timestep whose feature has the largest share of high frequencies.

One forward process, one run per (image, timestep) up to the feature's block, no labels. Injected noise is itself
broadband, so the raw ratio also rises where the input is mostly noise and the features say nothing; by default the
ratio of pure noise of the same sigma, run through the same network, is subtracted (ours; the raw curve is kept).
"""

from __future__ import annotations

import time
from typing import Any

import torch
from tqdm.auto import tqdm

from aselect_hf.cost import encode_flops, feature_flops
from aselect_hf.modeling.high_frequency_ratio import high_frequency_ratio, standardize_channels
from aselect_hf.selection.inputs import SelectionInputs
from aselect_hf.selection.result import SelectionCost, TimestepSelection


def select(
    inputs: SelectionInputs,
    *,
    noise_correction: bool = True,
    cutoff: float = 0.15,
    dims: int = 2,
    spectrum: str = "power",
    remove_mean: bool = False,
    standardize: bool = False,
) -> TimestepSelection:
    """Score every candidate timestep by HFR and take the highest.

    Args:
        noise_correction: subtract the ratio of pure noise (`sigma * noise`, no image) from that of the images.
        cutoff, dims, spectrum, remove_mean: see `high_frequency_ratio`.
        standardize: standardise channels first, see `standardize_channels`.

    Raises:
        ValueError: fewer than two images (no standard error), NaN pixels, a cutoff that leaves no bins.
    """
    started = time.perf_counter()
    model, count = inputs.model, len(inputs.images)
    if count < 2:
        raise ValueError(f"hfr needs at least 2 images for its standard errors, got {count}")
    spectrum_options: dict[str, Any] = {
        "cutoff": cutoff,
        "dims": dims,
        "spectrum": spectrum,
        "remove_mean": remove_mean,
    }
    grid = model.config.grid_size
    high_frequency_ratio(torch.zeros(1, grid[0] * grid[1], 1), grid, **spectrum_options)  # refuses bad options early
    batches = inputs.images.batches(model.config, inputs.batch_size)
    latents = torch.cat([model.prepare_latents(batch.to(model.device)).float() for batch in batches])
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(inputs.seed)).to(latents)

    passes = 2 * count * len(inputs.timesteps)
    with tqdm(total=passes, desc="hfr", unit="pass", disable=not inputs.progress) as bar:
        raw, control = (
            _ratios(inputs, clean, noise, spectrum_options, standardize, bar)
            for clean in (latents, torch.zeros_like(latents))
        )
    per_image = raw - control if noise_correction else raw
    scores = per_image.mean(dim=0)
    flops = count * encode_flops(model) + passes * feature_flops(model, inputs.feature)
    return TimestepSelection(
        method="hfr",
        feature=inputs.feature,
        timestep=inputs.timesteps[int(scores.argmax())],
        timesteps=inputs.timesteps,
        scores=scores.tolist(),
        standard_errors=(per_image.std(dim=0) / count**0.5).tolist(),
        cost=SelectionCost(passes, time.perf_counter() - started, flops),
        schedule=model.noise_schedule.to_dict(),
        score_name="HFR minus HFR of pure noise" if noise_correction else "HFR",
        options={"noise_correction": noise_correction, "standardize": standardize} | spectrum_options,
        num_images=count,
        seed=inputs.seed,
        raw_scores=raw.mean(dim=0).tolist(),
        control_scores=control.mean(dim=0).tolist(),
        per_image_scores=per_image.tolist(),
    )


def _ratios(
    inputs: SelectionInputs,
    clean: torch.Tensor,
    noise: torch.Tensor,
    spectrum_options: dict[str, Any],
    standardize: bool,
    bar: tqdm,
) -> torch.Tensor:
    """HFR of every image at every timestep, `(images, timesteps)`, float64 on the CPU; timesteps share batches."""
    model, count = inputs.model, len(clean)
    grid = (clean.shape[-2] // model.config.patch_size, clean.shape[-1] // model.config.patch_size)
    together = max(1, inputs.batch_size // count)
    columns = []
    for start in range(0, len(inputs.timesteps), together):
        group = inputs.timesteps[start : start + together]
        noisy = torch.cat([model.noise_schedule.add_noise(clean, noise, t) for t in group])
        steps = torch.tensor(group, device=noisy.device).repeat_interleave(count)
        tokens = []
        for batch, batch_steps in zip(noisy.split(inputs.batch_size), steps.split(inputs.batch_size), strict=True):
            tokens.append(model.features_of_noisy(batch, batch_steps, [inputs.feature])[inputs.feature].float())
            bar.update(len(batch))
        for features in torch.cat(tokens).split(count):
            if standardize:
                features = standardize_channels(features)
            columns.append(high_frequency_ratio(features, grid, **spectrum_options).double().cpu())
    return torch.stack(columns, dim=1)
