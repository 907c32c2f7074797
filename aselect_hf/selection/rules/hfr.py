"""High-Frequency Ratio (A-SelecT): the timestep whose feature has the largest share of high frequencies.

Each image is run once per timestep, up to the feature's block, without labels. Injected noise is itself broadband, so
the raw ratio also rises where the input is mostly noise and the features say nothing. By default the ratio of pure
noise of the same sigma, run through the same network, is therefore subtracted (ours; the raw curve is kept).
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch

from aselect_hf.selection.high_frequency_ratio import high_frequency_ratio
from aselect_hf.selection.inputs import SelectionInputs
from aselect_hf.selection.result import TimestepSelection
from aselect_hf.selection.rule import Criterion, rule
from aselect_hf.selection.search import SEARCHES, choose
from aselect_hf.selection.sweep import HFRSweep
from aselect_hf.selection.ties import best_of

SCORE_NAME = "HFR minus HFR of pure noise"
AUTHORS_SPECTRUM: dict[str, Any] = {"cutoff": 0.15, "dims": 1, "spectrum": "power", "remove_mean": False}


def hfr_score(ratios: np.ndarray, noise_correction: bool = True) -> float:
    """Mean over images of the ratio of the image less that of its noise, from `(images, 2)`."""
    return float((ratios[:, 0] - ratios[:, 1] if noise_correction else ratios[:, 0]).mean())


@rule(
    "hfr",
    labels="none",
    explanation="Takes the timestep whose feature has the highest High-Frequency Ratio, the share of its spectrum "
    "above a cutoff, by default less that of pure noise.",
    num_images=64,
    runs=2,
    criterion=Criterion(hfr_score, "ratios", SCORE_NAME),
)
def select_hfr(
    inputs: SelectionInputs,
    *,
    noise_correction: bool = True,
    search: Literal["full", "coarse_to_fine"] = "full",
    early_stopping: float | None = None,
    cutoff: float = 0.15,
    dims: int = 2,
    spectrum: Literal["power", "amplitude"] = "power",
    remove_mean: bool = False,
    standardize: bool = False,
) -> TimestepSelection:
    """Score candidate timesteps by HFR and take the highest.

    Each image has its own noise; its score is its HFR less that of this noise. Candidates that were not scored are not
    in the result's `timesteps`. With `early_stopping`, candidates see different numbers of images. Each score is then
    the mean over the images that its candidate has seen (the others are `None` in `per_image_scores`), and `num_images`
    is the largest of these numbers. See `search.race`, `search.coarse_to_fine` and `high_frequency_ratio`.

    Args:
        noise_correction: Subtract the HFR of pure noise from that of the images (default: True).
        search: "full" scores every candidate; "coarse_to_fine" scores about half of them and chooses the same if the
            curve has a single peak (default: full).
        early_stopping: Accepted probability of missing the best timestep. Candidates that are significantly worse than
            the leader are dropped while images are added (default: None, every image is scored).
        cutoff: Cycles per token above which a frequency is high (default: 0.15).
        dims: 2 for the spectrum over the patch grid, 1 for the spectrum over the token sequence (default: 2).
        spectrum: "power" for squared magnitudes, or "amplitude" (default: power).
        remove_mean: Leave the zero frequency out of the total (default: False).
        standardize: Standardize channels over all images first; not with early stopping (default: False).

    Raises:
        ValueError: fewer than 2 images, NaN pixels, a cutoff that leaves no bins, an unknown search, an
            `early_stopping` that is not a probability or comes with `standardize`.
    """
    count = len(inputs.images)
    if count < 2:
        raise ValueError(f"hfr needs at least 2 images for its standard errors, got {count}")
    if search not in SEARCHES:
        raise ValueError(f"search must be one of {', '.join(SEARCHES)}; got {search!r}")
    if early_stopping is not None and not 0 < early_stopping < 1:
        raise ValueError(f"early_stopping must be a probability between 0 and 1, or None; got {early_stopping!r}")
    if early_stopping is not None and standardize:
        raise ValueError("early_stopping compares images one by one, but standardize mixes them: give one of the two")
    spectrum_options: dict[str, Any] = {"cutoff": cutoff, "dims": dims, "spectrum": spectrum}
    spectrum_options["remove_mean"] = remove_mean
    grid = inputs.model.config.grid_size
    high_frequency_ratio(torch.zeros(1, grid[0] * grid[1], 1), grid, **spectrum_options)  # refuses bad options early

    num = len(inputs.timesteps)
    sweep = HFRSweep(inputs, spectrum_options, standardize, noise_correction)
    best = choose(sweep.scores, num, count, search, early_stopping)
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
        score_name=SCORE_NAME if noise_correction else "HFR",
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


def raw_score(ratios: np.ndarray) -> float:
    """Mean of the images' ratios `(images,)`."""
    return float(ratios.mean())


@rule(
    "hfr_authors",
    labels="none",
    explanation="Takes the timestep with the highest High-Frequency Ratio as the authors of A-SelecT configure it: "
    "over the token sequence, of sampled latents, without a correction for noise.",
    num_images=64,
    criterion=Criterion(raw_score, "sequence ratios", "HFR over the token sequence"),
)
def select_hfr_authors(inputs: SelectionInputs) -> TimestepSelection:
    """Score each candidate by HFR with the settings in the authors' public configuration.

    The spectrum is 1-D over the token sequence with a cutoff of 0.15, latents are samples of the VAE's posterior, and
    each image has noise of its own. The authors' code of the ratio itself is not public: the power spectrum, its bins
    and the averaging are those of `high_frequency_ratio` (ours).

    Raises:
        ValueError: fewer than 2 images, NaN pixels.
    """
    count = len(inputs.images)
    if count < 2:
        raise ValueError(f"hfr_authors needs at least 2 images for its standard errors, got {count}")
    sweep = HFRSweep(inputs, AUTHORS_SPECTRUM, noise_correction=False, control=False, sample_latents=True)
    per_image = sweep.scores([*range(len(inputs.timesteps))], count)
    scores = per_image.mean(axis=0)
    return TimestepSelection(
        method="hfr_authors",
        feature=inputs.feature,
        timestep=inputs.timesteps[best_of(scores)],
        timesteps=inputs.timesteps,
        scores=scores.tolist(),
        standard_errors=(per_image.std(axis=0, ddof=1) / count**0.5).tolist(),
        cost=sweep.cost(),
        schedule=inputs.model.noise_schedule.to_dict(),
        score_name="HFR over the token sequence",
        options=AUTHORS_SPECTRUM | {"noise_correction": False, "latents": "sampled"},
        num_images=count,
        seed=inputs.seed,
        per_image_scores=per_image.tolist(),
    )
