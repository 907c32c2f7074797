"""The content of a model card and its metadata; `card_sections.py` renders the text."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from huggingface_hub import ModelCardData
from typing_extensions import TypedDict

from aselect_hf.audit import Audit
from aselect_hf.compare.table import Comparison
from aselect_hf.conversion.licenses import License
from aselect_hf.files import check_types
from aselect_hf.hub.card_merge import SAMPLE_PICTURES
from aselect_hf.hub.examples import Example
from aselect_hf.hub.licenses import inherited_license
from aselect_hf.hub.redaction import publishable
from aselect_hf.hub.results import EvaluationResult, is_hub_id, results_of
from aselect_hf.modeling.configuration_noisy_backbone import NoisyBackboneConfig
from aselect_hf.modeling.noise_schedule import NoiseSchedule
from aselect_hf.selection import TimestepSelection
from aselect_hf.tasks import FEATURES, Task, task_of_class

logger = logging.getLogger(__name__)

TAGS = ["diffusion-transformer", "timestep-selection"]
WIDGET = [
    {"src": f"{SAMPLE_PICTURES}/{name}.jpg", "example_title": name.capitalize()}
    for name in ("tiger", "teapot", "palace")
]
LOCAL_ARGUMENTS = ("output_dir", "train_dir", "validation_dir", "resume_from_checkpoint", "cache_dir")


class TrainingRecord(TypedDict, total=False):
    """The fields of a training record that a card reads."""

    arguments: dict[str, Any]
    steps: int
    seconds: float
    history: list[dict[str, float]]


@dataclass
class CardContent:
    """The content of a card.

    Args:
        architecture: class name of the model, which decides its task.
        num_parameters: of the whole model, including its VAE.
        selection: how the timestep was chosen (default: `config.selection`).
        results: figures of this checkpoint.
        comparison: of rules; its row for this checkpoint's timestep is added to `results` if `dataset` is given.
        dataset: Hub id of the data set of the comparison.
        training: record of a training run: `{"arguments": {...}, "steps": ..., "seconds": ..., "history": [...]}`.
        license: claimed by the author (default: that of the base model).
        files: names of the files beside the card, to which a license link may point.
        examples: pictures beside the card with the model's answers, for the page on the Hub.
        space: whether a Space of the same id shows the model.

    Raises:
        ValueError: the license is less restrictive than the base model's, the selection or audit is of another timestep
            or feature than the config's, or the base model is not a Hub id.
    """

    config: NoisyBackboneConfig
    repo_id: str
    architecture: str
    num_parameters: int
    selection: TimestepSelection | None = None
    results: list[EvaluationResult] = field(default_factory=list)
    comparison: Comparison | None = None
    dataset: str | None = None
    training: dict[str, Any] | None = None
    audit: Audit | None = None
    license: License | None = None
    files: Collection[str] = ()
    examples: list[Example] = field(default_factory=list)
    space: bool = False

    def __post_init__(self) -> None:
        config = self.config
        self.selection, self.comparison, self.dataset, self.audit = publishable(
            (self.selection, self.comparison, self.dataset, self.audit)
        )
        self.results = [result.public() for result in self.results]
        if self.training is not None:
            _check("training", self.training, TrainingRecord)
            self.training = publishable_training(self.training)
        if config.base_model and not is_hub_id(config.base_model):
            raise ValueError(f"config.base_model must be the id of a model on the Hub, got {config.base_model!r}")
        self.license = inherited_license(config.base_model_license, self.license)
        if self.selection is None:
            if selection := TimestepSelection.from_config(config):
                _check("config.selection", asdict(selection), TimestepSelection)
            self.selection = publishable(selection)
        elif (self.selection.timestep, self.selection.feature) != (config.timestep, config.feature):
            raise ValueError(
                f"selection chose t = {self.selection.timestep} of {self.selection.feature}, but the config has "
                f"t = {config.timestep} of {config.feature}: call selection.apply(model) first"
            )
        if self.audit is not None:
            audited = self.audit.picked
            if (audited.timestep, audited.feature) != (config.timestep, config.feature):
                raise ValueError(
                    f"audit is of t = {audited.timestep} of {audited.feature}, but the config has t = "
                    f"{config.timestep} of {config.feature}: audit the latter with `aselect audit --selection`"
                )
        if self.comparison is not None:
            if self.dataset is None:
                logger.warning(
                    "the comparison is in the card but not in its metadata: give its dataset to add it there"
                )
            self.results = [*self.results, *results_of(self.comparison, config, self.dataset)]

    @property
    def name(self) -> str:
        return self.repo_id.rpartition("/")[2]

    @property
    def task(self) -> Task:
        return task_of_class(self.architecture)

    @property
    def has_processor(self) -> bool:
        return self.config.takes_pictures

    @property
    def timestep(self) -> int:
        """The chosen timestep, or the default one."""
        return self.config.timestep if self.config.timestep is not None else self.schedule.num_train_timesteps // 10

    @property
    def inputs_of_head(self) -> tuple[list[str], list[int]]:
        """Features and timesteps that the model reads."""
        names, timesteps = [str(self.config.feature)], [self.timestep]
        if self.task is not FEATURES:
            names = getattr(self.config, "head_features", None) or names
            timesteps = getattr(self.config, "head_timesteps", None) or timesteps
        return names, timesteps

    @cached_property
    def license_details(self) -> dict[str, str]:
        """Name and link of a license that the Hub calls `other`, without links to missing files."""
        if self.license != "other":
            return {}
        name, link = self.config.base_model_license_name, self.config.base_model_license_link
        if link and "://" not in link and link.removeprefix("./") not in self.files:
            logger.warning("the base model's license file %s is not beside the model: its link is omitted", link)
            link = None
        return {key: text for key, text in (("license_name", name), ("license_link", link)) if text}

    @property
    def schedule(self) -> NoiseSchedule:
        return NoiseSchedule.from_dict(self.config.noise_schedule or {})

    def metadata(self) -> ModelCardData:
        """The metadata that the Hub reads."""
        published = [result for result in self.results if result.on_hub]
        trained_on = (self.training or {}).get("arguments", {}).get("dataset_name") or ""
        trained_on = trained_on if "/" in trained_on else ""  # a bare name may be what is left of a folder's path
        candidates = [trained_on, self.dataset, *(result.dataset for result in self.results)]
        optional: dict[str, Any] = {
            "license": self.license,
            **self.license_details,
            "base_model": self.config.base_model,
            "base_model_relation": "finetune" if self.config.base_model else None,
            "datasets": sorted({name for name in candidates if name and is_hub_id(name)}),
            "metrics": sorted({result.metric for result in published}),
            "eval_results": [result.to_eval_result() for result in published],
            "widget": self.examples or (WIDGET if self.has_processor else None),
        }
        return ModelCardData(
            library_name="transformers",
            pipeline_tag=self.task.pipeline,
            tags=[*TAGS, self.config.model_type],
            model_name=self.name if published else None,
            **{name: value for name, value in optional.items() if value},
        )


def _check(name: str, content: Any, kind: Any) -> None:
    try:
        check_types(content, kind)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def publishable_training(record: dict[str, Any]) -> dict[str, Any]:
    """A training record without local paths and secrets."""
    arguments = {name: value for name, value in record.get("arguments", {}).items() if name not in LOCAL_ARGUMENTS}
    return publishable(record | {"arguments": arguments})
