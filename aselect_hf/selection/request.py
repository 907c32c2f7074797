"""Checks of a request to `select_timestep`, before any work, and the rule that `"auto"` stands for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from transformers.utils import logging

from aselect_hf.data.classes import has_classes
from aselect_hf.data.image_data import NOT_GIVEN, ImageData
from aselect_hf.selection.rule import AUTO, WITH_LABELS, WITHOUT_LABELS, Rule
from aselect_hf.selection.rules import RULES
from aselect_hf.selection.samples import resolve_task
from aselect_hf.tasks import Task, find_task

logger = logging.get_logger(__name__)


def check_request(method: str, options: Iterable[str] = (), feature: str | None = None) -> None:
    """Refuse an unknown method, an option that it does not have, and `feature="auto"` if it cannot choose a feature.

    Raises:
        ValueError: the message names the rules that have the option, or that can choose a feature.
    """
    if method != AUTO and method not in RULES:
        raise ValueError(f"method {method!r} is unknown; accepted are {', '.join((AUTO, *RULES))}")
    rule = RULES[WITH_LABELS if method == AUTO else method]  # it has all options of the rule without labels
    accepted = rule.options
    for option in sorted(set(options) - set(accepted) - set(rule.aliases)):
        owners = rules_with(option)
        hint = f"; {option} is an option of {', '.join(owners)}" if owners else ""
        raise ValueError(f"method {method!r} has no option {option}; accepted are {', '.join(accepted)}{hint}")
    if feature == AUTO and method != AUTO and not rule.chooses_feature:
        choosing = [name for name, each in RULES.items() if each.chooses_feature]
        raise ValueError(
            f"feature='auto' needs labels, and scores that can be compared between features, not those of {method!r}; "
            f"give a feature by name, or one of the methods {', '.join(choosing)}"
        )


def rules_with(option: str) -> list[str]:
    """Names of the rules that have an option of this name, present or former."""
    return [name for name, rule in RULES.items() if option in rule.options or option in rule.aliases]


def automatic_method(data: ImageData) -> str:
    """The rule that `"auto"` stands for: `"logme"` with masks or labels of 2 classes, else `"consensus_rank"`."""
    return WITH_LABELS if data.masks is not None or has_classes(data.labels) else WITHOUT_LABELS


def report_unused_labels(data: ImageData, method: str) -> None:
    """Warn why the automatic rule uses no labels, unless none were given."""
    if data.masks is None and not has_classes(data.labels) and (data.labels is not None or data.no_labels != NOT_GIVEN):
        why = data.no_labels if data.labels is None else f"no 2 classes have 2 images each ({data.describe_classes()})"
        logger.warning_once(f"no labels are used, so the rule is {method}: {why}")


def task_of(rule: Rule, data: ImageData, options: Mapping[str, Any]) -> Task | None:
    """The task that a rule learns; `None` if it uses no labels."""
    parts = [RULES.get(options.get(name, rule.options[name].default)) for name in rule.parts]
    if rule.labels == "none" or (parts and all(part is None or part.labels == "none" for part in parts)):
        return None
    return find_task(rule.tasks[0]) if len(rule.tasks) == 1 else resolve_task(data, options.get("task"))
