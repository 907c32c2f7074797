"""Massive activations: a few channels that are far larger than all others, on every token of every image.

DiTF (arXiv 2505.18584) finds them in diffusion transformers: they dominate cosines of features that are used as they
are, and correspondence suffers. Reading the features behind the adaptive norm, or discarding the channels, helps there.
Probes that standardize channels, as those of this package do, are not affected.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from aselect_hf.data.classes import UNLABELED, has_classes
from aselect_hf.data.image_data import ImageData
from aselect_hf.modeling.noisy_backbone import NoisyBackbone
from aselect_hf.selection.criteria import knn_predictions

MASSIVE = 50.0
"""Least ratio of a channel's mean magnitude to that of the median channel (ours; trained models stay below 20 in what
they pass between blocks)."""
NORMS = ("attention_norm", "mlp_norm")
BATCH, NEIGHBORS = 32, 5
UPSTREAM_IMAGES, UPSTREAM_BATCH = 8, 2
"""Few images are enough before the feature, because massive channels are massive on all tokens of all images."""
DOMINANT = 0.5
"""Least share of the mean square over channels, which is what a later norm divides by, that makes channels a cause."""


@dataclass
class MassiveChannels:
    """Channels of a feature that dwarf the others.

    Args:
        feature, timestep: what was looked at.
        channels: numbers of the channels, the largest first; empty if there are none.
        ratios: mean magnitude over that of the median channel, of each.
        norms: features of the same block behind a norm, another remedy; empty if the network has none.
        accuracies: leave-one-out accuracy in [0, 1] of the five nearest neighbors by cosine of token means, as the
            features are: of `"as it is"`, `"channels discarded"`, and features behind a norm of the same block, by
            name. `None` without labels.
    """

    feature: str
    timestep: int
    channels: list[int]
    ratios: list[float]
    norms: list[str]
    accuracies: dict[str, float] | None = None

    def sentence(self) -> str:
        """The finding with its remedies; empty if there are no such channels."""
        if not self.channels:
            return ""
        largest = ", ".join(
            f"{x} ({ratio:.0f} x the median)" for x, ratio in zip(self.channels, self.ratios, strict=True)
        )
        remedies = [f"read {norm}" for norm in self.norms]
        remedies.append(f"set config.channel_discard = {{{self.feature!r}: {self.channels}}}")
        text = (
            f"massive activations in {self.feature}: channel {largest}; little else shows in cosines and norms of the "
            f"raw values: {', or '.join(remedies)}"
        )
        if self.accuracies:
            found = ", ".join(f"{name} {100 * score:.1f} %" for name, score in self.accuracies.items())
            text += f" (nearest neighbors by cosine: {found})"
        return text


@torch.no_grad()
def find_massive_channels(
    model: NoisyBackbone,
    images: Any,
    *,
    feature: str | None = None,
    timestep: int | None = None,
    num_images: int = 64,
    seed: int = 0,
) -> MassiveChannels:
    """Find channels whose mean magnitude over images and tokens is at least 50 times that of the median channel.

    With labels of classes, the remedies are measured on the same images.

    Args:
        images: as in `select_timestep`.
        feature, timestep: what to look at (default: the model's own).
        num_images: random images to look at.

    Raises:
        ValueError: no such feature or timestep, or images that cannot be read.
    """
    name = str(model.config.resolve_feature(feature or str(model.config.feature)))
    step = model.resolve_timestep(timestep)
    data = ImageData.of(images, num_images).sample(num_images, seed)
    behind_norms = {f"{name.rpartition('.')[0]}.{kind}" for kind in NORMS} - {name}
    norms = [each for each in model.config.list_features() if each in behind_norms]
    wanted = [name, *norms]
    sums = torch.zeros(model.config.feature_width(name), dtype=torch.float64)
    pooled: dict[str, list[np.ndarray]] = {key: [] for key in wanted}
    for pixels in data.batches(model.config, BATCH):
        found = model.extract_features(pixels.to(model.device), feature=wanted, timestep=step)
        sums += found[name].double().abs().mean(dim=2).sum(dim=(0, 1)).cpu()
        for key in wanted:
            pooled[key].append(found[key][:, 0].float().mean(dim=1).cpu().numpy())
    ratios, channels = _massive(sums)
    result = MassiveChannels(name, step, channels, [float(ratios[channel]) for channel in channels], norms)
    if channels and has_classes(data.labels):
        labeled = np.flatnonzero(np.asarray(data.labels) != UNLABELED)
        rows = {key: np.concatenate(parts)[labeled] for key, parts in pooled.items()}
        rows = {"as it is": rows.pop(name), **rows}
        rows["channels discarded"] = np.delete(rows["as it is"], channels, axis=1)
        labels, neighbors = np.asarray(data.labels)[labeled], min(NEIGHBORS, len(labeled) - 1)
        result.accuracies = {
            key: float((knn_predictions(each, labels, neighbors, standardize=False) == labels).mean())
            for key, each in rows.items()
        }
    return result


@dataclass
class UpstreamChannels:
    """Massive channels of what blocks before a feature pass on.

    Args:
        feature: the feature that is read.
        blocks: the outputs with massive channels, in order of computation.
        channels: their numbers in the first of these, the largest first.
        ratio: mean magnitude of the largest over that of the median channel, the highest over `blocks`.
        share: what massive channels make up of the mean square over channels, the highest over `blocks`.
    """

    feature: str
    blocks: list[str]
    channels: list[int]
    ratio: float
    share: float

    def sentence(self) -> str:
        """The finding; empty if there are no such channels, or if they are too small to squeeze the others."""
        if not self.blocks or self.share < DOMINANT:
            return ""
        where = self.blocks[0] if len(self.blocks) == 1 else f"{self.blocks[0]} to {self.blocks[-1]}"
        channels = f"channel{'s' * (len(self.channels) > 1)} {', '.join(map(str, self.channels))}"
        return (
            f"massive activations before {self.feature}: {channels} in {where} ({self.ratio:.0f} x the median, "
            f"{self.share:.0%} of the mean square), which leave little room for all others behind every norm: "
            "read a feature of an earlier block"
        )


@torch.no_grad()
def find_upstream_channels(
    model: NoisyBackbone, images: Any, *, feature: str | None = None, timestep: int | None = None, seed: int = 0
) -> UpstreamChannels:
    """Find massive channels, as `find_massive_channels` does, in the outputs of all blocks before a feature.

    Channels that are discarded from the feature, itself the output of a block, are known and not named again.

    Args:
        images, feature, timestep: see `find_massive_channels`; 8 random images are looked at.
    """
    name = str(model.config.resolve_feature(feature or str(model.config.feature)))
    features = model.config.list_features()
    before = [each for each in features[: features.index(name)] if each.endswith(".hidden")]
    sizes, squares = ({each: torch.tensor(0.0, dtype=torch.float64) for each in before} for _ in range(2))
    data = ImageData.of(images, UPSTREAM_IMAGES).sample(UPSTREAM_IMAGES, seed)
    for pixels in data.batches(model.config, UPSTREAM_BATCH) if before else ():
        found = model.extract_features(
            pixels.to(model.device), feature=before, timestep=model.resolve_timestep(timestep)
        )
        for each, values in found.items():
            sizes[each] = sizes[each] + values.double().abs().mean(dim=2).sum(dim=(0, 1)).cpu()
            squares[each] = squares[each] + values.double().square().mean(dim=2).sum(dim=(0, 1)).cpu()
    known = (model.config.channel_discard or {}).get(name, []) if name.endswith(".hidden") else []
    result = UpstreamChannels(name, [], [], 0.0, 0.0)
    for each in before:
        ratios, channels = _massive(sizes[each])
        channels = [channel for channel in channels if channel not in known]
        if channels:
            result.blocks.append(each)
            result.channels = result.channels or channels
            result.ratio = max(result.ratio, float(ratios[channels[0]]))
            result.share = max(result.share, float(squares[each][channels].sum() / squares[each].sum()))
    return result


def _massive(sums: torch.Tensor) -> tuple[np.ndarray, list[int]]:
    """Every channel's magnitude over that of the median channel, and the massive channels, the largest first."""
    ratios = (sums / sums.median()).nan_to_num(posinf=float("inf")).numpy()
    return ratios, [int(each) for each in np.argsort(-ratios, kind="stable") if ratios[each] >= MASSIVE]
