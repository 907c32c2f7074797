"""Arguments of the training scripts, named as in transformers' image-classification example."""

from __future__ import annotations

import math
import os
import re
import sys
from argparse import Action, ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, make_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import HfArgumentParser

from aselect_hf.data.image_data import check_on_error
from aselect_hf.data.sources import refuse_shared_splits
from aselect_hf.files import as_path
from aselect_hf.hub.redaction import without_secrets
from aselect_hf.hub.results import is_hub_id, local_name
from aselect_hf.selection import AUTO, RULES
from aselect_hf.selection.request import check_request, rules_with
from aselect_hf.selection.rule import WITH_LABELS
from aselect_hf.selection.rule_options import rule_option_fields

NOT_IN_TRAINING = ("task", "num_epochs")
"""Options of rules that a training script decides: it has a task, and trains the gate with it."""
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

PATHS = (
    "model_name_or_path",
    "dataset_name",
    "train_dir",
    "validation_dir",
    "cache_dir",
    "output_dir",
    "resume_from_checkpoint",
)
"""Arguments that may name a file or folder."""


def _field(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


class Arguments:
    """Base of the argument dataclasses: `~` in a path is the home folder, wherever the argument comes from."""

    def __post_init__(self) -> None:
        for name in PATHS:
            if value := getattr(self, name, None):
                setattr(self, name, os.path.expanduser(value))


@dataclass
class ModelArguments(Arguments):
    model_name_or_path: str | None = _field(None, "Checkpoint to start from: a folder, a Hub id, or 'sample'.")
    attn_implementation: str = _field(
        "sdpa", "Attention: sdpa, eager (fastest for tiny models on CPU), flash_attention_2."
    )


@dataclass
class PretrainModelArguments(ModelArguments):
    preset: str | None = _field(None, "Published shape to start from scratch, such as DiT-S/2.")
    config_overrides: str | None = _field(
        None, "Config fields for a model from scratch: 'hidden_size=144,num_hidden_layers=7,patch_size=4'."
    )


@dataclass
class TaskModelArguments(RuleOptions, ModelArguments):  # type: ignore[misc]
    timestep_selection: str = _field(AUTO, f"How the timestep is chosen: {', '.join((AUTO, *RULES))}.")
    timesteps: str | None = _field(None, "Candidates '0,50,100', or how many of the strategy's default ones.")
    num_selection_images: int | None = _field(None, "Training images to look at; default: hfr 64, criteria 256 or 500.")
    num_visited_timesteps: int = _field(2, "gate: Candidates that each image visits in a step.")
    gate_learning_rate: float = _field(3e-3, "gate: Its learning rate.")
    feature: str | None = _field(None, "blocks.<i>.<kind>, or auto; default the checkpoint's own.")
    freeze_backbone: bool = _field(False, "Train heads alone, many side by side; validation chooses one.")
    lora_rank: int = _field(0, "Train low-rank adapters of this rank instead of the whole backbone; 0 for none.")
    head_learning_rates: list[float] | None = field(
        default=None,
        metadata={"help": "Learning rates of heads; default learning_rate; frozen: 3, 10, 30, 100, 300 times it."},
    )
    head_weight_decays: list[float] | None = field(
        default=None,
        metadata={"help": "Weight decays, each with every learning rate; default weight_decay; if frozen, 0 and 0.1."},
    )
    pooling: str | None = _field(None, "classify: mean or attentive pooling of the tokens.")
    segmentation_head: str | None = _field(None, "segment: linear or upernet.")
    head_norm: str | None = _field(None, "layer_norm or batch_norm before the head's linear layer.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.timestep_selection not in (AUTO, *RULES):
            raise ValueError(
                f"timestep_selection must be one of {', '.join((AUTO, *RULES))}; got {self.timestep_selection!r}"
            )
        rule = RULES[WITH_LABELS if self.timestep_selection == AUTO else self.timestep_selection]
        for name, value in self.rule_options.items():
            if name not in rule.options:
                owners = " or ".join(rules_with(name))
                raise ValueError(f"{name}={value} needs timestep_selection={owners}, got {self.timestep_selection!r}")
        check_request(self.timestep_selection, feature=self.feature)
        if self.num_visited_timesteps < 1:
            raise ValueError(f"num_visited_timesteps must be at least 1, got {self.num_visited_timesteps}")
        if self.freeze_backbone and self.lora_rank:
            raise ValueError("freeze_backbone and lora_rank exclude each other")

    @property
    def rule_options(self) -> dict[str, Any]:
        """The options of rules that were given."""
        defaults = type(self).__dataclass_fields__
        values = {name: getattr(self, name) for name in RULE_OPTIONS}
        return {name: value for name, value in values.items() if value != defaults[name].default}

    @property
    def candidates(self) -> list[int] | int | None:
        """Candidate timesteps, or their number."""
        if self.timesteps is None:
            return None
        try:
            values = [int(part) for part in str(self.timesteps).split(",")]
        except ValueError:
            raise ValueError(f"timesteps must be integers such as '0,50,100'; got {self.timesteps!r}") from None
        return values[0] if len(values) == 1 else values


@dataclass
class DataArguments(Arguments):
    dataset_name: str | None = _field(None, "Data set on the Hub, a folder of parquet files, or 'sample'.")
    dataset_config_name: str | None = _field(None, "Configuration of the data set.")
    train_dir: str | None = _field(None, "Folder of images, in place of dataset_name.")
    train_split: str = _field("train", "Split to train on.")
    image_column_name: str = _field("image", "Column with the images.")
    label_column_name: str | None = _field(None, "Column with the class labels; default: label, if there is one.")
    max_train_samples: int | None = _field(
        None, "Use a random sample of at most this many training images, of every class its share."
    )
    on_error: str = _field("stop", "At an unreadable image: 'stop', or 'skip' it; skipping reads every image first.")
    random_flip: bool = _field(True, "Flip half of the training images horizontally.")
    dataloader_num_workers: int = _field(0, "Worker processes that decode images.")

    @property
    def public_name(self) -> str:
        """The data set's id on the Hub or address, or a folder's name that cannot be taken for either."""
        source = str(self.train_dir or self.dataset_name)
        if source == "sample" or "://" in source or is_hub_id(source):
            return source
        return local_name(Path(source).resolve().name)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_on_error(self.on_error)


@dataclass
class TaskDataArguments(DataArguments):
    streaming: bool = _field(False, "Read the images as a stream, without downloading the data set first.")
    validation_dir: str | None = _field(None, "Folder of validation images.")
    validation_split: str | None = _field(None, "Split that chooses; default a part of the training images.")
    train_val_split: float = _field(0.15, "That part.")
    test_split: str | None = _field(None, "Split to report on, scored once at the end.")
    max_eval_samples: int | None = _field(None, "Use a random sample of at most this many validation images.")
    max_test_samples: int | None = _field(None, "Use a random sample of at most this many test images.")
    classes: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names of the classes in order, or how many there are; for masks also value=name, such as "
            "0=background 255=lesion. Default: those of the training images. A stream without names needs it."
        },
    )
    mask_column_name: str | None = _field(None, "segment: column with the masks; default mask, annotation or label.")
    reduce_labels: bool = _field(False, "segment: class 0 is background to be ignored, the others move down by one.")
    num_streamed_images: int = _field(1000, "streaming: images read first, to choose the timestep on.")
    shuffle_buffer_size: int = _field(
        10_000,
        "streaming: size of the buffer from which every next image is drawn at random; each worker has one.",
    )
    cache_latents: bool = _field(True, "Encode every image once, to disk; with no streaming.")
    cache_features: bool = _field(True, "With a frozen backbone and no gate, run it once an image; not with streaming.")
    cache_dir: str | None = _field(None, "Where encoded images are kept; default beside the Hub's cache.")

    def __post_init__(self) -> None:
        super().__post_init__()
        validation_split = None if self.validation_dir else self.validation_split
        refuse_shared_splits(
            {"train_split": self.train_split, "validation_split": validation_split, "test_split": self.test_split}
        )


