"""The report of a finished run: figures with their protocol, costs, and the files that a push reads."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from aselect_hf.conversion import save_model
from aselect_hf.cost import feature_flops
from aselect_hf.data.image_data import ImageData
from aselect_hf.files import atomic_files, write_json
from aselect_hf.hub.redaction import without_secrets
from aselect_hf.hub.results import EvaluationResult
from aselect_hf.hub.upload import prepare_folder
from aselect_hf.selection import SelectionCost, TimestepSelection
from aselect_hf.selection.picture import plot_selection
from aselect_hf.selection.timestep_gate import gate_temperature
from aselect_hf.training import pictures
from aselect_hf.training.arguments import TrainingArguments, public_arguments
from aselect_hf.training.evaluation import NUM_SCORED_CLASSES
from aselect_hf.training.objective import SETTLED, HeadSetting, TaskObjective
from aselect_hf.training.run_facts import RunFacts
from aselect_hf.versions import hardware, installed_versions

BACKWARD = 2  # a backward pass costs about twice the forward pass


@dataclass
class RunReport:
    """One finished run.

    Args:
        selection: how the timestep was chosen, with its cost.
        hfr: HFR of the same candidates, shown beside a gate's weights; its cost is not counted.
        setting: of the head that validation chose among `num_heads`.
        validation, test: its metrics by name; `test` is `None` without a test split.
        record: of the training: `steps`, `seconds`, `history`.
        training_cost: of the training.
    """

    facts: RunFacts
    selection: TimestepSelection
    hfr: TimestepSelection | None
    setting: HeadSetting
    num_heads: int
    validation: dict[str, float]
    test: dict[str, float] | None
    record: dict[str, Any]
    training_cost: SelectionCost

    @property
    def main_metric(self) -> str:
        """The metric that chose the head and that the card reports."""
        return self.facts.task.metric

    def summary(self) -> str:
        """Timestep and main metric in one line."""
        scores = [("validation", self.validation), *([("test", self.test)] if self.test else [])]
        figures = ", ".join(f"{split} {self.main_metric} {values[self.main_metric]:.4f}" for split, values in scores)
        return f"t = {self.selection.timestep} by {self.selection.method}: {figures}"

    def protocol(self) -> dict[str, str]:
        """How the figures were measured, item by item."""
        facts = self.facts
        backbone = "fully trained"
        if facts.model_args.freeze_backbone:
            backbone = "frozen"
        elif facts.model_args.lora_rank:
            backbone = f"LoRA of rank {facts.model_args.lora_rank}"
        chosen = f", chosen among {self.num_heads} on validation" if self.num_heads > 1 else ""
        return {
            "images": facts.data.describe().removeprefix("images: "),
            "backbone": f"{backbone}, {self.selection.feature} at t = {self.selection.timestep} "
            f"by {self.selection.method}",
            "head": f"learning rate {self.setting.learning_rate:g}, weight decay {self.setting.weight_decay:g}{chosen}",
            "training": f"{self.record['steps']:,} steps of {facts.batch_size} images, "
            f"mixed precision {facts.mixed_precision}, seed {facts.args.seed}",
            "test split": "scored once" if self.test else "none",
            **self._scored_classes(),
            "hardware": hardware(facts.device),
            "versions": ", ".join(f"{name} {number}" for name, number in installed_versions().items()),
        }

    def _scored_classes(self) -> dict[str, str]:
        """How many classes the mean is over, if not all."""
        count = len(self.facts.data.label_names)
        scored = (self.test or self.validation).get(NUM_SCORED_CLASSES, count)
        if scored == count:
            return {}
        return {"classes": f"mean over {scored:.0f} of {count}; the others neither occur nor are predicted"}

    def results(self) -> list[EvaluationResult]:
        """The figure for the card: of the test split or, if absent, of validation."""
        split, values = ("test", self.test) if self.test else ("validation", self.validation)
        return [
            EvaluationResult(
                dataset=self.facts.data_args.public_name,
                metric=self.main_metric,
                value=values[self.main_metric],
                task=self.facts.task.pipeline,
                split=split,
                protocol="; ".join(f"{name}: {text}" for name, text in self.protocol().items()),
            )
        ]

    def content(self) -> dict[str, Any]:
        content = {
            "task": self.facts.task.pipeline,
            "strategy": self.selection.method,
            "timestep": self.selection.timestep,
            "feature": self.selection.feature,
            "classes": self.facts.data.label_names,
            "validation": self.validation,
            "test": self.test,
            "head": asdict(self.setting) | {"chosen_among": self.num_heads},
            "cost": {"selection": asdict(self.selection.cost), "training": asdict(self.training_cost)},
            "protocol": self.protocol(),
            "results": [asdict(result) for result in self.results()],
        }
        return without_secrets(content)

    def write(self, output_dir: Path) -> None:
        """Write model, report and pictures; every file is complete or absent."""
        facts, model = self.facts, self.facts.model
        groups = (facts.model_args, facts.data_args, facts.args)
        values = public_arguments(*groups)
        defaults = public_arguments(*(type(group)() for group in groups))
        given = {name: value for name, value in values.items() if value is not None}
        changed = {name: value for name, value in values.items() if value != defaults[name]}
        self.selection.apply(model)
        with atomic_files(output_dir) as folder:
            save_model(model.cpu().eval(), folder)
            self.selection.save(folder / "selection.json")
            if self.selection.scores:
                plot_selection(self.selection, folder / "selection.png", beside=self.hfr)
            pictures.plot_history(self.record["history"], self.main_metric, folder / "history.png")
            for name, content in (
                ("results.json", self.content()),
                ("training.json", {"arguments": changed} | self.record),
                ("training_args.json", given),
            ):
                write_json(folder / name, content)
            if facts.args.push_examples is not False:
                pictures.save_widget_examples(model, facts.data.validation, facts.data_args.public_name, folder)
            prepare_folder(folder, facts.args.repo_id, dataset=None, license=None).card.save(folder / "README.md")


def training_cost(objective: TaskObjective, record: dict[str, Any], images: int) -> SelectionCost:
    """Network runs, seconds and operations of a training in which `images` were seen, counting repetitions.

    If the backbone trains, its backward passes cost twice as much as its forward passes.
    """
    visited = 1.0
    if objective.gate is not None:
        visited = SETTLED * objective.num_visited + 1 - SETTLED
    if not objective.denoising_loss_weight:
        visited *= objective.dit.config.num_noise_draws
    passes = round(images * visited)
    features = ["blocks.-1.hidden"] if objective.denoising_loss_weight else objective.features
    flops = feature_flops(objective.dit, *features) * (1 + BACKWARD * objective.backbone_trains)
    return SelectionCost(passes, record["seconds"], passes * flops)


def gate_selection(
    objective: TaskObjective, data: ImageData, cost: SelectionCost, images: int, args: TrainingArguments
) -> TimestepSelection:
    """The gate's choice, with its weights as scores. Its cost is that of all passes beyond one per image seen."""
    gate = objective.gate
    assert gate is not None
    weights = gate.named_weights(gate_temperature(1.0))
    extra = max(0, cost.forward_passes - images)
    share = extra / cost.forward_passes
    return TimestepSelection(
        method="gate",
        feature=str(objective.dit.config.feature),
        timestep=gate.timestep,
        timesteps=list(weights),
        scores=list(weights.values()),
        standard_errors=[0.0] * len(weights),
        cost=SelectionCost(extra, share * cost.seconds, share * cost.flops),
        schedule=objective.dit.noise_schedule.to_dict(),
        score_name="gate weight",
        options={
            "num_visited_timesteps": objective.num_visited,
            "denoising_loss_weight": objective.denoising_loss_weight,
        },
        num_images=len(data),
        seed=args.seed,
    )
