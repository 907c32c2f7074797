"""Arguments of the training scripts, named as in transformers' image-classification example."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, fields, make_dataclass
from pathlib import Path
from typing import Annotated, Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from aselect_hf.data.image_data import check_on_error
from aselect_hf.data.sources import refuse_shared_splits
from aselect_hf.hub.redaction import without_secrets
from aselect_hf.hub.results import is_hub_id, local_name
from aselect_hf.selection import AUTO, RULES
from aselect_hf.selection.candidates import read_candidates
from aselect_hf.selection.request import check_request, rules_with
from aselect_hf.selection.rule import WITH_LABELS
from aselect_hf.selection.rule_options import rule_option_fields
from aselect_hf.training.parsing import Accepted, Arguments, LocalPath, argument, one_of

NOT_IN_TRAINING = ("task", "num_epochs")
"""Rule options that a training script sets itself: it knows its task, and trains the gate for its own epochs."""
RuleOptions: Any = make_dataclass("RuleOptions", rule_option_fields(without=NOT_IN_TRAINING))
RULE_OPTIONS = [field.name for field in fields(RuleOptions)]
LR_SCHEDULERS = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
)
MAX_REPO_NAME = 80


def _is_repo_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _is_number_or_epoch(value: str) -> bool:
    return value == "epoch" or (value.isdecimal() and int(value) >= 1)


Count = Annotated[int, Accepted(lambda value: value >= 1, "at least 1")]
WholeNumber = Annotated[int, Accepted(lambda value: value >= 0, "at least 0")]
Positive = Annotated[float, Accepted(lambda value: 0 < value < math.inf, "greater than 0")]
NotNegative = Annotated[float, Accepted(lambda value: 0 <= value < math.inf, "at least 0")]
Decay = Annotated[float, Accepted(lambda value: 0 <= value < 1, "in [0, 1)")]
Share = Annotated[float, Accepted(lambda value: 0 <= value <= 1, "in [0, 1]")]
Method = Annotated[str, one_of(AUTO, *RULES)]
LrScheduler = Annotated[str, one_of(*LR_SCHEDULERS)]
Precision = Annotated[str, Accepted(("no", "fp16", "bf16").__contains__, "no, fp16 or bf16")]
Steps = Annotated[str, Accepted(_is_number_or_epoch, "a number of steps or 'epoch'")]
RepoId = Annotated[str, Accepted(_is_repo_id, "'name' or 'user/name', of letters, digits, '-', '_' and '.'")]


@dataclass
class ModelArguments(Arguments):
    model_name_or_path: LocalPath | None = argument(None, "Checkpoint to start from: a folder, a Hub id, or 'sample'.")
    attn_implementation: str = argument("sdpa", "sdpa, eager (fastest for tiny models on CPU) or flash_attention_2.")


@dataclass
class PretrainModelArguments(ModelArguments):
    preset: str | None = argument(None, "Published shape of a model trained from scratch, such as DiT-S/2.")
    config_overrides: str | None = argument(
        None, "Config fields of a model trained from scratch: 'hidden_size=144,num_hidden_layers=7,patch_size=4'."
    )
    log_icr: Count | None = argument(
        None, "Steps between log lines with the invariant contamination ratio (ICR) of the features (default: none)."
    )


@dataclass
class TaskModelArguments(RuleOptions, ModelArguments):
    method: Method = argument(AUTO, f"Rule for the timestep: {', '.join((AUTO, *RULES))}.", ["timestep_selection"])
    timesteps: str | None = argument(None, "Candidates such as '0,50,100', or the number of default candidates.")
    num_images: int | None = argument(
        None, "Random training images for the rule (default: the rule's own number).", ["num_selection_images"]
    )
    num_visited_timesteps: Count = argument(2, "gate: Candidates that each image visits per step.")
    gate_learning_rate: float = argument(3e-3, "gate: Learning rate of the gate.")
    feature: str | None = argument(None, "blocks.<i>.<kind>, or auto (default: the checkpoint's own).")
    freeze_backbone: bool = argument(False, "Train only heads, several at once; validation chooses one.")
    lora_rank: int = argument(0, "Train low-rank adapters of this rank instead of the whole backbone (0: none).")
    head_learning_rates: list[float] | None = argument(
        None, "Learning rates of heads (default: learning_rate; if frozen, 3, 10, 30, 100 and 300 times it)."
    )
    head_weight_decays: list[float] | None = argument(
        None, "Weight decays of heads, each combined with every rate (default: weight_decay; if frozen, 0 and 0.1)."
    )
    pooling: str | None = argument(None, "classify: mean, attentive or transformer pooling of the tokens.")
    segmentation_head: str | None = argument(None, "segment: linear or upernet.")
    head_norm: str | None = argument(None, "Norm before the head's linear layer: layer_norm, batch_norm or none.")

    def __post_init__(self) -> None:
        super().__post_init__()
        rule = RULES[WITH_LABELS if self.method == AUTO else self.method]
        for name, value in self.rule_options.items():
            if name not in rule.options:
                raise ValueError(f"{name}={value} needs method={' or '.join(rules_with(name))}, got {self.method!r}")
        check_request(self.method, feature=self.feature)
        read_candidates(self.timesteps)  # refuses a mistake before any work
        if self.freeze_backbone and self.lora_rank:
            raise ValueError("freeze_backbone and lora_rank cannot be combined")

    @property
    def rule_options(self) -> dict[str, Any]:
        """Rule options that differ from their defaults."""
        defaults = type(self).__dataclass_fields__
        values = {name: getattr(self, name) for name in RULE_OPTIONS}
        return {name: value for name, value in values.items() if value != defaults[name].default}

    @property
    def candidates(self) -> list[int] | int | None:
        """Candidate timesteps, or their number."""
        return read_candidates(self.timesteps)


@dataclass
class DataArguments(Arguments):
    dataset_name: LocalPath | None = argument(None, "Data set on the Hub, a folder of parquet files, or 'sample'.")
    dataset_config_name: str | None = argument(None, "Configuration of the data set.")
    train_dir: LocalPath | None = argument(None, "Folder of images, instead of dataset_name.")
    train_split: str = argument("train", "Split to train on.")
    image_column_name: str = argument("image", "Column with the images.", ["image_column"])
    label_column_name: str | None = argument(None, "Column of class labels (default: label, if any).", ["label_column"])
    max_train_samples: int | None = argument(None, "Use at most this many training images, stratified by class.")
    on_error: str = argument("stop", "For unreadable images: 'stop', or 'skip' (reads every image first).")
    random_flip: bool = argument(True, "Flip half of the training images horizontally.")
    dataloader_num_workers: int = argument(0, "Worker processes that decode images.")
    cache_latents: bool = argument(
        True, "Encode every image once, to disk: latents, or pixels of a model without a VAE (not with streaming)."
    )
    cache_dir: LocalPath | None = argument(None, "Folder for encoded images and features (default: next to the Hub's).")

    @property
    def latents_dir(self) -> Path | None:
        """Folder of encoded images, the one that `select_timestep` uses; `None` for the default."""
        return Path(self.cache_dir) / "latents" if self.cache_dir else None

    @property
    def public_name(self) -> str:
        """The data set's Hub id or address, or the name of a folder, marked as local."""
        source = str(self.train_dir or self.dataset_name)
        if source == "sample" or "://" in source or is_hub_id(source):
            return source
        return local_name(Path(source).resolve().name)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_on_error(self.on_error)


