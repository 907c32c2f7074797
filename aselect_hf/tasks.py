"""The tasks that a model can learn, with everything that differs between them.

To add a task, add one `Task` here, a head model in `modeling/`, and a metric in `training/metrics.py`. This module
imports nothing heavy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Task:
    """One task.

    Args:
        name: in Python and in saved selections.
        pipeline: transformers' name of the pipeline, also the card's `pipeline_tag`.
        auto_class: transformers' Auto class that loads a model of this task.
        head_suffix: ending of the class names of its models.
        introduction: first words of the card; `{classes}` is the number of classes.
        example, example_comment: an expression for the card's Python example, and its value; `{shape}` is that of a
            feature.
        answer: what an inference endpoint returns.
        pipeline_options: further arguments of its pipeline.
        head: attribute of its models that holds the head.
        metric: in `training/metrics.py`; it chooses among heads, and a run reports it.
        score_name: of a probe's score on this task.
        needs: what every image must have: a class label, or a mask with a class for every pixel.
        whole_image: whether the whole image is resized to a square instead of cropped to its center.
    """

    name: str
    pipeline: str
    auto_class: str
    head_suffix: str
    introduction: str
    example: str
    example_comment: str
    answer: str
    pipeline_options: str = ""
    head: str = ""
    metric: str = ""
    score_name: str = ""
    needs: Literal["labels", "masks"] | None = None
    whole_image: bool = False

    @property
    def dense(self) -> bool:
        """Whether every pixel has a class of its own."""
        return self.needs == "masks"


CLASSIFICATION = Task(
    name="classification",
    pipeline="image-classification",
    auto_class="AutoModelForImageClassification",
    head_suffix="ForImageClassification",
    introduction="An image classifier of {classes} classes on",
    example="model(**inputs).logits.softmax(-1)",
    example_comment="probability of each class",
    answer="labels and scores",
    head="classifier",
    metric="accuracy",
    score_name="validation accuracy",
    needs="labels",
)
SEGMENTATION = Task(
    name="segmentation",
    pipeline="image-segmentation",
    auto_class="AutoModelForSemanticSegmentation",
    head_suffix="ForSemanticSegmentation",
    introduction="A semantic segmenter of {classes} classes on",
    example="model(**inputs).logits",
    example_comment="(1, classes, height, width)",
    answer="one mask per class",
    head="decode_head",
    metric="mean_iou",
    score_name="validation mean IoU (tokens)",
    needs="masks",
    whole_image=True,
)
FEATURES = Task(
    name="features",
    pipeline="image-feature-extraction",
    auto_class="AutoModel",
    head_suffix="Model",
    introduction="A vision backbone:",
    example="model(**inputs).last_hidden_state",
    example_comment="({shape}): the chosen feature",
    answer="its feature vector",
    pipeline_options=", pool=True",
)
"""A backbone without a head."""

TASKS = {task.name: task for task in (CLASSIFICATION, SEGMENTATION)}
"""The tasks that a head can learn, by name."""


def find_task(name: str) -> Task:
    """The task of this name; a `ValueError` if there is none."""
    if name not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}; got {name!r}")
    return TASKS[name]


def task_of_class(name: str) -> Task:
    """The task of a model by the name of its class; `FEATURES` if it has no head."""
    return next((task for task in TASKS.values() if name.endswith(task.head_suffix)), FEATURES)


def task_of_model(model: object) -> Task:
    """The task of a model by its class or a base class."""
    tasks = [task_of_class(each.__name__) for each in type(model).__mro__]
    return next((task for task in tasks if task is not FEATURES), FEATURES)
