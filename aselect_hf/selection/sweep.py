"""High-Frequency Ratios of images and of pure noise at candidate timesteps, each computed once, on demand."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate.utils import find_executable_batch_size
from tqdm.auto import tqdm

from aselect_hf.cost import sweep_flops
from aselect_hf.data.latent_cache import latent_shape
from aselect_hf.data.processes import Processes, processes
from aselect_hf.selection.high_frequency_ratio import high_frequency_ratio, standardize_channels
from aselect_hf.selection.inputs import SelectionInputs
from aselect_hf.selection.result import SelectionCost

LARGEST_BATCH = {"cpu": 64}
LARGEST_ELSEWHERE = 256
"""Default batch size, halved until a batch fits. Larger ones help neither a CPU nor an H100, which did 2,309 to 5,966
passes per second with a batch size of 1,024 and 3,150 to 17,570 with 256 (`benchmarks/results/on-gpu-*.md`)."""


@dataclass
class _Runs:
    """Network runs, each of an image times a scale (0: pure noise) at a timestep; `done` holds the ratios so far."""

    rows: torch.Tensor
    scales: torch.Tensor
    steps: torch.Tensor
    grid: tuple[int, int]
    done: list[torch.Tensor] = field(default_factory=list)


@dataclass
class _Ratios:
    """Ratios `(kinds of runs, ratios)` with the image and the candidate of each."""

    images: np.ndarray
    columns: np.ndarray
    ratios: np.ndarray


class HFRSweep:
    """Ratios of the first images at any candidates.

    A batch mixes timesteps, images and their controls. Every image is encoded once and has one noise, which also is its
    control. Inside `shared_work` every process does the runs of its own images, and all get all ratios; with
    `standardize`, which mixes images, every process does all runs.

    Args:
        inputs: a `batch_size` of `None` is found automatically, see `LARGEST_BATCH`.
        spectrum_options: options of `high_frequency_ratio`.
        standardize: standardize channels over all images of a timestep first; every call must then ask for all images.
        noise_correction: subtract the ratios of noise in `scores`.
        control: also run the noise alone.
        sample_latents: draw each image's latents from the VAE's posterior, once, instead of taking its mean.

    Attributes:
        raw, control: `(images, candidates)`, ratios of the images and of their noise; NaN if not yet computed.
        batch_size: runs per batch, as found by the calls so far.
    """

    def __init__(
        self,
        inputs: SelectionInputs,
        spectrum_options: dict[str, Any],
        standardize: bool = False,
        noise_correction: bool = True,
        *,
        control: bool = True,
        sample_latents: bool = False,
    ) -> None:
        self.inputs, self.spectrum_options = inputs, spectrum_options
        self.standardize, self.noise_correction = standardize, noise_correction
        self.weights = (1.0, 0.0) if control else (1.0,)
        self.here = Processes() if standardize else processes()
        self.seconds, self.encoded = 0.0, 0
        count = len(inputs.images)
        self.raw, self.control = np.full((2, count, len(inputs.timesteps)), np.nan)
        shape = latent_shape(inputs.model, inputs.images)
        generator = torch.Generator().manual_seed(inputs.seed)
        self.noise = torch.randn((count, *shape), generator=generator)
        self.deviations = torch.randn((count, *shape), generator=generator) if sample_latents else None
        self.latents = torch.empty(0, *shape)
        self.batch_size = inputs.batch_size or LARGEST_BATCH.get(inputs.model.device.type, LARGEST_ELSEWHERE)
        total = len(self.weights) * len(self.here.every(count)) * len(inputs.timesteps)
        quiet = not (inputs.progress and processes().is_main)
        self.bar = tqdm(total=total, desc="hfr", unit="pass", disable=quiet)

    def scores(self, candidates: list[int], num_images: int) -> np.ndarray:
        """Scores of the first images at candidates, given by index: `(num_images, len(candidates))`."""
        self.run(candidates, num_images)
        raw, control = (x[:num_images, candidates] for x in (self.raw, self.control))
        return raw - control if self.noise_correction else raw

    def run(self, candidates: list[int], num_images: int) -> None:
        """Fill `raw` and `control` for the first images at candidates, given by index."""
        self._encode(num_images)
        columns = np.asarray(candidates)
        missing, images = np.nonzero(np.isnan(self.raw[:num_images, columns].T))
        if not len(images):
            return
        columns = columns[missing]
        own = images % self.here.count == self.here.index
        for found in self.here.gather(self._own_ratios(images[own], columns[own])):
            for kind, values in zip((self.raw, self.control), found.ratios, strict=False):
                kind[found.images, found.columns] = values

    def cost(self) -> SelectionCost:
        """Cost of everything so far, with the time that encoding takes without a cache."""
        self.bar.close()
        self.seconds = max(self.here.gather(self.seconds))
        model, passes = self.inputs.model, len(self.weights) * int(np.isfinite(self.raw).sum())
        flops = sweep_flops(model, self.encoded, passes, self.inputs.feature)
        return SelectionCost(passes, self.seconds, flops, self.here.count)

    def _encode(self, num_images: int) -> None:
        """Extend `latents`, those of this process's images, to the first `num_images` of all."""
        missing = range(self.encoded, num_images)
        if not missing:
            return
        images = self.inputs.images.subset(missing) if len(missing) < len(self.inputs.images) else self.inputs.images
        own = [image for image in missing if image % self.here.count == self.here.index]
        deviations = None if self.deviations is None else self.deviations[own]
        rows = [image - missing.start for image in own]
        new, seconds = self.inputs.latents(images, rows, deviations=deviations)
        self.seconds, self.encoded = self.seconds + seconds, num_images
        self.latents = torch.cat([self.latents, new])

    def _own_ratios(self, images: np.ndarray, columns: np.ndarray) -> _Ratios:
        """Ratios of this process's images at candidates, one by one."""
        runs = len(self.weights)
        if not len(images):
            return _Ratios(images, columns, np.empty((runs, 0)))
        ratios = self._ratios(np.tile(images, runs), np.tile(columns, runs), np.repeat(self.weights, len(images)))
        return _Ratios(images, columns, ratios.reshape(runs, -1))

    def _ratios(self, images: np.ndarray, columns: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Ratio of every run, float64: an image times its weight (0: pure noise) at a candidate."""
        started = time.perf_counter()
        steps = torch.tensor(self.inputs.timesteps)[columns]
        rows, scales = torch.from_numpy(images), torch.from_numpy(weights).float().view(-1, 1, 1, 1)
        grid = self.inputs.model.grid_size(self.noise)
        runs = _Runs(rows, scales, steps, grid)
        if self.inputs.batch_size is None:
            find_executable_batch_size(self._finish, self.batch_size, self._halve)(runs)
        else:
            self._finish(self.batch_size, runs)
        ratios = torch.cat(runs.done).numpy()
        self.inputs.check_finite(ratios)
        self.seconds += time.perf_counter() - started
        return ratios

    def _finish(self, batch_size: int, runs: _Runs) -> None:
        """Do the remaining runs; those that are done are kept if a batch does not fit."""
        while (start := sum(map(len, runs.done))) < len(runs.rows):
            together = slice(start, start + (len(self.raw) if self.standardize else batch_size))
            parts = zip(*(x[together].split(batch_size) for x in (runs.rows, runs.scales, runs.steps)), strict=True)
            tokens = torch.cat([self._tokens(*part) for part in parts])  # (runs, tokens, width)
            if self.standardize:
                tokens = standardize_channels(tokens)
            runs.done.append(high_frequency_ratio(tokens, runs.grid, **self.spectrum_options).double().cpu())
            self.bar.update(len(tokens))

    def _halve(self) -> int:
        self.batch_size //= 2
        return self.batch_size

    def _tokens(self, rows: torch.Tensor, scales: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        """The feature of one batch, `(batch, tokens, width)` float32."""
        model, feature = self.inputs.model, self.inputs.feature
        own = rows // self.here.count
        clean, noise, steps = (x.to(model.device) for x in (scales * self.latents[own], self.noise[rows], steps))
        noisy = model.noise_schedule.add_noise(clean, noise, steps)
        return model.features_of_noisy(noisy, steps, [feature])[feature].float()
