"""What the rules and the truth are computed from: features of a pair's images, each computed once."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from aselect_hf.conversion import load_model
from aselect_hf.data.feature_cache import KeptRows, pooled_rows, token_rows
from aselect_hf.data.image_data import ImageData
from aselect_hf.data.sources import load_images
from aselect_hf.modeling.features import list_features, parse_feature
from aselect_hf.modeling.modeling_aselect_dit import ASelectDiTModel
from aselect_hf.selection import default_timesteps
from aselect_hf.selection.feature_sweep import VIEWS, Views, noise_views, stored_noise_view, sweep_features
from aselect_hf.selection.high_frequency_ratio import high_frequency_ratio
from aselect_hf.selection.inputs import SelectionInputs
from aselect_hf.selection.rule import Rule
from aselect_hf.selection.rules.hfr import AUTHORS_SPECTRUM
from aselect_hf.selection.scoring import KINDS
from aselect_hf.selection.tokens import choose_tokens
from aselect_hf.tasks import Task
from benchmarks.selection.rules import criterion_of

TRAIN, VALIDATION, VIEWED, RATIOED = 1000, 1000, 300, 128
TRAIN_TOKENS, VALIDATION_TOKENS = 8000, 6000
BATCH = 100

Features = dict[str, np.ndarray]
"""By name: `(timesteps, rows, ...)`."""


class Sources:
    """Model and images of a pair.

    Args:
        model, data: a folder, a Hub id or `"sample"`.
        task: what labels are of: images, or tokens of masks.
        device: where the model runs.
        num_train, num_validation: images at most.
        feature_filter: of `(name, the checkpoint's own feature, number of blocks)`, whether to measure it; default all
            blocks, and the kinds of `feature="auto"`.
        change_training: what to change of the training images before some are drawn; default nothing.
    """

    def __init__(
        self,
        model: str,
        data: str,
        task: Task,
        *,
        device: str | torch.device = "cpu",
        num_train: int = TRAIN,
        num_validation: int = VALIDATION,
        feature_filter: Callable[[str, str, int], bool] | None = None,
        change_training: Callable[[ImageData], ImageData] = lambda images: images,
    ) -> None:
        self.model_name, self.task = model, task
        self.model: ASelectDiTModel = load_model(model).to(device).eval()
        layers = self.model.config.num_hidden_layers
        self.timesteps = default_timesteps(self.model.noise_schedule)
        self.default_feature = str(parse_feature(str(self.model.config.feature), layers))
        wanted = feature_filter or (lambda name, own, depth: parse_feature(name, depth).kind in KINDS)
        self.features = [name for name in list_features(layers) if wanted(name, self.default_feature, layers)]
        train = ImageData.of(load_images(data, "train", masks=task.dense))
        if (validation := _validation(data, task.dense)) is None:
            rows = np.random.default_rng(0).permutation(len(train))
            train, validation = train.subset(rows[:-num_validation]), train.subset(rows[-num_validation:])
        self.train = change_training(train).sample(num_train, 0)
        self.validation = validation.sample(num_validation, 0)
        self._known: dict[str, Features] = {}

    def __getitem__(self, source: str) -> Features:
        """Features of all names, from a source without views."""
        if source == "images" and not self.task.dense:
            source = "labeled rows"
        if source not in self._known:
            self._known[source] = self._compute(source)
        return self._known[source]

    def seen_by(self, rule: Rule) -> Features:
        """Features of all names, as a rule sees them."""
        sees = criterion_of(rule).sees
        if sees not in VIEWS:
            return self[sees]
        key = f"{rule.runs} {sees}"
        if key not in self._known:
            some = self._viewed
            views = VIEWS[sees](self._inputs(some), rule.runs)
            kept = pooled_rows(self.model, len(some), 1)
            self._known[key] = self._sweep(self.model, views, kept, self.features, key)
        return self._known[key]

    def with_other_noise(self, source: str, seed: int) -> Features:
        """Labeled rows or image means of the default feature, with another draw of the stored noise."""
        key = f"{source if self.task.dense else 'labeled rows'} with noise {seed}"
        if key not in self._known:
            model = load_model(self.model_name, noise_seed=seed).to(self.model.device).eval()
            if self.task.dense and source == "images":
                self._known[key] = self._image_means([self.default_feature], model)
            else:
                self._known[key] = self._rows(self.train, [self.default_feature], model)
        return self._known[key]

    @property
    def default_rows(self) -> Features:
        """Labeled rows of the default feature."""
        return {self.default_feature: self["labeled rows"][self.default_feature]}

    @cached_property
    def validation_rows(self) -> Features:
        return self._rows(self.validation, self.features, self.model)

    @property
    def labeled_rows(self) -> Features:
        """Labeled rows of all features."""
        return self["labeled rows"]

    def fresh_noise_rows(self, features: list[str]) -> tuple[Features, Features]:
        """Training and validation rows, each image with noise of its own."""
        train, validation = (
            self._rows(data, features, self.model, noise_seed=seed)
            for seed, data in enumerate((self.train, self.validation))
        )
        return train, validation

    def truth(self, data: ImageData) -> tuple[np.ndarray, np.ndarray | None]:
        """Labels of the rows, and of which image each is where they are tokens."""
        if not self.task.dense:
            return np.asarray(data.labels), None
        chosen = self._chosen(data)
        return chosen.labels, chosen.images

    def _chosen(self, data: ImageData) -> Any:
        return choose_tokens(self._inputs(data), data, TRAIN_TOKENS if data is self.train else VALIDATION_TOKENS)

    def _inputs(self, data: ImageData, model: ASelectDiTModel | None = None, seed: int = 0) -> SelectionInputs:
        return SelectionInputs(model or self.model, data, None, self.default_feature, self.timesteps, seed, BATCH)

    def _compute(self, source: str) -> Features:
        model, features = self.model, self.features
        if source == "labeled rows":
            return self._rows(self.train, features, model)
        if source == "images":
            return self._image_means(features, model)
        if source in ("ratios", "sequence ratios"):
            return self._ratios(source, self._viewed.subset(range(min(RATIOED, len(self._viewed)))))
        raise KeyError(f"{source} are seen with a number of views: seen_by")

    @property
    def _viewed(self) -> ImageData:
        return self.train.subset(range(min(VIEWED, len(self.train))))

    def _image_means(self, features: list[str], model: ASelectDiTModel) -> Features:
        some = self._viewed
        views, kept = stored_noise_view(self._inputs(some, model), some), pooled_rows(model, len(some), 1)
        return {name: x[:, :, 0] for name, x in self._sweep(model, views, kept, features, "images").items()}

    def _rows(
        self, data: ImageData, features: list[str], model: ASelectDiTModel, noise_seed: int | None = None
    ) -> Features:
        """Rows of images or of tokens, with the stored noise, or with each image's own from a seed."""
        if self.task.dense:
            chosen = self._chosen(data)
            data, kept = chosen.data, token_rows(model, chosen.data, chosen.tokens)
        else:
            kept = pooled_rows(model, len(data), 1)
        if noise_seed is None:
            views = stored_noise_view(self._inputs(data, model), data, whole_image=kept.whole_image)
        else:
            views = noise_views(self._inputs(data, model, noise_seed), 1)
        return {name: x[:, :, 0] for name, x in self._sweep(model, views, kept, features, "rows").items()}

    @torch.no_grad()
    def _sweep(self, model: ASelectDiTModel, views: Views, kept: KeptRows, features: list[str], name: str) -> Features:
        return sweep_features(
            model, views, self.timesteps, features, kept, batch_size=BATCH, progress=True, name=name
        ).values

    @torch.no_grad()
    def _ratios(self, source: str, some: ImageData) -> Features:
        """As the HFR rules, of all features in one sweep: image and control `(..., images, 2)`, or `(..., images)`."""
        model, features, paired = self.model, self.features, source == "ratios"
        options = {} if paired else AUTHORS_SPECTRUM
        noise = noise_views(self._inputs(some), 1).noise[0, 0]
        deviations = None if paired else torch.randn(noise.shape, generator=torch.Generator().manual_seed(1))
        latents = self._inputs(some).latents(some, deviations=deviations)[0].to(noise.device)
        grid = model.grid_size(latents)
        signals = (latents, torch.zeros_like(latents)) if paired else (latents,)
        ratios = {name: np.empty((len(self.timesteps), len(some), len(signals))) for name in features}
        for column, t in enumerate(tqdm(self.timesteps, desc=source, unit="timestep")):
            for kind, signal in enumerate(signals):
                noisy = model.noise_schedule.add_noise(signal, noise, t)
                for first in range(0, len(some), BATCH):
                    part = noisy[first : first + BATCH]
                    steps = torch.full((len(part),), t, device=part.device)
                    for name, tokens in model.features_of_noisy(part, steps, features).items():
                        found = high_frequency_ratio(tokens.float(), grid, **options).cpu().numpy()
                        ratios[name][column, first : first + len(part), kind] = found
        return ratios if paired else {name: found[..., 0] for name, found in ratios.items()}


def _validation(source: str, masks: bool) -> ImageData | None:
    try:
        return ImageData.of(load_images(source, "validation", masks=masks))
    except ValueError:  # there is none
        return None
