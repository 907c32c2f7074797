"""The rules that choose a timestep, and their options, read from `aselect_hf/selection/rules/*.py`.

Each rule is a function under the decorator `rule`; its options are the function's keyword-only parameters.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from aselect_cli.source import SourceOption, options_of, package_folder, parse

LABELS = {"none": "no labels", "few": "a few labels", "all": "all labels"}


@dataclass(frozen=True)
class SourceRule:
    """A rule as its source describes it; fields as in `aselect_hf.selection.rule.Rule`."""

    name: str
    labels: str
    explanation: str
    options: tuple[SourceOption, ...]


@cache
def read_rules() -> tuple[SourceRule, ...]:
    """All rules, in the order in which the registry has them."""
    files = sorted(package_folder().joinpath("selection", "rules").glob("*.py"))
    return tuple(rule for file in files for rule in _rules_in(parse("selection", "rules", file.name)))


@cache
def rule_options() -> tuple[SourceOption, ...]:
    """The options of all rules, each once; the help of an option names the rules that have it."""
    owners: dict[str, dict[str, list[str]]] = {}  # option -> help -> rules
    types: dict[str, Any] = {}
    for rule in read_rules():
        for option in rule.options:
            types.setdefault(option.name, option.type)
            owners.setdefault(option.name, {}).setdefault(option.help, []).append(rule.name)
    return tuple(
        SourceOption(name, types[name], " ".join(f"{', '.join(rules)}: {text}" for text, rules in texts.items()))
        for name, texts in owners.items()
    )


def rules_table() -> str:
    """What each rule does, as a list."""
    with_labels, without = automatic_rules()
    lines = [f"- auto (the default): {with_labels} with labels, {without} without."]
    rules = sorted(read_rules(), key=lambda rule: [*LABELS].index(rule.labels))
    lines += [f"- {rule.name} ({LABELS[rule.labels]}): {rule.explanation}" for rule in rules]
    return "\n\n".join(lines)


def automatic_rules() -> tuple[str, str]:
    """The rules that `auto` stands for, with labels and without."""
    for node in parse("selection", "rule.py").body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "(WITH_LABELS, WITHOUT_LABELS)":
            return ast.literal_eval(node.value)
    raise ValueError("selection/rule.py does not say what auto stands for")


def complete_rule() -> list[tuple[str, str]]:
    """Values of `--method` with their explanations, for the shell."""
    return [("auto", "the default rule"), *((rule.name, rule.explanation) for rule in read_rules())]


def complete_rules(incomplete: str) -> list[tuple[str, str]]:
    """Values of `--methods`, a list with commas, for the name that is being typed."""
    before, comma, _ = incomplete.rpartition(",")
    return [(before + comma + rule.name, rule.explanation) for rule in read_rules()]


def _rules_in(module: ast.Module) -> Iterator[SourceRule]:
    for node in module.body:
        if not isinstance(node, ast.FunctionDef):
            continue
        for decorator in node.decorator_list:
            if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "rule":
                described = {each.arg: each.value for each in decorator.keywords}
                yield SourceRule(
                    ast.literal_eval(decorator.args[0]),
                    ast.literal_eval(described["labels"]),
                    ast.literal_eval(described["explanation"]),
                    tuple(options_of(node.args.kwonlyargs, ast.get_docstring(node))),
                )