@dataclass
class TaskDataArguments(DataArguments):
    streaming: bool = argument(False, "Read the images as a stream, without downloading the data set first.")
    validation_dir: LocalPath | None = argument(None, "Folder of validation images.")
    validation_split: str | None = argument(None, "Validation split (default: part of the training images).")
    train_val_split: float = argument(0.15, "Share of the training images to validate on by default.")
    test_split: str | None = argument(None, "Split to report on, scored once at the end.")
    max_eval_samples: int | None = argument(None, "Use a random sample of at most this many validation images.")
    max_test_samples: int | None = argument(None, "Use a random sample of at most this many test images.")
    classes: list[str] | None = argument(
        None,
        "Class names in order, or the number of classes; for masks also value=name, such as 0=background 255=lesion "
        "(default: the classes of the training images). Required for a stream without class names.",
    )
    mask_column_name: str | None = argument(None, "segment: column of masks (default: mask, annotation or label).")
    reduce_labels: bool = argument(False, "segment: ignore class 0 and shift the others down by one.")
    num_streamed_images: int = argument(1000, "streaming: images, read first, to choose the timestep on.")
    shuffle_buffer_size: int = argument(10_000, "streaming: images in the shuffle buffer of each worker.")
    cache_features: bool = argument(True, "Run a frozen backbone once per image (no gate, no streaming).")

    def __post_init__(self) -> None:
        super().__post_init__()
        validation_split = None if self.validation_dir else self.validation_split
        refuse_shared_splits(
            {"train_split": self.train_split, "validation_split": validation_split, "test_split": self.test_split}
        )


