"""The options of the rules for help, tables and argument dataclasses, read from signatures and docstrings."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Collection, Sequence
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from aselect_hf.selection.rule import Rule
from aselect_hf.selection.rules import RULES

ARGUMENTS = re.compile(r"^Args:\n((?:(?:    .*)?\n)*)", re.MULTILINE)
ENTRY = re.compile(r"^    (\w+): (.*(?:\n {5,}.*)*)", re.MULTILINE)


def option_sentences(rule: Rule) -> dict[str, str]:
    """What each option of a rule does, in one sentence, from the `Args:` of its function.

    Raises:
        ValueError: an option is not described there.
    """
    section = ARGUMENTS.search((inspect.getdoc(rule.select) or "") + "\n")
    described = dict(ENTRY.findall(section[1])) if section else {}
    if missing := [name for name in rule.options if name not in described]:
        raise ValueError(f"rule {rule.name!r} does not describe its option {missing[0]} under 'Args:'")
    return {name: " ".join(described[name].split()) for name in rule.options}


def option_help() -> dict[str, str]:
    """What each option does, after the names of the rules that have it: `"hfr: Cycles per token above which ..."`."""
    owners: dict[str, dict[str, list[str]]] = {}
    for rule in RULES.values():
        for option, sentence in option_sentences(rule).items():
            owners.setdefault(option, {}).setdefault(sentence, []).append(rule.name)
    return {
        option: " ".join(f"{', '.join(names)}: {sentence}" for sentence, names in sentences.items())
        for option, sentences in owners.items()
    }


def rule_option_fields(without: Collection[str] = ()) -> list[tuple[str, Any, Any]]:
    """Fields for `dataclasses.make_dataclass`, one per option of any rule: name, type, and default `None` with help.

    Args:
        without: options to leave out.
    """
    types = {
        option: _argument_type(get_type_hints(rule.select)[option]) | None
        for rule in RULES.values()
        for option in rule.options
    }
    return [
        (option, types[option], dataclasses.field(default=None, metadata={"help": help}))
        for option, help in option_help().items()
        if option not in without
    ]


def _argument_type(hint: Any) -> Any:
    """The type of a command-line argument: `int` of `int | None`, `str` of a `Literal`, `list[str]` of a sequence."""
    if get_origin(hint) is Literal:
        return type(get_args(hint)[0])
    if get_origin(hint) is Sequence:
        return list[get_args(hint)[0]]  # type: ignore[misc]
    if NoneType in get_args(hint):
        (hint,) = set(get_args(hint)) - {NoneType}
        return _argument_type(hint)
    return hint
