"""Build what a task run trains: a model with a new head, the bank of heads, and the gate."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from aselect_hf.conversion import head_class, load_model
from aselect_hf.selection import AUTO, NUM_GATE_TIMESTEPS, gate_timesteps
from aselect_hf.selection.timestep_gate import TimestepGate
from aselect_hf.tasks import Task
from aselect_hf.training.arguments import TaskDataArguments, TaskModelArguments, TrainingArguments
from aselect_hf.training.lora import add_lora
from aselect_hf.training.objective import HeadModel, HeadSetting, TaskObjective

HEAD_RATES = (3.0, 10.0, 30.0, 100.0, 300.0)
HEAD_DECAYS = (0.0, 0.1)
"""Default bank on a frozen backbone: every multiple of `learning_rate` with every weight decay."""


def build_model(args: TaskModelArguments, task: Task, label_names: list[str]) -> HeadModel:
    """Load a model. A backbone gets a new head; a model of the task keeps its head if the classes match.

    Raises:
        ValueError: the checkpoint cannot be read, or a field of the head is wrong.
    """
    overrides: dict[str, Any] = {
        "id2label": dict(enumerate(label_names)),
        "label2id": {name: index for index, name in enumerate(label_names)},
    }
    for name in ("feature", "pooling", "head_norm", "segmentation_head"):
        if (value := getattr(args, name)) not in (None, AUTO):
            overrides[name] = value
    model = load_model(args.model_name_or_path or "", head_class(task), new_head=True, dtype=torch.float32, **overrides)
    model.set_attn_implementation(args.attn_implementation)
    return model


def build_objective(
    model: HeadModel, model_args: TaskModelArguments, data_args: TaskDataArguments, args: TrainingArguments
) -> TaskObjective:
    """Freeze or prepare the backbone; make the bank of heads and the gate.

    Raises:
        ValueError: several heads on a backbone that trains, or see `TaskObjective`.
    """
    frozen = model_args.freeze_backbone
    if frozen:
        model.freeze_backbone()
    elif model_args.lora_rank:
        add_lora(model, model_args.lora_rank)
    settings = head_settings(model_args, args)
    gate = build_gate(model, model_args, len(settings)) if model_args.method == "gate" else None
    weight = args.denoising_loss_weight
    if weight is None:
        weight = 0.0 if frozen or not model.config.is_whole else 1.0
    return TaskObjective(
        model,
        settings,
        gate=gate,
        num_visited=model_args.num_visited_timesteps,
        denoising_loss_weight=weight,
        random_flip=data_args.random_flip,
    )


def head_settings(model_args: TaskModelArguments, args: TrainingArguments) -> list[HeadSetting]:
    """Every head learning rate combined with every weight decay."""
    frozen = model_args.freeze_backbone
    rates = model_args.head_learning_rates or [args.learning_rate * x for x in (HEAD_RATES if frozen else (1.0,))]
    decays = model_args.head_weight_decays or (list(HEAD_DECAYS) if frozen else [args.weight_decay])
    settings = [HeadSetting(rate, decay) for rate, decay in itertools.product(rates, decays)]
    if not frozen and len(settings) > 1:
        raise ValueError("several head_learning_rates or head_weight_decays need --freeze_backbone")
    return settings


def build_gate(model: HeadModel, args: TaskModelArguments, num_heads: int) -> TimestepGate:
    """A gate over the given candidates, or else over its default ones."""
    schedule, candidates = model.base_model.noise_schedule, args.candidates
    if not isinstance(candidates, list):
        candidates = gate_timesteps(schedule, candidates or NUM_GATE_TIMESTEPS)
    width = sum(map(model.config.feature_width, model.features))
    return TimestepGate(width, candidates, [schedule.log_snr(t) for t in candidates], num_heads=num_heads)