@dataclass
class PretrainingArguments(Arguments):
    """What every training run needs. A value out of range is a `ValueError` that names its argument."""

    output_dir: str = _field("", "Folder for checkpoints and the final model.")
    per_device_train_batch_size: int = _field(64, "Images per device and forward pass.")
    gradient_accumulation_steps: int = _field(1, "Forward passes per optimizer step.")
    learning_rate: float = _field(1e-4, "Peak learning rate of AdamW.")
    weight_decay: float = _field(0.0, "Weight decay of AdamW.")
    max_grad_norm: float = _field(1.0, "Gradient clipping.")
    num_train_epochs: int = _field(10, "Passes over the training data.")
    max_train_steps: int | None = _field(None, "Optimizer steps; overrides num_train_epochs. A stream needs it.")
    lr_scheduler_type: str = _field("cosine", f"One of {', '.join(LR_SCHEDULERS)}.")
    num_warmup_steps: int = _field(0, "Steps of linear warm-up.")
    mixed_precision: str | None = _field(None, "no, fp16 or bf16; default what accelerate was configured with.")
    ema_decay: float = _field(0.0, "Decay of the weight average that is saved; 0 saves the weights themselves.")
    condition_dropout: float = _field(0.1, "Share of class labels replaced by the null class in training.")
    seed: int = _field(0, "Seed of initialization, order, flips, timesteps and noise.")
    num_processes: int | None = _field(
        None, "Refuse to run with fewer processes; default what the launcher was asked for."
    )
    logging_steps: int = _field(50, "Steps between log lines.")
    checkpointing_steps: str | None = _field(
        None, "Steps between checkpoints, or 'epoch'; default: only the final model."
    )
    checkpoints_total_limit: int = _field(2, "Checkpoints to keep.")
    resume_from_checkpoint: str | None = _field(
        None, "A checkpoint folder, or 'latest': the newest whole one in output_dir, else from the beginning."
    )
    report_to: str | None = _field(None, "Trackers, by comma: tensorboard, trackio, wandb, ...; or 'all' installed.")
    with_tracking: bool = _field(False, "Report to all installed trackers where report_to names none.")
    push_to_hub: bool = _field(False, "Push the final model to the Hub.")
    hub_model_id: str | None = _field(None, "Repository on the Hub: user/name.")
    hub_private_repo: bool = _field(False, "Make a new repository private.")
    hub_token: str | None = field(
        default=None, repr=False, metadata={"help": "Token for the Hub; default: the one you logged in with."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.checkpointing_steps, int):
            self.checkpointing_steps = str(self.checkpointing_steps)
        if self.with_tracking and not self.report_to:
            self.report_to = "all"
        for name in (
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "num_train_epochs",
            "max_train_steps",
            "num_processes",
            "logging_steps",
            "checkpoints_total_limit",
        ):
            self._check(name, lambda value: value >= 1, "at least 1")
        for name in ("learning_rate", "max_grad_norm"):
            self._check(name, lambda value: 0 < value < math.inf, "greater than 0")
        for name in ("weight_decay", "num_warmup_steps", "seed"):
            self._check(name, lambda value: 0 <= value < math.inf, "at least 0")
        self._check("ema_decay", lambda value: 0 <= value < 1, "in [0, 1)")
        self._check("condition_dropout", lambda value: 0 <= value <= 1, "in [0, 1]")
        self._check("lr_scheduler_type", LR_SCHEDULERS.__contains__, f"one of {', '.join(LR_SCHEDULERS)}")
        self._check("mixed_precision", ("no", "fp16", "bf16").__contains__, "no, fp16 or bf16")
        self._check(
            "checkpointing_steps",
            lambda value: value == "epoch" or (value.isdecimal() and int(value) >= 1),
            "a number of steps or 'epoch'",
        )
        self._check("hub_model_id", _is_repo_id, "'name' or 'user/name', of letters, digits, '-', '_' and '.'")

    def _check(self, name: str, accepted: Callable[[Any], bool], expected: str) -> None:
        """An optional value that is not given is fine."""
        value = getattr(self, name)
        if value is not None and not accepted(value):
            raise ValueError(f"{name} must be {expected}; got {value!r}")

    @property
    def repo_id(self) -> str:
        """Where the model goes on the Hub: `hub_model_id`, or the name of `output_dir` as far as it can be one."""
        name = re.sub(r"[^A-Za-z0-9]+", "-", Path(self.output_dir).resolve().name).strip("-")
        return self.hub_model_id or name[:MAX_REPO_NAME] or "model"

    def public(self) -> dict[str, Any]:
        """`public_arguments` of these."""
        return public_arguments(self)


@dataclass
class TrainingArguments(PretrainingArguments):
    """Pretraining's arguments, and those of training for a task."""

    per_device_eval_batch_size: int = _field(64, "Images per device in evaluation.")
    eval_steps: int | None = _field(None, "Steps between evaluations; default: at the end of every epoch.")
    denoising_loss_weight: float | None = _field(
        None, "Weight of the denoising loss beside the task's; default 0 with a frozen backbone, else 1."
    )

    push_examples: bool | None = _field(
        None,
        "Push three validation images with the model's answers; default: if their data set's license permits.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("per_device_eval_batch_size", "eval_steps"):
            self._check(name, lambda value: value >= 1, "at least 1")
        self._check("denoising_loss_weight", lambda value: 0 <= value < math.inf, "at least 0")


def _is_repo_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


class _HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Defaults beside the arguments that have one, the example above them as it was written."""

    def _get_help_string(self, action: Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def public_arguments(*groups: Any) -> dict[str, Any]:
    """The values of argument dataclasses as files and trackers may hold them: without token, passwords, signatures."""
    return without_secrets({name: value for group in groups for name, value in asdict(group).items()})


def parse_arguments(
    dataclasses: Sequence[Any], description: str | None, argv: Sequence[str] | None = None
) -> tuple[Any, ...]:
    """Instances of argument dataclasses from the command line.

    A first argument that ends in .yaml, .yml or .json is a file of `name: value` lines; flags after it override it.

    Args:
        dataclasses: such as `(ModelArguments, DataArguments, TrainingArguments)`.
        description: what `--help` says first: the script's docstring with its example.
        argv: default the command line's.

    Raises:
        ValueError: the file cannot be read or names an unknown argument, or a value is out of range.
    """
    parser = HfArgumentParser(
        list(dataclasses), description=description, formatter_class=_HelpFormatter, allow_abbrev=False
    )
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0].endswith((".yaml", ".yml", ".json")):
        argv = _flags_of_file(as_path(argv[0]), dataclasses) + argv[1:]
    return parser.parse_args_into_dataclasses(argv, look_for_args_file=False)


def _flags_of_file(path: Path, dataclasses: Sequence[Any]) -> list[str]:
    """The file as flags, so that argparse reads its values just as it reads the command line's."""
    try:
        values = yaml.safe_load(path.read_bytes())  # in any Unicode encoding
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"config file {path} cannot be read ({str(error).splitlines()[0]})") from error
    types = {name: hint for kind in dataclasses for name, hint in get_type_hints(kind).items()}
    if not isinstance(values, dict):
        raise ValueError(f"config file {path} must hold 'name: value' lines")
    for name in values:
        if name not in types:
            hint = "".join(f"; did you mean {close}?" for close in get_close_matches(str(name), types, 1))
            raise ValueError(f"config file {path}: unknown argument {name!r}{hint}")
    flags = []
    for name, value in values.items():
        if isinstance(value, bool) and types[name] is not bool:
            value = "yes" if value else "no"  # YAML reads `mixed_precision: no` as false
        if isinstance(value, list):
            flags += [f"--{name}", *map(str, value)]
        elif value is not None:
            flags.append(f"--{name}={value}")
    return flags
