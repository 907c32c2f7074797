"""One run of a task script: choose a timestep, train, choose a head, report, write, push.

Protocol. The timestep is chosen on training (and, for grid search, validation) images; the head, of all that trained
side by side, on validation images; the test split, where there is one, is scored once, at the end, by that head alone.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType, set_seed
from torch.utils.data import DataLoader

from aselect_hf.conversion import load_model
from aselect_hf.cost import weight_bytes
from aselect_hf.files import atomic_file, check_writable
from aselect_hf.modeling.modeling_aselect_dit_heads import (
    ASelectDiTForImageClassification,
    ASelectDiTForSemanticSegmentation,
)
from aselect_hf.selection import NUM_GATE_TIMESTEPS, TimestepSelection, gate_timesteps, select_timestep
from aselect_hf.selection.timestep_gate import TimestepGate
from aselect_hf.training.arguments import TaskDataArguments, TaskModelArguments, TrainingArguments
from aselect_hf.training.evaluation import HeadEvaluation
from aselect_hf.training.frozen_features import keep_features
from aselect_hf.training.loop import Trainer, effective_batch
from aselect_hf.training.lora import add_lora, merge_lora
from aselect_hf.training.objective import HeadModel, HeadSetting, TaskObjective, put_head
from aselect_hf.training.output_dir import hold_output_dir
from aselect_hf.training.pictures import log_figure, predictions_figure
from aselect_hf.training.processes import this_process
from aselect_hf.training.publish import push_output
from aselect_hf.training.report import RunReport, gate_selection, training_cost
from aselect_hf.training.task_data import TaskDataset, encode_once, load_task_data, stream_collate

HEAD_RATES = (3.0, 10.0, 30.0, 100.0, 300.0)
HEAD_DECAYS = (0.0, 0.1)
"""Default bank on a frozen backbone: these multiples of `learning_rate`, each with these weight decays."""

SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)


class TaskRun:
    """Everything of one run; `run` leaves in `output_dir` a model that loads and pushes, and its report.

    Args:
        segmentation: masks, or else class labels.

    Raises:
        ValueError: arguments are wrong or contradict each other.
    """

    def __init__(
        self,
        segmentation: bool,
        model_args: TaskModelArguments,
        data_args: TaskDataArguments,
        args: TrainingArguments,
    ) -> None:
        if not model_args.model_name_or_path or not args.output_dir:
            raise ValueError("give --model_name_or_path and --output_dir")
        self.segmentation, self.model_args, self.data_args, self.args = segmentation, model_args, data_args, args
        self.output_dir = Path(args.output_dir)
        check_writable(self.output_dir / "config.json")
        self.state = this_process()
        set_seed(args.seed)
        with self.state.main_process_first():
            self.data = load_task_data(data_args, segmentation, args.seed)
            self.model = self._build_model().to(self.state.device)
        self.scores: list[dict[str, float]] = []
        self.feature_dir, self.kept = self.output_dir / ".features", 0

    def run(self) -> RunReport | None:
        """Train and write; `None` if a signal interrupted the training, whose checkpoint then waits.

        Raises:
            ValueError: another run works in `output_dir`, or it has no room for the final model.
        """
        with hold_output_dir(self.output_dir, weight_bytes(self.model)) as give_back_room:
            try:
                return self._run(give_back_room)
            finally:
                if self.state.is_main_process:
                    shutil.rmtree(self.feature_dir, ignore_errors=True)

    def _run(self, give_back_room: Callable[[], None]) -> RunReport | None:
        self.state.print(f"{self.model_args.model_name_or_path}: {self.data.describe()}")
        selection, hfr = None, None
        if self.model_args.timestep_selection != "gate":
            selection = self._choose_timestep()
            selection.apply(self.model)
            self.state.print(f"timestep: {selection.describe()}")
        objective = self._build_objective()
        trainer = self._build_trainer(objective)
        record = trainer.train()
        if record["interrupted"]:
            trainer.finish()
            return None
        if not self.scores:  # resumed after its last step
            self._validate(trainer, record["steps"])
        best = self._best_head
        test = None
        if self.data.test is not None:
            evaluation = self._evaluation(trainer, self.data.test)
            test = evaluation.run(trainer.objective, "test")[best]
        objective = self._whole(trainer, objective)
        batch_size = effective_batch(self.args, trainer.accelerator)
        images = record["steps"] * batch_size
        cost = training_cost(objective, record, images)
        if objective.gate is not None:
            selection = gate_selection(objective, self.data.train, cost, images, self.args)
            if self.state.is_main_process:
                hfr = self._select("hfr", selection.timesteps)
                self.state.print(f"HFR among the same timesteps would choose t = {hfr.timestep}")
        assert selection is not None
        put_head(self.model, objective.heads[best])
        merge_lora(self.model)
        report = RunReport(
            self, selection, hfr, objective.settings[best], len(self.scores), self.scores[best], test, record, cost,
            batch_size, trainer.accelerator.mixed_precision,
        )  # fmt: skip
        give_back_room()
        if self.state.is_main_process:
            report.write(self.output_dir)
            push_output(self.args)
        trainer.finish()
        self.state.print(f"{report.summary()}; saved to {self.output_dir}")
        return report

    def _build_model(self) -> HeadModel:
        """A backbone's checkpoint gets a new head, a task model keeps its own where the classes agree."""
        args, names = self.model_args, self.data.label_names
        overrides: dict[str, Any] = {
            "id2label": dict(enumerate(names)),
            "label2id": {x: i for i, x in enumerate(names)},
        }
        for name in ("feature", "pooling", "head_norm", "segmentation_head"):
            if (value := getattr(args, name)) is not None:
                overrides[name] = value
        model_class: Any = ASelectDiTForImageClassification
        if self.segmentation:
            model_class = ASelectDiTForSemanticSegmentation
        model = load_model(args.model_name_or_path or "", model_class, new_head=True, dtype=torch.float32, **overrides)
        model.set_attn_implementation(args.attn_implementation)
        return model

    @property
    def _selection_file(self) -> Path:
        return self.output_dir / "selection.json"

    def _choose_timestep(self) -> TimestepSelection:
        """By any method but the gate, before training; a resumed run keeps what it had chosen."""
        args, data = self.model_args, self.data
        method = args.timestep_selection
        options: dict[str, Any] = {}
        if method == "fixed":
            options = {"timestep": args.timestep}
        elif method == "grid":
            if data.stream is not None:
                raise ValueError("timestep_selection=grid needs every image: it cannot run with --streaming")
            options = {"validation": data.validation, "task": "segmentation" if self.segmentation else "classification"}
        if self.state.is_main_process and not (self.args.resume_from_checkpoint and self._selection_file.is_file()):
            self._select(method, args.candidates, **options).save(self._selection_file)
        self.state.wait_for_everyone()
        return TimestepSelection.load(self._selection_file)

    def _select(self, method: str, timesteps: int | list[int] | None, **options: Any) -> TimestepSelection:
        return select_timestep(
            self.model.base_model, self.data.train, method=method, timesteps=timesteps, seed=self.args.seed,
            num_images=self.model_args.num_selection_images, batch_size=self.args.per_device_eval_batch_size, **options,
        )  # fmt: skip

    def _build_objective(self) -> TaskObjective:
        """Freeze or prepare the backbone; make the bank of heads and the gate."""
        model, model_args, args = self.model, self.model_args, self.args
        frozen = model_args.freeze_backbone
        if frozen:
            model.freeze_backbone()
        elif model_args.lora_rank:
            add_lora(model, model_args.lora_rank)
        rates = model_args.head_learning_rates or [args.learning_rate * x for x in (HEAD_RATES if frozen else (1.0,))]
        decays = model_args.head_weight_decays or (list(HEAD_DECAYS) if frozen else [args.weight_decay])
        settings = [HeadSetting(rate, decay) for rate, decay in itertools.product(rates, decays)]
        if not frozen and len(settings) > 1:
            raise ValueError("several head_learning_rates or head_weight_decays need --freeze_backbone")
        gate = None
        if model_args.timestep_selection == "gate":
            schedule, candidates = model.base_model.noise_schedule, model_args.candidates
            if not isinstance(candidates, list):
                candidates = gate_timesteps(schedule, candidates or NUM_GATE_TIMESTEPS)
            width = sum(map(model.config.feature_width, model.features))
            log_snr = [schedule.log_snr(t) for t in candidates]
            gate = TimestepGate(width, candidates, log_snr, num_heads=len(settings))
        weight = args.denoising_loss_weight
        return TaskObjective(
            model,
            settings,
            gate=gate,
            num_visited=model_args.num_visited_timesteps,
            denoising_loss_weight=(0.0 if frozen else 1.0) if weight is None else weight,
            random_flip=self.data_args.random_flip,
        ).to(self.state.device)

    def _build_trainer(self, objective: TaskObjective) -> Trainer:
        """The trainer, with the validation that it calls."""
        config, data, args = self.model.config, self.data, self.args
        dataset: Any = data.stream
        if data.stream is not None:
            collate = stream_collate(config, self.data_args, self.segmentation, data)
        else:
            dataset = self._dataset(data.train, self.data_args.random_flip)
            collate = dataset.collate
        trainer = Trainer(
            objective,
            dataset,
            collate,
            args,
            num_workers=self.data_args.dataloader_num_workers,
            parameter_groups=objective.parameter_groups(
                args.learning_rate, args.weight_decay, self.model_args.gate_learning_rate
            ),
            evaluate=lambda step: self._validate(trainer, step),
        )
        if data.stream is None:
            self._keep_features(trainer, dataset)
        self.evaluation = self._evaluation(trainer, data.validation)
        return trainer

    def _validate(self, trainer: Trainer, step: int) -> dict[str, Any]:
        """Score every head and return the best one's metrics."""
        self.scores = self.evaluation.run(trainer.objective, "validation")
        objective: TaskObjective = trainer.accelerator.unwrap_model(trainer.objective)
        sharded = trainer.accelerator.distributed_type in SHARDED
        if step == trainer.max_steps and self.state.is_main_process and not sharded:
            figure = predictions_figure(objective, self.evaluation.dataset, self.data.label_names, self._best_head)
            log_figure(trainer.accelerator, "predictions", figure, step)
            with atomic_file(self.output_dir / "predictions.png") as temporary:
                figure.savefig(temporary, dpi=110)
        return self.scores[self._best_head] | {"timestep": objective.timestep}

    @property
    def _best_head(self) -> int:
        return max(range(len(self.scores)), key=lambda head: self.scores[head][self.evaluation.main_metric])

    def _dataset(self, data: Any, random_flip: bool, whole_masks: bool = False) -> TaskDataset:
        batch_size = self.args.per_device_eval_batch_size
        latents = encode_once(self.model.base_model, data, self.data_args, self.segmentation, batch_size, random_flip)
        return TaskDataset(data, self.model.config, self.segmentation, latents, random_flip, whole_masks)

    def _keep_features(self, trainer: Trainer, dataset: TaskDataset) -> None:
        """Let `dataset` deliver features, where the backbone gives the same ones in every epoch."""
        accelerator = trainer.accelerator
        objective: TaskObjective = accelerator.unwrap_model(trainer.objective)
        changing = objective.backbone_trains or objective.gate is not None
        if changing or not self.data_args.cache_features or accelerator.distributed_type in SHARDED:
            return
        self.feature_dir.mkdir(exist_ok=True)
        path = self.feature_dir / f"{self.kept}.npy"
        self.kept += 1
        dataset.tokens = keep_features(
            objective, dataset, path, accelerator, self.args.per_device_eval_batch_size, dataset.random_flip
        )

    def _evaluation(self, trainer: Trainer, data: Any) -> HeadEvaluation:
        dataset = self._dataset(data, random_flip=False, whole_masks=True)
        self._keep_features(trainer, dataset)
        loader = DataLoader(
            dataset,
            batch_size=self.args.per_device_eval_batch_size,
            collate_fn=dataset.collate,
            num_workers=self.data_args.dataloader_num_workers,
        )
        ignore_index = self.model.config.semantic_loss_ignore_index
        return HeadEvaluation(trainer.accelerator, loader, self.data.label_names, self.segmentation, ignore_index)

    def _whole(self, trainer: Trainer, objective: TaskObjective) -> TaskObjective:
        """The trained objective with all its weights in this process, gathered where they were sharded."""
        if trainer.accelerator.distributed_type not in SHARDED:
            return trainer.accelerator.unwrap_model(trainer.objective)
        weights = trainer.accelerator.get_state_dict(trainer.objective)
        self.model = self._build_model()
        objective = self._build_objective()
        objective.load_state_dict(weights)
        return objective
