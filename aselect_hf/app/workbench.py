"""Everything that the page computes, without the page."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image

from aselect_hf.app.cache import BoundedCache
from aselect_hf.app.checkpoint import Checkpoint
from aselect_hf.app.compute import COMPUTATIONS, Progress, no_progress
from aselect_hf.app.uploads import Upload
from aselect_hf.data.image_data import ImageData
from aselect_hf.data.sources import load_images
from aselect_hf.pictures import FeatureColors, PictureSweep
from aselect_hf.selection.high_frequency_ratio import high_frequency_ratio

MAX_SWEEP_BYTES = 2**28
MAX_CACHED_BYTES = 2**30
NUM_NEIGHBORS = 10
GALLERY_PER_CLASS = 12


class Workbench:
    """Sweeps, predictions and neighbors for the models on show, each computed once.

    Args:
        checkpoints: at least one; names must differ.
    """

    def __init__(self, checkpoints: list[Checkpoint]) -> None:
        self.checkpoints = {each.name: each for each in checkpoints}
        if not checkpoints or len(self.checkpoints) < len(checkpoints):
            raise ValueError(f"models must have different names, got {', '.join(each.name for each in checkpoints)}")
        self.cache = BoundedCache(MAX_CACHED_BYTES)
        self._run: Callable[..., Any] = self._run_here

    def borrow(self, lend: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Run models by a function that is lent a GPU for the length of a call, as `spaces.GPU` does.

        Such a call may run in another process: only names, pictures and tensors pass, and no progress is shown.
        """
        lent = lend(self._run_here)
        self._run = lambda *inputs, progress=no_progress: lent(*inputs)

    def _run_here(self, what: str, name: str, *inputs: Any, progress: Progress = no_progress) -> Any:
        return COMPUTATIONS[what](self.checkpoint(name), *inputs, progress=progress)

    def checkpoint(self, name: str | None) -> Checkpoint:
        """The model of this name (default: the first)."""
        if name is None:
            return next(iter(self.checkpoints.values()))
        if name not in self.checkpoints:
            raise ValueError(f"model must be one of {', '.join(self.checkpoints)}; got {name!r}")
        return self.checkpoints[name]

    def sweep(self, shown: Checkpoint, upload: Upload, feature: str, progress: Progress = no_progress) -> PictureSweep:
        """All timesteps of a picture with this feature, and with as many others as fit into memory.

        Raises:
            ValueError: the model's timestep is fixed.
        """
        if not shown.can_walk:
            fixed = (shown.backbone.config.fixed_to or {}).get("timestep")
            raise ValueError(f"The timestep of this model is fixed to {fixed}: there is nothing to walk over.")
        features = features_together(shown, feature)

        def compute() -> PictureSweep:
            return self._run("sweep", shown.name, upload.picture, features, progress=progress)

        return self.cache.get(("sweep", shown.name, upload.key, *features), compute, sweep_bytes)

    def colors(self, shown: Checkpoint, upload: Upload, feature: str) -> FeatureColors:
        """One projection for all timesteps of a picture."""
        return self.cache.get(
            ("colors", shown.name, upload.key, feature),
            lambda: FeatureColors.fit(self.sweep(shown, upload, feature).features[feature]),
        )

    def ratios(self, shown: Checkpoint, upload: Upload, feature: str) -> list[float]:
        """HFR of a picture at every timestep, with the settings of the data set's curve if there is one."""

        def compute() -> list[float]:
            sweep = self.sweep(shown, upload, feature)
            asked = shown.curve.options if shown.curve else {}
            options = {name: asked[name] for name in ("cutoff", "dims", "spectrum", "remove_mean") if name in asked}
            return high_frequency_ratio(sweep.features[feature], sweep.grid_size, **options).tolist()

        return self.cache.get(("ratios", shown.name, upload.key, feature), compute)

    def confidences(self, shown: Checkpoint, upload: Upload) -> dict[str, list[float]] | None:
        """Probabilities over t of the classes that are likeliest somewhere, at most five; of masks, one mean.

        `None` if there is no head, or it reads several timesteps.
        """
        if not shown.has_head or len(shown.model.timesteps) > 1 or not shown.can_walk:
            return None
        return self.cache.get(("head", shown.name, upload.key), lambda: self._confidences(shown, upload))

    def _confidences(self, shown: Checkpoint, upload: Upload) -> dict[str, list[float]]:
        shares = self._run("shares_over_t", shown.name, upload.picture)
        if shown.task.dense:
            return {"mean over pixels": shares[:, 0].tolist()}
        best = shares.amax(0).topk(min(5, shares.shape[1])).indices.tolist()
        return {class_name(shown.model.config, label): shares[:, label].tolist() for label in best}

    def attention(self, shown: Checkpoint, upload: Upload, timestep: int, block: int) -> torch.Tensor:
        """`attention_maps` of one block, kept."""
        return self.cache.get(
            ("attention", shown.name, upload.key, timestep, block),
            lambda: self._run("attention", shown.name, upload.picture, timestep, block),
            lambda maps: maps.nbytes,
        )

    def classes(self, shown: Checkpoint, upload: Upload) -> dict[str, float]:
        """Probabilities by class; without a head, shares of the nearest labeled pictures of the sample."""
        if not shown.has_head:
            block, kind = shown.own_feature
            rows, _ = self.neighbors(shown, upload, shown.feature(block, kind), None)
            labels = [self.gallery_label(row) for row in rows]
            return {name: labels.count(name) / len(labels) for name in dict.fromkeys(labels)}
        shares = self._logits(shown, upload)[0].softmax(-1).tolist()
        return {class_name(shown.model.config, label): share for label, share in enumerate(shares)}

    def segments(self, shown: Checkpoint, upload: Upload) -> np.ndarray:
        """The class of every pixel, `(height, width)`."""
        size = (upload.picture.height, upload.picture.width)
        logits = torch.nn.functional.interpolate(self._logits(shown, upload), size=size, mode="bilinear")
        return logits[0].argmax(0).cpu().numpy()

    def _logits(self, shown: Checkpoint, upload: Upload) -> torch.Tensor:
        return self._run("logits", shown.name, upload.picture)

    @property
    def gallery(self) -> ImageData:
        """Pictures of the sample's test split, as many of each class."""

        def read() -> ImageData:
            data = ImageData.of(load_images("sample", "test"), name="sample (test)")
            labels = np.asarray(data.labels)
            rows = [row for label in np.unique(labels) for row in np.flatnonzero(labels == label)[:GALLERY_PER_CLASS]]
            return data.subset(rows)

        return self.cache.get("gallery", read)

    def gallery_picture(self, row: int) -> Image.Image:
        picture = self.gallery.decode(row)
        assert isinstance(picture, Image.Image)
        return picture

    def gallery_label(self, row: int) -> str:
        names, labels = self.gallery.label_names, self.gallery.labels
        if names is None or labels is None:
            return ""
        return names[labels[row]]

    def neighbors(
        self, shown: Checkpoint, upload: Upload, feature: str, timestep: int | None, progress: Progress = no_progress
    ) -> tuple[list[int], list[float]]:
        """The nearest pictures of the gallery by cosine of mean tokens, less the gallery's mean.

        Args:
            timestep: `None` for the model's own.

        Returns:
            Rows of the gallery and similarities, the nearest first.
        """
        wall = self._gallery_features(shown, feature, timestep, progress)
        own = self._run("pooled", shown.name, [upload.picture], feature, timestep) - wall.mean(0)
        similarities = torch.nn.functional.cosine_similarity(wall - wall.mean(0), own)
        found = similarities.topk(NUM_NEIGHBORS)
        return found.indices.tolist(), found.values.tolist()

    def _gallery_features(
        self, shown: Checkpoint, feature: str, timestep: int | None, progress: Progress
    ) -> torch.Tensor:
        """`(pictures, width)`."""

        def compute() -> torch.Tensor:
            pictures = [self.gallery_picture(row) for row in range(len(self.gallery))]
            return self._run("pooled", shown.name, pictures, feature, timestep, progress=progress)

        return self.cache.get(("gallery", shown.name, feature, timestep), compute, lambda found: found.nbytes)


def features_together(shown: Checkpoint, feature: str) -> list[str]:
    """The features that one sweep reads: all; or those of the same kind; or this one: the most that fit."""
    config = shown.backbone.config
    everything = config.list_features()
    kind = feature.rpartition(".")[2]
    for names in (everything, [name for name in everything if name.endswith(f".{kind}")]):
        width = sum(config.feature_width(name) for name in names)
        if 4 * width * config.num_patches * len(shown.timesteps) <= MAX_SWEEP_BYTES:
            return names
    return [feature]


def sweep_bytes(sweep: PictureSweep) -> int:
    """Memory of a sweep."""
    return sweep.noisy.nbytes + sum(each.nbytes for each in sweep.features.values())


def class_name(config: Any, label: int) -> str:
    """The name of a class."""
    return str((config.id2label or {}).get(label, label))
