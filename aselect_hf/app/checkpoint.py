"""A model on show, and what is known about it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from aselect_hf.audit import Audit
from aselect_hf.conversion import load_checkpoint
from aselect_hf.conversion.locate import locate
from aselect_hf.hub.card import CardContent
from aselect_hf.hub.card_sections import facts
from aselect_hf.modeling.noisy_backbone import NoisyBackbone
from aselect_hf.pictures.sweep import even_timesteps
from aselect_hf.reporting.markdown import Markdown
from aselect_hf.selection import TimestepSelection
from aselect_hf.tasks import FEATURES, Task, task_of_model

NUM_TIMESTEPS = 40


@dataclass(frozen=True)
class Checkpoint:
    """A model on show.

    Args:
        name: shown to users: `sample`, the Hub id or the folder's name.
        model: with or without a head, in evaluation mode.
        audit: of its timestep, if it was saved beside it.
        license: that the card beside it names; empty if none.
    """

    name: str
    model: Any
    audit: Audit | None = None
    license: str = ""

    @property
    def backbone(self) -> NoisyBackbone:
        return self.model.base_model

    @property
    def task(self) -> Task:
        return task_of_model(self.model)

    @property
    def has_head(self) -> bool:
        return self.task is not FEATURES

    @property
    def can_walk(self) -> bool:
        """Whether it runs at more than one timestep."""
        return not self.backbone.config.fixed_timestep

    @property
    def timesteps(self) -> list[int]:
        """The timesteps that a user can walk over, at equal distances from 0."""
        return even_timesteps(self.backbone.noise_schedule.num_train_timesteps, NUM_TIMESTEPS)

    @property
    def own_timestep(self) -> int:
        """The timestep in `timesteps` that is closest to the model's own."""
        return min(self.timesteps, key=lambda t: abs(t - self.backbone.default_timestep))

    @property
    def own_feature(self) -> tuple[int, str]:
        """Block and kind of the model's own feature."""
        feature = self.backbone.config.resolve_feature(str(self.backbone.config.feature))
        return feature.block, feature.kind

    @property
    def curve(self) -> TimestepSelection | None:
        """The curve of HFR over a data set that the config carries; `None` if another rule chose, or none."""
        selection = TimestepSelection.from_config(self.backbone.config)
        return selection if selection is not None and selection.raw_scores is not None else None

    def feature(self, block: int, kind: str) -> str:
        """The name of a feature.

        Raises:
            ValueError: this network has no such block or kind.
        """
        name = str(self.backbone.config.resolve_feature(f"blocks.{block}.{kind}"))
        if name not in self.backbone.config.list_features():
            raise ValueError(f"block {block} of this network has no {kind}: choose another kind or block")
        return name

    def facts(self) -> str:
        """What a model card says at its top, as Markdown: timestep, noise level, feature, rule, license, audit."""
        config = self.model.config
        content = CardContent(config, self.name, type(self.model).__name__, self.model.num_parameters())
        found = dict(facts(content))
        if self.license:
            found.setdefault("license", self.license)
        if self.audit is not None:
            found["audit"] = f"{self.audit.verdict}: {self.audit.sentence}"
        rows = [Markdown("| {} | {} |").format(*each) for each in found.items()]
        return str(Markdown("\n").join([Markdown("| fact | value |\n|---|---|"), *rows]))


def load_shown(source: str, device: str = "cpu") -> Checkpoint:
    """Load any checkpoint with its head, and the audit in its folder.

    Args:
        source: folder, Hub id, or `sample`.
        device: where it runs.

    Raises:
        ValueError: it cannot be loaded, or takes no pictures.
    """
    model = load_checkpoint(source, keep_head=True)
    if not model.config.takes_pictures:
        raise ValueError(f"{source} takes {model.config.image_channels} channels, not pictures: it cannot be shown")
    place = locate(source, with_vae=False)
    saved = place.path / "audit.json"
    audit = Audit.load(saved) if saved.is_file() else None
    name = Path(source).name if Path(source).exists() else source
    return Checkpoint(name, model.to(torch.device(device)).eval(), audit, str(place.card.get("license") or ""))
