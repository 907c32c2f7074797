"""The learnable gate: weights over candidate timesteps, trained together with a linear head on the frozen backbone.

In each step every image visits a few candidates, with the noise of inference. Features are layer-normalized and
classified, and the cross-entropy, weighted by the gate, trains both head and gate. See `TimestepGate`; the recipe is
ours.
"""

from __future__ import annotations

import time

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from aselect_hf.cost import sweep_flops
from aselect_hf.modeling.noisy_backbone import NoisyBackbone
from aselect_hf.selection.inputs import SelectionInputs
from aselect_hf.selection.result import SelectionCost, TimestepSelection
from aselect_hf.selection.rule import rule
from aselect_hf.selection.samples import check_truth
from aselect_hf.selection.timestep_gate import TimestepGate, gate_temperature
from aselect_hf.tasks import CLASSIFICATION

IMAGES_PER_STEP = 32
LEAST_IMAGES = 4000
"""Images to train on by default, counting repeats: 125 steps."""


@rule(
    "gate",
    labels="all",
    explanation="Trains weights over the timesteps together with a linear classifier on all labeled images, "
    "and takes the timestep with the highest weight.",
    num_images=None,
    even_in_log_snr=True,
    tasks=(CLASSIFICATION.name,),
    aliases={"num_visited": "num_visited_timesteps", "learning_rate": "gate_learning_rate"},
)
def select_gate(
    inputs: SelectionInputs,
    *,
    num_visited_timesteps: int = 2,
    num_epochs: int | None = None,
    gate_learning_rate: float = 0.01,
) -> TimestepSelection:
    """Train the gate and take the timestep with the highest weight.

    Scores are the final weights, which are practically one-hot. They come from one training, so their standard errors
    are 0.

    Args:
        num_visited_timesteps: Candidates that each image visits in a step, at least 2 (default: 2).
        num_epochs: Passes over the images (default: as many as it takes to see 4,000 images).
        gate_learning_rate: Learning rate of AdamW for head and gate (default: 0.01).

    Raises:
        ValueError: no labels, a single class, fewer than 2 visits or more than there are candidates.
    """
    started = time.perf_counter()
    model, images = inputs.model, inputs.images
    check_truth(images, CLASSIFICATION, "gate trains a classifier and needs")
    classes, labels = np.unique(np.asarray(images.labels), return_inverse=True)
    if len(classes) < 2:
        raise ValueError(f"gate trains a classifier and needs images of at least 2 classes; {images.name} has one")
    if num_visited_timesteps < 2:
        raise ValueError(
            f"num_visited_timesteps must be at least 2, got {num_visited_timesteps}: a single visit compares nothing"
        )
    if num_epochs is None:
        num_epochs = -(-LEAST_IMAGES // len(images))
    if num_epochs < 1:
        raise ValueError(f"num_epochs must be at least 1, got {num_epochs}")
    gate = _train(inputs, labels, num_visited_timesteps, num_epochs, gate_learning_rate)
    weights = gate.named_weights(gate_temperature(1.0))
    seen = num_epochs * len(images)
    passes = seen * num_visited_timesteps * model.config.num_noise_draws
    return TimestepSelection(
        method="gate",
        feature=inputs.feature,
        timestep=gate.timestep,
        timesteps=inputs.timesteps,
        scores=list(weights.values()),
        standard_errors=[0.0] * len(weights),
        cost=SelectionCost(
            forward_passes=passes,
            seconds=time.perf_counter() - started,
            flops=sweep_flops(model, seen, passes, inputs.feature),
        ),
        schedule=model.noise_schedule.to_dict(),
        score_name="gate weight",
        options={
            "num_visited_timesteps": num_visited_timesteps,
            "num_epochs": num_epochs,
            "gate_learning_rate": gate_learning_rate,
        },
        num_images=len(images),
        seed=inputs.seed,
    )


@torch.inference_mode(False)  # `select_timestep` turns gradients off for the rules that do not train
def _train(
    inputs: SelectionInputs, labels: np.ndarray, num_visited: int, num_epochs: int, learning_rate: float
) -> TimestepGate:
    """Train the gate beside a head for `labels` `(images,)`, classes numbered from 0."""
    model, count, seen = inputs.model, len(inputs.images), 0
    gate, head = _build(inputs, int(labels.max()) + 1)
    gate.inclusion_probabilities(num_visited)  # refuses a bad number early
    optimizer = torch.optim.AdamW([*gate.parameters(), *head.parameters()], lr=learning_rate)
    generator = torch.Generator().manual_seed(inputs.seed)
    with tqdm(total=num_epochs * count, desc="gate", unit="image", disable=not inputs.progress) as bar:
        for _ in range(num_epochs):
            order = torch.randperm(count, generator=generator)
            batches = inputs.images.subset(order.tolist()).batches(model.config, IMAGES_PER_STEP)
            for rows, pixel_values in zip(order.split(IMAGES_PER_STEP), batches, strict=True):
                uniforms = torch.rand(len(rows), len(inputs.timesteps) + 1, generator=generator).to(model.device)
                visits = gate.visit(uniforms, num_visited, gate_temperature(seen / (num_epochs * count)))
                pooled = _pooled(inputs, pixel_values, gate.timesteps[visits.indices])  # (batch, visited, width)
                inputs.check_finite(pooled)
                normed = nn.functional.layer_norm(pooled, pooled.shape[-1:])
                targets = torch.from_numpy(labels[rows.numpy()]).to(model.device)[:, None].expand(-1, num_visited)
                losses = nn.functional.cross_entropy(head(normed).movedim(2, 1), targets, reduction="none")[None]
                loss = gate.expected_losses(losses, visits).sum()
                gate.observe(normed, losses, visits)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                seen += len(rows)
                bar.update(len(rows))
    return gate


def _build(inputs: SelectionInputs, num_classes: int) -> tuple[TimestepGate, nn.Linear]:
    """Gate and head, initialized from the seed without touching the caller's random state."""
    model, width = inputs.model, inputs.model.config.feature_width(inputs.feature)
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(inputs.seed)
        log_snr = [model.noise_schedule.log_snr(t) for t in inputs.timesteps]
        gate, head = TimestepGate(width, inputs.timesteps, log_snr), nn.Linear(width, num_classes)
        nn.init.zeros_(head.weight)
    return gate.to(model.device), head.to(model.device)


@torch.no_grad()
def _pooled(inputs: SelectionInputs, pixel_values: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """Token means `(batch, visits, width)` float32 of each image at its own `timesteps` `(batch, visits)`."""
    model: NoisyBackbone = inputs.model
    batch, visits = timesteps.shape
    latents = model.prepare_latents(pixel_values.to(model.device)).float()
    draws = model.stored_noise(latents).float().expand(-1, batch, -1, -1, -1)
    clean, steps = latents.repeat_interleave(visits, dim=0), timesteps.flatten()
    total = torch.zeros(batch * visits, model.config.feature_width(inputs.feature), device=model.device)
    for noise in draws:
        noisy = model.noise_schedule.add_noise(clean, noise.repeat_interleave(visits, dim=0), steps)
        parts = zip(noisy.split(inputs.fixed_batch_size), steps.split(inputs.fixed_batch_size), strict=True)
        runs = [
            model.features_of_noisy(part, part_steps, [inputs.feature])[inputs.feature] for part, part_steps in parts
        ]
        total += torch.cat(runs).float().mean(dim=1)
    return (total / len(draws)).unflatten(0, (batch, visits))
