"""What the training scripts minimize: the loss of one or many heads, and the denoising loss of the same runs."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from aselect_hf.modeling.feature_reader import FeatureReader
from aselect_hf.selection.timestep_gate import ANNEALED_AT, TimestepGate, Visits, gate_temperature
from aselect_hf.tasks import task_of_model
from aselect_hf.training.draws import SampleDraws
from aselect_hf.training.latents import clean_latents, mirrored, some_mirrored

HeadModel = FeatureReader
"""A model with the head of a task."""

SETTLED = ANNEALED_AT
"""A gate that has cooled visits only its favorite timestep, so heads train on what inference will see."""


@dataclass(frozen=True)
class HeadSetting:
    """How one head of a bank is optimized."""

    learning_rate: float
    weight_decay: float


class TaskObjective(nn.Module):
    """Task loss of a bank of heads on the features of one backbone pass, plus a weighted denoising loss.

    A backbone that trains sees a fresh sample of its VAE's posterior in every step. A frozen one sees the mean, as in
    inference.

    The noise is the stored evaluation noise, as in inference. With a denoising loss, noise is drawn for every image and
    the task reads its features from the same runs.

    A loss is a mean over all images of an optimizer step, or over all of its pixels that are not ignored. The gradient
    therefore does not depend on how images are divided among forward passes and processes, except through batch norm
    and dropout.

    Args:
        model: backbone and head; every head of the bank starts as a copy of its head.
        settings: one per head. All heads see the same features; validation chooses.
        gate: chooses a timestep while it trains (default: the model's own timestep is used).
        num_visited: timesteps that every image visits per step while the gate explores.
        denoising_loss_weight: lambda of `L = L_task + lambda * L_denoise`; with 0 a run stops at the feature.
        random_flip: mirror half of the images (and their masks).

    Raises:
        ValueError: the model reads several timesteps, a frozen backbone has a denoising loss, or a gate has batch norm.
    """

    def __init__(
        self,
        model: HeadModel,
        settings: Sequence[HeadSetting],
        *,
        gate: TimestepGate | None = None,
        num_visited: int = 2,
        denoising_loss_weight: float = 0.0,
        random_flip: bool = False,
    ) -> None:
        super().__init__()
        if model.config.head_timesteps:
            raise ValueError(f"training uses one timestep, but config.head_timesteps is {model.config.head_timesteps}")
        self.task = task_of_model(model)
        self.ignore_index = model.config.semantic_loss_ignore_index
        self.features = model.features
        self.dit = model.base_model
        self.heads = nn.ModuleList(copy.deepcopy(getattr(model, self.task.head)) for _ in settings)
        self.settings = list(settings)
        self.gate = gate
        self.num_visited = num_visited
        self.denoising_loss_weight = denoising_loss_weight
        self.random_flip = random_flip
        self.progress = 0.0
        self._observed: list[tuple[torch.Tensor, torch.Tensor, Visits]] = []
        if gate is not None and model.config.head_norm == "batch_norm":
            raise ValueError(
                "a gate needs head_norm=layer_norm or none, got batch_norm: batch statistics would mix timesteps"
            )
        if denoising_loss_weight:
            if not self.backbone_trains:
                raise ValueError("denoising_loss_weight must be 0 with a frozen backbone: it has nothing to train")
            if not self.dit.config.is_whole:
                raise ValueError("denoising_loss_weight must be 0 for a network without its last blocks")
            self.dit.requires_grad_(True)  # the prediction depends on blocks that the feature does not
            if self.dit.vae is not None:
                self.dit.vae.requires_grad_(False)

    @property
    def backbone_trains(self) -> bool:
        return any(parameter.requires_grad for parameter in self.dit.parameters())

    @property
    def pools(self) -> bool:
        """Whether the heads see nothing but the mean of the tokens."""
        return not self.task.dense and self.dit.config.pooling == "mean"

    @property
    def timestep(self) -> int:
        """The timestep that inference would use now."""
        return self.gate.timestep if self.gate is not None else self.dit.default_timestep

    def set_progress(self, progress: float) -> None:
        """Set the share of training that is done: the gate cools, then settles."""
        self.progress = progress

    def parameter_groups(self, learning_rate: float, weight_decay: float, gate_learning_rate: float) -> list[dict]:
        """AdamW groups: each head with its own setting, the backbone with the run's, the gate without decay."""
        groups = [
            {"params": list(head.parameters()), "lr": setting.learning_rate, "weight_decay": setting.weight_decay}
            for head, setting in zip(self.heads, self.settings, strict=True)
        ]
        if backbone := [parameter for parameter in self.dit.parameters() if parameter.requires_grad]:
            groups.append({"params": backbone, "lr": learning_rate, "weight_decay": weight_decay})
        if self.gate is not None:
            groups.append({"params": list(self.gate.parameters()), "lr": gate_learning_rate, "weight_decay": 0.0})
        return groups

    def train(self, mode: bool = True) -> TaskObjective:
        super().train(mode)
        if self.dit.vae is not None:
            self.dit.vae.eval()
        if not self.backbone_trains:
            self.dit.eval()
        return self

    def count_items(self, batch: dict[str, Any]) -> torch.Tensor:
        """`(2,)`: the images of a batch, and the items of its task loss: images, or pixels that are not ignored."""
        labels = batch["labels"]
        images = torch.tensor(len(labels), device=labels.device)
        return torch.stack([images, (labels != self.ignore_index).sum() if self.task.dense else images])

    def end_step(self) -> None:
        """After an optimizer step, show the gate what all forward passes of the step saw.

        Until then its running means stay unchanged, so that all passes draw visits in the same way.
        """
        if self.gate is None or not self._observed:
            return
        pooled, losses, visits = zip(*self._observed, strict=True)
        indices = torch.cat([each.indices for each in visits])
        self.gate.observe(torch.cat(pooled), torch.cat(losses, dim=1), replace(visits[0], indices=indices))
        self._observed.clear()

    def forward(
        self, batch: dict[str, Any], draws: SampleDraws | None = None, counts: torch.Tensor | None = None
    ) -> Any:
        """Losses of a training batch or, without `draws`, every head's logits for an evaluation batch.

        Args:
            batch: `latents` (with what else `cached_inputs` returns), `pixel_values`, or a frozen backbone's `tokens`
                (and `flipped_tokens`) `(batch, tokens, features, width)`; and `labels`: `(batch,)` classes or
                `(batch, height, width)` masks.
            counts: `count_items`, averaged over all forward passes of the optimizer step on all processes (default:
                those of this batch). The mean loss of these passes is then the loss of the step.

        Returns:
            `{"loss", "task_loss"}`, with a denoising loss also `"denoising_loss"`; or logits
            `(heads, batch, classes, ...)` at the timestep that inference would use.
        """
        if draws is None:
            tokens = batch["tokens"] if "tokens" in batch else self.read_features(batch)
            return torch.stack([self._logits(head, tokens) for head in self.heads])
        counts = self.count_items(batch) if counts is None else counts
        if "tokens" in batch:
            flip, labels = self._flips(batch, draws)
            return self._losses(some_mirrored(batch, "tokens", flip)[:, None], labels, counts)
        flip, labels = self._flips(batch, draws)
        latents = clean_latents(self.dit, batch, draws, flip, sampled=self.backbone_trains)
        visits: Visits | None = None
        timesteps = self._constant(latents)
        if self.gate is not None:
            uniforms = draws.uniform(len(self.gate.timesteps) + 1).to(latents.device)
            if self.progress < SETTLED:
                visits = self.gate.visit(uniforms, self.num_visited, gate_temperature(self.progress))
            else:
                visits = self.gate.settle(len(latents))
            timesteps = self.gate.timesteps[visits.indices]
        noise = None
        if self.denoising_loss_weight:
            noise = draws.normal(timesteps.shape[1], *latents.shape[1:]).to(latents)
        tokens, denoising_loss = self._read(latents, timesteps, noise)
        if self.pools:
            tokens = tokens.mean(dim=2, keepdim=True)
        return self._losses(tokens, labels, counts, visits, denoising_loss)

    def read_features(self, batch: dict[str, Any], flipped: bool = False) -> torch.Tensor:
        """Features `(batch, tokens, features, width)` of an evaluation batch, at the timestep of inference."""
        name = "latents" if "latents" in batch else "pixel_values"
        inputs = mirrored(batch, name) if flipped else batch[name]
        latents = self.dit.prepare_latents(**{name: inputs}).float()
        return self._read(latents, self._constant(latents), None)[0][:, 0].float()

    def _losses(
        self,
        tokens: torch.Tensor,
        labels: torch.Tensor,
        counts: torch.Tensor,
        visits: Visits | None = None,
        denoising_loss: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Losses of `forward`, from tokens `(batch, visited, tokens, features, width)`."""
        visited = tokens.shape[1]
        repeated = labels.repeat_interleave(visited, dim=0)
        images, items = counts
        share = len(labels) / images  # relative to the average forward pass
        per_image = (images / items).nan_to_num(posinf=0.0)  # every pixel of the step may be ignored
        losses = per_image * torch.stack(
            [self._image_losses(self._logits(head, tokens.flatten(0, 1)), repeated) for head in self.heads]
        )
        if self.gate is None or visits is None:
            task_loss = share * losses.mean()
        else:
            losses = losses.unflatten(1, (-1, visited))
            task_loss = share * self.gate.expected_losses(losses, visits).mean()
            self._observed.append((tokens.detach().mean(dim=2).flatten(2), losses.detach(), visits))
        found = {"loss": task_loss, "task_loss": task_loss.detach()}
        if denoising_loss is not None:
            denoising_loss = share * denoising_loss
            found["loss"] = task_loss + self.denoising_loss_weight * denoising_loss
            found["denoising_loss"] = denoising_loss.detach()
        return found

    def _flips(self, batch: dict[str, Any], draws: SampleDraws) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Which images to mirror, about half of them, and the labels that then fit."""
        labels = batch["labels"]
        if not self.random_flip:
            return None, labels
        flip = (draws.uniform() < 0.5).to(labels.device)
        if self.task.dense:
            labels = torch.where(flip[:, None, None], labels.flip(-1), labels)
        return flip, labels

    def _constant(self, latents: torch.Tensor) -> torch.Tensor:
        return torch.full((len(latents), 1), self.timestep, device=latents.device)

    def _read(
        self, latents: torch.Tensor, timesteps: torch.Tensor, noise: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Features of every image at its timesteps, all in one run of the blocks.

        Args:
            latents: `(batch, channels, height, width)`, clean.
            timesteps: `(batch, visited)`.
            noise: `(batch, visited, channels, height, width)`; `None` averages over the stored draws.

        Returns:
            `(batch, visited, tokens, features, width)`, and with `noise` the denoising loss.
        """
        count, visited = timesteps.shape
        draws = self.dit.stored_noise(latents)[:, :, None] if noise is None else noise[None]
        num_draws = len(draws)
        clean = latents[None, :, None].expand(num_draws, -1, visited, -1, -1, -1)
        noise = draws.expand_as(clean).flatten(0, 2)
        steps = timesteps[None].expand(num_draws, -1, -1).flatten()
        noisy = self.dit.noise_schedule.add_noise(clean.flatten(0, 2), noise, steps)
        denoising_loss = None
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.backbone_trains):
            if self.training and self.denoising_loss_weight:
                prediction, found = self.dit.denoise_with_features(noisy, steps, self.features)
                target = self.dit.noise_schedule.training_target(clean.flatten(0, 2), noise, steps)
                denoising_loss = F.mse_loss(prediction.float(), target)
            else:
                found = self.dit.features_of_noisy(noisy, steps, self.features)
        tokens = torch.stack([found[name] for name in self.features], dim=2).unflatten(0, (num_draws, count, visited))
        return tokens.mean(dim=0), denoising_loss

    def _logits(self, head: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        """Logits in full precision: differences between images may be small beside a feature's mean."""
        with torch.autocast(tokens.device.type, enabled=False):
            tokens = tokens.float()
            return head(tokens, self.dit.config.grid_size) if self.task.dense else head(tokens)

    def _image_losses(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of every image; for masks, the sum over its pixels that are not ignored."""
        if not self.task.dense:
            return F.cross_entropy(logits, labels, reduction="none")
        logits = F.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=False)
        return F.cross_entropy(logits, labels, ignore_index=self.ignore_index, reduction="none").sum(dim=(1, 2))
