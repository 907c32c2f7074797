"""High-Frequency Ratio (A-SelecT): the timestep whose feature has the largest share of high frequencies.

One forward process, one run per (image, timestep) up to the feature's block, no labels. Injected noise is itself
broadband, so the raw ratio also rises where the input is mostly noise and the features say nothing; by default the
ratio of pure noise of the same sigma, run through the same network, is subtracted (ours; the raw curve is kept).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from aselect_hf.selection.high_frequency_ratio import high_frequency_ratio
from aselect_hf.selection.inputs import SelectionInputs
from aselect_hf.selection.result import TimestepSelection
from aselect_hf.selection.search import SEARCHES, choose
from aselect_hf.selection.sweep import HFRSweep


def select(
    inputs: SelectionInputs,
    *,
    noise_correction: bool = True,
    search: str = "full",
    early_stopping: float | None = None,
    cutoff: float = 0.15,
    dims: int = 2,
    spectrum: str = "power",
    remove_mean: bool = False,
    standardize: bool = False,
) -> TimestepSelection:
    """Score candidate timesteps by HFR and take the highest.

    Candidates that were not scored are not in the result's `timesteps`. With `early_stopping`, candidates are dropped
    after different numbers of images: every score is the mean over the images that its candidate has seen (the others
    are `None` in `per_image_scores`), and `num_images` is the number that the last one has seen.

    Args:
        noise_correction: subtract the ratio of pure noise (`sigma * noise`, no image) from that of the images. Each
            image has its own noise, and its score is the difference of the two runs with it.
        search: `"full"`, or `"coarse_to_fine"`: about half the runs, the same choice where the curve has one peak; see
            `search.coarse_to_fine`.
        early_stopping: probability, between 0 and 1, that is accepted of stopping on a worse timestep: images are run
            in growing batches, and timesteps that are surely worse than the leader are dropped; see `search.race`.
            `None` scores all images.
        cutoff, dims, spectrum, remove_mean: see `high_frequency_ratio`.
        standardize: standardize channels over all images first, see `standardize_channels`; not with `early_stopping`.

    Raises:
        ValueError: fewer than two images (no standard error), NaN pixels, a cutoff that leaves no bins, an unknown
            search, an `early_stopping` that is no probability or comes with `standardize`.
    """
    count = len(inputs.images)
    if count < 2:
        raise ValueError(f"hfr needs at least 2 images for its standard errors, got {count}")
    if search not in SEARCHES:
        raise ValueError(f"search must be one of {', '.join(SEARCHES)}; got {search!r}")
    if early_stopping is not None and not 0 < early_stopping < 1:
        raise ValueError(f"early_stopping must be a probability between 0 and 1, or None; got {early_stopping!r}")
    if early_stopping is not None and standardize:
        raise ValueError("early_stopping compares images one by one, standardize mixes them: give one of the two")
    spectrum_options: dict[str, Any] = {
        "cutoff": cutoff,
        "dims": dims,
        "spectrum": spectrum,
        "remove_mean": remove_mean,
    }
    grid = inputs.model.config.grid_size
    high_frequency_ratio(torch.zeros(1, grid[0] * grid[1], 1), grid, **spectrum_options)  # refuses bad options early

    num = len(inputs.timesteps)
    sweep = HFRSweep(inputs, spectrum_options, standardize)

    def scores(candidates: list[int], num_images: int) -> np.ndarray:
        sweep.run(candidates, num_images)
        raw, control = (x[:num_images, candidates] for x in (sweep.raw, sweep.control))
        return raw - control if noise_correction else raw

    best = choose(scores, num, count, search, early_stopping)
    scored = np.flatnonzero(np.isfinite(sweep.raw[0]))
    seen = np.isfinite(sweep.raw[:, scored]).sum(axis=0)
    raw, control = (x[: seen.max(), scored] for x in (sweep.raw, sweep.control))
    per_image = raw - control if noise_correction else raw
    return TimestepSelection(
        method="hfr",
        feature=inputs.feature,
        timestep=inputs.timesteps[best],
        timesteps=[inputs.timesteps[candidate] for candidate in scored],
        scores=np.nanmean(per_image, axis=0).tolist(),
        standard_errors=(np.nanstd(per_image, axis=0, ddof=1) / seen**0.5).tolist(),
        cost=sweep.cost(),
        schedule=inputs.model.noise_schedule.to_dict(),
        score_name="HFR minus HFR of pure noise" if noise_correction else "HFR",
        options={
            "noise_correction": noise_correction,
            "search": search,
            "early_stopping": early_stopping,
            "candidates": num,
            "standardize": standardize,
        }
        | spectrum_options,
        num_images=int(seen.max()),
        seed=inputs.seed,
        raw_scores=np.nanmean(raw, axis=0).tolist(),
        control_scores=np.nanmean(control, axis=0).tolist(),
        per_image_scores=[[None if np.isnan(score) else float(score) for score in row] for row in per_image],
    )
