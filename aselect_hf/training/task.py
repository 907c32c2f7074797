"""One run of a task script: choose a timestep, train, choose a head, report, write, push.

Protocol: the timestep is chosen on training images (for grid search, also on validation images), and the head on
validation images. The test split, if any, is scored once, at the end, by the chosen head only.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate.utils import set_seed
from torch.utils.data import DataLoader

from aselect_hf.cost import weight_bytes
from aselect_hf.data.image_data import ImageData
from aselect_hf.data.processes import shared_work
from aselect_hf.files import atomic_file, check_writable
from aselect_hf.selection import AUTO, RULES, TimestepSelection, select_timestep
from aselect_hf.selection.ties import best_of
from aselect_hf.tasks import Task
from aselect_hf.training.arguments import TaskDataArguments, TaskModelArguments, TrainingArguments
from aselect_hf.training.batches import effective_batch
from aselect_hf.training.build import build_model, build_objective
from aselect_hf.training.evaluation import HeadEvaluation
from aselect_hf.training.frozen_features import keep_features
from aselect_hf.training.latents import encode_once
from aselect_hf.training.loop import Trainer
from aselect_hf.training.lora import merge_lora
from aselect_hf.training.objective import TaskObjective
from aselect_hf.training.output_dir import hold_output_dir
from aselect_hf.training.pictures import log_figure, predictions_figure
from aselect_hf.training.processes import this_process
from aselect_hf.training.publish import check_push, push_output
from aselect_hf.training.report import RunReport, gate_selection, training_cost
from aselect_hf.training.run_facts import RunFacts
from aselect_hf.training.sharding import is_sharded, refuse_sharding, whole_weights
from aselect_hf.training.task_data import load_task_data
from aselect_hf.training.task_dataset import TaskDataset, stream_collate


class TaskRun:
    """One run, which leaves in `output_dir` a model that loads and pushes, and its report.

    Raises:
        ValueError: arguments are wrong or contradict each other.
    """

    def __init__(
        self, task: Task, model_args: TaskModelArguments, data_args: TaskDataArguments, args: TrainingArguments
    ) -> None:
        if not model_args.model_name_or_path or not args.output_dir:
            raise ValueError("give --model_name_or_path and --output_dir")
        self.task, self.model_args, self.data_args, self.args = task, model_args, data_args, args
        self.output_dir = Path(args.output_dir)
        self.feature_dir = self.output_dir / ".features"
        check_writable(self.output_dir / "config.json")
        self.state = this_process()
        set_seed(args.seed)
        with self.state.main_process_first():
            self.data = load_task_data(data_args, task, args.seed)
            self.model = build_model(model_args, task, self.data.label_names).to(self.state.device)
        check_push(args, self.model.config)
        self.scores: list[dict[str, float]] = []

    def run(self) -> RunReport | None:
        """Train and write the results; `None` if a signal stopped the training, which leaves a checkpoint.

        Raises:
            ValueError: another run uses `output_dir`, or it has no room for the final model.
        """
        with hold_output_dir(
            self.output_dir, weight_bytes(self.model), self.args.resume_from_checkpoint
        ) as give_back_room:
            try:
                return self._run(give_back_room)
            finally:
                if self.state.is_main_process:
                    shutil.rmtree(self.feature_dir, ignore_errors=True)

    def _run(self, give_back_room: Callable[[], None]) -> RunReport | None:
        self.state.print(f"{self.model_args.model_name_or_path}: {self.data.describe()}")
        selection = None
        if self.model_args.method != "gate":
            selection = self._choose_timestep()
            self._apply(selection)
            self.state.print(f"timestep: {selection.describe()}")
        trainer = self._build_trainer(self._build_objective())
        record = trainer.train()
        if record["interrupted"]:
            trainer.finish()
            return None
        report = self._report(trainer, record, selection)
        give_back_room()
        if self.state.is_main_process:
            report.write(self.output_dir)
            push_output(self.args)
        trainer.finish()
        self.state.print(f"{report.summary()}; saved to {self.output_dir}")
        return report

    def _apply(self, selection: TimestepSelection) -> None:
        """Let the model read the chosen feature at the chosen timestep."""
        selection.apply(self.model)
        if self.model_args.feature == AUTO:
            self.model.base_model.requires_grad_(True)
            self.model.freeze_unused()

    def _report(self, trainer: Trainer, record: dict[str, Any], selection: TimestepSelection | None) -> RunReport:
        """Choose the head, score the test split, and put the head into the model."""
        if not self.scores:  # resumed after its last step
            self._validate(trainer, record["steps"])
        best, test = self._best_head, None
        if self.data.test is not None:
            test = self._evaluation(trainer, self.data.test, "test").run(trainer.objective, "test")[best]
        objective = self._whole(trainer, selection)
        setattr(self.model, self.task.head, objective.heads[best])
        batch_size = effective_batch(self.args, trainer.accelerator)
        images = record["steps"] * batch_size
        cost, hfr = training_cost(objective, record, images), None
        if objective.gate is not None:
            selection = gate_selection(objective, self.data.train, cost, images, self.args)
            with shared_work():
                hfr = self._select("hfr", selection.timesteps)
            self.state.print(f"HFR among the same timesteps would choose t = {hfr.timestep}")
        assert selection is not None
        merge_lora(self.model)
        facts = RunFacts(
            task=self.task,
            model_args=self.model_args,
            data_args=self.data_args,
            args=self.args,
            data=self.data,
            model=self.model,
            batch_size=batch_size,
            device=self.state.device,
            mixed_precision=trainer.accelerator.mixed_precision,
        )
        setting, validation = objective.settings[best], self.scores[best]
        return RunReport(facts, selection, hfr, setting, len(self.scores), validation, test, record, cost)

    @property
    def _selection_file(self) -> Path:
        return self.output_dir / "selection.json"

    def _choose_timestep(self) -> TimestepSelection:
        """Choose by any rule but the gate, before training, all processes together. A resumed run keeps its choice."""
        args, data = self.model_args, self.data
        method, options = args.method, args.rule_options
        if args.feature == AUTO:
            options["feature"] = AUTO
        if method != AUTO and "task" in RULES[method].options:
            options["task"] = self.task.name
        if method != AUTO and RULES[method].labels == "all":
            if data.stream is not None:
                raise ValueError(f"method={method} needs every image: it cannot run with --streaming")
            options["validation"] = data.validation
        with shared_work() as here:
            kept = self.args.resume_from_checkpoint and self._selection_file.is_file()
            if not here.gather(kept)[0]:
                selection = self._select(method, args.candidates, **options)
                if here.is_main:
                    selection.save(self._selection_file)
        return TimestepSelection.load(self._selection_file)

    def _select(self, method: str, timesteps: int | list[int] | None, **options: Any) -> TimestepSelection:
        return select_timestep(
            self.model.base_model,
            self.data.train,
            method=method,
            timesteps=timesteps,
            seed=self.args.seed,
            num_images=self.model_args.num_images,
            batch_size=self.args.per_device_eval_batch_size,
            cache_dir=self.data_args.cache_dir,
            progress=self.state.is_main_process,
            **options,
        )

    def _build_objective(self) -> TaskObjective:
        return build_objective(self.model, self.model_args, self.data_args, self.args).to(self.state.device)

    def _build_trainer(self, objective: TaskObjective) -> Trainer:
        data, args = self.data, self.args
        dataset: Any = data.stream
        if data.stream is not None:
            collate = stream_collate(self.model.config, self.data_args, self.task, data)
        else:
            dataset = self._dataset(data.train, self.data_args.random_flip, sampled=objective.backbone_trains)
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
        if objective.gate is not None:
            refuse_sharding(trainer.accelerator, "method=gate")
        if data.stream is None:
            self._keep_features(trainer, dataset, "training")
        self.evaluation = self._evaluation(trainer, data.validation, "validation")
        return trainer

    def _validate(self, trainer: Trainer, step: int) -> dict[str, Any]:
        """Score every head and return the best one's metrics."""
        self.scores = self.evaluation.run(trainer.objective, "validation")
        objective: TaskObjective = trainer.accelerator.unwrap_model(trainer.objective)
        sharded = is_sharded(trainer.accelerator)
        if step == trainer.max_steps and self.state.is_main_process and not sharded:
            figure = predictions_figure(objective, self.evaluation.dataset, self.data.label_names, self._best_head)
            log_figure(trainer.accelerator, "predictions", figure, step)
            with atomic_file(self.output_dir / "predictions.png") as temporary:
                figure.savefig(temporary, dpi=110)
        return self.scores[self._best_head] | {"timestep": objective.timestep}

    @property
    def _best_head(self) -> int:
        return best_of([scores[self.task.metric] for scores in self.scores])

    def _dataset(
        self, data: ImageData, random_flip: bool = False, sampled: bool = False, whole_masks: bool = False
    ) -> TaskDataset:
        latents = encode_once(
            self.model.base_model,
            data,
            self.data_args,
            self.args.per_device_eval_batch_size,
            flipped=random_flip,
            sampled=sampled,
            whole_image=self.task.whole_image,
        )
        return TaskDataset(data, self.model.config, self.task, latents, random_flip, whole_masks)

    def _keep_features(self, trainer: Trainer, dataset: TaskDataset, split: str) -> None:
        """Let `dataset` deliver features if the backbone gives the same ones in every epoch."""
        accelerator = trainer.accelerator
        objective: TaskObjective = accelerator.unwrap_model(trainer.objective)
        changing = objective.backbone_trains or objective.gate is not None
        if changing or not self.data_args.cache_features or is_sharded(accelerator):
            return
        self.feature_dir.mkdir(exist_ok=True)
        path, batch_size = self.feature_dir / f"{split}.npy", self.args.per_device_eval_batch_size
        dataset.tokens = keep_features(objective, dataset, path, accelerator, batch_size, dataset.random_flip)

    def _evaluation(self, trainer: Trainer, data: ImageData, split: str) -> HeadEvaluation:
        dataset = self._dataset(data, whole_masks=True)
        self._keep_features(trainer, dataset, split)
        loader = DataLoader(
            dataset,
            batch_size=self.args.per_device_eval_batch_size,
            collate_fn=dataset.collate,
            num_workers=self.data_args.dataloader_num_workers,
        )
        ignore_index = self.model.config.semantic_loss_ignore_index
        return HeadEvaluation(trainer.accelerator, loader, self.data.label_names, self.task, ignore_index)

    def _whole(self, trainer: Trainer, selection: TimestepSelection | None) -> TaskObjective:
        """The trained objective with all its weights in this process, gathered if they were sharded."""
        if not is_sharded(trainer.accelerator):
            return trainer.accelerator.unwrap_model(trainer.objective)
        weights = whole_weights(trainer.accelerator, trainer.objective)
        self.model = build_model(self.model_args, self.task, self.data.label_names)
        if selection is not None:
            self._apply(selection)
        objective = build_objective(self.model, self.model_args, self.data_args, self.args)
        objective.load_state_dict(weights)
        return objective