@dataclass
class PushArguments(Arguments):
    """Whether and where the final model is pushed."""

    output_dir: LocalPath = argument("", "Folder for checkpoints and the final model.")
    push_to_hub: bool = argument(False, "Push the final model to the Hub.")
    hub_model_id: RepoId | None = argument(None, "Repository on the Hub: user/name (default: the name of output_dir).")
    hub_private_repo: bool = argument(False, "Make a new repository private.")
    accept_base_license: bool = argument(
        False, "Push weights whose base model is gated, or has a non-commercial or uncommon license that you have read."
    )
    hub_token: str | None = argument(None, "Token for the Hub (default: the one you logged in with).", repr=False)

    @property
    def repo_id(self) -> str:
        """Repository on the Hub: `hub_model_id`, or a valid name made from that of `output_dir`."""
        name = re.sub(r"[^A-Za-z0-9]+", "-", Path(self.output_dir).resolve().name).strip("-")
        return self.hub_model_id or name[:MAX_REPO_NAME] or "model"

    @property
    def push_options(self) -> dict[str, Any]:
        """These arguments under the names that `push_folder` uses."""
        return {
            "repo_id": self.repo_id, "private": self.hub_private_repo or None, "token": self.hub_token,
            "accept_base_license": self.accept_base_license,
        }  # fmt: skip


@dataclass
class PretrainingArguments(PushArguments):
    """Arguments of every training run."""

    per_device_train_batch_size: Count = argument(64, "Images per device and forward pass.")
    gradient_accumulation_steps: Count = argument(1, "Forward passes per optimizer step.")
    learning_rate: Positive = argument(1e-4, "Peak learning rate of AdamW.")
    weight_decay: NotNegative = argument(0.0, "Weight decay of AdamW.")
    max_grad_norm: Positive = argument(1.0, "Norm to which gradients are clipped.")
    num_train_epochs: Count = argument(10, "Passes over the training data.")
    max_train_steps: Count | None = argument(None, "Optimizer steps; overrides num_train_epochs. Required for streams.")
    lr_scheduler_type: LrScheduler = argument("cosine", f"One of {', '.join(LR_SCHEDULERS)}.")
    num_warmup_steps: WholeNumber = argument(0, "Steps of linear warm-up.")
    mixed_precision: Precision | None = argument(None, "no, fp16 or bf16 (default: as accelerate is configured).")
    ema_decay: Decay = argument(0.0, "Decay of the weight average that is saved (0: no averaging).")
    condition_dropout: Share = argument(0.1, "Share of class labels replaced by the null class in training.")
    seed: WholeNumber = argument(0, "Seed of initialization, order, flips, timesteps and noise.")
    num_processes: Count | None = argument(None, "Minimum number of processes (default: as given to the launcher).")
    logging_steps: Count = argument(50, "Steps between log lines.")
    checkpointing_steps: Steps | None = argument(None, "Steps between checkpoints, or 'epoch' (default: none).")
    checkpoints_total_limit: Count = argument(2, "Checkpoints to keep.")
    resume_from_checkpoint: LocalPath | None = argument(
        None, "Checkpoint folder, or 'latest': the newest complete one in output_dir, if any."
    )
    report_to: str | None = argument(None, "Trackers (tensorboard, trackio, wandb, ...), separated by commas, or all.")
    with_tracking: bool = argument(False, "Report to all installed trackers if report_to names none.")

    def __post_init__(self) -> None:
        if isinstance(self.checkpointing_steps, int):
            self.checkpointing_steps = str(self.checkpointing_steps)
        super().__post_init__()
        if self.with_tracking and not self.report_to:
            self.report_to = "all"

    def public(self) -> dict[str, Any]:
        return public_arguments(self)


@dataclass
class TrainingArguments(PretrainingArguments):
    """Arguments of training for a task, in addition to those of pretraining."""

    per_device_eval_batch_size: Count = argument(64, "Images per device and evaluation batch.")
    eval_steps: Count | None = argument(None, "Steps between evaluations (default: after every epoch).")
    denoising_loss_weight: NotNegative | None = argument(
        None,
        "Weight of the denoising loss added to the task loss (default: 0 with a frozen backbone or without its "
        "last blocks, else 1).",
    )
    push_examples: bool | None = argument(
        None, "Push three validation images with the model's answers (default: if the data set's license permits it)."
    )

    @property
    def push_options(self) -> dict[str, Any]:
        return super().push_options | {"examples": self.push_examples}


def public_arguments(*groups: Any) -> dict[str, Any]:
    """Values of argument dataclasses for files and trackers, without tokens, passwords and signatures."""
    return without_secrets({name: value for group in groups for name, value in asdict(group).items()})
