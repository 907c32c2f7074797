"""Inputs from which no timestep can be told: features that are the same for all images, copies of images, one class."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np
import torch

from aselect_hf.audit.verdicts import ANY_TIMESTEP, DO_NOT_TRUST, TRUST, UNCERTAIN
from aselect_hf.data.classes import UNLABELED
from aselect_hf.data.fingerprint import tensor_bytes
from aselect_hf.data.image_data import ImageData
from aselect_hf.modeling.noisy_backbone import NoisyBackbone
from aselect_hf.selection.criteria import RESOLUTION

LOOKED_AT, BATCH = 64, 32
MOST_COPIES, MOST_CONSTANT = 0.5, 0.5
"""Shares of copied images, or of constant channels, above which a pick is not trusted, or a feature is named (ours)."""


@dataclass
class Degenerate:
    """What is wrong with the inputs of an audit.

    Args:
        dead: why the feature can tell nothing; empty if it can.
        doubts: why no verdict on these images can be `"trust"`.
        warnings: what to know, without consequence for the verdict.
    """

    dead: str = ""
    doubts: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def capped(self, verdict: str, sentence: str) -> tuple[str, str]:
        """The verdict and its sentence, no better than the inputs permit."""
        if self.dead:
            return DO_NOT_TRUST, self.dead
        if self.doubts and verdict in (ANY_TIMESTEP, TRUST):
            return UNCERTAIN, f"{'; '.join(self.doubts)}; {sentence}"
        return verdict, sentence

    def all(self) -> list[str]:
        """Everything, as warnings."""
        return [*filter(None, [self.dead]), *self.doubts, *self.warnings]


def find_degenerate(
    model: NoisyBackbone, data: ImageData, labels: np.ndarray | None, feature: str, timestep: int, seed: int
) -> Degenerate:
    """Look at the images, their labels, and the feature of at most 64 images at a timestep.

    Args:
        labels: of all images that were given, used or not; `None` without labels.
    """
    found = Degenerate()
    copies = len(data) - _num_distinct(model, data)
    if copies:
        told = f"{copies:,} of {len(data):,} images are copies of others"
        (found.doubts if copies > MOST_COPIES * len(data) else found.warnings).append(told)
    if labels is not None and len(classes := np.unique(labels[labels != UNLABELED])) == 1:
        found.doubts.append(f"all labels are of one class ({classes[0]}), so they cannot check the pick")
    rows = _pooled(model, data.sample(LOOKED_AT, seed), feature, timestep)
    constant = rows.std(axis=0) <= RESOLUTION * np.abs(rows.mean(axis=0))
    constant[list((model.config.channel_discard or {}).get(feature, []))] = False
    if constant.all():
        found.dead = f"{feature} is the same for all images at t = {timestep}: choose another feature"
    elif constant.mean() > MOST_CONSTANT:
        count = f"{constant.sum():,} of {len(constant):,} channels"
        found.warnings.append(f"{count} of {feature} are the same for all images at t = {timestep}")
    return found


def _num_distinct(model: NoisyBackbone, data: ImageData) -> int:
    """Number of images that differ from all others, as the network sees them."""
    return len(
        {hashlib.sha256(tensor_bytes(image)).digest() for batch in data.batches(model.config, BATCH) for image in batch}
    )


@torch.no_grad()
def _pooled(model: NoisyBackbone, data: ImageData, feature: str, timestep: int) -> np.ndarray:
    """Token means of a feature: `(images, width)`."""
    parts = []
    for pixels in data.batches(model.config, BATCH):
        found = model.extract_features(pixels.to(model.device), feature=feature, timestep=timestep)
        parts.append(found[feature][:, 0].double().mean(dim=1).cpu().numpy())
    return np.concatenate(parts)
